"""Perplexity of one model quantised by every method: `python -m launch.bench lowbit --model runs/lm/model …`.

    python -m launch.bench lowbit --model runs/lm/model --data text.zip --files wikitext2/valid.txt \\
        --test wikitext2/test.txt --out runs/lowbit.jsonl

For each setting (W2A16 is 2 bits for weights and none for activations, `g64` a scale for each 64 inputs, else one for
each output), method and seed of the calibration texts it quantises the blocks and adds a line to `--out`: perplexity;
divergence, the mean over tokens of KL(real model || quantised model), in thousandths of a nat, which tells methods
apart where perplexity hardly does; seconds; and the relative error of what leaves the last block. What the file has
already is not done again. Prints means and standard deviations over seeds. Embeddings, norms and head keep their
numbers.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from launch import perplexity as measuring
from launch.bench_matmul import bits_of
from research.core import storage
from research.core.errors import UserError
from research.data import text as texts
from research.language import perplexity, tokens
from research.quantize import calibration, methods, rules
from research.quantize.rules import Rule

REAL = "real"
SCORES = ("perplexity", "divergence")
METHODS = (
    "rtn",
    "smoothquant",
    "gptq:act_order=true",
    "awq",
    "omniquant:epochs=5,texts=4",
    "brecq:iterations=150,texts=4,rate=0.04,input_iterations=60,input_rate=2e-3",
    "cbq:window=1,overlap=0",
    "cbq",
)
WITHOUT_DATA = ("rtn",)
GRIDS = {"awq": "awq", "omniquant": "omniquant"}  # as published; all others "gptq"
SETTINGS = ("W4A16", "W4A16g64", "W3A16", "W3A16g64", "W2A16", "W2A16g64", "W4A8", "W4A4")


def setting(text: str, grid: str = "gptq") -> Rule:
    """The rule of `W4A8` or `W2A16g64` for all layers of all blocks, on a grid of `research.quantize.grids`.

    Raises:
      UserError: another form.
    """
    name, grouped, group = text.partition("g")
    bits, inputs = bits_of(name, "--settings")
    if grouped and not group.isdecimal():
        raise UserError(f"--settings: {text!r} has no number of inputs to a scale after g, as W2A16g64 has")
    return Rule("^layers_", bits, int(group) if grouped else None, inputs, grid, pad=True)


class Scorer:
    """Scores a model of few bits on a text, beside the model that it was made of.

    Args:
      apply, params: of that model.
      tokens: the text, (T,) int; context: tokens of a window; batch: windows at a time, a remainder is left out.
    """

    def __init__(self, apply, params, tokens: np.ndarray, context: int, batch: int):
        rows = perplexity.windows(tokens, context)
        self.rows = rows[: max(len(rows) // batch, 1) * batch].reshape(-1, min(batch, len(rows)), context)
        self.real = [np.asarray(_log_probabilities(apply, params, part)) for part in self.rows]

    def __call__(self, apply, params) -> tuple[float, float]:
        """(perplexity, divergence in thousandths of a nat)."""
        pairs = zip(self.rows, self.real, strict=True)
        loss, divergence = np.mean([_scored(apply, params, part, real) for part, real in pairs], axis=0)
        return math.exp(loss), 1e3 * float(divergence)


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(apply, params, tokens):
    return jax.nn.log_softmax(apply({"params": params}, tokens)[0])


@functools.partial(jax.jit, static_argnums=0)
def _scored(apply, params, tokens, real):
    found = _log_probabilities(apply, params, tokens)
    loss = -jnp.mean(jnp.take_along_axis(found[:, :-1], tokens[:, 1:, None], axis=-1))
    return loss, jnp.mean(jnp.sum(jnp.exp(real) * (real - found), axis=-1))


def measure(options: argparse.Namespace, console: Console) -> list[dict]:
    """All lines, those that were there included."""
    apply, found = measuring.load(options.model)
    tokenizer, params = tokens.load(options.model), found.variables["params"]

    def encoded(files: str, key: str) -> np.ndarray:
        return tokens.encode(tokenizer, texts.BETWEEN.join(texts.read(options.data, files.split(","), key)))

    calibrating, test = encoded(options.files, "--files"), encoded(options.test, "--test")
    test = test[: options.windows * options.context] if options.windows else test
    score = Scorer(apply, params, test, options.context, options.batch)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    have = {(line["setting"], line["method"], line["seed"]) for line in lines}

    def add(setting: str, method: str, seed: int, scores: tuple[float, float], seconds: float, error: float) -> None:
        line = {"setting": setting, "method": method, "seed": seed, "seconds": seconds, "error": error}
        lines.append(line | dict(zip(SCORES, scores, strict=True)))
        with options.out.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        console.print(f"{setting} {method} seed {seed}: {scores[0]:.2f}, {scores[1]:.2f}, {seconds:.0f} s")

    if (REAL, REAL, 0) not in have:
        add(REAL, REAL, 0, score(apply, params), 0.0, 0.0)
    for asked in options.settings:
        own = rules.apply(found.model, (setting(asked),))  # compiled once for all that have no steps
        for name in options.methods:
            built, rule = methods.build(name), setting(asked, GRIDS.get(name.partition(":")[0], "gptq"))
            for seed in options.seeds if name not in WITHOUT_DATA else options.seeds[:1]:
                if (asked, name, seed) in have:
                    continue
                begin = time.perf_counter()
                data = calibration.draw(calibrating, options.texts, options.context, seed)
                result = calibration.calibrate(found.model, params, data, (rule,), built, seed=seed, progress=str)
                seconds = time.perf_counter() - begin
                run = rules.apply(found.model, (rule,), result.steps) if result.steps else own
                scores = score(run, rules.dequantize_params(result.params))
                add(asked, name, seed, scores, seconds, result.errors[-1])
    return lines


def table(lines: Sequence[dict], score: str) -> Table:
    """A row for each method, a column for each setting: mean and standard deviation of a score over seeds."""
    settings = list(dict.fromkeys(line["setting"] for line in lines if line["setting"] != REAL))
    shown = Table("", *settings, title=f"{score}; real numbers {lines[0][score]:.2f}", title_justify="left")
    for name in dict.fromkeys(line["method"] for line in lines if line["method"] != REAL):
        cells = []
        for asked in settings:
            found = [line[score] for line in lines if (line["setting"], line["method"]) == (asked, name)]
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.2f}{spread}" if found else "")
        shown.add_row(name, *cells)
    return shown


def parser() -> argparse.ArgumentParser:
    """The options of `bench lowbit`."""
    found = argparse.ArgumentParser(
        prog="python -m launch.bench lowbit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", required=True, type=storage.folder, metavar="FOLDER", help="config.json and weights")
    found.add_argument("--data", required=True, help="folder, .zip or text file")
    found.add_argument("--files", default="*", metavar="NAME,…", help="those to calibrate on")
    found.add_argument("--test", required=True, metavar="NAME,…", help="those whose perplexity is measured")
    found.add_argument("--out", required=True, type=storage.folder, metavar="FILE", help="a line for each result")
    found.add_argument("--settings", nargs="+", default=SETTINGS, help="W4A16, W2A16g64, …")
    found.add_argument("--methods", nargs="+", default=METHODS, help="such as gptq:act_order=true")
    found.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="of calibration texts and methods")
    found.add_argument("--texts", type=int, default=64, help="calibration texts")
    found.add_argument("--context", type=int, default=256, help="tokens of a text and of a test window")
    found.add_argument("--windows", type=int, default=0, help="test windows; 0: all")
    found.add_argument("--batch", type=int, default=8, help="test windows at a time")
    return found


def main(argv: list[str]) -> int:
    options, console = parser().parse_args(argv), Console()
    lines = measure(options, console)
    for score in SCORES:
        console.print(table(lines, score))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
