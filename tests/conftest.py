"""Strict settings for every test: 8 virtual devices, no silent rank or dtype promotion, warnings are errors."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: unoptimised code compiles in half the time, and the same program only once.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag, and stop
    # The older code generator compiles a training step in half the time again.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    # In one part it takes a fifth less than in many for as many threads, and other cores have tests of their own.
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers have their parent's
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="stillroom-jax-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("MPLBACKEND", "agg")

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden"
# What takes longest: started last, one file would keep a single worker busy while the others have nothing to do.
FIRST = (
    "distill/test_vanilla_kd.py",
    "backbones/test_every_backbone.py",
    "test_notebooks.py",
    "distill/test_arms.py",
    "pod/test_kill.py",
    "launch/test_distributed.py",
    "tokens/test_configs.py",
    "core/test_storage.py",
    "distill/test_ofa_configs.py",
    "distill/test_deep_training.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorts the files that several workers share."""
    if hasattr(config, "workerinput"):
        rank = {HERE / name: index for index, name in enumerate(FIRST)}
        items.sort(key=lambda item: rank.get(item.path, len(FIRST)))


@pytest.fixture(scope="module")
def one_device():
    """Runs of a module's tests take one device, for tests of configs: compiling for eight takes longer."""
    from launch import train  # imports everything, which most tests do without

    bind = train.runner.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.runner, "build", lambda e, **o: bind(e, **{"devices": jax.devices()[:1], **o}))
        yield


@pytest.fixture
def golden() -> pathlib.Path:
    """The folder of golden arrays."""
    return GOLDEN
