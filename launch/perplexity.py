"""Perplexity of a language model on text.

    python -m launch.perplexity --model runs/lm/model --data text.zip --files wikitext2/test.txt --context 256
    python -m launch.perplexity --model /models/Llama-2-7B-GPTQ --data wikitext-2/wiki.test.raw

The model is a folder of Hugging Face's form (LLaMA, OPT), in real numbers or of few bits as AutoGPTQ and AutoAWQ write
it; `launch.convert --run` makes one of a training, `launch.quantize` one of few bits. Texts are files of a folder or
zip, one after the other. The protocol is that of papers on compressed models: windows of `--context` tokens that do not
overlap, nothing asked of a window's first token. Prints a table, or with --json one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import tokenizers
from rich.console import Console
from rich.table import Table

from research.core import config as configs
from research.core import storage
from research.core.errors import UserError, cli
from research.data import text as texts
from research.language import checkpoint, perplexity, tokens
from research.language.causal import CausalModel
from research.quantize import checkpoints, inputs, rules

CONTEXT = 2048
BATCH_SIZE = 4


def is_few(folder: storage.Path) -> bool:
    """Whether the arrays of a model's folder are of few bits."""
    config = checkpoint.read_json(folder / "config.json")
    return "quantization_config" in config or any((folder / name).is_file() for name in checkpoints.SETTINGS_FILES)


def load(folder: storage.Path, dtype: str = "float32") -> tuple[Callable, checkpoint.Pretrained]:
    """(apply, model with variables and config) of a folder, whose arrays and inputs may be of few bits."""
    few, (settings, steps) = is_few(folder), inputs.read(folder)
    found = (checkpoints if few else checkpoint).load(folder, dtype=jnp.dtype(dtype))
    if not isinstance(found.model, CausalModel):
        kind = type(found.model).__name__
        raise UserError(f"--model: {folder} holds a {kind}, which predicts no next token; give a LLaMA or an OPT")
    return (rules.apply(found.model, settings, steps) if few or settings else found.model.apply), found


def read(options: argparse.Namespace, found: checkpoint.Pretrained) -> tuple[tokenizers.Tokenizer, np.ndarray, str]:
    """(tokeniser, tokens (T,), text) that the options name, for the model that was found."""
    text = texts.BETWEEN.join(texts.read(options.data, options.files.split(","), "--files"))
    tokenizer = tokens.load(options.tokenizer or options.model)
    ids = tokens.encode(tokenizer, text)
    if len(ids) and np.max(ids) >= found.model.vocab_size:
        raise UserError(
            f"--tokenizer: it writes token {np.max(ids)}, but the model knows {found.model.vocab_size}: it is another "
            "model's"
        )
    return tokenizer, ids, text


def context_of(options: argparse.Namespace, found: checkpoint.Pretrained, most: int) -> int:
    """Tokens of a window, of a text of `most`: as asked for, or the model's."""
    context = options.context or min(found.config.get("max_position_embeddings") or CONTEXT, CONTEXT)
    if context < 2 or most < context:
        raise UserError(f"--context: {context}; give at least 2, and at most the text's {most} tokens")
    return context


def measure(options: argparse.Namespace) -> perplexity.Score:
    """The score of a model on the text that the options name."""
    apply, found = load(options.model, options.dtype)
    _, ids, text = read(options, found)
    context = context_of(options, found, len(ids))
    return perplexity.score(apply, found.variables, ids, text, context=context, batch=options.batch_size)


def table(score: perplexity.Score) -> Table:
    """One row of what was measured."""
    shown = Table(*(name.replace("_", " ") for name in score._fields))
    shown.add_row(*(f"{value:,}" if isinstance(value, int) else f"{value:#.6g}" for value in score))
    return shown


def add_options(found: argparse.ArgumentParser, batch_size: int) -> None:
    """What a model and a text to read with it are named by; `batch_size` by default."""
    found.add_argument("--model", required=True, type=storage.folder, metavar="FOLDER", help="config.json and weights")
    found.add_argument("--data", required=True, help="folder, .zip or text file")
    found.add_argument("--files", default="*", metavar="NAME,…", help="those of the folder or zip, * for anything; all")
    found.add_argument("--tokenizer", help="its file or folder, if not in the model's")
    found.add_argument("--context", type=int, help=f"tokens of a window; the model's, at most {CONTEXT}, by default")
    found.add_argument("--batch-size", type=int, default=batch_size, help=f"windows at a time, {batch_size} by default")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m launch.perplexity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(found, BATCH_SIZE)
    found.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return found


@cli
def main(argv: list[str]) -> int:
    options, extra = configs.parse_args(parser(), argv)
    if extra:
        raise UserError(f"{extra[0]}: a model has no config to change")
    if options.batch_size < 1:
        raise UserError(f"--batch-size: {options.batch_size} is not above 0")
    score = measure(options)
    if options.json:
        print(json.dumps(score._asdict()))
    else:
        Console().print(table(score))
    return 0


if __name__ == "__main__":
    sys.exit(main())
