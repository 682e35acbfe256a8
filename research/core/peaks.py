"""What a device can do at most: FLOP/s by dtype and bytes/s of its memory, the denominators of MFU.

TPUs come from JAX's own registry, GPUs from the table below, and a CPU, whose peak no one publishes, is measured.
"""

import functools
import re
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Dense TFLOP/s (never "with sparsity") and memory GB/s, from NVIDIA's data sheets and architecture white papers of each
# card, with sums in float32. `f32` is what JAX's default precision gives float32 products: TF32 where the card has it.
# A row: words of the device kind (the first row whose words all occur is taken), rates by dtype or its class, GB/s.
_GPUS = (
    (("B200",), dict(f16=2250, f32=1100, f8=4500, i8=4500), 8000),
    (("H200",), dict(f16=989, f32=494, f8=1979, i8=1979), 4800),
    (("GH200",), dict(f16=989, f32=494, f8=1979, i8=1979), 4000),
    (("H100", "PCIE"), dict(f16=756, f32=378, f8=1513, i8=1513), 2000),
    (("H100", "NVL"), dict(f16=835, f32=417, f8=1671, i8=1671), 3900),
    (("H100",), dict(f16=989, f32=494, f8=1979, i8=1979), 3350),
    (("A100", "80GB", "PCIE"), dict(f16=312, f32=156, i8=624), 1935),
    (("A100", "80GB"), dict(f16=312, f32=156, i8=624), 2039),
    (("A100",), dict(f16=312, f32=156, i8=624), 1555),
    (("L40S",), dict(f16=362, f32=183, f8=733, i8=733), 864),
    (("L4",), dict(f16=121, f32=60, f8=242, i8=242), 300),
    (("A10G",), dict(f16=70, f32=35, i8=140), 600),
    (("A10",), dict(f16=125, f32=62.5, i8=250), 600),
    (("T4",), dict(float16=65, f32=8.1, i8=130), 320),
    (("V100", "PCIE"), dict(float16=112, f32=14), 900),
    (("V100",), dict(float16=125, f32=15.7), 900),
    (("RTX", "4090"), dict(f16=165.2, f32=82.6, f8=330.3, i8=660.6), 1008),
    (("RTX", "3090"), dict(f16=71, f32=35.6, i8=284), 936),
)


def peak_flops(device: jax.Device | str | None = None, dtype=jnp.bfloat16) -> float:
    """FLOP/s (two a multiply-add) a device can reach in matrix products of `dtype`.

    A CPU's figure is measured, not published: the machine's best rate over a few large products, shared evenly by the
    process's CPU devices (virtual ones share the same cores). It is measured once a process, in about a second.

    Args:
      device: a device, a device kind ("NVIDIA H200"), or a TPU version ("v5e"); None is the default device.
      dtype: of the operands; float32 means products at JAX's default precision (TF32 on GPUs, bfloat16 passes on TPUs).
    Raises:
      ValueError: the device or its rate for this dtype is not known.
    """
    device = jax.devices()[0] if device is None else device
    dtype, kind = jnp.dtype(dtype), _kind(device)
    family = f"{'i' if jnp.issubdtype(dtype, jnp.integer) else 'f'}{8 * dtype.itemsize}"
    if kind == "cpu":
        return measured_flops(dtype) / jax.local_device_count("cpu")
    if gpu := _gpu(kind):
        peak = 1e12 * gpu[1].get(dtype.name, gpu[1].get(family, 0))
    else:
        tpu = _tpu(device)
        rates = {"i8": tpu.int8_ops_per_second, "f8": tpu.fp8_ops_per_second}
        peak = rates.get(family, tpu.bf16_ops_per_second) * tpu.num_cores
    if not peak:
        raise ValueError(f"no published peak of {kind!r} for {dtype.name} products: state MFU in another dtype")
    return float(peak)


def peak_bandwidth(device: jax.Device | str | None = None) -> float:
    """Bytes/s of a device's main memory (arguments as in `peak_flops`; measured by copying on a CPU)."""
    device = jax.devices()[0] if device is None else device
    if _kind(device) == "cpu":
        return measured_bandwidth() / jax.local_device_count("cpu")
    if gpu := _gpu(_kind(device)):
        return 1e9 * gpu[2]
    tpu = _tpu(device)
    return float(tpu.mem_bw_bytes_per_second * tpu.num_cores)


def mfu(flops: float, seconds: float, devices: Sequence[jax.Device] | None = None, dtype=jnp.bfloat16) -> float:
    """Model FLOP utilisation: `flops` done in `seconds` over what `devices` (default: all) could have done at most.

    `flops` is what the model's mathematics needs (two a multiply-add, a training step three times its forward pass), so
    recomputation does not count as work. On CPU the denominator is measured, see `peak_flops`.
    """
    devices = jax.devices() if devices is None else devices
    return flops / seconds / (peak_flops(devices[0], dtype) * len(devices))


@functools.cache
def measured_flops(dtype=jnp.float32, size: int = 1536, seconds: float = 0.5) -> float:
    """Best FLOP/s of `size`-square matrix products of `dtype` on this machine's CPU, over about `seconds` of trials."""
    dtype = jnp.dtype(dtype)
    host = jax.local_devices(backend="cpu")[0]
    entries = np.random.default_rng(0).integers(-3, 4, (size, size))
    x = jax.device_put(entries.astype(dtype), host)
    out = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.int32
    best = _fastest(jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=out)), x, seconds)
    return 2 * size**3 / best


@functools.cache
def measured_bandwidth(megabytes: int = 128, seconds: float = 0.3) -> float:
    """Best bytes/s (read plus written) of a large array pass on this machine's CPU, over about `seconds` of trials."""
    x = jax.device_put(np.ones(megabytes * 2**18, np.float32), jax.local_devices(backend="cpu")[0])
    return 2 * x.nbytes / _fastest(jax.jit(lambda a: -a), x, seconds)


def _fastest(fn, x, seconds: float) -> float:
    jax.block_until_ready(fn(x))  # compiles
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        jax.block_until_ready(fn(x))
        times.append(time.perf_counter() - begin)
    return min(times)


def _kind(device) -> str:
    return device if isinstance(device, str) else device.device_kind


def _gpu(kind: str) -> tuple | None:
    words = set(re.split(r"[^A-Z0-9]+", kind.upper()))
    if words & {"LAPTOP", "MIG"}:  # slower relatives of the same name
        return None
    return next((row for row in _GPUS if words.issuperset(row[0])), None)


def _tpu(device):
    """JAX's `TpuInfo` of a TPU; its figures are per core, and `num_cores` of them form the device."""
    kind = _kind(device).lower().removeprefix("tpu").strip()
    version = {"v4 lite": "v4i", "v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}.get(kind, kind)
    from jax.experimental.pallas import tpu as pltpu  # a second of imports that GPU and CPU runs need not pay

    if version not in {chip.value for chip in pltpu.ChipVersion}:
        raise ValueError(f"no published peaks of device {_kind(device)!r}: add them in research/core/peaks.py")
    chip, cores = pltpu.ChipVersion(version), getattr(device, "num_cores", None)
    if cores is not None:
        return pltpu.get_tpu_info_for_chip(chip, cores)
    try:
        return pltpu.get_tpu_info_for_chip(chip, 2)  # a name alone: the whole chip where it acts as one device
    except ValueError:
        return pltpu.get_tpu_info_for_chip(chip, 1)
