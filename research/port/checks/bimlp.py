"""Golden checks of BiMLP and its parts against the official MindSpore file."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones import bimlp
from research.layers.binary import BinaryConv, RPReLU
from research.layers.norm import BatchNorm
from research.port.checks import common
from research.port.names import from_official, to_official
from research.port.verify import Golden

RULES = bimlp.NAMES["official"]
F64 = {"dtype": jnp.float64}


def _variables(golden: Golden, module: nn.Module, *options) -> tuple[dict, jax.Array]:
    """(the golden's weights as variables of `module`, its input in our layout)."""
    x = common.nhwc(golden.x["in"])
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, *options), x)
    return from_official(shapes, golden.w, RULES), x


def _part(golden: Golden, module: nn.Module, *options) -> dict:
    variables, x = _variables(golden, module, *options)
    return {"out": common.nchw(jax.jit(lambda v, x: module.apply(v, x, *options))(variables, x))}


def check_conv(golden: Golden) -> dict:
    outputs, inputs, *kernel_size = golden.w["weight"].shape
    groups = golden.x["in"].shape[1] // inputs
    return _part(golden, BinaryConv(outputs, tuple(kernel_size), groups, **F64))


def check_rprelu(golden: Golden) -> dict:
    return _part(golden, RPReLU(**F64))


def check_downsample(golden: Golden) -> dict:
    norm = functools.partial(BatchNorm, **F64)
    return _part(golden, bimlp.Projection(golden.w["proj.weight"].shape[0], norm, halve=True, **F64), False)


def _mlp(golden: Golden, activation: str) -> bimlp.Mlp:
    hidden, features = (golden.w[f"fc{i}.weight"].shape[0] for i in (1, 2))
    return bimlp.Mlp(hidden=hidden, features=features, activation=activation, **F64)


def check_mlp(golden: Golden) -> dict:
    return _part(golden, _mlp(golden, "ternary"), False)


def check_gradients(golden: Golden) -> dict:
    """Output and straight-through gradients, batch norms taking their running statistics."""
    module = _mlp(golden, golden.case.removeprefix("ste_mlp_"))
    variables, x = _variables(golden, module, False)
    statistics = {"batch_stats": variables["batch_stats"]}

    @jax.jit
    def pull(params, x, cotangent):
        out, back = jax.vjp(lambda params, x: module.apply({"params": params, **statistics}, x, False), params, x)
        return out, *back(cotangent)

    out, params, inputs = pull(variables["params"], x, common.nhwc(golden.x["cotangent"]))
    named = to_official({"params": params}, RULES)
    gradients = {f"grad.{name}": gradient for name, gradient in named.items()}
    return {"out": common.nchw(out), "grad_in": common.nchw(inputs), **gradients}


def _net(golden: Golden, activation: str) -> dict:
    """The whole network; the kind of norm is read off the weights, as the description words it freely."""
    kwargs = golden.kwargs
    if set(kwargs.get("mlp_ratios", [4])) != {4} or not all(kwargs.get("transitions", [True])):
        raise ValueError("the official file works with MLP ratio 4 and a transition after every stage only")
    model = bimlp.build(
        layers=tuple(kwargs["layers"]),
        embed_dims=tuple(kwargs["embed_dims"]),
        num_classes=golden.w["head.weight"].shape[0],
        norm_layer="batch" if "norm.moving_mean" in golden.w else "sample",
        activation=activation,
        **F64,
    )
    return common.run(golden, bimlp, model, lambda module: module)[0]


def check_net(golden: Golden) -> dict:
    return _net(golden, "ternary")


def check_net_sign(golden: Golden) -> dict:
    return _net(golden, "sign")


CHECKS = {
    "unit_quanconv_1x1": check_conv,
    "unit_quanconv_grouped_1x7": check_conv,
    "unit_quanconv_depthwise_7x1": check_conv,
    "unit_rprelu": check_rprelu,
    "unit_downsample_bn": check_downsample,
    "unit_mlp_expand": check_mlp,
    "unit_mlp_reweight": check_mlp,
    "ste_mlp_ternary": check_gradients,
    "ste_mlp_sign": check_gradients,
    "net_S_style": check_net,
    "net_M_style": check_net,
    "net_S_style_true_sign": check_net_sign,
}
