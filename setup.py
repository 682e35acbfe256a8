"""Packaging of Stillroom. `pip install -e .[test]` is all a development checkout needs."""

from setuptools import find_packages, setup

TEST = [
    "pytest>=8.3,<10",
    "pytest-xdist>=3.6,<4",
    "hypothesis>=6.100,<7",
    "jaxtyping>=0.3,<0.4",
    "beartype>=0.20,<1",
    "ruff>=0.12,<1",
    "psutil>=5.9,<8",
    "gcp-storage-emulator>=2026.7,<2028",
    # Compiles for TPUs without one; JAX says which version belongs to it. There is no build for other machines.
    "jax[tpu]>=0.10,<0.12; sys_platform == 'linux' and platform_machine == 'x86_64'",
]
GCS = ["gcsfs>=2025.3,<2028"]
NOTEBOOKS = ["nbclient>=0.10,<1", "nbformat>=5.10,<6", "ipykernel>=6.29,<8"]

setup(
    name="stillroom",
    version="0.1.0",
    description="Efficient-AI methods as pure functions over Flax modules",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["research*", "configs*", "launch*"]),
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12,<0.13",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.11,<0.13",
        "grain>=0.2.12,<0.3",
        "tensorflow-datasets>=4.9.7,<5",
        "ml-collections>=1.0,<2",
        "chex>=0.1.90,<0.2",
        "absl-py>=2.1,<3",
        "etils[epath]>=1.12,<2",
        "numpy>=2.0,<3",
        "scipy>=1.13,<2",
        "scikit-learn>=1.5,<2",
        "opencv-python-headless>=4.10,<6",
        "Pillow>=10.4,<13",
        "safetensors>=0.5,<1",
        "flatbuffers>=24.3.25,<26",  # what jax.export serialises with
        "tokenizers>=0.20,<1",
        "tensorboardX>=2.6.2,<3",
        "tqdm>=4.66,<5",
        "rich>=13.7,<16",
        "matplotlib>=3.9,<4",
    ],
    extras_require={
        "test": TEST + NOTEBOOKS + GCS,
        "notebooks": NOTEBOOKS,
        "detection": ["faster-coco-eval>=1.6,<2", "pycocotools>=2.0.8,<3"],
        "gcs": GCS,
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda12]>=0.10,<0.12"],
        "torch": ["torch>=2.6,<3"],
    },
)
