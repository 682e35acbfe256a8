"""Finds PPT's threshold for a network and images of your own.

    python -m launch.calibrate --model deit_small_patch16_224 --weights deit.pth --data /data/imagenet \\
        --reduce ppt:r=50,blocks=3+6+9 --share 0.5
    python -m launch.calibrate --run runs/tokens_dense --reduce ppt:r=16,blocks=1+3+4 --images 2000

Prints for every block the threshold that prunes the share of the images, and pools the others, block after block, and
what to hand to `launch.evaluate --reduce`. Images are spread evenly over the split and not augmented.
"""

import argparse
import sys
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.table import Table

from launch import evaluate, export
from research import tokens
from research.core import errors, storage
from research.core.errors import UserError
from research.data import sources, transforms
from research.layers import reduction
from research.tokens import calibrate
from research.tokens.ppt import PPT


def images(source: sources.Source, transform: transforms.Eval, count: int, batch_size: int) -> Iterator[np.ndarray]:
    """Batches (B, H, W, 3) in [0, 1] of `count` images spread evenly over the source, of all where it has fewer."""
    chosen = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))
    for first in range(0, len(chosen), batch_size):
        found = np.stack([transform(source[int(i)], None)["image"] for i in chosen[first : first + batch_size]])
        yield found.astype(np.float32) / 255 if found.dtype == np.uint8 else found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m launch.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--run", type=storage.folder, help="folder of a finished run")
    found.add_argument("--arm", default="", help="which of its networks")
    found.add_argument("--model", help="a ViT of research.backbones")
    found.add_argument("--weights", help="its checkpoint, .safetensors or .pth")
    found.add_argument("--data", help="folder, .zip or .npz of images, or 'digits'; that of the run by default")
    found.add_argument("--split", default="train", help="part of the data, 'train' by default")
    found.add_argument("--size", type=int, help="side of the images, if not the model's own")
    found.add_argument("--reduce", required=True, metavar="ppt:KEY=VALUE,…", help="PPT's options, without threshold")
    found.add_argument("--share", type=float, default=0.5, help="of the images to prune in every block (0.5)")
    found.add_argument("--images", type=int, default=512, help="how many images decide (512)")
    found.add_argument("--batch-size", type=int, default=64, help="images at a time (64)")
    return found


def _asked(options: argparse.Namespace):
    """(network, variables, source, transform) of the options."""
    if bool(options.run) == bool(options.model and options.weights and options.data):
        raise UserError("give --run, or --model with --weights and --data (--help shows examples)")
    if not options.run:
        network, variables = export.of_model(options.model, options.weights, size=options.size)
        source = sources.source(*evaluate.place(options.data), options.split)
        return network, variables, source, evaluate.eval_transform(network)
    config = evaluate.run_config(options.run, [])
    arm = options.arm or min(config.students) * (len(config.students) == 1)
    network, variables = export.of_run(options.run, arm)
    d = config.data
    where, more = (evaluate.place(options.data), {}) if options.data else ((d.kind, d.path), d.options)
    transform = transforms.build(train=False, size=config.eval.size, crop=config.eval.crop)
    return network, variables, sources.source(*where, options.split, **more), transform


@errors.cli
def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    for name in ("images", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 1 or more")
    asked = reduction.build(tokens.parse(options.reduce))
    if not isinstance(asked, PPT):
        raise UserError(f"--reduce: {options.reduce} has no threshold; PPT has one, ppt:r=50,blocks=3+6+9")
    network, variables, source, transform = _asked(options)
    if not hasattr(network.module, "reduce"):
        raise UserError(f"--model: {network.name} has no tokens to reduce; vit_*, deit* and lvvit_* have")
    params = variables.pop("params")
    batches = list(images(source, transform, options.images, options.batch_size))
    variances = calibrate.measured(network, params, variables, lambda: batches)
    found = calibrate.calibrated(asked, variances, options.share)
    print(f"{network.name}: {sum(map(len, batches))} images, {options.share:g} of them pruned in every block")
    shown = Table("block", "threshold")
    for block, threshold in zip(found.blocks, found.threshold, strict=True):
        shown.add_row(str(block), f"{threshold:.9g}")
    Console(highlight=False).print(shown)
    print("threshold=" + "+".join(f"{threshold:.9g}" for threshold in found.threshold) + "+" * (len(found.blocks) == 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
