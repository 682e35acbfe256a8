"""Few bits by rules: which layers get them, that models compute with them, and in how many bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from research import language
from research.core import sharding
from research.kernels.lowbit_matmul import Packed
from research.language import llama
from research.layers.dense import Dense
from research.quantize import rules
from research.quantize.grids import Form
from research.quantize.quantized import Quantized, dequantize, quantize
from research.quantize.rules import Rule


class Block(nn.Module):
    """Both kinds of dense layers, with and without a bias, and a convolution that no rule speaks of."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (3,), name="conv")(x)
        x = jnp.tanh(Dense(96, dtype=self.dtype, name="up")(x))
        return nn.Dense(32, use_bias=False, dtype=self.dtype, name="down")(x)


RULES = (Rule(r"^up$", bits=4, group=32, activation_bits=8), Rule(r"", bits=3, rule="omniquant"))


@pytest.fixture(scope="module")
def block():
    """(params, x), with a bias that is not zero."""
    x = jax.random.normal(jax.random.key(0), (8, 5, 64))
    params = jax.jit(Block().init)(jax.random.key(1), x)["params"]
    return params | {"up": params["up"] | {"bias": jnp.linspace(-1, 1, 96)}}, x


def expected(params, x):
    """The block by its meaning, in float64: inputs by token and kernels by group, rounded one after the other."""
    wide = lambda a: np.asarray(a, np.float64)
    x = nn.Conv(64, (3,)).apply({"params": params["conv"]}, x)
    x = wide(dequantize(quantize(x, Form(8, axis=-1, rule="absmax"))))
    x = np.tanh(x @ wide(dequantize(quantize(params["up"]["kernel"], Form(4, group=32)))) + wide(params["up"]["bias"]))
    return x @ wide(dequantize(quantize(params["down"]["kernel"], Form(3, rule="omniquant"))))


@pytest.fixture(scope="module")
def trees(block):
    """The block's parameters in all forms, made in one program."""

    def make(params):
        few = rules.quantize_params(params, RULES)
        packed = rules.pack_params(few)
        return {"fake": rules.fake(params, RULES), "few": few, "packed": packed}, rules.dequantize_params(packed)

    return jax.jit(make)(block[0])


@pytest.fixture(scope="module")
def run():
    return jax.jit(rules.apply(Block(), RULES))


def test_rounded_quantised_and_packed_compute_the_same(block, trees, run):
    (params, x), (forms, again) = block, trees
    assert isinstance(forms["few"]["up"]["kernel"], Quantized)
    assert isinstance(forms["packed"]["down"]["kernel"], Packed)
    for name, tree in forms.items():
        np.testing.assert_allclose(run({"params": tree}, x), expected(params, x), atol=2e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, forms["fake"])


def test_bytes_are_as_many_as_the_bits(trees):
    """What bf16 takes, times bits / 16, and scales and zero points; as they lie in memory."""
    for (k, n, bits, groups), name in {(64, 96, 4, 2): "up", (96, 32, 3, 1): "down"}.items():
        kernel = trees[0]["packed"][name]["kernel"]
        assert sum(plane.on_device_size_in_bytes() for plane in kernel.planes) == 2 * k * n * bits // 16
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(kernel)) == k * n * bits // 8 + 2 * groups * n * 4


def test_devices_share_a_batch(block, trees, run):
    mesh, packed = sharding.mesh({"data": 8}), {"params": trees[0]["packed"]}
    spread = jax.device_put(block[1], NamedSharding(mesh, PartitionSpec("data")))
    found = run(jax.device_put(packed, NamedSharding(mesh, PartitionSpec())), spread)
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, run(packed, block[1]), atol=1e-5)


def test_rounding_has_a_gradient(block):
    """Weights are trained through their rounding; inputs have the same gradient through packed kernels."""
    params, x = block
    settings = (Rule(r"^(up|down)$", bits=4),)
    loss = lambda p, x: jnp.sum(rules.apply(Block(), settings)({"params": p}, x) ** 2)

    @jax.jit
    def gradients(params, x):
        through = jax.grad(lambda p, x: loss(rules.fake(p, settings), x), argnums=(0, 1))(params, x)
        packed = rules.pack_params(rules.quantize_params(params, settings))
        return through, jax.grad(loss)(rules.fake(params, settings), x), jax.grad(loss, argnums=1)(packed, x)

    (of_params, of_x), straight, of_packed = gradients(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), of_params, straight)
    np.testing.assert_allclose(of_packed, of_x, rtol=1e-3, atol=1e-3)


def test_the_dtype_of_a_layer_is_kept(block, trees):
    narrow = jax.jit(rules.apply(Block(jnp.bfloat16), RULES))
    found = narrow({"params": trees[0]["packed"]}, block[1])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected(*block), atol=0.05)


def test_a_language_model_needs_no_change():
    """W4A8 in its attention and W8 in its head; what no rule matches stays."""
    settings = (Rule(r"^lm_head$", bits=8, rule="absmax"), Rule(r"self_attn/", bits=4, group=32, activation_bits=8))
    model = llama.build(vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)

    @jax.jit
    def logits():
        params = language.init(model, jax.random.key(0))["params"]
        packed = rules.pack_params(rules.quantize_params(params, settings))
        few = rules.apply(model, settings)
        found = [few({"params": tree}, tokens)[0] for tree in (packed, rules.fake(params, settings))]
        return packed, *found, model.apply({"params": params}, tokens)[0]

    packed, found, rounded, real = logits()
    few = {"/".join(path[:-1]) for path, leaf in traverse_util.flatten_dict(packed).items() if rules.is_few(leaf)}
    assert few == {"lm_head", *(f"layers_0/self_attn/{name}_proj" for name in "qkvo")}
    np.testing.assert_allclose(found, rounded, atol=1e-5)
    assert np.abs(found - real).max() > 1e-3


def test_no_rules_change_nothing(block):
    params, x = block
    assert rules.fake(params, ()) == params
    few, plain = (jax.make_jaxpr(f)({"params": params}, x) for f in (rules.apply(Block()), Block().apply))
    assert str(few) == str(plain)


def test_the_first_rule_decides(block):
    found = rules.match(block[0], [Rule("up"), *RULES[1:]])
    assert {layer: rule.bits for layer, rule in found.items()} == {"up": None, "down": 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([Rule("q_proj", bits=4)], r"rule 'q_proj' decides about no layer: no layer .* there are .*up"),
        ([Rule("conv", bits=4)], r"rule 'conv' decides about no layer: no layer with a kernel \(K, N\)"),
        ([Rule("", bits=4), Rule("up", bits=8)], r"rule 'up' .* earlier rules decide about all it matches \(up\)"),
        ([Rule("u", bits=4, group=48)], r"up, by rule 'u': group: 48 does not divide the 64 entries"),
    ],
)
def test_rules_that_do_not_fit_are_named(block, settings, message):
    for change in (rules.fake, rules.quantize_params):
        with pytest.raises(ValueError, match=message):
            change(block[0], settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "("}, r"rule '\(' is no regular expression"),
        ({"path": "a", "bits": 9}, "rule 'a': bits: 9 is not from 1 to 8"),
        ({"path": "a", "bits": 4, "rule": "best"}, "rule 'a': rule: 'best' is none of absmax"),
        ({"path": "a", "activation_bits": 1}, "rule 'a': activation_bits 1 is not from 2 to 8"),
        ({"path": "a", "group": 64}, "rule 'a' has a group of 64 inputs but no bits"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rule(**arguments)


class Own(nn.Module):
    """A product that is no nn.Dense."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.ones, (32, 4))


def test_what_cannot_multiply_by_few_bits_says_so():
    settings, x = (Rule("", bits=4),), jax.ShapeDtypeStruct((2, 32), jnp.float32)
    model = nn.Sequential([Own()])
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    few = jax.eval_shape(lambda v: {"params": rules.quantize_params(v["params"], settings)}, variables)
    assert jax.eval_shape(rules.apply(model, settings), variables, x).shape == (2, 4)
    with pytest.raises(ValueError, match="layers_0: only an nn.Dense multiplies by a kernel of few bits, no Own"):
        jax.eval_shape(rules.apply(model, settings), few, x)
    with pytest.raises(ValueError, match="layers_0: the kernel has 4 bits already"):
        rules.fake(few["params"], settings)
