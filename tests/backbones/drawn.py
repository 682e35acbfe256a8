"""Weights for tests, drawn on the host: compiling a network's own initialiser takes longer than the test."""

import jax
import numpy as np


def variables(model, image, seed: int = 0) -> dict:
    """Variables of `model` for images like `image`: kernels of unit gain, all statistics away from 0 and 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)
        centre = {"scale": 1.0, "var": 1.0, "gamma": 0.5}.get(name, 0.0)
        return (centre + 0.3 * rng.uniform(-1, 1, leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    return jax.tree_util.tree_map_with_path(draw, shapes)
