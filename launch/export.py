"""Exports a network with its weights as StableHLO, to run with JAX alone: on images in [0, 1], NHWC, not normalised.

    python -m launch.export --model resnet50 --weights resnet50_a1.safetensors --to resnet50.stablehlo
    python -m launch.export --run runs/small --arm ofa --to ofa.stablehlo --batch any --outputs logits,pooled
    python -m launch.export --check resnet50.stablehlo

Weights are official files or ours; those of a run are what it trained, and a VanillaNet's merged ones `<arm>_deploy`.
`--check` reads an export again and compares it with what the network answered when it was exported; exit status 1 where
they differ. launch/README.md shows how to use the file.
"""

import argparse
import sys
import time

import jax
import numpy as np
from flax import traverse_util
from rich.console import Console
from rich.table import Table

from launch import train
from research import backbones
from research.backbones import classify
from research.core import config as configs
from research.core import storage
from research.core.errors import UserError, cli
from research.port import checkpoint, export


def of_model(
    model: str, weights: str, *, size: int | None = None, dtype: str | None = None, dialect: str | None = None
) -> tuple[classify.Network, dict]:
    """(network, variables) of a variant and a checkpoint, with as many classes as the checkpoint has."""
    spec, file = backbones.input_spec(model), checkpoint.read(model, weights, dialect)
    size, module = size or spec.size, backbones.create(model)
    count = checkpoint.class_count(file.state, checkpoint.network(model).head(file.rules))
    sized = {"img_size": size} if hasattr(module, "img_size") else {}
    try:
        variables = checkpoint.fill(model, file, num_classes=count, image_size=size if sized else None)
    except ValueError as error:
        raise UserError(f"{weights}: {error}") from None
    return classify.network(model, count, size, dtype=dtype or "float32", **sized), variables


def of_run(folder: storage.Path, arm: str, *, dtype: str | None = None) -> tuple[classify.Network, dict]:
    """(network, variables) of an arm of a finished run, by the name of its file in the run's `weights` folder."""
    file = folder / configs.FILE
    if not file.exists():
        raise UserError(f"{folder}: no run here ({configs.FILE} is missing)")
    config = configs.from_json(file.read_text())
    trained = sorted(found.stem for found in storage.files(folder / train.WEIGHTS) if found.suffix == ".safetensors")
    if not trained:
        raise UserError(f"{folder}: no weights yet; they are written when training ends")
    if arm not in trained:
        raise UserError(f"--arm: {folder} trained {', '.join(trained)}" + (f", not {arm!r}" if arm else ""))
    # `deep`, its average `deep_ema0.999`, and the merged forms of both, `..._deploy`.
    owners = [name for name in config.students if arm == name or arm.startswith(f"{name}_")]
    if not owners:
        raise UserError(f"--arm: {arm!r} is no student of {file}")
    name = max(owners, key=len)
    student, options = config.students[name], dict(config.students[name].options)
    if arm != name and arm.endswith("_deploy"):
        options["deploy"] = True
    variables = checkpoint.load_variables(folder / train.WEIGHTS / f"{arm}.safetensors")
    build = lambda count: classify.network(
        student.model, count, config.eval.size, dtype=dtype or student.dtype, **options
    )
    network = build(_classes(build, variables))
    wanted = jax.eval_shape(lambda: network.module.init(jax.random.PRNGKey(0), network.example()))
    if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, dict(wanted)):
        raise UserError(f"{folder / train.WEIGHTS / arm}.safetensors: not the weights of {file}'s students.{name}")
    return network, variables


def _classes(build, variables: dict) -> int:
    """Number of classes in the variables: the last axis of whatever a network without classes lacks."""
    flat = traverse_util.flatten_dict(variables)
    paths = [set(traverse_util.flatten_dict(jax.eval_shape(build(n).init, jax.random.PRNGKey(0))[0])) for n in (1, 0)]
    head = [("params", *path) for path in paths[0] - paths[1]]
    return max((flat[path].shape[-1] for path in head if path in flat), default=0)


def check(path: str) -> bool:
    """Prints how far an export is from the network it was made of; returns whether that is near enough."""
    started = time.perf_counter()
    found = export.load(path)
    errors, allowed = export.check(found)
    images, seconds = found.description["images"], time.perf_counter() - started
    shape = ", ".join(map(str, images["shape"]))
    shown = Table("output", "shape", "difference", title=f"{found.description['model']}: {images['dtype']} ({shape})")
    for name, error in errors.items():
        described = found.description["outputs"][name]
        shown.add_row(name or "logits", str(described["shape"]), f"{error:.1e}")
    Console().print(shown)
    good = max(errors.values()) <= allowed
    print(f"{'agrees with' if good else 'DIFFERS FROM'} the network ({allowed:g} allowed), {seconds:.1f} s")
    return good


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m launch.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--model", help="a variant of research.backbones")
    found.add_argument("--weights", metavar="FILE", help="its checkpoint, .safetensors or .pth, official or ours")
    found.add_argument("--dialect", help="whose names an official checkpoint uses; by default the best fit")
    found.add_argument("--run", type=storage.folder, metavar="FOLDER", help="a finished run, in place of --model")
    found.add_argument("--arm", default="", metavar="NAME", help="which of the run's weights")
    found.add_argument("--to", metavar="FILE", help=f"the export, {export.SUFFIX}")
    found.add_argument("--size", type=int, help="side of the images; by default that of the published weights")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation; float32, or the run's own")
    found.add_argument("--batch", default="1", metavar="N", help="images at a time, or 'any'")
    found.add_argument("--images", choices=tuple(export.IMAGES), default="float32", help="in [0, 1], or in 0..255")
    found.add_argument("--outputs", default="logits", help="comma-separated: logits, pooled or other endpoints")
    found.add_argument("--platforms", default=",".join(export.PLATFORMS), help="comma-separated")
    found.add_argument("--separate-weights", action="store_true", help="write them as .safetensors beside the program")
    found.add_argument("--overwrite", action="store_true", help="replace an older export")
    found.add_argument("--check", metavar="FILE", help="compare an export with the network it was made of")
    return found


def options_of(chosen: argparse.Namespace) -> dict:
    """Arguments of `export.save`; raises UserError for a wrong batch or platform."""
    platforms = tuple(chosen.platforms.split(","))
    if unknown := set(platforms) - {*export.PLATFORMS, "rocm"}:
        raise UserError(f"--platforms: {min(unknown)!r} is none of {', '.join(export.PLATFORMS)}, rocm")
    if chosen.batch != export.ANY and not (chosen.batch.isdecimal() and int(chosen.batch)):
        raise UserError(f"--batch: {chosen.batch!r} is neither a number of images nor {export.ANY!r}")
    return {
        "batch": chosen.batch if chosen.batch == export.ANY else int(chosen.batch),
        "outputs": tuple(chosen.outputs.split(",")),
        "images": chosen.images,
        "platforms": platforms,
        "separate": chosen.separate_weights,
        "overwrite": chosen.overwrite,
    }


@cli
def main(argv: list[str]) -> int:
    chosen, extra = configs.parse_args(parser(), argv)
    if extra:
        raise UserError(f"{extra[0]}: an export has no config; the run's own is used")
    if chosen.check:
        return 0 if check(chosen.check) else 1
    if not chosen.to or not (chosen.run or (chosen.model and chosen.weights)):
        raise UserError("give --to, and --model with --weights or --run with --arm (--help shows examples)")
    options = options_of(chosen)
    if chosen.run:
        if chosen.size:
            raise UserError("--size: a run's networks keep their size; leave it out")
        network, variables = of_run(chosen.run, chosen.arm, dtype=chosen.dtype)
        facts = {"weights": f"{chosen.run}/{train.WEIGHTS}/{chosen.arm}.safetensors"}
    else:
        network, variables = of_model(
            chosen.model, chosen.weights, size=chosen.size, dtype=chosen.dtype, dialect=chosen.dialect
        )
        facts = {"weights": chosen.weights, "crop": backbones.input_spec(chosen.model).crop}
    described = export.save(chosen.to, network, variables, facts=facts, **options)
    print(f"{chosen.to}: {described['program']['bytes'] / 2**20:.1f} MiB for {', '.join(described['platforms'])}")
    if "weights_file" in described:
        print(f"{described['weights_file']['name']}: {described['weights_file']['bytes'] / 2**20:.1f} MiB of weights")
    print(f"compare it with the network: python -m launch.export --check {chosen.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
