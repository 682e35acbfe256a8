"""BiMLP with packed kernels against its float form, layer by layer and whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from research.backbones import bimlp, bimlp_packed
from research.core import cost
from research.layers import binary
from tests.backbones import drawn

SMALL = {"layers": (1,), "embed_dims": (40,), "num_classes": 5}  # 40 and its multiples do not fill all words


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 12, 3)), jnp.float32)


@pytest.fixture(scope="module")
def variables(images):
    return drawn.variables(bimlp.build(**SMALL), images)


@pytest.fixture(scope="module", params=["ternary", "sign"])
def evaluated(request, variables, images):
    """(model, logits and endpoints of the float form, {path: (layer, input, output)} of its binary layers)."""
    model, found = bimlp.build(**SMALL, activation=request.param), {}

    def watch(method, args, kwargs, context):
        out = method(*args, **kwargs)
        if isinstance(context.module, binary.BinaryConv):
            found["/".join(context.module.path)] = args[0], out
        return out

    @jax.jit
    def forward(variables, images):
        with nn.intercept_methods(watch):
            result = model.apply(variables, images)
        return result, dict(found)

    return model, *forward(variables, images)


def latent_kernel(variables, path):
    """The kernel of the layer at a slash path."""
    return functools.reduce(lambda tree, name: tree[name], path.split("/"), variables["params"])["kernel"]


def test_every_binary_layer_agrees_and_its_sums_are_the_same_integers(evaluated, variables):
    model, _, layers = evaluated
    packed, _ = bimlp_packed.pack(variables)

    @jax.jit
    def compare(layers, packed, kernels):
        results = {}
        for path, (x, expected) in layers.items():
            kernel = packed[path]
            _, _, inputs, outputs = kernel.shape
            groups = x.shape[-1] // inputs
            options = {"activation": model.activation, "groups": groups}
            layer = binary.BinaryConv(outputs, kernel.shape[:2], **options)
            results[path] = [(bimlp_packed.convolved(x, kernel, layer), expected)]
            results[path] += [(bimlp_packed.unpack_kernel(kernel), binary.xnor(kernels[path]))]
            if groups == 1:
                signs = jnp.sign(kernels[path][0, 0]).astype(jnp.int32)
                quantised = binary.ACTIVATIONS[model.activation](x).astype(jnp.int32)
                results[path] += [(bimlp_packed.integers(x, kernel, model.activation), quantised @ signs)]
        return results

    kernels = {path: latent_kernel(variables, path) for path in packed}
    layers = {path: pair for path, pair in layers.items() if path in packed}
    assert set(layers) == set(packed) and len(packed) == 12
    for path, ((found, expected), (kernel, real), *sums) in compare(layers, packed, kernels).items():
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.max(jnp.abs(expected))), err_msg=path)
        np.testing.assert_allclose(kernel, real, rtol=1e-6, err_msg=path)
        for found, expected in sums:
            np.testing.assert_array_equal(found, expected, err_msg=path)


def test_the_network_computes_the_same_from_latent_and_from_frozen_weights(evaluated, variables, images):
    model, (expected, endpoints), _ = evaluated
    frozen, _ = bimlp_packed.pack({**variables, "params": bimlp.freeze(variables["params"])})
    packed, rest = bimlp_packed.pack(variables)
    for path, kernel in frozen.items():
        np.testing.assert_array_equal(kernel.signs, packed[path].signs)
        np.testing.assert_allclose(kernel.scales, packed[path].scales, rtol=1e-6)
    logits, found = jax.jit(lambda p, r, x: bimlp_packed.apply(model, p, r, x))(packed, rest, images)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * float(jnp.max(jnp.abs(expected))))
    np.testing.assert_allclose(found["stage1"], endpoints["stage1"], atol=1e-4)


def test_kernels_of_the_published_network_take_a_32nd_and_their_scales():
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: bimlp.build(**bimlp.VARIANTS["bimlp_s"]).init(jax.random.key(0), x), image)
    flat = jax.tree_util.tree_leaves_with_path(shapes["params"])
    kernels = [leaf for path, leaf in flat if bimlp.is_binary(tuple(k.key for k in path)) and leaf.shape[2] > 1]
    dense = [leaf for leaf in kernels if leaf.shape[:2] == (1, 1)]
    size = lambda arrays: sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
    packed = jax.eval_shape(lambda leaves: [bimlp_packed.pack_kernel(leaf) for leaf in leaves], kernels)
    of_dense = [kernel for kernel in packed if kernel.shape[:2] == (1, 1)]
    # A gate's second layer has 16 inputs at the first stage, half a word.
    assert size(dense) / 32 <= size([kernel.signs for kernel in of_dense]) <= size(dense) / 32 * 1.01
    assert size([kernel.scales for kernel in of_dense]) == 4 * sum(leaf.shape[-1] for leaf in dense)
    assert size(jax.tree.leaves(packed)) < size(kernels) / 16
    assert cost.params_count(kernels) > 0.8 * cost.params_count(shapes["params"])


def test_what_one_bit_cannot_say_is_refused(variables, images):
    kernel = np.array(variables["params"]["network_0_0"]["mlp"]["fc1"]["kernel"])
    kernel[0, 0, 3, 5] = 0
    params = jax.tree.map(lambda leaf: leaf, variables["params"])
    params["network_0_0"]["mlp"]["fc1"]["kernel"] = kernel
    with pytest.raises(ValueError, match="network_0_0/mlp/fc1/kernel: a weight is exactly 0"):
        bimlp_packed.pack({**variables, "params": params})
    with pytest.raises(ValueError, match="activation='real', weights='xnor' are not both binary"):
        bimlp_packed.apply(bimlp.build(**SMALL, activation="real"), {}, variables, images)
