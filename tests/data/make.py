"""Tiny images and folders of them."""

import io
import pathlib
import zipfile

import numpy as np
from PIL import Image


def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    """A smooth random image with a little noise: like a photograph to a JPEG encoder."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(seed: int = 0, width: int = 40, height: int = 30) -> bytes:
    return encoded(picture(seed, width, height))


def tree(root: pathlib.Path, names: list[str]) -> dict[str, bytes]:
    """Writes a different JPEG under each name; returns them."""
    files = {name: jpeg(number) for number, name in enumerate(names)}
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return files


def zipped(path: pathlib.Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path
