"""Hint methods on feature maps with trained adaptors: AB, VID, OFD, SRRL, FT.

Builders as in `hints`: options in, a `Hint` out. Endpoint names are None for all stages, or the last for methods of one
map. Losses are unweighted; the published weights are in the README.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core import scope
from research.distill import activations, factors, features, maps, taps
from research.distill.hints import Hint, adapted, zeros
from research.distill.numerics import until, wide

Names = tuple[str, ...] | None


class Each(nn.Module):
    """One module a map: [(B, H, W, C)] -> [module(map)]."""

    modules: tuple[nn.Module, ...]

    def __call__(self, x: list[jax.Array], **options) -> list:
        return [module(one, **options) for module, one in zip(self.modules, x, strict=True)]


def ab(
    *,
    student: Names = None,
    teacher: Names = None,
    margin: float = 1.0,
    init_epochs: float | None = None,
    group: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """Activation boundaries of maps before ReLU, 3 / 1000 of the sum over stages of 2^(i - n + 1) `activations.ab`.

    The student's maps pass a `features.ConvReg` without ReLU.

    Args:
      init_epochs: epochs in which it acts; RepDistiller trains with it alone before the labels. None is always.
      group: examples a batch-norm group of the adaptors.
    """
    names = student, teacher

    def call(student, teacher, key):
        own, known = zip(*taps.pairs(student, teacher, names, preact=True), strict=True)
        options = {"relu": False, "group": group, "dtype": dtype}
        modules = tuple(features.ConvReg(t.shape[-1], t.shape[1:3], **options) for t in known)
        return Each(modules), (list(own),)

    def loss(out, teacher, epoch):
        known = taps.stages(teacher, names[1], preact=True)[-len(out) :]
        values = [
            2.0 ** (k + 1 - len(out)) * activations.ab(s, t, margin=margin)
            for k, (s, t) in enumerate(zip(out, known, strict=True))
        ]
        total = 3 / 1000 * sum(values)
        return total * until(epoch, init_epochs).astype(total.dtype)

    return adapted(call, loss)


def vid(
    *,
    student: Names = None,
    teacher: Names = None,
    variance: float = 5.0,
    eps: float = 1e-5,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """Variational information distillation: the sum over stages of `activations.vid`, log-scales trained."""
    names = student, teacher

    def call(student, teacher, key):
        found = taps.pairs(student, teacher, names)
        modules = tuple(activations.Likelihood(t.shape[-1], variance, eps, dtype) for _, t in found)
        return Each(modules), ([maps.same_size(s, t)[0] for s, t in found],)

    def loss(out, teacher, epoch):
        known = taps.stages(teacher, names[1])[-len(out) :]
        return sum(activations.vid(*gaussian, t) for gaussian, t in zip(out, known, strict=True))

    return adapted(call, loss, normed=False)


def _batch_margin(teacher: jax.Array) -> jax.Array:
    """The mean of the negative activations of the whole batch, (C,)."""
    (x,) = wide(jax.lax.stop_gradient(teacher))
    negative = x < 0
    axes = tuple(range(x.ndim - 1))
    total, count = scope.total((jnp.sum(jnp.where(negative, x, 0), axes), jnp.sum(negative, axes).astype(x.dtype)))
    return total / jnp.maximum(count, 1)


def ofd(
    *,
    student: Names = None,
    teacher: Names = None,
    norms: list[tuple[jax.Array, jax.Array]] | None = None,
    group: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """Overhaul of feature distillation on maps before ReLU: the sum over stages of `activations.ofd` / 2^(n - 1 - i).

    Args:
      norms: (scale, bias) (C,) of the teacher's last batch norm in every stage, which set the margins, as in the
        official code; kept in the state. None takes the mean negative activation of the global batch, the paper's
        other way.
      group: examples a batch-norm group of the connectors.
    Raises:
      ValueError: norms for another number of stages.
    """
    names = student, teacher

    def call(student, teacher, key):
        own, known = zip(*taps.pairs(student, teacher, names, preact=True), strict=True)
        if norms is not None and len(norms) != len(own):
            raise ValueError(f"ofd: norms of {len(norms)} stages for {len(own)}")
        return Each(tuple(activations.Connector(t.shape[-1], group=group, dtype=dtype) for t in known)), (list(own),)

    def within(kept):
        def loss(out, teacher, epoch):
            known = taps.stages(teacher, names[1], preact=True)[-len(out) :]
            margins = [activations.margins(*n) for n in kept] if kept else list(map(_batch_margin, known))
            stages = zip(out, known, margins, strict=True)
            return sum(activations.ofd(*stage) / 2 ** (len(out) - 1 - k) for k, stage in enumerate(stages))

        return adapted(call, loss)

    def init(key, student, teacher):
        params, state = within(None).init(key, student, teacher)
        return params, {**state, "norms": jax.tree.map(jnp.asarray, norms or [])}

    def apply(params, state, student, teacher, **extra):
        kept = state["norms"]
        loss, new = within(kept).apply(params, {"batch_stats": state["batch_stats"]}, student, teacher, **extra)
        return loss, {**new, "norms": kept}

    return Hint(init, apply)


def srrl(
    kernel: jax.Array,
    bias: jax.Array,
    *,
    student: str | None = None,
    feature_weight: float = 1.0,
    logit_weight: float = 1.0,
    group: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """Softmax regression representation learning: `features.srrl` of the student's last map and the teacher's `pooled`.

    Args:
      kernel, bias: (C, classes) and (classes,) of the teacher's last layer, kept in the state.
      group: examples a batch-norm group of the connector.
    Raises:
      ValueError: a classifier of another width than the teacher's.
    """

    def module(teacher):
        width = taps.tap(teacher, "pooled").shape[-1]
        if kernel.shape[0] != width:
            raise ValueError(f"srrl: a classifier of {kernel.shape[0]} inputs for a teacher's feature of {width}")
        return activations.Connector(width, relu=True, group=group, dtype=dtype)

    def init(key, student_endpoints, teacher):
        variables = module(teacher).init(key, taps.last_stage(zeros(student_endpoints), student), train=False)
        frozen = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        return variables["params"], {"batch_stats": variables["batch_stats"], "classifier": frozen}

    def apply(params, state, student_endpoints, teacher, *, labels=None, index=None, key=None, epoch=0):
        own, known = taps.last_stage(student_endpoints, student), taps.tap(teacher, "pooled")
        variables = {"params": params, "batch_stats": state["batch_stats"]}
        out, new = module(teacher).apply(variables, own, mutable=["batch_stats"])
        weights = {"feature_weight": feature_weight, "logit_weight": logit_weight}
        values = features.srrl(jnp.mean(out, axis=(1, 2)), known, **state["classifier"], **weights)
        return jnp.mean(values), {**state, **new}

    return Hint(init, apply)


def ft(
    *,
    student: str | None = None,
    teacher: str | None = None,
    rate: float = 0.5,
    power: int = 2,
    order: int = 1,
    whole: bool = False,
    init_epochs: float = 30,
    group: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """Factor transfer on the last map: `factors.factor` of a translator's and a paraphraser's output.

    In the first `init_epochs` epochs the loss is the paraphraser's reconstruction error and teaches the student
    nothing; then a copy of it, kept in the state, is frozen and the student's transfer begins. RepDistiller spends 30
    epochs on the paraphraser alone, before the student's.

    Args:
      rate: channels of the factor, of the teacher's.
      power, order, whole: of `factors.factor`.
      group: examples a batch-norm group of the translator.
    """
    paraphraser = factors.Paraphraser(rate, dtype=dtype)

    def translator(known):
        return factors.Translator(int(known.shape[-1] * rate), group=group, dtype=dtype)

    def tapped(student_endpoints, teacher_endpoints):
        return taps.last_stage(student_endpoints, student), taps.last_stage(teacher_endpoints, teacher)

    def init(key, student_endpoints, teacher_endpoints):
        own, known = tapped(zeros(student_endpoints), zeros(teacher_endpoints))
        keys = jax.random.split(key)
        translated = translator(known).init(keys[0], own, train=False)
        paraphrased = paraphraser.init(keys[1], known, train=False)["params"]
        params = {"translator": translated["params"], "paraphraser": paraphrased}
        # A copy: the loop donates buffers, which parameters and state must not share.
        frozen = jax.tree.map(jnp.copy, paraphrased)
        return params, {"batch_stats": translated["batch_stats"], "paraphraser": frozen}

    def apply(params, state, student_endpoints, teacher_endpoints, *, labels=None, index=None, key=None, epoch=0):
        own, known = tapped(student_endpoints, teacher_endpoints)
        first = until(epoch, init_epochs) > 0
        _, rebuilt = paraphraser.apply({"params": params["paraphraser"]}, known)
        choose = lambda new, old: jnp.where(first, jax.lax.stop_gradient(new), old)
        frozen = jax.tree.map(choose, params["paraphraser"], state["paraphraser"])
        known_factor, _ = paraphraser.apply({"params": frozen}, known)
        variables = {"params": params["translator"], "batch_stats": state["batch_stats"]}
        own_factor, new = translator(known).apply(variables, own, mutable=["batch_stats"])
        transfer = jnp.mean(factors.factor(own_factor, known_factor, power=power, order=order, whole=whole))
        loss = jnp.where(first, jnp.mean(features.mse(rebuilt, known)), transfer)
        return loss, {**new, "paraphraser": frozen}

    return Hint(init, apply)
