"""A calibration's folder: what is written comes back, what was not finished does not count."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from research.core import storage
from research.core.errors import UserError
from research.quantize.grids import Form
from research.quantize.quantized import Quantized, quantize
from research.quantize.saved import PROGRESS, Store, flat, unflat

RNG = np.random.default_rng(0)
W = RNG.normal(size=(20, 6)).astype(np.float32)
FORMS = {
    "groups": Form(4, group=5),
    "filled_up": Form(3, group=8, pad=True),
    "channels": Form(2),
    "symmetric": Form(4, group=10, rule="absmax"),
    "one_bit": Form(1, rule="sign"),
    "tensor": Form(8, per_tensor=True),
    "tokens": Form(8, axis=-1, rule="absmax"),
}
IDENTITY = {"seed": 0, "settings": ("a", "b"), "weights": "0123"}


def few(form) -> Quantized:
    return jax.device_get(jax.jit(quantize, static_argnames="form")(W, form=form))


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert kinds(found) == kinds(expected)


def test_arrays_of_few_bits_are_arrays_by_name():
    weights = {f"mlp/{name}/kernel": few(form) for name, form in FORMS.items()}
    weights["norm/scale"] = W[0]
    order = RNG.permutation(20).astype(np.int32)
    weights["moved/kernel"] = few(FORMS["groups"]).replace(order=order)
    arrays = flat(weights)
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    same(unflat(arrays), weights)


def test_blocks_and_what_is_carried_come_back(tmp_path):
    store = Store(tmp_path, IDENTITY)
    assert (store.done(), store.carried()) == (0, {})
    block = {"norm/scale": W[0].astype(ml_dtypes.bfloat16), "mlp/up/kernel": few(FORMS["groups"])}
    steps = {"mlp/up/kernel": np.float32(0.25)}
    carried = {"learned": {"steps": {"mlp/up/kernel": W}, "inputs": {}}, "fixed": {"zeros": {"b/kernel": W[:1]}}}
    store.write(0, [(block, steps), (block, {})], {2: carried, 3: None})
    again = Store(str(tmp_path), IDENTITY)
    assert again.done() == 2
    same(again.block(0), (block, steps))
    same(again.block(1), (block, {}))
    carried["learned"].pop("inputs")  # files hold no empty dicts
    same(again.carried(), {2: carried})
    again.write(2, [(block, {})], {3: carried})
    same(again.carried(), {3: carried})
    again.write(3, [(block, {})], {})
    assert (again.done(), again.carried()) == (4, {})
    blocks = [f"block_{index:04d}.safetensors" for index in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*blocks, "calibration.json", PROGRESS]


def test_a_window_counts_when_all_of_it_is_written(tmp_path, monkeypatch):
    store, block = Store(tmp_path, IDENTITY), {"norm/scale": W[0]}
    store.write(0, [(block, {})], {1: {"a": W}})
    write = storage.write

    def full(path, *data):
        if path.name == PROGRESS:
            raise OSError("no space left")
        write(path, *data)

    monkeypatch.setattr(storage, "write", full)
    with pytest.raises(OSError, match="no space"):
        store.write(1, [({"norm/scale": W[1]}, {})], {2: {"a": W + 1}})
    monkeypatch.undo()
    again = Store(tmp_path, IDENTITY)
    assert again.done() == 1
    same(again.carried(), {1: {"a": W}})
    again.write(1, [(block, {})], {2: {"a": W - 1}})
    same((again.block(1), again.carried()), ((block, {}), {2: {"a": W - 1}}))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"settings": ("a", "c")}, r"settings \['a', 'b'\], not \['a', 'c'\]"),
        ({"more": 1}, "more None, not 1"),
    ],
)
def test_another_calibration_is_refused(changed, message, tmp_path):
    Store(tmp_path, IDENTITY)
    with pytest.raises(UserError, match=f"{tmp_path}: holds a calibration with {message}: resume it with the same"):
        Store(tmp_path, {**IDENTITY, **changed})
    assert json.loads((tmp_path / "calibration.json").read_text())["seed"] == 0
    Store(tmp_path, IDENTITY)


def test_kernels_may_lie_on_the_device():
    q = jax.jit(quantize, static_argnames="form")(jnp.asarray(W), form=FORMS["channels"])
    same(jax.device_get(unflat(flat({"a/kernel": q}))), {"a/kernel": jax.device_get(q)})
