"""What a compiled step needs: a split that adds up, loops counted in full, and compilers' words about memory."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.core import runner, sharding
from research.pods import chips, measure
from tests.pod import toy

BATCH = {"image": (toy.SIDE, toy.SIDE, 3), "label": (), "index": (), "mask": ()}
DTYPES = {"image": jnp.float32, "label": jnp.int32, "index": jnp.int32, "mask": jnp.float32}


def bound(**options):
    rules = [(".*", "fsdp")] if "fsdp" in options.get("axes", {}) else [(".*", "replicate")]
    found = runner.build(toy.build(accumulate=options.pop("accumulate", 1)), rules=rules, **options)
    rows = sharding.batch_sharding(found.shapes.step.sharding.mesh)
    shapes = {k: jax.ShapeDtypeStruct((toy.BATCH, *s), DTYPES[k], sharding=rows) for k, s in BATCH.items()}
    return found, shapes


@pytest.mark.parametrize("step", ["train", "eval"])
def test_memory_adds_up(step):
    found, batch = bound(axes={"data": 4, "fsdp": 2})
    one = measure.measure(step, found, batch, chips.parse("cpu:8"))
    assert one.fits and one.complete and one.peak == sum(one.memory.values())
    stats = one.compiled.memory_analysis()
    assert one.memory["activations and temporaries"] == stats.temp_size_in_bytes
    assert one.peak >= stats.argument_size_in_bytes + stats.temp_size_in_bytes
    assert one.memory["parameters"] == one.memory["moving averages"] - one.memory["model state"]


def test_state_bytes_follow_the_shardings():
    whole, _ = bound(axes={"data": 8})
    split, _ = bound(axes={"data": 4, "fsdp": 2})
    sizes = [measure.state_bytes(r.shapes)["parameters"] for r in (whole, split)]
    kernel = 3 * 3 * 16 * 64 * 4  # the one array that is large enough to split
    assert sizes[0] - sizes[1] == kernel // 2
    assert measure.state_bytes(whole.shapes)["step and key"] == 12


def test_micro_batches_are_all_counted():
    flops = []
    for accumulate in (1, 2):
        found, batch = bound(axes={"data": 8}, accumulate=accumulate)
        flops.append(measure.measure("train", found, batch, chips.parse("cpu:8")).flops)
    assert flops[1] == pytest.approx(flops[0], rel=0.2)


def test_cuda_is_lowered_only():
    found, batch = bound(axes={"data": 8})
    one = measure.measure("train", found, batch, chips.parse("h200:8"))
    assert one.fits and not one.complete and one.compiled is None
    assert one.peak == sum(measure.state_bytes(found.shapes).values()) + measure.device_bytes(batch)
    assert one.flops > 0 and [row.kind for row in one.traffic] == ["all-reduce"]


def test_device_bytes_of_a_partition():
    mesh = sharding.mesh({"data": 4, "fsdp": 2})
    of = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    tree = [jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=s) for s in (of(), of("data"), of("data", "fsdp"))]
    assert [measure.device_bytes(leaf) for leaf in tree] == [96, 24, 12]


@pytest.mark.parametrize(
    "text, needed, available",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (35.76G) "
            "exceeds available HBM (15.75G).",
            35.76,
            15.75,
        ),
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.",
            20.5,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: Used 512.00M of 256.00M hbm. Used 1.00G of 256.00M hbm", 1.0, 0.25),
        ("RESOURCE_EXHAUSTED: no words about sizes", 0, 0),
    ],
)
def test_sizes_in_the_compilers_message(text, needed, available):
    assert measure.is_oom(RuntimeError(text))
    found = measure.out_of_memory(text)
    assert [x / 2**30 for x in found] == pytest.approx([needed, available], abs=1e-6)


def test_other_errors_are_not_out_of_memory():
    assert not measure.is_oom(RuntimeError("INVALID_ARGUMENT: shapes differ"))
