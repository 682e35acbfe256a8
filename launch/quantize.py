"""Quantises a language model with calibration texts.

    python -m launch.quantize --model /models/Llama-2-7B --out w2 --method cbq:epochs=3 --bits 2 --group 64 \\
        --data text.zip --files wikitext2/train.txt --texts 128 --work w2.work
    python -m launch.quantize --model runs/lm/model --out w4a8 --method gptq --bits 4 --activation-bits 8 \\
        --data text.txt --context 256 --layout autoawq
    python -m launch.perplexity --model w2 --data text.zip --files wikitext2/test.txt

The model is a folder of Hugging Face's form (LLaMA, OPT); embeddings and head stay as they are. Texts are windows of
`--context` tokens from random places of the files, one after the other. With `--work` activations and finished blocks
are kept there, and the same command goes on where it was stopped.

`--layout` is how weights are written: as AutoGPTQ or AutoAWQ do, in few bits with scales of 16, or `real`, the numbers
that codes stand for in the model's own form, for bits that no layout holds. Rounded inputs are stated in `inputs.json`
beside them, which `launch.perplexity` reads and other programs do not.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from launch import perplexity
from research.core import config as configs
from research.core import storage
from research.core.errors import UserError, cli
from research.data.text import TOKENIZER
from research.language import checkpoint
from research.language.causal import CausalModel
from research.quantize import calibration, checkpoints, grids, inputs, methods, rules
from research.quantize.layouts import LAYOUTS
from research.quantize.quantized import Quantized
from research.quantize.rules import Rule

REAL = "real"
WAYS = (*checkpoints.FORMATS.values(), REAL)
TEXTS, BATCH_SIZE = 128, 8
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")  # copied as they are


def load(folder: storage.Path, dtype: str) -> checkpoint.Pretrained:
    """The model in `folder` in real numbers, parameters in the file's dtypes."""
    if perplexity.is_few(folder):
        raise UserError(f"--model: {folder} has few bits already; give the model in real numbers")
    found = checkpoint.load(folder, param_dtype=None, dtype=jnp.dtype(dtype))
    if not isinstance(found.model, CausalModel):
        raise UserError(f"--model: {folder} holds a {type(found.model).__name__}; LLaMA and OPT are quantised")
    return found


def settings_of(options: argparse.Namespace) -> tuple[Rule, ...]:
    """The rule of all blocks."""
    try:
        return (Rule("^layers_", options.bits, options.group, options.activation_bits, options.grid, options.pad),)
    except ValueError as error:
        raise UserError(f"--bits, --group, --activation-bits: {error}") from None


def check_layout(layout: str, params: dict, settings: tuple[Rule, ...], method: calibration.Method) -> None:
    """Raises UserError for kernels that `layout` cannot hold, before anything is calibrated."""
    moves = getattr(method, "act_order", False) and not method.static_groups
    if layout == REAL:
        return
    shape = lambda layer: functools.reduce(dict.__getitem__, layer.split("/"), params)["kernel"].shape
    found = rules.match(params, settings)
    for (k, n), layer in {shape(layer): layer for layer in reversed(found)}.items():  # the first of each shape
        rule = found[layer]
        group = min(rule.group or k, k)
        order = np.arange(k, dtype=np.int32) if moves and rule.group else None
        codes, scales = np.zeros((-(-k // group) * group, n), np.uint8), np.ones((-(-k // group), n), np.float32)
        try:
            LAYOUTS[layout].write(Quantized(codes, scales, scales, order, rule.bits, 0, group, k))
        except ValueError as error:
            raise UserError(f"--layout: {layer}: {error}; {REAL} holds everything") from None


def texts_of(options: argparse.Namespace, found: checkpoint.Pretrained) -> tuple[np.ndarray, str]:
    """(calibration texts (S, N), the tokeniser's file) of what the options name."""
    tokenizer, ids, _ = perplexity.read(options, found)
    context = perplexity.context_of(options, found, len(ids))
    return calibration.draw(ids, options.texts, context, options.seed), tokenizer.to_str()


def save(options: argparse.Namespace, found: checkpoint.Pretrained, result: calibration.Calibrated, settings) -> None:
    """Writes the folder, its real numbers in the dtypes of the model's."""
    kept = jax.tree.map(
        lambda like, x: x if rules.is_few(x) else np.asarray(x, like.dtype), found.variables["params"], result.params
    )
    if options.layout == REAL:
        shown = jax.tree.map(lambda like, x: np.asarray(x, like.dtype), found.variables["params"], _real(kept))
        checkpoint.save(options.out, found.model, {"params": shown}, found.config)
    else:
        try:
            checkpoints.save(options.out, found.model, {"params": kept}, found.config, layout=options.layout)
        except ValueError as error:
            raise UserError(f"--layout: {error}; {REAL} holds everything") from None
    inputs.write(options.out, result.params, settings, result.steps)


def _real(params: dict) -> dict:
    one = jax.jit(rules.dequantize_params)
    return jax.tree.map(lambda x: jax.device_get(one(x)) if rules.is_few(x) else x, params, is_leaf=rules.is_few)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m launch.quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known = ", ".join(methods.METHODS)
    perplexity.add_options(found, BATCH_SIZE)
    found.add_argument("--out", required=True, type=storage.folder, metavar="FOLDER", help="what is written")
    found.add_argument("--method", required=True, metavar="NAME:KEY=VALUE,…", help=f"{known}, with options")
    found.add_argument("--bits", required=True, type=int, help="of a weight, 1 to 8")
    found.add_argument("--group", type=int, help="inputs to a scale; a scale to each output by default")
    found.add_argument("--pad", action="store_true", help="let the last group have fewer inputs")
    found.add_argument(
        "--grid", choices=tuple(grids.RULES), default="gptq", help="of codes, see research.quantize.grids"
    )
    found.add_argument("--activation-bits", type=int, help="of the layers' inputs, 2 to 8; they stay by default")
    found.add_argument("--layout", choices=WAYS, default=WAYS[0], help=f"of the written weights, {WAYS[0]} by default")
    found.add_argument("--texts", type=int, default=TEXTS, help=f"how many windows, {TEXTS} by default")
    found.add_argument("--seed", type=int, default=0, help="of the windows' places and of what the method draws")
    found.add_argument("--work", type=storage.folder, metavar="FOLDER", help="kept on the way, to resume")
    found.add_argument("--overwrite", action="store_true", help="replace a model in --out")
    return found


@cli
def main(argv: list[str]) -> int:
    options, extra = configs.parse_args(parser(), argv)
    if extra:
        raise UserError(f"{extra[0]}: a model has no config to change")
    for name in ("texts", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(options, name)} is not above 0")
    if (options.out / "config.json").exists() and not options.overwrite:
        raise UserError(f"--out: {options.out} holds a model: choose another, or pass --overwrite")
    method, settings, found = methods.build(options.method), settings_of(options), load(options.model, options.dtype)
    check_layout(options.layout, found.variables["params"], settings, method)
    texts, tokenizer = texts_of(options, found)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), found.variables["params"])
    say = functools.partial(print, flush=True)
    asked = {"seed": options.seed, "batch": options.batch_size, "folder": options.work or "", "progress": say}
    result = calibration.calibrate(found.model, params, texts, settings, method, **asked)
    save(options, found, result, settings)
    storage.write(options.out / TOKENIZER, tokenizer)
    for name in filter(lambda name: (options.model / name).is_file(), BESIDE):
        storage.write(options.out / name, (options.model / name).read_bytes())
    say(f"{options.model} -> {options.out} ({options.method}, {options.bits} bits, {options.layout})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
