"""Calibration holds one window of blocks and one batch of activations on the device, however deep the model is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import language
from research.language import llama
from research.quantize import calibration
from research.quantize.calibration import calibrate
from research.quantize.methods import Cbq, cbq
from research.quantize.rules import Rule

SETTINGS = (Rule("^layers_", bits=2, group=16, activation_bits=8),)
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 16))
METHOD = Cbq(window=2, epochs=1, texts=4, rank=2)  # so small a network has weights as small as factors of rank 16
DEPTHS = 4, 12
PROGRAMS = {}  # compiled functions, by what they were compiled for


class Meter:
    """The most that lies on the device before and after calls of compiled functions, and what one of them adds."""

    def __init__(self):
        self.before, self.most, self.temporary = _held(), 0, set()

    def note(self) -> None:
        self.most = max(self.most, _held() - self.before)

    def around(self, function):
        @functools.wraps(function)
        def run(*arguments, **options):
            self.note()
            found = function(*arguments, **options)
            self.note()
            return found

        return run

    def inside(self, function, static: tuple[str, ...]):
        """As `around`, of a jitted function; the bytes that its programs need for what they compute are kept."""

        def run(*arguments, **options):
            fixed = tuple(options.pop(name) for name in static)
            key = function, fixed, jax.tree.structure(arguments), *map(jax.typeof, jax.tree.leaves(arguments))
            if key not in PROGRAMS:
                whole = options | dict(zip(static, fixed, strict=True))
                PROGRAMS[key] = function.lower(*arguments, **whole).compile()
            self.temporary.add(PROGRAMS[key].memory_analysis().temp_size_in_bytes)
            return PROGRAMS[key](*arguments, **options)

        return self.around(run)


def _held() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


@functools.cache
def model_of(depth: int):
    """(model, its parameters on the host)."""
    model = llama.build(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=depth, num_attention_heads=2
    )
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape.shape, scale=0.2).astype(shape.dtype)
    return model, jax.tree.map(draw, language.shapes(model)["params"])


def measured(depth: int, monkeypatch, folder) -> Meter:
    """What calibrating a model of `depth` blocks takes."""
    (model, params), meter = model_of(depth), Meter()
    with monkeypatch.context() as patch:
        patch.setattr(cbq, "_learn", meter.inside(cbq._learn, ("blocks", "schemes", "rates", "decided")))
        patch.setattr(cbq, "_finish", meter.around(cbq._finish))
        for module in (calibration, cbq):
            patch.setattr(module, "observe", meter.around(module.observe))
        found = calibrate(model, params, TOKENS, SETTINGS, METHOD, batch=4, folder=folder, progress=lambda line: None)
    assert len(found.errors) == depth
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found.params))
    return meter


def test_the_meter_sees_what_lies_on_the_device():
    meter, kept = Meter(), []
    meter.around(lambda: kept.append(jnp.zeros((100, 7))))()
    kept.clear()
    meter.note()
    assert meter.most == 2800
    assert _held() == meter.before


@pytest.fixture(scope="module", params=["memory", "folder"])
def meters(request, tmp_path_factory):
    """Of all depths."""
    with pytest.MonkeyPatch.context() as patch:
        place = lambda depth: tmp_path_factory.mktemp("calibration") / str(depth) if request.param == "folder" else ""
        yield [measured(depth, patch, place(depth)) for depth in DEPTHS]


def test_a_window_is_all_that_lies_on_the_device(meters):
    few, many = meters
    assert abs(many.most / few.most - 1) < 0.1
    assert few.temporary == many.temporary and min(few.temporary) > 0
    params = model_of(DEPTHS[1])[1]
    size = lambda tree: sum(array.nbytes for array in jax.tree.leaves(tree))
    assert 2 * size(params["layers_0"]) < many.most < size(params)
