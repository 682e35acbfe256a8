"""Golden checks of ParameterNet's language side: the layer with experts, its balancing loss, and a small LLaMA."""

import jax
import jax.numpy as jnp
import numpy as np

from research.language import llama
from research.language.losses import next_token_loss
from research.layers import moe
from research.port.names import from_official, to_official
from research.port.verify import Golden

LAYER_RULES = [("^router_classifier", "router.classifier")]


def _gradients(tree, rules) -> dict:
    state = moe.unstack_experts(to_official({"params": tree}, rules))
    return {f"grad.{name}": value for name, value in state.items()}


def layer(golden: Golden) -> dict:
    kwargs, x = golden.kwargs, jnp.asarray(golden.x["in"])
    module = moe.SwitchDense(kwargs["intermediate_size"], kwargs.get("num_experts", 8), dtype=jnp.float64)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)
    variables = from_official(shapes, moe.stack_experts(golden.w), LAYER_RULES)

    def loss(params, x):
        out, logits = module.apply({"params": params}, x)
        return jnp.sum(out * golden.x["cotangent"]), (out, logits)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (params, inputs), (out, logits) = gradient(variables["params"], x)
    outputs = {"out": out, "router_logits": logits, "expert_index": moe.route(logits)[0], "grad_in": inputs}
    return outputs | _gradients(params, LAYER_RULES)


def balancing(golden: Golden) -> dict:
    logits, expert = (jnp.asarray(golden.x[name]) for name in ("router_logits", "expert_index"))
    value, gradient = jax.value_and_grad(moe.load_balancing_loss)(logits, expert)
    return {"loss": value, "grad_router_logits": gradient}


def language_model(golden: Golden) -> dict:
    """Logits, last state, routers, both losses, and gradients of cross-entropy plus the weighted balancing loss."""
    fields = set(llama.Llama.__dataclass_fields__) & set(golden.kwargs)
    kept = {"num_experts": 8} | {name: golden.kwargs[name] for name in fields}
    model = llama.Llama(**kept, dtype=jnp.float64)
    tokens, labels = (jnp.asarray(golden.x[name]) for name in ("input_ids", "labels"))
    shapes = jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens), tokens)
    state = {name: np.asarray(array) for name, array in moe.stack_experts(golden.w).items()}
    rules = llama.NAMES["official"]
    variables = from_official(shapes, state, rules, ignore=(r"rotary_emb\.inv_freq$",))
    weight = golden.kwargs.get("router_aux_loss_coef", 0.01)

    def loss(params):
        logits, endpoints = model.apply({"params": params}, tokens)
        aux = moe.load_balancing_loss(endpoints["router_logits"])
        total = next_token_loss(logits, labels) + weight * aux
        return total, {"logits": logits, "loss": total, "aux_loss": aux, **endpoints}

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    return {**outputs, "last_hidden": outputs["hidden"], **_gradients(gradients, rules)}


CHECKS = {"moe_layer": layer, "load_balancing_loss": balancing, "llama_moe_down": language_model}
