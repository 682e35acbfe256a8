"""Mixup and cutmix on device, in timm's batch mode: one draw a batch, whose reverse holds the partners.

The maths (`mixup`, `cutmix`, `mixed_target`, `corrected_lam`) are functions of a given lam and box; `mix` draws them.
Zhang et al., "mixup" (arXiv 1710.09412); Yun et al., "CutMix" (arXiv 1905.04899); timm 0.6.5 `timm.data.mixup`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from research.core import scope

Box = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def mixed_target(
    labels: jax.Array, lam, *, num_classes: int, smoothing: float = 0.0, partners: jax.Array | None = None
) -> jax.Array:
    """lam * s(labels) + (1 - lam) * s(partners), where s is a one-hot vector with 1 - e + e/C and e/C elsewhere.

    Args:
      labels: (B,) integers.
      lam: scalar share of an example's own label.
      num_classes: C.
      smoothing: e.
      partners: (B,) integers; `labels` reversed by default.
    Returns:
      (B, C) in lam's dtype.
    """
    lam = jnp.asarray(lam)
    partners = labels[::-1] if partners is None else partners

    def smooth(y):
        return jax.nn.one_hot(y, num_classes, dtype=lam.dtype) * (1.0 - smoothing) + smoothing / num_classes

    return lam * smooth(labels) + (1.0 - lam) * smooth(partners)


def mixup(images: jax.Array, lam, partners: jax.Array | None = None) -> jax.Array:
    """lam * images + (1 - lam) * partners; partners are the images (B, H, W, C) reversed by default."""
    partners = images[::-1] if partners is None else partners
    lam = jnp.asarray(lam, images.dtype)
    return lam * images + (1.0 - lam) * partners


def cutmix(images: jax.Array, box: Box, partners: jax.Array | None = None) -> jax.Array:
    """images (B, H, W, C) with the box from their partners, the images reversed by default.

    A box is (top, bottom, left, right) in pixels, ends excluded.
    """
    partners = images[::-1] if partners is None else partners
    return jnp.where(_inside(box, *images.shape[1:3])[None, :, :, None], partners, images)


def corrected_lam(box: Box, height: int, width: int, dtype=jnp.float32) -> jax.Array:
    """The share of the image outside the box (top, bottom, left, right)."""
    top, bottom, left, right = (jnp.asarray(edge, dtype) for edge in box)
    return 1.0 - (bottom - top) * (right - left) / (height * width)


def cutmix_box(key: jax.Array, lam: jax.Array, height: int, width: int) -> Box:
    """A box (top, bottom, left, right) of side int(size * sqrt(1 - lam)) with uniform centre, clipped to the image."""
    edges = []
    for own_key, size in zip(jax.random.split(key), (height, width), strict=True):
        half = (size * jnp.sqrt(1.0 - lam)).astype(jnp.int32) // 2
        center = jax.random.randint(own_key, (), 0, size)
        edges += [jnp.maximum(center - half, 0), jnp.minimum(center + half, size)]
    return tuple(edges)


def mix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    smoothing: float | Sequence[float] = 0.0,
    group: int | None = None,
):
    """Mixes a batch with drawn parameters.

    Args:
      key: the same on every device.
      images: (B, H, W, C) floats in any range.
      labels: (B,) integers.
      num_classes: C.
      mixup_alpha, cutmix_alpha: of lam's Beta(alpha, alpha); 0 switches that kind off. Both 0: nothing is mixed.
      prob: probability that a batch is mixed at all.
      switch_prob: probability of cutmix where both kinds are on.
      smoothing: of the labels; several values give several targets.
      group: examples that share a draw and exchange partners, as those of one GPU did in published runs: groups of N
        consecutive ones, each with its own draw. None or 0 is the global batch, also under pmap.
    Returns:
      (images, targets): targets (B, C) float32, or a tuple of them for several smoothings.
    Raises:
      ValueError: integer images, or a batch that does not divide into groups.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"mix needs float images, got {images.dtype}: convert them first, e.g. to [0, 1]")
    options = dict(mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha, prob=prob, switch_prob=switch_prob)
    smoothings = tuple(smoothing) if isinstance(smoothing, Sequence) else (smoothing,)

    def one(key, images, labels, partner_images, partner_labels):
        weight, lam = draw(key, *images.shape[1:3], **options)
        weight = weight[None, :, :, None].astype(images.dtype)
        mixed = weight * images + (1.0 - weight) * partner_images
        target = lambda e: mixed_target(labels, lam, num_classes=num_classes, smoothing=e, partners=partner_labels)
        return mixed, tuple(target(e) for e in smoothings)

    if not group:
        mixed, targets = one(key, images, labels, _reversed(images), _reversed(labels))
    else:
        batch = images.shape[0]
        if batch % group:
            raise ValueError(f"mix.group: a batch of {batch} examples does not divide into groups of {group}")
        count = batch // group
        first = 0 if scope.axis() is None else jax.lax.axis_index(scope.axis()) * count
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(first + jnp.arange(count))
        images, labels = (x.reshape(count, group, *x.shape[1:]) for x in (images, labels))
        mixed, targets = jax.vmap(one)(keys, images, labels, images[:, ::-1], labels[:, ::-1])
        mixed, targets = jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), (mixed, targets))
    return mixed, targets if isinstance(smoothing, Sequence) else targets[0]


def draw(key: jax.Array, height: int, width: int, *, mixup_alpha, cutmix_alpha, prob, switch_prob):
    """Draws (weight (H, W) of an example's own pixels, lam of its own label), both float32."""
    coin, switch, beta, place = jax.random.split(key, 4)
    if not (mixup_alpha or cutmix_alpha):
        return jnp.ones((height, width)), jnp.ones(())
    chance = switch_prob if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)
    is_cut = jax.random.uniform(switch) < chance
    alpha = jnp.where(is_cut, cutmix_alpha or 1.0, mixup_alpha or 1.0)
    gammas = jax.random.loggamma(beta, alpha, (2,))  # g1 / (g1 + g2) of two Gamma(alpha) is Beta(alpha, alpha)
    lam = jnp.where(jax.random.uniform(coin) < prob, jax.nn.sigmoid(gammas[0] - gammas[1]), 1.0)
    box = cutmix_box(place, lam, height, width)
    lam = jnp.where(is_cut, corrected_lam(box, height, width), lam)
    weight = jnp.where(is_cut, 1.0 - _inside(box, height, width).astype(jnp.float32), lam)
    return weight, lam


def _inside(box: Box, height: int, width: int) -> jax.Array:
    top, bottom, left, right = (jnp.asarray(edge, jnp.int32) for edge in box)
    rows, columns = jnp.arange(height, dtype=jnp.int32)[:, None], jnp.arange(width, dtype=jnp.int32)[None, :]
    return ((rows >= top) & (rows < bottom)) & ((columns >= left) & (columns < right))


def _reversed(x: jax.Array) -> jax.Array:
    """The own share of the globally reversed batch: under a mapped axis, the mirror device's share, reversed."""
    if scope.axis() is not None:
        size = jax.lax.axis_size(scope.axis())
        x = jax.lax.ppermute(x, scope.axis(), [(i, size - 1 - i) for i in range(size)])
    return x[::-1]
