"""Training of causal language models: each token is predicted from those before it in its window.

The recipe is that of the LLaMA papers (Touvron et al. 2023, arXiv 2302.13971, section 2.2): AdamW with betas 0.9 and
0.95, decay of matrices alone, gradients clipped to norm 1, a warm-up and a cosine; all of it is in the config's
`optimizer` and `schedule`. Data is `data.kind=text`.
"""

import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tokenizers import Tokenizer

from research import language
from research.core import config as configs
from research.core import cost, optim, schedules, storage
from research.core import experiment as engine
from research.core.errors import UserError
from research.data.text import TOKENIZER, context_of
from research.language import llama, opt
from research.language.checkpoint import Pretrained
from research.language.losses import IGNORED_LABEL, next_token_loss, token_losses
from research.port.checkpoint import load_variables

FAMILIES = {"llama": llama, "opt": opt}
WEIGHTS = "weights/model.safetensors"
SPECIALS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>"}


def network(section: Mapping, vocab: int) -> nn.Module:
    """The model of a config's section `model`: `family`, `dtype` of the computation, `options` of the constructor.

    Args:
      section: it; its vocabulary is that of the tokeniser where `options` have no `vocab_size`.
      vocab: tokens that the tokeniser has.
    Raises:
      UserError: an unknown family, an option that it does not have, a vocabulary smaller than the tokeniser's.
    """
    if section.family not in FAMILIES:
        raise UserError(f"model.family: no {section.family!r}; it is one of {', '.join(FAMILIES)}")
    options = {"vocab_size": vocab, **section.options}
    if options["vocab_size"] < vocab:
        raise UserError(
            f"model.options.vocab_size: {options['vocab_size']}, but the tokeniser has {vocab} tokens: raise it, or "
            "lower data.options.vocab"
        )
    try:
        return FAMILIES[section.family].build(**options, dtype=jnp.dtype(section.dtype))
    except TypeError as error:
        raise UserError(f"model.options: {error}") from None


def trained(run: str | os.PathLike) -> Pretrained:
    """The model of a finished run, as `research.language.checkpoint.load` gives those of Hugging Face's folders.

    Its config has the ids of the tokeniser's special tokens and, as `max_position_embeddings`, the training's context.

    Raises:
      UserError: no run there, one of something else, or one that is not finished.
    """
    root = storage.folder(run)
    files = [root / name for name in (configs.FILE, TOKENIZER, WEIGHTS)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{root}: no finished run of a language model ({file.relative_to(root)} is missing)")
    config, tokenizer = configs.from_json(files[0].read_text()), Tokenizer.from_str(files[1].read_text())
    model, context = network(config.model, tokenizer.get_vocab_size()), context_of(config.data.options)
    ids = {f"{name}_token_id": tokenizer.token_to_id(token) for name, token in SPECIALS.items()}
    stated = {"max_position_embeddings": context} | {name: value for name, value in ids.items() if value is not None}
    return Pretrained(model, load_variables(files[2]), stated)


def experiment(config, labels: Callable[[], np.ndarray] | None = None) -> engine.Experiment:
    """The Experiment of a resolved config (`data.num_classes`, `steps`, `steps_per_epoch` known).

    Batches have `tokens` (B, N) int32. The metric `loss` is the mean cross-entropy of a token, of the training batch
    and, exactly, of all windows of the evaluation; its exponential is their perplexity.

    Args:
      config: see configs.common and configs.language.
      labels: not used; what all experiments are given.
    Raises:
      UserError: see `network`.
    """
    del labels
    model, c = network(config.model, config.data.num_classes), config
    schedule = schedules.schedule(lr=c.optimizer.lr, steps=c.steps, steps_per_epoch=c.steps_per_epoch, **c.schedule)
    options = {key: value for key, value in c.optimizer.items() if key not in ("lr", "options")}
    optimizer = optim.optimizer(lr=schedule, **options, **c.optimizer.options)

    def init(key):
        return language.init(model, key)["params"], {}

    def loss(params, model_state, batch, context):
        rngs = {"dropout": context.key}
        logits, _ = model.apply({"params": params}, batch["tokens"], train=True, rngs=rngs)
        value = next_token_loss(logits, batch["tokens"])
        return value, engine.Output(model_state, {"loss": engine.scalar(value)})

    def evaluate(params, model_state, batch, frozen):
        del model_state, frozen
        logits, _ = model.apply({"params": params}, batch["tokens"])
        asked = jnp.where(batch["mask"][:, None] > 0, batch["tokens"][:, 1:], IGNORED_LABEL)
        total, count = token_losses(logits[:, :-1], asked)
        return {"loss": (total, count.astype(jnp.float32))}

    def costs():
        shapes = language.shapes(model)
        window = jax.ShapeDtypeStruct((1, context_of(c.data.options)), jnp.int32)
        macs = cost.macs(lambda *given: model.apply(*given)[0], shapes, window)
        return {"model": {"params": cost.params_count(shapes), "macs": macs}}

    made = engine.supervised(
        init, loss, evaluate, optimizer, schedule=schedule, accumulate=c.parallel.accumulate, ema=tuple(c.ema)
    )
    return made._replace(costs=costs)
