"""Collectives read from programs whose traffic is known, and from the notations that compilers write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.core import sharding
from research.pods import chips, hlo, roofline

MESH = {"data": 4, "fsdp": 2}
ROWS, COLUMNS = 64, 128


def compiled(function, spec, out=None):
    mesh = sharding.mesh(MESH)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out or spec, check_vma=False)
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, sharding=NamedSharding(mesh, spec))
    return mesh, hlo.parse(jax.jit(mapped).lower(x).compile().as_text())


def summed(mesh, program):
    rows = roofline.traffic(program.collectives, mesh, chips.parse("cpu:8"))
    return {(row.kind, row.axis): (row.count, row.bytes) for row in rows}


SPLIT = PartitionSpec("data", "fsdp")
LOCAL = ROWS // 4 * COLUMNS // 2 * 4  # bytes of float32 on one device


@pytest.mark.parametrize(
    "function, out, kind, axis, size",
    [
        (lambda x: jax.lax.psum(x, "data"), None, "all-reduce", "data", LOCAL),
        (lambda x: jax.lax.psum(x, ("data", "fsdp")), None, "all-reduce", "data+fsdp", LOCAL),
        (
            lambda x: jax.lax.all_gather(x, "fsdp", axis=1, tiled=True),
            PartitionSpec("data"),
            "all-gather",
            "fsdp",
            2 * LOCAL,
        ),
        (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), None, "reduce-scatter", "data", LOCAL),
        (
            lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]),
            None,
            "collective-permute",
            "data",
            LOCAL,
        ),
        (lambda x: jax.lax.psum(x, "data", axis_index_groups=[[0, 1], [2, 3]]), None, "all-reduce", "data/2", LOCAL),
    ],
)
def test_one_collective(function, out, kind, axis, size):
    assert summed(*compiled(function, SPLIT, out)) == {(kind, axis): (1, size)}


def test_loops_multiply():
    def inner(x, _):
        return 0.1 * jax.lax.psum(x, "fsdp"), None

    def outer(x, _):
        x, _ = jax.lax.scan(inner, x, None, length=3)
        return 0.1 * jax.lax.psum(x, "data"), None

    found = summed(*compiled(lambda x: jax.lax.scan(outer, x, None, length=5)[0], SPLIT))
    assert found == {("all-reduce", "fsdp"): (15, 15 * LOCAL), ("all-reduce", "data"): (5, 5 * LOCAL)}


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    def function(x):
        return jax.lax.while_loop(lambda x: jnp.max(x) < 1e3, lambda x: jax.lax.psum(x, "data"), x)

    mesh, program = compiled(function, SPLIT)
    assert summed(mesh, program)["all-reduce", "data"] == (1, LOCAL)
    assert program.unknown_loops == 1


def test_moved_bytes_of_a_copy():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    program = hlo.parse(jax.jit(lambda x: x * 2 + 1).lower(x).compile().as_text())
    assert program.bytes == 2 * 256 * 256 * 4


# As the TPU compiler writes them: lengths of loops only in their conditions, asynchronous pairs, on-chip arrays.
TPU = """\
HloModule jit_f, is_scheduled=true

%cond (p: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%fused (q: f32[8,128]) -> f32[8,128] {
  ROOT %q.1 = f32[8,128]{1,0:T(8,128)} add(%q, %q), backend_config={"estimated_cycles":"1000000"}
}

%all-reduce-scatter (r: f32[8,128]) -> f32[2,128] {
  %sum = f32[8,128]{1,0:T(8,128)} all-reduce(%r), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[2,128]{1,0:T(8,128)} dynamic-slice(%sum, %at)
}

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %f = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/jvp(V)/b_3/attn/add"}, backend_config={"estimated_cycles":"100"}
  %s = f32[2,128]{1,0:T(8,128)} fusion(%f), kind=kCustom, calls=%all-reduce-scatter
  %g = (f32[2,128]{1,0}, f32[8,128]{1,0}) all-gather-start(%s), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %h = f32[8,128]{1,0:T(8,128)} all-gather-done(%g)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %w = (s32[], f32[8,128]{1,0:T(8,128)}) while(%a), condition=%cond, body=%body
  %m = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %n = f32[8,128]{1,0} collective-permute-done(%m)
  ROOT %o = f32[8,128]{1,0} fusion(%n), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"5"}
}
"""  # noqa: E501


def test_the_tpu_compilers_text():
    program = hlo.parse(TPU)
    found = {one.kind: (one.count, one.bytes) for one in program.collectives}
    whole = 8 * 128 * 4
    assert found == {"reduce-scatter": (7, whole), "all-gather": (7, whole), "collective-permute": (1, whole)}
    assert program.places == {"jvp(V)/b_*/attn": 700, "other": 5}
    assert program.cycles == 7 * 100 + 5  # what a fusion holds is in the fusion's own estimate
    assert program.unknown_loops == 0


def test_transfers_between_slices():
    send = (
        "  %s = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%x, %t), channel_id=3, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    program = hlo.parse(f"ENTRY %main (x: f32[8,128]) -> f32[8,128] {{\n{send}\n}}\n")
    assert program.collectives == [hlo.Collective("all-reduce", 4096.0, None, 1, "all-reduce.1_0", True)]
    topology = chips.parse("v5e:2x4*2")
    mesh = sharding.mesh({"data": 8})
    (row,) = roofline.traffic(program.collectives, mesh, topology)
    assert (row.axis, row.network) == ("slices", True)
    assert row.seconds == pytest.approx(4096 * 8 / 25e9)  # eight chips share a host; of two slices each sends once


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2,'z'=1] {'x','y'}", [[0, 1, 2, 3]]),
        ("replica_groups={}", None),
    ],
)
def test_notations_of_groups(text, groups):
    line = f"  %r = f32[4]{{0}} all-reduce(%x), channel_id=1, {text}, use_global_device_ids=true, to_apply=%add"
    program = hlo.parse(f"ENTRY %main (x: f32[4]) -> f32[4] {{\n{line}\n}}\n")
    found = program.collectives[0].groups
    assert (found is None) if groups is None else np.array_equal(found, groups)


class Place:
    """A device that knows only where it is."""

    def __init__(self, x, y, slice_index=0):
        self.coords, self.slice_index = (x, y, 0), slice_index


@pytest.mark.parametrize(
    "kind, members, topology, expected",
    [
        ("all-reduce", [(x, 0) for x in range(16)], "v5e:16x16", 2 * 15 / 16 / 90e9),  # a ring, both directions
        ("all-gather", [(x, 0) for x in range(8)], "v5e:8x8", 7 / 8 / 45e9),  # a line
        ("all-gather", [(x, y) for x in range(16) for y in range(16)], "v5e:16x16", 255 / 256 / 180e9),
        ("reduce-scatter", [(x, 0) for x in range(4)], "v5e:16x16", 3 / 4 / 45e9),  # part of a ring
        ("collective-permute", [(0, 0), (1, 0)], "v5e:16x16", 1 / 45e9),
        # Two slices: inside each four chips in a square, then one host of each shares the bytes.
        ("all-reduce", [(x, y, s) for s in (0, 1) for x in (0, 1) for y in (0, 1)], "v5e:2x2*2", 1.5 / 90e9 + 1 / 25e9),
    ],
)
def test_prices(kind, members, topology, expected):
    devices = np.array([Place(*member) for member in members], dtype=object)
    one = hlo.Collective(kind, 1e9, np.arange(len(members))[None], 1, "")
    assert roofline.seconds(one, devices, chips.parse(topology)) == pytest.approx(1e9 * expected)
