"""Evaluates trained weights.

    python -m launch.evaluate --run runs/small                        every arm of a run, from its newest checkpoint
    python -m launch.evaluate --model resnet50 --weights resnet50.safetensors --data /data/imagenet --split val

The first form uses the run's own config and data (`--config.data.path=…` replaces it); the second any checkpoint, ours
or official, with the image size, crop and normalisation that the model states for itself. Prints a table, or with
--json one JSON object.
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from launch import train
from research import backbones
from research.backbones import classify
from research.core import config as configs
from research.core import loop, overrides, storage
from research.core.checkpoint import Checkpoints
from research.core.errors import UserError, cli
from research.data import pipeline, sources, transforms
from research.port import checkpoint


def run_metrics(folder: storage.Path, changes: list[str]) -> dict[str, float]:
    """Evaluation metrics of the newest checkpoint of a run folder."""
    file = folder / configs.FILE
    if not file.exists():
        raise UserError(f"{folder}: no run here ({configs.FILE} is missing)")
    config = overrides.thaw(configs.from_json(file.read_text()).unlock())
    for change in changes:
        overrides.apply(config, change)
    config = overrides.freeze(config)
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


def model_metrics(model: str, weights: str, source: sources.Source, batch_size: int, dtype: str) -> dict[str, float]:
    """top1, top5 and loss of one network on a source, at the network's own image size, crop and normalisation."""
    spec = backbones.input_spec(model)
    variables = dict(checkpoint.load_official(model, weights, num_classes=source.num_classes))
    net = classify.network(model, source.num_classes, spec.size, dtype=dtype)
    params, model_state = jax.device_put(variables.pop("params")), jax.device_put(variables)

    @jax.jit
    def step(batch):
        logits, _, _ = net.apply(params, model_state, classify.unit(batch["image"]))
        return classify.accuracy(logits, batch["label"], batch["mask"])

    transform = transforms.build(train=False, size=spec.size, crop=spec.crop)
    found = pipeline.eval_batches(source, transform, batch_size=batch_size)
    return loop.total(step(jax.tree.map(jnp.asarray, batch)) for batch in found)


def table(metrics: dict[str, float]) -> Table:
    """Rows are networks, columns are metrics."""
    cells = {}
    for name, value in metrics.items():
        network, _, metric = name.rpartition("/")
        cells.setdefault(network, {})[metric] = value
    columns = list(dict.fromkeys(metric for row in cells.values() for metric in row))
    shown = Table("network", *columns)
    for network, row in cells.items():
        shown.add_row(network or "model", *(f"{row[c]:.4f}" if c in row else "" for c in columns))
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
    found.add_argument("--batch-size", type=int, default=64)
    found.add_argument("--dtype", default="float32", help="of the computation")
    found.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return found


@cli
def main(argv: list[str]) -> int:
    options, changes = configs.parse_args(parser(), argv)
    if options.run:
        metrics = run_metrics(options.run, changes)
    elif options.model and options.weights and options.data:
        kind, path = ("digits", None) if options.data == "digits" else (None, options.data)
        source = sources.source(kind, path, options.split)
        metrics = model_metrics(options.model, options.weights, source, options.batch_size, options.dtype)
    else:
        raise UserError("give --run, or --model with --weights and --data (--help shows examples)")
    if options.json:
        print(json.dumps(metrics))
    else:
        Console().print(table(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main())
