"""Files of named arrays: `.safetensors` read and written without PyTorch, PyTorch's own files read with it."""

import argparse
import os
import pickle
import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from research.core import storage

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# Under which keys training scripts keep the weights; averaged ones first, as timm reads them.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
# What wrappers for parallel or compiled training put before every name.
PREFIXES = ("module.", "_orig_mod.")
SAFE_TORCH = (2, 6)

_DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "BOOL": np.bool_,
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
}


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Name -> array of a checkpoint file, unwrapped, without prefixes common to all names.

    Args:
      path: `.safetensors`, or one of PyTorch's files by suffix (needs the `torch` extra).
    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged, of an unknown kind, or a pickle of more than tensors, which is not executed.
    """
    path = storage.folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        return strip_prefixes(_read_safetensors(path))
    if path.suffix in PICKLES:
        return strip_prefixes(_numpy(unwrap(_read_pickle(path), path)))
    raise ValueError(f"{path}: checkpoints end in .safetensors or {', '.join(PICKLES)}, not in {path.suffix!r}")


def write(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a `.safetensors` file, whole or not at all; folders are made, an older file is replaced."""
    path = storage.folder(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are written as .safetensors, give the file that suffix")
    # Not `ascontiguousarray`, which makes vectors of scalars.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    storage.write(path, safetensors.numpy.save(contiguous, dict(metadata)))


def unwrap(content, path: str | os.PathLike) -> dict:
    """The state dict inside what a training script saved.

    Raises:
      ValueError: there is none.
    """
    while isinstance(content, Mapping):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if isinstance(content, Mapping) and content and all(hasattr(value, "shape") for value in content.values()):
        return dict(content)
    found = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(f"{path} holds no state dict of tensors, plain or under {', '.join(WRAPPERS)}, but: {found}")


def strip_prefixes(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`state` without the prefixes that all its names share."""
    state = dict(state)
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): array for name, array in state.items()}
    return state


def _read_safetensors(path: storage.Path) -> dict[str, np.ndarray]:
    # safetensors.numpy knows no bfloat16, so its parser is used and the arrays are made here.
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no intact safetensors file ({error}): fetch it again") from None
    unknown = sorted({entry["dtype"] for _, entry in entries} - set(_DTYPES))
    if unknown:
        raise ValueError(f"{path} holds arrays of type {', '.join(unknown)}, which cannot be read")
    return {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"]) for name, entry in entries
    }


def _read_pickle(path: storage.Path):
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path} is a PyTorch file: pip install 'stillroom[torch]' to read it, or use its .safetensors form"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise ValueError(
            f"{path}: PyTorch {torch.__version__} can be made to execute code by a crafted file even where it reads "
            "tensors only (CVE-2025-32434): pip install 'torch>=2.6'"
        )
    try:
        # timm saves its command line beside the weights; a Namespace is a plain container.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's text goes on to advise against its own protection; only what it objects to is of use.
        objects = ", ".join(dict.fromkeys(re.findall(r"GLOBAL (\S+)", str(error)))) or "or is damaged"
        raise ValueError(
            f"{path} holds pickled objects other than tensors ({objects}): it was refused and nothing in it executed; "
            "ask for a .safetensors file"
        ) from None
    except Exception as error:  # A damaged pickle can stop its reader with any exception.
        raise ValueError(f"{path} is no intact PyTorch file ({_first_sentence(error)}): fetch it again") from None


def _first_sentence(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).split(". ")[0]


def _numpy(state: Mapping) -> dict[str, np.ndarray]:
    import torch

    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
        for name, tensor in state.items()
    }
