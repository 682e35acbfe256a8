"""Strict settings for every test: 8 virtual devices, no silent rank or dtype promotion, warnings are errors."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: unoptimised code compiles in half the time, and the same program only once.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="stillroom-jax-"))
os.environ.setdefault("MPLBACKEND", "agg")

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> pathlib.Path:
    """The folder of golden arrays."""
    return GOLDEN
