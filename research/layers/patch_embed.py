"""Images to tokens: non-overlapping patches, linearly projected."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

torch_conv = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """`value` for both axes, or `value` itself where it is already (height, width)."""
    return (value, value) if isinstance(value, int) else tuple(value)


def grid(image: int | tuple[int, int], patch: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of patches in an image; a remainder at the bottom or right is left out, as in timm."""
    return tuple(side // size for side, size in zip(pair(image), pair(patch), strict=True))


class PatchEmbed(nn.Module):
    """Projected patches of images: (B, H, W, 3) -> (B, rows, columns, features).

    Fields:
      features: width of a token.
      patch: side of a patch, or (height, width).
      image: the only image size accepted, or None for any. Networks whose parameters depend on the size state it.
      use_bias: a bias of the projection.
      kernel_init, bias_init: default to PyTorch's for a convolution, uniform within 1/sqrt(inputs).
    Raises:
      ValueError: images of another size than `image`.
    """

    features: int
    patch: int | tuple[int, int]
    image: int | tuple[int, int] | None = None
    use_bias: bool = True
    kernel_init: Callable = torch_conv
    bias_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size, patch = images.shape[1:3], pair(self.patch)
        if self.image is not None and size != pair(self.image):
            height, width = pair(self.image)
            raise ValueError(
                f"images are {size[0]}x{size[1]} but the model is built for {height}x{width}: resize them or build it "
                f"with img_size={tuple(size)}"
            )
        bound = (patch[0] * patch[1] * images.shape[-1]) ** -0.5
        uniform = lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)
        return nn.Conv(
            self.features,
            patch,
            patch,
            padding="VALID",
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init or uniform,
            dtype=self.dtype,
            name="proj",
        )(images)
