"""Factor transfer (FT): the teacher's map paraphrased, the student's translated, and their difference.

Kim et al. 2018, "Paraphrasing Complex Network". Maps are (B, H, W, C).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.distill.features import TORCH_INIT
from research.distill.maps import attention, flat, same_size
from research.distill.numerics import unit
from research.layers.norm import BatchNorm

SLOPE = 0.1  # of the leaky ReLUs


class Stack(nn.Module):
    """3x3 convolutions of the `widths`, each followed by batch norm if asked and a leaky ReLU.

    Parameters are numbered as in the official nn.Sequential: convolution 3k, batch norm 3k + 1.
    """

    widths: tuple[int, ...]
    transpose: bool = False
    batch_norm: bool = False
    group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        for index, width in enumerate(self.widths):
            options = {"padding": ((1, 1), (1, 1)), "kernel_init": TORCH_INIT, "dtype": self.dtype}
            layer: Callable[..., nn.Module] = nn.Conv
            if self.transpose:
                layer, options["transpose_kernel"] = nn.ConvTranspose, True
            x = layer(width, (3, 3), name=f"layer{3 * index}", **options)(x)
            if self.batch_norm:
                x = BatchNorm(group=self.group, dtype=self.dtype, name=f"layer{3 * index + 1}")(x, train)
            x = nn.leaky_relu(x, SLOPE)
        return x


class Paraphraser(nn.Module):
    """Autoencoder of the teacher's map: (factor (B, H, W, int(rate C)), reconstruction (B, H, W, C)).

    It is trained first, alone, by the `features.mse` of reconstruction and map, and then kept.
    """

    rate: float = 0.5
    batch_norm: bool = False
    group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> tuple[jax.Array, jax.Array]:
        wide, narrow = x.shape[-1], int(x.shape[-1] * self.rate)
        options = {"batch_norm": self.batch_norm, "group": self.group, "dtype": self.dtype}
        factor = Stack((wide, narrow, narrow), name="encoder", **options)(x, train)
        return factor, Stack((narrow, wide, wide), transpose=True, name="decoder", **options)(factor, train)


class Translator(nn.Module):
    """The student's map (B, h, w, c) as a factor (B, h, w, features), trained with the student."""

    features: int
    batch_norm: bool = True
    group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        widths = (x.shape[-1], self.features, self.features)
        options = {"batch_norm": self.batch_norm, "group": self.group, "dtype": self.dtype}
        return Stack(widths, name="encoder", **options)(x, train)


def factor(student: jax.Array, teacher: jax.Array, *, power: int = 2, order: int = 1, whole: bool = False) -> jax.Array:
    """Mean of |q_s - q_t|^order of the factors' attention maps q, (B,). Kim et al. 2018.

    RepDistiller turns the factors into attention maps of `power` and weighs the loss by 200; `whole` compares the
    factors themselves at unit length, as do the paper and torchdistill.
    """
    s, t = (unit(flat(x)) if whole else attention(x, power) for x in same_size(student, teacher))
    return jnp.mean(jnp.abs(s - t) if order == 1 else (s - t) ** order, axis=-1)


# Official (RepDistiller) names of the parameters of Paraphraser and Translator.
NAMES = [(r"coder\.layer(\d)", r"coder.\1")]
