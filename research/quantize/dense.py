"""A dense layer whose kernel is packed in few bits, for models written by hand.

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(QuantDense(512, form=Form(4, group=128), activation_bits=8, name="up")(x))
            return QuantDense(128, form=Form(4, group=128), name="down")(x)

    logits = Block().apply({"params": rules.pack_params(calibrated)}, x)

Parameters are those of `nn.Dense` with a `Packed` as the kernel, as `rules.pack_params` makes them of a model of dense
layers with the same names: checkpoints hold the packed bits, and `jax.eval_shape(model.init, ...)` is what they are
restored to. Models that are not to be rewritten run by `research.quantize.rules.apply`, with the same product.
"""

import jax
from flax import linen as nn

from research.kernels.lowbit_matmul import Packed
from research.quantize.grids import Form
from research.quantize.quantized import Quantized, pack, quantize
from research.quantize.rules import is_few, product


class QuantDense(nn.Dense):
    """`nn.Dense` by a packed kernel, (..., K) -> (..., features).

    A kernel that is there may be of any bits and groups; a `Quantized` one is packed when the layer is traced. It has
    no gradient; inputs and bias have.

    Fields:
      form: what a new kernel is quantised to.
      activation_bits: of the inputs, 2 to 8, each token by its largest magnitude; None keeps them. A rule of
        `rules.apply` for this layer goes before it.
    Raises:
      ValueError: the kernel is in real numbers, or has another number of inputs or outputs.
    """

    form: Form = Form(4)
    activation_bits: int | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        def packed(key):
            return pack(quantize(self.kernel_init(key, (inputs.shape[-1], self.features), self.param_dtype), self.form))

        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
        else:
            kernel = self.param("kernel", packed)
        if self.use_bias:
            self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        self._check(kernel, inputs.shape[-1])
        return product(self, inputs, kernel, self.activation_bits)

    def _check(self, kernel, inputs: int) -> None:
        name = "/".join(self.path) or type(self).__name__
        if not is_few(kernel):
            raise ValueError(f"{name}: the kernel is in real numbers; quantise it, e.g. by rules.quantize_params")
        if kernel.shape != (inputs, self.features):
            raise ValueError(f"{name}: the kernel is {kernel.shape}, not {(inputs, self.features)}")


def of(
    kernel: Quantized | Packed, bias: jax.Array | None = None, activation_bits: int | None = None, **fields
) -> tuple[QuantDense, dict]:
    """A layer for a calibrated kernel (K, N) and its variables; `fields` are others of `QuantDense`.

    Raises:
      ValueError: a kernel that does not pack.
    """
    packed = pack(kernel) if isinstance(kernel, Quantized) else kernel
    layer = QuantDense(
        packed.shape[1],
        use_bias=bias is not None,
        form=form_of(packed),
        activation_bits=activation_bits,
        **fields,
    )
    return layer, {"params": {"kernel": packed} | ({} if bias is None else {"bias": bias})}


def form_of(packed: Packed) -> Form:
    """A form in which new kernels have planes, scales and zero points like `packed`, but no `order`."""
    signed = "sign" if packed.bits == 1 else "absmax"
    rule = signed if packed.zeros is None else "gptq"
    if packed.scales.size == 1 < packed.shape[1]:
        return Form(packed.bits, per_tensor=True, rule=rule)
    return Form(packed.bits, group=None if len(packed.scales) == 1 else packed.group, rule=rule, pad=True)
