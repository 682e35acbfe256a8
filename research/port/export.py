"""Networks as StableHLO: one file that any JAX runs, on CPU, TPU or GPU, without the code that defined the network.

A file `NAME.stablehlo` is what `jax.export` serialises: the network in evaluation mode with its normalisation, so that
it takes images in [0, 1], and with its weights as constants. Beside it `NAME.stablehlo.json` says what it is. With
weights apart, they lie in `NAME.safetensors` under our own names and are the program's first argument.

    program = export.load("resnet50.stablehlo")
    logits = program(images)                                                # (B, H, W, 3) float32 in [0, 1]

    program = jax.export.deserialize(open("resnet50.stablehlo", "rb").read())     # the same without this project
    logits = program.call(images)                # or call(safetensors.numpy.load_file("resnet50.safetensors"), images)
"""

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export as jax_export

from research.backbones import classify
from research.core import storage
from research.core.errors import UserError
from research.port import tensors

SUFFIX, FORMAT = ".stablehlo", "stillroom export 1"
PLATFORMS = ("cpu", "tpu", "cuda")
ANY = "any"
IMAGES = {"float32": "in [0, 1]", "uint8": "in 0..255"}
# The container counts its bytes in 31 bits.
LARGEST = 2**31 - 2**24
SAMPLES = 16
# Largest difference of outputs from the network's own, as a part of the largest output: of a program in float32 on a
# CPU, and of one in narrow floats or on a chip that multiplies in them.
EXACT, NARROW = 1e-3, 5e-2


def program(
    network: classify.Network,
    variables: Mapping,
    *,
    batch: int | str = 1,
    outputs: Sequence[str] = ("logits",),
    images: str = "float32",
    platforms: Sequence[str] = PLATFORMS,
    separate: bool = False,
) -> jax_export.Exported:
    """The network's forward pass, lowered for several platforms at once.

    Args:
      variables: `params` and `batch_stats` where there are some.
      batch: number of images, or "any".
      outputs: `logits` and names of endpoints. One gives an array, several a dict of arrays, float32 all.
      images: `float32` in [0, 1] or `uint8`; NHWC, of side `network.size`, not normalised.
      separate: (weights, images) instead of (images), the weights by their names in our files.
    Raises:
      ValueError: an unknown output or kind of images, or a network that needs to know its batch.
    """
    if images not in IMAGES:
        raise ValueError(f"images: {images!r} is none of {', '.join(IMAGES)}")
    flat = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(dict(variables), sep="/").items()}
    forward = _forward(network, tuple(outputs))
    called = forward if separate else lambda images: forward(flat, images)
    size = (network.size, network.size, 3)
    count = jax_export.symbolic_shape("batch")[0] if batch == ANY else batch
    given = [jax.ShapeDtypeStruct((count, *size), images)]
    if separate:
        given.insert(0, {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()})
    _check(network, variables, outputs, jax.ShapeDtypeStruct((1, *size), images))
    try:
        return jax_export.export(jax.jit(called), platforms=tuple(platforms))(*given)
    except (jax.errors.InconclusiveDimensionOperation, TypeError) as error:
        if batch != ANY:
            raise
        raise ValueError(f"batch: {network.name} has to know how many images it gets: give a number") from error


def _forward(network: classify.Network, outputs: tuple[str, ...]) -> Callable:
    def forward(flat, images):
        tree = traverse_util.unflatten_dict(flat, sep="/")
        params = tree.pop("params")
        logits, endpoints, _ = network.apply(params, tree, classify.unit(images))
        found = {"logits": logits, **endpoints}
        picked = {name: found[name].astype(jnp.float32) for name in outputs}
        return picked[outputs[0]] if len(outputs) == 1 else picked

    return forward


def _check(network: classify.Network, variables: Mapping, outputs: Sequence[str], image: jax.ShapeDtypeStruct) -> None:
    state = dict(variables)
    params = state.pop("params")
    _, endpoints, _ = jax.eval_shape(lambda x: network.apply(params, state, classify.unit(x)), image)
    known = ["logits", *endpoints]
    for name in outputs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"outputs: {network.name} has no {name!r}; {hint}")


class Files(NamedTuple):
    """Where an export lies."""

    program: storage.Path
    description: storage.Path
    weights: storage.Path


def files(path: str | os.PathLike) -> Files:
    """The files of the export at `path`; raises UserError where it does not end in `.stablehlo`."""
    path = storage.folder(path)
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: exports end in {SUFFIX}")
    return Files(path, path.with_name(path.name + ".json"), path.with_suffix(".safetensors"))


def save(
    path: str | os.PathLike,
    network: classify.Network,
    variables: Mapping,
    *,
    facts: Mapping | None = None,
    separate: bool = False,
    overwrite: bool = False,
    **options,
) -> dict:
    """Writes `program(network, variables, separate=separate, **options)`; returns its description.

    Args:
      path: ends in `.stablehlo`.
      facts: more for the description, as JSON holds it.
    Raises:
      UserError: a file is there already and not to be replaced; the program would be too large.
      ValueError: as `program`.
    """
    place = files(path)
    for file in place if separate else place[:2]:
        if file.exists() and not overwrite:
            raise UserError(f"{file} exists: choose another --to, or pass --overwrite")
    exported = program(network, variables, separate=separate, **options)
    if len(exported.mlir_module_serialized) > LARGEST:
        raise UserError(f"{place.program}: weights and program exceed 2 GiB: pass --separate-weights")
    data = bytes(exported.serialize())
    described = _describe(network, exported, dict(facts or {})) | {
        "program": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "probe": _probe(network, variables, options.get("outputs", ("logits",)), exported.in_avals[-1].dtype),
    }
    if separate:
        flat = traverse_util.flatten_dict(dict(variables), sep="/")
        tensors.write(place.weights, {name: np.asarray(x) for name, x in flat.items()}, {"format": "stillroom"})
        described["weights_file"] = {"name": place.weights.name, "bytes": place.weights.stat().st_size}
    storage.write(place.program, data)
    storage.write(place.description, json.dumps(described, indent=2) + "\n")
    return described


def _describe(network: classify.Network, exported: jax_export.Exported, facts: dict) -> dict:
    kind = exported.in_avals[-1].dtype.name
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    outputs = outputs if isinstance(outputs, dict) else {"": outputs}
    return {
        "format": FORMAT,
        "model": network.name,
        **facts,
        "images": {"shape": _shape(exported.in_avals[-1]), "dtype": kind, "values": IMAGES[kind], "layout": "NHWC"},
        "normalisation": {"mean": list(network.mean), "std": list(network.std), "where": "inside the program"},
        "outputs": {name: {"shape": _shape(aval), "dtype": aval.dtype.name} for name, aval in outputs.items()},
        "computed_in": jnp.dtype(network.module.dtype).name,
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
    }


def _shape(aval) -> list:
    return [n if isinstance(n, int) else ANY for n in aval.shape]


def _images(shape: Sequence, dtype: str, batch: int = 1) -> np.ndarray:
    """The images that exports are checked with, the first always the same."""
    rng = np.random.default_rng(0)
    shape = (batch if shape[0] == ANY else shape[0], *shape[1:])
    return rng.integers(0, 256, shape, np.uint8) if dtype == "uint8" else rng.random(shape, np.float32)


def _sampled(outputs) -> dict[str, dict]:
    """Some values of the first image of every output, and the largest."""
    named = outputs if isinstance(outputs, dict) else {"": outputs}
    found = {name: np.asarray(value[0], np.float32).reshape(-1) for name, value in named.items()}
    places = {name: np.linspace(0, value.size - 1, SAMPLES).astype(int) for name, value in found.items()}
    return {
        name: {"values": value[places[name]].tolist(), "largest": float(np.max(np.abs(value)))}
        for name, value in found.items()
    }


def _probe(network: classify.Network, variables: Mapping, outputs: Sequence[str], dtype) -> dict[str, dict]:
    """What the network itself answers to the images of a check."""
    image = _images((1, network.size, network.size, 3), jnp.dtype(dtype).name)
    flat = traverse_util.flatten_dict(dict(variables), sep="/")
    return _sampled(jax.jit(_forward(network, tuple(outputs)))(jax.device_put(flat), image))


class Program(NamedTuple):
    """An export that was read again; call it with images.

    Attributes:
      path: its file.
      description: what its `.json` says.
      weights: name -> array where they lie apart, or None.
      call: the compiled program, (images) or (weights, images).
    """

    path: storage.Path
    description: dict
    weights: dict[str, jax.Array] | None
    call: Callable

    def __call__(self, images):
        """The outputs for a batch of images, an array or a dict of arrays.

        Raises:
          ValueError: images of another shape or type than the program's.
        """
        wanted = self.description["images"]
        shape, dtype = list(np.shape(images)), jnp.dtype(getattr(images, "dtype", type(images))).name
        fits = len(shape) == 4 and all(b in (ANY, a) for a, b in zip(shape, wanted["shape"], strict=True))
        if not fits or dtype != wanted["dtype"]:
            raise ValueError(
                f"{self.path} takes images ({', '.join(map(str, wanted['shape']))}) of {wanted['dtype']} "
                f"{wanted['values']}, these are ({', '.join(map(str, shape))}) of {dtype}"
            )
        return self.call(images) if self.weights is None else self.call(self.weights, images)


def load(path: str | os.PathLike) -> Program:
    """Reads an export, for the platform at hand.

    Raises:
      FileNotFoundError: no such file.
      UserError: it is no export of ours, damaged, for other platforms, or of a JAX too far from this one.
    """
    place = files(path)
    if not place.program.is_file():
        raise FileNotFoundError(f"no export at {place.program}")
    described = _description(place)
    data = place.program.read_bytes()
    if hashlib.sha256(data).hexdigest() != described["program"]["sha256"]:
        raise UserError(
            f"{place.program}: damaged, or of another export than {place.description.name}: export it again"
        )
    here = jax_export.default_export_platform()
    if here not in described["platforms"]:
        raise UserError(
            f"{place.program} was made for {', '.join(described['platforms'])}, this is {here}: export it with "
            f"--platforms {','.join([*described['platforms'], here])}"
        )
    try:
        exported = jax_export.deserialize(bytearray(data))
    except Exception as error:  # Another version's container can stop its reader with any exception.
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{place.program} was made with JAX {described['jax']} and JAX {jax.__version__} cannot read it ({first}): "
            "export it again"
        ) from None
    weights = None
    if "weights_file" in described:
        names = exported.in_tree.unflatten(exported.in_avals)[0][0]
        weights = _weights(place, names)
    return Program(place.program, described, weights, jax.jit(exported.call))


def _description(place: Files) -> dict:
    if not place.description.is_file():
        raise UserError(f"{place.program}: no export of ours, or {place.description.name} was left behind")
    try:
        found = json.loads(place.description.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{place.description}: no description of an export ({FORMAT!r})")
    return found


def _weights(place: Files, shapes: Mapping) -> dict[str, jax.Array]:
    found = tensors.read(place.weights)
    wrong = sorted(set(found) ^ set(shapes)) + [n for n in found if n in shapes and found[n].shape != shapes[n].shape]
    if wrong:
        raise UserError(f"{place.weights}: weights of another export ({wrong[0]})")
    return jax.device_put(found)


def check(found: Program) -> tuple[dict[str, float], float]:
    """(largest difference of each output from the network's own, as a part of the largest output; what is allowed)."""
    images = found.description["images"]
    sampled, known = _sampled(found(_images(images["shape"], images["dtype"]))), found.description["probe"]
    errors = {
        name: float(np.max(np.abs(np.subtract(sampled[name]["values"], value["values"]))) / (value["largest"] or 1))
        for name, value in known.items()
    }
    narrow = found.description["computed_in"] != "float32" or jax.default_backend() != "cpu"
    return errors, NARROW if narrow else EXACT
