"""Evaluates trained weights.

    python -m launch.evaluate --run runs/small                        every arm of a run, from its newest checkpoint
    python -m launch.evaluate --model resnet50 --weights resnet50.safetensors --data /data/imagenet --split val
    python -m launch.evaluate --model resnet50 --weights resnet50.safetensors --data digits --split test --protocol knn
    python -m launch.evaluate --model deit_small_patch16_224 --weights deit.pth --data /data/imagenet --split val \\
        --reduce ppt:r=50,blocks=3+6+9,threshold=7e-5             off the shelf with fewer tokens, see research.tokens

The first form uses the run's own config and data (`--config.data.path=…` replaces it); the others any checkpoint, ours
or official, with the image size, crop and normalisation that the model states for itself. Prints a table, or with
--json one JSON object.

Protocols: top1 scores the network's own classifier; the others probe its frozen features with the training split, knn
by the vote of nearest neighbours (DINO's), fewshot by least squares on a few examples a class (big_vision's), linear by
logistic regression (CLIP's).
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from launch import evaluate_probe, train
from research import backbones, tokens
from research.backbones import classify
from research.core import config as configs
from research.core import loop, overrides, storage
from research.core.checkpoint import Checkpoints
from research.core.errors import UserError, cli
from research.data import pipeline, sources, transforms
from research.port import checkpoint

PROTOCOLS = ("top1", *evaluate_probe.PROTOCOLS)
# Options that only some protocols take, and those that a run's config decides.
OF_PROTOCOLS = {
    "train_split": tuple(evaluate_probe.PROTOCOLS),
    "endpoint": tuple(evaluate_probe.PROTOCOLS),
    "k": ("knn",),
    "temperature": ("knn",),
    "shots": ("fewshot",),
    "seeds": ("fewshot",),
    "l2": ("fewshot", "linear"),
}
BATCH_SIZE = 64
OF_MODELS = {
    "data": "data.path",
    "split": "eval.split",
    "train_split": "data.split",
    "size": "eval.size",
    "crop": "eval.crop",
    "batch_size": "eval.batch_size",
    "dtype": "students.NAME.dtype",
}


def reduced(model: str, text: str | None) -> dict:
    """The constructor's options that make a model's tokens fewer as `--reduce` says; none without it."""
    if not text:
        return {}
    if not hasattr(backbones.create(model), "reduce"):
        raise UserError(f"--reduce: {model} has no tokens to reduce; vit_*, deit* and lvvit_* have")
    return {"reduce": tokens.parse(text)}


def run_config(folder: storage.Path, changes: list[str], reduce: str | None = None):
    """The config of a run folder, with changes applied, and `reduce` to all of its students."""
    file = folder / configs.FILE
    if not file.exists():
        raise UserError(f"{folder}: no run here ({configs.FILE} is missing)")
    config = overrides.thaw(configs.from_json(file.read_text()).unlock())
    for change in changes:
        overrides.apply(config, change)
    for student in config.get("students", {}).values():
        for key, value in reduced(student.model, reduce).items():
            student.options[key] = ConfigDict(value)  # in place of one that it has, not merged with it
    return overrides.freeze(config)


def run_metrics(folder: storage.Path, changes: list[str], reduce: str | None = None) -> dict[str, float]:
    """Evaluation metrics of the newest checkpoint of a run folder."""
    config = run_config(folder, changes, reduce)
    data = train.open_data(config)
    resolved = train.with_teacher(train.resolve(config, data), folder)
    bound = train.bind(train.build(resolved, data), resolved)
    checkpoints = Checkpoints(folder / "checkpoints", keep=resolved.save.keep, metric=resolved.save.best)
    try:
        state, progress = loop.start(bound, jax.random.PRNGKey(resolved.seed), checkpoints)
    finally:
        checkpoints.close()
    if not progress.examples:
        raise UserError(f"{folder}: no checkpoint was saved yet; train it first with launch.train")
    return loop.evaluate(bound, state, train.batches(resolved, data)[1]())


def run_probe(
    folder: storage.Path, changes: list[str], asked: evaluate_probe.Options, reduce: str | None = None
) -> dict[str, float]:
    """Metrics of the features of every arm of a finished run, on its own splits without augmentation."""
    config = run_config(folder, changes, reduce)
    if not config.get("students"):
        raise UserError(f"{folder}: its config has no students: probe its weights with --model and --weights")
    data, found = train.open_data(config), {}
    evaluate_probe.check(data.train, data.eval, asked)
    batch_size = config.eval.batch_size or config.batch_size
    for name, student in config.students.items():
        file = folder / train.WEIGHTS / f"{name}.safetensors"
        if not file.exists():
            raise UserError(f"{file}: not there; a run writes it when it is done")
        options = {**student.options, "dtype": student.dtype}
        network = classify.network(student.model, data.train.num_classes, config.eval.size, **options)
        variables = checkpoint.load_variables(file)
        metrics = evaluate_probe.measure(
            network, variables, data.train, data.eval, data.eval_transform, batch_size, asked
        )
        found |= {f"{name}/{key}": value for key, value in metrics.items()}
    return found


def load(
    model: str, weights: str, num_classes: int, size: int, dtype: str, reduce: str | None = None
) -> tuple[classify.Network, dict]:
    """A network at its own image size, or at `size` where that is not 0, and its variables; see `reduced`."""
    size = size or backbones.input_spec(model).size
    sized = reduced(model, reduce) | ({"img_size": size} if hasattr(backbones.create(model), "img_size") else {})
    variables = checkpoint.load_official(model, weights, num_classes=num_classes, image_size=size)
    return classify.network(model, num_classes, size, dtype=dtype, **sized), variables


def eval_transform(network: classify.Network, crop: float | None = None) -> transforms.Eval:
    """The transform at the network's size with a crop, by default that of its published weights."""
    return transforms.build(train=False, size=network.size, crop=crop or backbones.input_spec(network.name).crop)


def model_metrics(
    network: classify.Network, variables: dict, source: sources.Source, batch_size: int, crop: float | None = None
):
    """top1, top5, loss and calibration error of one network on a source; `crop` as of `eval_transform`."""
    variables = dict(variables)
    params, model_state = jax.device_put(variables.pop("params")), jax.device_put(variables)

    @jax.jit
    def step(batch):
        logits, _, _ = network.apply(params, model_state, classify.unit(batch["image"]))
        return classify.accuracy(logits, batch["label"], batch["mask"])

    found = pipeline.eval_batches(source, eval_transform(network, crop), batch_size=batch_size)
    return loop.total(step(jax.tree.map(jnp.asarray, batch)) for batch in found)


def model_probe(options: argparse.Namespace, asked: evaluate_probe.Options) -> dict[str, float]:
    """Metrics of the features of one network, learned from the training split and asked about the other."""
    parts = (options.train_split or "train", options.split)
    bank, test = (sources.source(*place(options.data), part) for part in parts)
    evaluate_probe.check(bank, test, asked)
    asking = (options.size or 0, options.dtype or "float32", options.reduce)
    network, variables = load(options.model, options.weights, 0, *asking)
    transform, batch_size = eval_transform(network, options.crop), options.batch_size or BATCH_SIZE
    return evaluate_probe.measure(network, variables, bank, test, transform, batch_size, asked)


def place(data: str) -> tuple[str | None, str | None]:
    """(kind, path) of the source that `--data` names."""
    return ("digits", None) if data == "digits" else (None, data)


def table(metrics: dict[str, float]) -> Table:
    """Rows are networks, columns are metrics."""
    cells = {}
    for name, value in metrics.items():
        network, _, metric = name.rpartition("/")
        cells.setdefault(network, {})[metric] = value
    columns = list(dict.fromkeys(metric for row in cells.values() for metric in row))
    shown = Table("", *columns)
    for network, row in cells.items():
        shown.add_row(network or "model", *(f"{row[c]:#.4g}" if c in row else "" for c in columns))
    return shown


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m launch.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--run", type=storage.folder, help="run folder")
    found.add_argument("--model", help="a variant of research.backbones")
    found.add_argument("--weights", help="its checkpoint, .safetensors or .pth")
    found.add_argument("--data", help="folder, .zip or .npz of images, or 'digits'")
    found.add_argument("--split", help="part of the data, where it has parts")
    found.add_argument("--size", type=int, help="side of the images, if not the model's own")
    found.add_argument("--crop", type=float, help="share of the shorter side that is seen, if not that of the weights")
    found.add_argument("--batch-size", type=int, help=f"images at a time, {BATCH_SIZE} by default")
    found.add_argument("--dtype", help="of the computation, float32 by default")
    found.add_argument(
        "--reduce", metavar="METHOD:KEY=VALUE,…", help="fewer tokens, e.g. tome:r=13 or evit:keep_rate=0.7"
    )
    found.add_argument("--protocol", default="top1", metavar="NAME", help=f"{', '.join(PROTOCOLS)}; top1 by default")
    found.add_argument("--train-split", help="what a probe learns from, 'train' by default")
    found.add_argument("--endpoint", help="the features: 'pooled' by default; maps and tokens are averaged")
    found.add_argument("--k", metavar="K,K", help="knn: neighbours, 10,20 by default")
    found.add_argument("--temperature", type=float, help="knn: of the votes, 0.07 by default")
    found.add_argument("--shots", metavar="N,N", help="fewshot: examples a class, 1,5,10,25 by default")
    found.add_argument("--seeds", type=int, help="fewshot: how many draws of the examples, 3 by default")
    found.add_argument("--l2", metavar="X,X", help="fewshot: strengths, 1024 by default; linear: one, else searched")
    found.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return found


def probe_options(options: argparse.Namespace) -> evaluate_probe.Options:
    """The options of a probing protocol as they are given; UserError for a value that is no number above 0."""
    given = {key: getattr(options, key) for key in ("endpoint", "temperature", "seeds")}
    lists = {"k": int, "shots": int, "l2": float}
    given |= {key: _numbers(key, getattr(options, key), kind) for key, kind in lists.items()}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if key != "endpoint" and not np.min(value) > 0:
            raise UserError(f"--{key}: {getattr(options, key)} is not above 0")
    if options.protocol == "linear" and len(given.get("l2", ())) > 1:
        raise UserError(f"--l2: {options.l2}; linear takes one strength, or none to search for it")
    return evaluate_probe.Options(options.protocol, **given)


def _numbers(key: str, text: str | None, kind: type) -> tuple | None:
    try:
        return None if text is None else tuple(kind(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--{key}: {text!r} is not a list of numbers, such as 10,20") from None


def check_options(options: argparse.Namespace, changes: list[str]) -> None:
    """Raises UserError for options that what is asked for would not use."""
    if options.protocol not in PROTOCOLS:
        near = overrides.suggest(options.protocol, PROTOCOLS)
        raise UserError(f"--protocol: no {options.protocol!r}; it is one of {', '.join(PROTOCOLS)}{near}")
    given = [key for key, value in vars(options).items() if value is not None]
    flag = lambda key: f"--{key.replace('_', '-')}"
    for key, protocols in OF_PROTOCOLS.items():
        if key in given and options.protocol not in protocols:
            raise UserError(f"{flag(key)}: belongs to --protocol {' or '.join(protocols)}, not to {options.protocol}")
    if options.crop is not None and not 0 < options.crop <= 1:
        raise UserError(f"--crop: {options.crop} is not above 0 and at most 1")
    if options.run:
        if options.model or options.weights:
            raise UserError("--run: evaluates the networks of a run; leave it out with --model and --weights")
        for key in [key for key in OF_MODELS if key in given]:
            raise UserError(f"{flag(key)}: belongs to --model; give --config.{OF_MODELS[key]}=<value> with --run")
    elif not (options.model and options.weights and options.data):
        raise UserError("give --run, or --model with --weights and --data (--help shows examples)")
    elif changes:
        raise UserError(f"{changes[0]}: changes the config of a --run; a --model has none")


@cli
def main(argv: list[str]) -> int:
    options, changes = configs.parse_args(parser(), argv)
    check_options(options, changes)
    if options.protocol != "top1":
        asked = probe_options(options)
        run = lambda: run_probe(options.run, changes, asked, options.reduce)
        metrics = run() if options.run else model_probe(options, asked)
    elif options.run:
        metrics = run_metrics(options.run, changes, options.reduce)
    else:
        source = sources.source(*place(options.data), options.split)
        dtype, batch_size = options.dtype or "float32", options.batch_size or BATCH_SIZE
        loaded = load(options.model, options.weights, source.num_classes, options.size or 0, dtype, options.reduce)
        metrics = model_metrics(*loaded, source, batch_size, options.crop)
    if options.json:
        print(json.dumps(metrics))
    else:
        Console().print(table(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main())
