"""Topologies by name: what is accepted, what Cloud calls it, and what is refused with the nearest right name."""

import importlib.util

import pytest

from research.core.errors import UserError
from research.pods import chips


@pytest.mark.parametrize(
    "text, count, hosts, accelerator",
    [
        ("v5e:16x16", 256, 64, "v5litepod-256"),
        ("v5e:16x16*2", 512, 128, "v5litepod-256"),
        ("v5e:2x4", 8, 1, "v5litepod-8"),
        ("v5e:1x1", 1, 1, "v5litepod-1"),
        ("v4:2x2x2", 8, 2, "v4-16"),
        ("v5p:4x8x8", 256, 64, "v5p-512"),
        ("v6e:8x8", 64, 16, "v6e-64"),
        ("7x:4x4x4", 64, 16, "tpu7x-128"),
        ("h200:8x4", 32, 4, None),
        ("h100:8", 8, 1, None),
        ("cpu:2x3", 6, 3, None),
    ],
)
def test_names(text, count, hosts, accelerator):
    found = chips.parse(text)
    assert (found.chips, found.hosts, found.accelerator_type, found.name) == (count, hosts, accelerator, text)
    if accelerator and found.slices == 1:
        assert chips.parse(accelerator) == found


def test_cloud_names_mean_the_most_cubic_slice():
    shapes = {8: (2, 2, 1), 64: (2, 4, 4), 128: (4, 4, 4), 256: (4, 4, 8), 1024: (8, 8, 8), 12288: (16, 16, 24)}
    assert {n: chips.parse(f"v5p-{n}").shape for n in shapes} == shapes


def test_machine_types_follow_the_host():
    machines = {t: chips.parse(t).machine_type for t in ("v5e:4x4", "v5e:2x4", "v6e:1x1", "v5p:2x2x1", "h200:8")}
    assert list(machines.values()) == [
        "ct5lp-hightpu-4t",
        "ct5lp-hightpu-8t",
        "ct6e-standard-1t",
        "ct5p-hightpu-4t",
        None,
    ]


def test_figures_are_of_whole_chips():
    assert chips.chip("v5e").flops == 197e12
    assert chips.chip("v5p").flops == 459e12 and chips.chip("v5p").hbm_bytes == 103 * 10**9
    assert chips.chip("7x").flops == 2310e12 and chips.chip("7x").devices_per_chip == 2
    assert chips.chip("h200").flops == 989e12 and chips.chip("h200").network_bandwidth == 400e9


@pytest.mark.parametrize(
    "text, message",
    [
        ("v6f:16x16", "no chip 'v6f'; did you mean v6e"),
        ("v5e:16x15", "did you mean v5e:16x16"),
        ("v5e:4x2", "did you mean v5e:2x4"),
        ("v5e:32x32", "did you mean v5e:16x16"),
        ("v5p:4x4", "v5p has no slice 4x4; did you mean v5p:2x4x4|did you mean v5p:2x2x4"),
        ("v5p-500", "did you mean v5p-512"),
        ("v5litepod-255", "did you mean v5litepod-256"),
        ("v5e", "no shape; write it as v5e:16x16"),
        ("h200:8x4*2", "only TPUs have slices"),
        ("h200-8", "write devices a node x nodes, h200:8x4"),
        ("cpu:2x2x2", "write devices a node x nodes"),
        ("v5e:16x16*0", "only TPUs have slices, one or more"),
    ],
)
def test_refused_with_the_nearest(text, message):
    with pytest.raises(UserError, match=message):
        chips.parse(text)


def test_virtual_devices():
    assert len(chips.devices(chips.parse("cpu:4"))) == 4
    with pytest.raises(
        UserError, match="cpu:2x9 needs 18 virtual CPU devices, there are 8; set JAX_NUM_CPU_DEVICES=18"
    ):
        chips.devices(chips.parse("cpu:2x9"))


@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("text", ["v4:2x2x1", "v5e:1x1", "v5e:2x4", "v5e:2x2*2", "v5p:2x2x2", "v6e:4x4", "7x:2x2x1"])
def test_libtpu_has_what_is_offered(text):
    topology = chips.parse(text)
    found = chips.devices(topology)
    assert len(found) == topology.devices
    assert len({d.process_index for d in found}) == topology.hosts
    assert len({getattr(d, "slice_index", 0) or 0 for d in found}) == topology.slices
