"""The pre-norm transformer block that ViT, BEiT and CLIP share."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.layers.attention import Attention
from research.layers.drop import DropPath
from research.layers.mlp import Mlp, gelu
from research.layers.norm import LayerNorm
from research.layers.position import RelativePositionBias
from research.layers.reduction import Reduction, Tokens


def layer_scale(module: nn.Module, name: str, y: jax.Array, initial: float | None) -> jax.Array:
    """`y` (..., C) times the learned vector `name` of `module`; `y` where `initial` is None (Touvron et al. 2021)."""
    if initial is None:
        return y
    gamma = module.param(name, nn.initializers.constant(initial), (y.shape[-1],))
    return y * gamma.astype(y.dtype).reshape(*[1] * (y.ndim - 1), -1)


class Block(nn.Module):
    """Attention, then an MLP, each on normalised tokens and added to them: (B, N, C) -> (B, N, C).

    Fields:
      mlp_ratio: hidden width of the MLP relative to C.
      qkv_bias, key_bias, fused: see `Attention`; act: see `Mlp`.
      window: (rows, columns) of the tokens for a bias by relative position, class token first; None for no bias.
      init_values: initial layer scale of both branches, None for no layer scale.
      drop_path: rate of stochastic depth.
      epsilon: of both norms.
      out_init: initialiser of the layers that write to the residual stream.
      reduce: makes the tokens fewer between attention and MLP; `index` is the number of this block, from 0.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    key_bias: bool = True
    fused: bool = True
    act: Callable = gelu
    window: tuple[int, int] | None = None
    init_values: float | None = None
    drop_path: float = 0.0
    epsilon: float = 1e-6
    out_init: Callable | None = None
    reduce: Reduction | None = None
    index: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array | Tokens, train: bool, mask: jax.Array | None = None) -> jax.Array | Tokens:
        """`mask` is added to the scores, with trailing axes (..., heads, N, N). With `reduce`, it maps `Tokens`."""
        tokens, core = None, None
        if self.reduce is not None:
            tokens, x = x, x.x
            core = functools.partial(self.reduce.attend, tokens, self.index, train)
        shared = {"out_init": self.out_init, "dtype": self.dtype}
        attn = Attention(self.num_heads, self.qkv_bias, self.key_bias, self.fused, name="attn", **shared)
        mlp = Mlp(int(self.mlp_ratio * x.shape[-1]), self.act, name="mlp", **shared)
        bias = mask
        if self.window is not None:
            position = RelativePositionBias(self.window, self.num_heads, class_token=True, name="position")()
            bias = position if mask is None else position + mask

        y = attn(LayerNorm(self.epsilon, self.dtype, name="norm1")(x), bias, core)
        y, seen = (y, None) if core is None else y
        x = x + DropPath(self.drop_path)(layer_scale(self, "gamma_1", y, self.init_values), train)
        if self.reduce is not None:
            tokens = self.reduce.reduce(tokens._replace(x=x), self.index, train, seen)
            x = tokens.x
        y = mlp(LayerNorm(self.epsilon, self.dtype, name="norm2")(x))
        x = x + DropPath(self.drop_path)(layer_scale(self, "gamma_2", y, self.init_values), train)
        return x if self.reduce is None else tokens._replace(x=x)
