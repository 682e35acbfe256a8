"""Golden checks of ParameterNet: dynamic convolutions, ghost blocks and network, and the language model's experts."""

import jax
import jax.numpy as jnp

from research.backbones import parameternet
from research.layers import dynamic
from research.port.checks import common, parameternet_language
from research.port.names import from_official, to_official
from research.port.verify import Golden

ACTS = {"Hardswish": "hard_swish", "ReLU": "relu", "ReLU6": "relu6", "SiLU": "silu", "GELU": "gelu", None: None}
RULES = parameternet.NAMES["official"]


def _act(kwargs: dict, default: str | None = "ReLU") -> str | None:
    return ACTS[kwargs.get("act_layer", default)]


def _loaded(golden: Golden, module, *call):
    """(variables of `module` with the golden's weights, its input in NHWC)."""
    x = common.nhwc(golden.x["in"])
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, *call), x)
    return from_official(shapes, golden.w, RULES), x


def dynamic_conv(golden: Golden) -> dict:
    kwargs = golden.kwargs
    side, stride = kwargs.get("kernel_size", 1), kwargs.get("stride", 1)
    padding = kwargs.get("padding", "")
    module = dynamic.DynamicConv(
        kwargs["out_features"],
        side,
        stride,
        # timm pads "" symmetrically, by what a stride of one needs
        padding=(stride - 1 + side - 1) // 2 if padding in ("", None) else padding,
        groups=kwargs.get("groups", 1),
        num_experts=kwargs.get("num_experts", 4),
        dtype=jnp.float64,
    )
    variables, x = _loaded(golden, module)
    return {"out": common.nchw(jax.jit(module.apply)(variables, x))}


def ghost_module(golden: Golden) -> dict:
    kwargs = golden.kwargs
    options = {"num_experts": kwargs.get("num_experts", 4), "dtype": jnp.float64}
    module = parameternet.GhostModule(kwargs["oup"], _act(kwargs), **options)
    variables, x = _loaded(golden, module, False)
    return {"out": common.nchw(jax.jit(module.apply, static_argnums=2)(variables, x, False))}


def _block(golden: Golden) -> parameternet.Block:
    kwargs = golden.kwargs
    return parameternet.Block(
        kwargs["out_chs"],
        kwargs["mid_chs"],
        kwargs.get("dw_kernel_size", 3),
        kwargs.get("stride", 1),
        kwargs.get("se_ratio") or 0.0,
        _act(kwargs),
        kwargs.get("num_experts", 4),
        dtype=jnp.float64,
    )


def bottleneck(golden: Golden) -> dict:
    module = _block(golden)
    variables, x = _loaded(golden, module, False)
    return {"out": common.nchw(jax.jit(module.apply, static_argnums=2)(variables, x, False))}


def bottleneck_train(golden: Golden) -> dict:
    """One training pass: output, all gradients, and the running statistics after it."""
    module, cotangent = _block(golden), common.nhwc(golden.x["cotangent"])
    variables, x = _loaded(golden, module, True)

    def loss(params, x):
        out, new = module.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return jnp.sum(out * cotangent), (out, new)

    (params, inputs), (out, new) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], x)
    outputs = {"out": common.nchw(out), "grad_in": common.nchw(inputs)}
    outputs |= {f"grad.{name}": value for name, value in to_official({"params": params}, RULES).items()}
    return outputs | {f"buf.{name}": value for name, value in to_official(new, RULES).items()}


def network(golden: Golden) -> dict:
    kwargs = golden.kwargs
    model = parameternet.build(
        cfgs=tuple(tuple(map(tuple, row)) for row in kwargs["cfgs"]),
        width=kwargs.get("width", 1.0),
        act=_act(kwargs),
        num_experts=kwargs.get("num_experts", 4),
        head=kwargs.get("head_channels", 1280),
        num_classes=kwargs.get("num_classes", 1000),
        dtype=jnp.float64,
    )
    variables, x = _loaded(golden, model)
    logits, endpoints = jax.jit(model.apply)(variables, x)
    rows = {f"blocks.{row}": endpoints[f"block{row + 1:02d}"] for row in range(len(model.cfgs))}
    maps = {"stem": endpoints["stem"], **rows, f"blocks.{len(model.cfgs)}": endpoints["features"]}
    return {"out": logits} | {name: common.nchw(value) for name, value in maps.items()}


CHECKS = {
    "dynamicconv_pw": dynamic_conv,
    "dynamicconv_dw_s2": dynamic_conv,
    "ghostmodule_odd": ghost_module,
    "bottleneck_se": bottleneck,
    "bottleneck_train": bottleneck_train,
    "net_small": network,
    **parameternet_language.CHECKS,
}
