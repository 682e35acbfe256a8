"""Hint methods that generate the teacher's features from masked ones: MGD, ViTKD."""

import jax
import jax.numpy as jnp

from research.core import scope
from research.distill import generation, taps
from research.distill.hints import Hint, zeros

MASKS = {"channel": (generation.channel_mask, 0.15), "spatial": (generation.spatial_mask, 0.65)}


def _uniform(name: str, key: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """U[0, 1) of `shape` (b, ...): the share of one draw for the global batch, on any number of devices."""
    if key is None:
        raise ValueError(f"{name} needs a random key: it draws masks")
    shares = 1 if scope.axis() is None else jax.lax.axis_size(scope.axis())
    return scope.local(jax.random.uniform(key, (shape[0] * shares, *shape[1:])))


def mgd(
    *,
    student: str | None = None,
    teacher: str | None = None,
    mask: str = "channel",
    ratio: float | None = None,
    alpha: float = 7e-5,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """Masked generative distillation of the last map: `generation.mgd`, its weight `alpha` included.

    Args:
      mask: "channel", as the official classification code, or "spatial", as the paper and the dense tasks.
      ratio: how much is masked; None is 0.15 of the channels or 0.65 of the positions.
      alpha: 2e-5 for dense tasks.
    Raises:
      ValueError: an unknown mask; at apply, no key, or maps of unequal sizes.
    """
    if mask not in MASKS:
        raise ValueError(f"mgd: mask={mask!r}: choose 'channel' or 'spatial'")
    draw, usual = MASKS[mask]

    def tapped(student_endpoints, teacher_endpoints):
        return taps.last_stage(student_endpoints, student), taps.last_stage(teacher_endpoints, teacher)

    def masked(key, known):
        batch, height, width, channels = known.shape
        shape = (batch, 1, 1, channels) if mask == "channel" else (batch, height, width, 1)
        return draw(_uniform("mgd", key, shape), usual if ratio is None else ratio)

    def init(key, student_endpoints, teacher_endpoints):
        own, known = tapped(zeros(student_endpoints), zeros(teacher_endpoints))
        module = generation.Masked(known.shape[-1], dtype)
        return module.init(key, own, jnp.ones((1, 1, 1, 1)))["params"], {}

    def apply(params, state, student_endpoints, teacher_endpoints, *, labels=None, index=None, key=None, epoch=0):
        own, known = tapped(student_endpoints, teacher_endpoints)
        generated = generation.Masked(known.shape[-1], dtype).apply({"params": params}, own, masked(key, known))
        return jnp.mean(generation.mgd(generated, known, alpha=alpha)), state

    return Hint(init, apply)


def vitkd(
    *,
    student: tuple[str, str, str] | None = None,
    teacher: tuple[str, str, str] | None = None,
    ratio: float = 0.5,
    alpha: float = 3e-5,
    beta: float = 3e-6,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """ViTKD: two shallow blocks mimicked, the last generated: `generation.vitkd`, its weights included.

    Args:
      student, teacher: endpoints of tokens, the last of which is generated; None takes the first two blocks and the
        last. Class tokens are dropped.
      ratio: how many tokens are masked.
    Raises:
      ValueError: at apply, no key.
    """
    names = student, teacher

    def tapped(student_endpoints, teacher_endpoints):
        found = []
        for endpoints, own in zip((student_endpoints, teacher_endpoints), names, strict=True):
            chosen = taps.blocks(endpoints, own, lambda blocks: [*blocks[:2], blocks[-1]])
            found.append([taps.patches(taps.tap(endpoints, name)) for name in chosen])
        return found

    def init(key, student_endpoints, teacher_endpoints):
        own, known = tapped(zeros(student_endpoints), zeros(teacher_endpoints))
        module = generation.TokenGeneration(known[-1].shape[-1], dtype)
        return module.init(key, own[:-1], own[-1], jnp.ones(own[-1].shape[:2]))["params"], {}

    def apply(params, state, student_endpoints, teacher_endpoints, *, labels=None, index=None, key=None, epoch=0):
        own, known = tapped(student_endpoints, teacher_endpoints)
        removed = generation.removed_tokens(_uniform("vitkd", key, own[-1].shape[:2]), ratio)
        module = generation.TokenGeneration(known[-1].shape[-1], dtype)
        out = module.apply({"params": params}, own[:-1], own[-1], removed)
        options = {"alpha": alpha, "beta": beta, "ratio": ratio}
        return jnp.mean(generation.vitkd(*out, known[:-1], known[-1], removed, **options)), state

    return Hint(init, apply)
