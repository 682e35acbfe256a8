"""Learning rate as a function of the step, with timm's meaning of epochs and warm-up."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


def schedule(
    name: str,
    *,
    lr: float,
    steps: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0.0,
    warmup_lr: float = 0.0,
    warmup_prefix: bool = False,
    warmup_reaches: bool = False,
    per_step: bool = False,
    behind: float = 0.0,
    min_lr: float = 0.0,
    decay_epochs: float = 30.0,
    milestones: Sequence[float] = (),
    decay_rate: float = 0.1,
) -> Schedule:
    """step (int, 0-based) -> learning rate of that step.

    "cosine" falls from `lr` to `min_lr` at the end of the run; "step" multiplies by `decay_rate` every `decay_epochs`;
    "multistep" does at each of the `milestones`, counted in completed epochs (timm decays one epoch earlier than this,
    PyTorch and the CIFAR recipes of distillation do not); "constant" stays.

    Args:
      lr: the highest rate.
      steps, steps_per_epoch: length of the run and of an epoch.
      warmup_epochs, warmup_lr: linear rise from `warmup_lr` to `lr`.
      warmup_prefix: False, as in timm: the decay has been running under the warm-up, so that after W warm-up epochs it
        stands at epoch W. True, as in big_vision and optax: it starts after the warm-up and takes the remaining epochs.
      warmup_reaches: False: the warm-up heads for `lr` at the first step after it. True, as in ConvNeXt's and
        VanillaNet's code (a `linspace`): its own last step (or epoch, without `per_step`) has `lr` already.
      per_step: False, as in timm: the rate is constant within an epoch. True: it changes with every step.
      behind: epochs that the rate lags, standing still at first. It is 1 in DeiT's training loop and its descendants,
        which ask timm's scheduler for the epoch that has just ended.
      min_lr: end of the cosine; the other decays stop there too.
    Raises:
      ValueError: an unknown name, a warm-up that does not fit into the run, "multistep" without milestones.
    """
    epochs = steps / steps_per_epoch
    if warmup_epochs and warmup_epochs >= epochs:
        raise ValueError(
            f"schedule.warmup_epochs={warmup_epochs:g} leaves nothing of a run of {epochs:g} epochs: shorten it"
        )
    if name == "multistep" and not milestones:
        raise ValueError("schedule.milestones is empty: name the epochs at which the 'multistep' rate falls")
    shift = warmup_epochs if warmup_prefix else 0.0
    passed = lambda t: sum(jnp.where(t >= milestone, 1.0, 0.0) for milestone in milestones)
    curves = {
        "constant": lambda t: jnp.full_like(t, lr),
        "cosine": lambda t: min_lr + (lr - min_lr) * (1 + jnp.cos(jnp.pi * jnp.clip(t / (epochs - shift), 0, 1))) / 2,
        "step": lambda t: jnp.maximum(lr * decay_rate ** jnp.floor(t / decay_epochs), min_lr),
        "multistep": lambda t: jnp.maximum(lr * decay_rate ** passed(t), min_lr),
    }
    if name not in curves:
        raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(curves)}")
    rise = warmup_epochs - (1 / steps_per_epoch if per_step else 1) * warmup_reaches
    curve, slope = curves[name], (lr - warmup_lr) / rise if rise > 0 else 0.0

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step)
        t = (step if per_step else step // steps_per_epoch).astype(float)
        t = jnp.maximum((t / steps_per_epoch if per_step else t) - behind, 0)
        return jnp.where(t < warmup_epochs, warmup_lr + slope * t, curve(t - shift))

    return rate
