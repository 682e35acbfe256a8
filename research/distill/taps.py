"""Which of a network's endpoints a hint loss sees, by name."""

import math
import re
from collections.abc import Callable

import jax

from research.backbones.beit import unpatchify
from research.distill.features import adaptive_pool

Endpoints = dict[str, jax.Array]


def tap(endpoints: Endpoints, name: str) -> jax.Array:
    """The endpoint `name`; a ValueError lists those there are."""
    if name not in endpoints:
        raise ValueError(f"the network has no endpoint {name!r}; it has {', '.join(endpoints)}")
    return endpoints[name]


def feature_map(endpoints: Endpoints, name: str) -> jax.Array:
    """The endpoint `name` as a map (B, H, W, C); tokens (B, N, C) lose class tokens and are laid out as a square."""
    x = tap(endpoints, name)
    if x.ndim == 3:
        x = unpatchify(patches(x), 1)
    if x.ndim != 4:
        raise ValueError(f"endpoint {name!r} of shape {x.shape} is no feature map")
    return x


def patches(tokens: jax.Array) -> jax.Array:
    """The patch tokens alone: class and distillation tokens come first and leave a square number of patches."""
    return tokens[:, tokens.shape[1] - math.isqrt(tokens.shape[1]) ** 2 :]


def pyramid(endpoints: Endpoints) -> list[jax.Array]:
    """Feature maps, shallow to deep, as ReviewKD taps them in the VanillaKD runs.

    Networks with stages: all `stageK`, before their last ReLU where the network tells it apart. Plain transformers:
    four maps made of blocks 2 and 4 and of the last but two and the last (2, 4, 22, 24 in BEiT-L), with the patch
    tokens spread to 4x4, 2x2, 1x1 and 1x1 pixels and the last map halved by average pooling.

    Raises:
      ValueError: the network has neither.
    """
    stages = sorted(name for name in endpoints if re.fullmatch(r"stage\d", name))
    if stages:
        return [endpoints.get(f"{name}_preact", endpoints[name]) for name in stages]
    blocks = sorted(name for name in endpoints if re.fullmatch(r"block\d+", name))
    if len(blocks) < 6:
        raise ValueError(f"no feature pyramid among the endpoints {', '.join(endpoints)}: name the endpoints to distil")
    tokens = [patches(endpoints[name]) for name in (blocks[1], blocks[3], blocks[-3], blocks[-1])]
    maps = [unpatchify(x, spread) for x, spread in zip(tokens, (4, 2, 1, 1), strict=True)]
    return [*maps[:3], adaptive_pool(maps[3], tuple(side // 2 for side in maps[3].shape[1:3]))]


def stages(endpoints: Endpoints, names: tuple[str, ...] | None = None, *, preact: bool = False) -> list[jax.Array]:
    """The maps `names`, shallow to deep; None takes all `stageK`, with `preact` before their last ReLU if it is told.

    Raises:
      ValueError: nothing named, and the network has no stages.
    """
    if names is not None:
        return [feature_map(endpoints, name) for name in names]
    found = sorted(name for name in endpoints if re.fullmatch(r"stage\d", name))
    if not found:
        raise ValueError(f"no stages among the endpoints {', '.join(endpoints)}: name the endpoints to distil")
    return [
        feature_map(endpoints, f"{name}_preact" if preact and f"{name}_preact" in endpoints else name) for name in found
    ]


def pairs(
    student: Endpoints,
    teacher: Endpoints,
    names: tuple[tuple[str, ...] | None, tuple[str, ...] | None] = (None, None),
    *,
    preact: bool = False,
) -> list[tuple[jax.Array, jax.Array]]:
    """The `stages` of both networks, (student's, teacher's) shallow to deep.

    Where neither is named and one network has more, its shallowest are left out, as in mdistiller.

    Raises:
      ValueError: names for unequal numbers of maps.
    """
    own, known = (stages(e, n, preact=preact) for e, n in zip((student, teacher), names, strict=True))
    if len(own) != len(known) and names != (None, None):
        raise ValueError(f"{len(own)} maps of the student and {len(known)} of the teacher: name equally many")
    count = min(len(own), len(known))
    return list(zip(own[-count:], known[-count:], strict=True))


def last_stage(endpoints: Endpoints, name: str | None = None) -> jax.Array:
    """The map `name`, or the deepest stage."""
    return stages(endpoints, None if name is None else (name,))[-1]


def blocks(endpoints: Endpoints, names: tuple[str, ...] | None, default: Callable[[list[str]], list[str]]) -> list[str]:
    """The endpoints `names`, or what `default` takes of all `blockNN` of a transformer, in order.

    Raises:
      ValueError: nothing named, and the network has no blocks.
    """
    found = sorted(name for name in endpoints if re.fullmatch(r"block\d+", name))
    if names is None and not found:
        raise ValueError(f"no blocks among the endpoints {', '.join(endpoints)}: name the endpoints to distil")
    return list(names) if names is not None else default(found)


def levels(endpoints: Endpoints, names: tuple[str, ...] | None = None) -> list[jax.Array]:
    """ReviewKD's levels, shallow to deep: the maps `names` (None: `pyramid`), then `pooled` as a 1x1 map."""
    maps = pyramid(endpoints) if names is None else [feature_map(endpoints, name) for name in names]
    return [*maps, tap(endpoints, "pooled")[:, None, None, :]]
