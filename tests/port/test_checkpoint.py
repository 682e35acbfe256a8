"""Checkpoints in and out: what comes back, and what is refused with one clear line."""

import contextlib
import pathlib
import pickle
import resource
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from research import backbones
from research.port import checkpoint, names, tensors
from tests.backbones import drawn, tiny

MODEL = "resnet8"


@pytest.fixture(scope="module")
def variables():
    return drawn.variables(backbones.create(MODEL), jnp.zeros((1, 32, 32, 3)))


@pytest.fixture
def official(variables, tmp_path):
    path = tmp_path / "official.safetensors"
    checkpoint.save_official(variables, MODEL, path)
    return path


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def rewrite(path, change, **extra):
    """The file with every name changed and arrays added."""
    state = {change(name): array for name, array in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(state | extra, path)
    return path


def test_what_is_written_comes_back(variables, official):
    assert_same(checkpoint.load_official(MODEL, official), variables)
    stored = safetensors.numpy.load_file(official)
    assert stored["layer1.0.conv1.weight"].shape == (16, 16, 3, 3)
    np.testing.assert_array_equal(stored["fc.weight"], variables["params"]["fc"]["kernel"].T)


def test_our_own_form_comes_back(variables, tmp_path):
    path = tmp_path / "deep" / "ours.safetensors"
    checkpoint.save_variables(variables, path)
    assert "params/layer1_0/conv1/kernel" in safetensors.numpy.load_file(path)
    assert_same(checkpoint.load_variables(path), variables)
    assert_same(checkpoint.load_official(MODEL, path), variables)


def test_an_official_file_is_not_read_as_our_own(official):
    with pytest.raises(ValueError, match="read it with load_official"):
        checkpoint.load_variables(official)


@pytest.mark.parametrize("model, dialect", [("convnextv2_atto", "official"), ("cifar_resnet18", "shortcut")])
def test_the_dialect_is_recognised(tmp_path, model, dialect):
    variables = drawn.variables(backbones.create(model), jnp.zeros((1, 32, 32, 3)))
    checkpoint.save_official(variables, model, tmp_path / "w.safetensors", dialect=dialect)
    assert_same(checkpoint.load_official(model, tmp_path / "w.safetensors"), variables)
    with pytest.raises(ValueError, match="names missing"):
        first = next(iter(backbones.family(model).NAMES))
        checkpoint.load_official(model, tmp_path / "w.safetensors", dialect=first)


def test_authors_shapes_are_written(tmp_path):
    variables = drawn.variables(backbones.create("convnextv2_atto"), jnp.zeros((1, 32, 32, 3)))
    checkpoint.save_official(variables, "convnextv2_atto", tmp_path / "w.safetensors", dialect="official")
    stored = safetensors.numpy.load_file(tmp_path / "w.safetensors")
    assert stored["stages.0.0.grn.gamma"].shape == (1, 1, 1, 160)
    assert stored["stages.0.0.pwconv1.weight"].shape == (160, 40)
    assert stored["stages.0.0.dwconv.weight"].shape == (40, 1, 7, 7)


def test_what_training_scripts_add_is_dropped(variables, official):
    extra = {
        "module.bn1.num_batches_tracked": np.int64(7)[None],
        "module.kd_loss_fn.embed.weight": np.zeros((3, 3), np.float32),
    }
    assert_same(checkpoint.load_official(MODEL, rewrite(official, lambda name: f"module.{name}", **extra)), variables)


def test_narrow_floats_become_float32(variables, official):
    state = {k: v.astype(ml_dtypes.bfloat16) for k, v in safetensors.numpy.load_file(official).items()}
    safetensors.numpy.save_file(state, official)
    found = checkpoint.load_official(MODEL, official)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), found, variables)


def test_another_class_count_is_refused_and_named(official):
    with pytest.raises(ValueError, match="has 100 classes, resnet8 is to have 10: pass num_classes=100, or new_head=0"):
        checkpoint.load_official(MODEL, official, num_classes=10)


def test_a_new_head_is_initialised_and_the_rest_kept(variables, official):
    first, other = (checkpoint.load_official(MODEL, official, num_classes=10, new_head=seed) for seed in (0, 1))
    assert first["params"]["fc"]["kernel"].shape == (64, 10)
    assert np.any(first["params"]["fc"]["kernel"] != other["params"]["fc"]["kernel"])
    body = lambda tree: {name: value for name, value in tree["params"].items() if name != "fc"}
    assert_same(body(first), body(variables))


def test_no_classes_leave_the_classifier_out(variables, official):
    found = checkpoint.load_official(MODEL, official, num_classes=0)
    assert set(variables["params"]) - set(found["params"]) == {"fc"}


def test_a_file_of_another_network_is_refused(official):
    with pytest.raises(ValueError, match=r"official.safetensors: no checkpoint of resnet20: 60 of 107 names missing"):
        checkpoint.load_official("resnet20", official)


def test_variables_of_another_network_are_not_written(variables, tmp_path):
    with pytest.raises(ValueError, match="not those of resnet20"):
        checkpoint.save_official(variables, "resnet20", tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="expected params"):
        checkpoint.save_variables({"params": {}, "opt_state": {}}, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_positions_are_resampled_for_another_image_size(tmp_path):
    name = "vit_tiny_patch16_224"
    model = backbones.create(name)
    variables = drawn.variables(model, jnp.zeros((1, 224, 224, 3)))
    checkpoint.save_official(variables, name, tmp_path / "w.safetensors")
    found = checkpoint.load_official(name, tmp_path / "w.safetensors", image_size=160)
    old, new = variables["params"]["pos_embed"], found["params"]["pos_embed"]
    assert (old.shape, new.shape) == ((1, 197, 192), (1, 101, 192))
    np.testing.assert_array_equal(new[:, 0], old[:, 0])
    # The mean survives a resize; single values do not.
    np.testing.assert_allclose(new[0, 1:].mean(0), old[0, 1:].mean(0), atol=0.02)


def test_positions_that_are_a_plain_table_are_resampled_too(tmp_path, monkeypatch):
    name, side = tiny.use(monkeypatch, "clip")
    variables = drawn.variables(backbones.create(name), jnp.zeros((1, side, side, 3)))
    checkpoint.save_official(variables, name, tmp_path / "w.safetensors")
    stored = safetensors.numpy.load_file(tmp_path / "w.safetensors")
    assert stored["vision_model.embeddings.position_embedding.weight"].shape == (5, 16)
    assert_same(checkpoint.load_official(name, tmp_path / "w.safetensors", num_classes=7), variables)
    found = checkpoint.load_official(name, tmp_path / "w.safetensors", num_classes=7, image_size=24)
    new, old = (tree["params"]["vision"]["pos_embed"] for tree in (found, variables))
    assert new.shape == (1, 10, 16)
    np.testing.assert_array_equal(new[:, 0], old[:, 0])
    # Corners lie outside of the old cells' centres, the middle is their mean.
    np.testing.assert_allclose(new[0, 5], old[0, 1:].mean(0), atol=1e-6)


class Payload:
    """Creates a file when unpickled, which must never happen."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


@pytest.fixture
def pickled(tmp_path):
    path, marker = tmp_path / "weights.pth", tmp_path / "executed"
    path.write_bytes(pickle.dumps({"state_dict": Payload(marker)}))
    return path, marker


def test_a_pickle_is_not_touched_without_torch(pickled, monkeypatch):
    path, marker = pickled
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"weights.pth is a PyTorch file: pip install 'stillroom\[torch\]'"):
        checkpoint.load_official(MODEL, path)
    assert not marker.exists()


def torch_that(raises, version="2.6.0"):
    """Stands in for PyTorch, whose loader of plain tensors ends with an exception."""

    def load(path, *, map_location, weights_only):
        assert weights_only and map_location == "cpu"
        raise raises

    serialization = types.SimpleNamespace(safe_globals=lambda allowed: contextlib.nullcontext())
    return types.SimpleNamespace(load=load, serialization=serialization, __version__=version)


@pytest.mark.parametrize(
    "raises, message",
    [
        (pickle.UnpicklingError("failed.\nUnsupported global: GLOBAL os.system was"), r"\(os.system\): it was refused"),
        (EOFError(), r"no intact PyTorch file \(EOFError\)"),
    ],
)
def test_a_pickle_that_torch_refuses_ends_in_one_line(pickled, monkeypatch, raises, message):
    path, marker = pickled
    monkeypatch.setitem(sys.modules, "torch", torch_that(raises))
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load_official(MODEL, path)
    assert len(str(caught.value).splitlines()) == 1
    assert not marker.exists()


def test_a_torch_with_a_known_hole_is_not_used(pickled, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", torch_that(AssertionError("was called"), version="2.5.1+cpu"))
    with pytest.raises(ValueError, match=r"pip install 'torch>=2.6'"):
        checkpoint.load_official(MODEL, pickled[0])


@pytest.mark.parametrize("keys", [("state_dict",), ("model",), ("state_dict_ema",), ("state_dict", "module"), ()])
def test_wrappers_are_opened(keys):
    state = {"w": np.zeros(2)}
    content = state
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    assert tensors.unwrap(content, "f") == state


def test_averaged_weights_come_first():
    assert set(tensors.unwrap({"state_dict": {"a": np.zeros(1)}, "state_dict_ema": {"b": np.zeros(1)}}, "f")) == {"b"}


@pytest.mark.parametrize("content, found", [({"epoch": 3}, "epoch"), ([1], "list"), ({}, "but: ")])
def test_a_file_without_tensors_is_refused(content, found):
    with pytest.raises(ValueError, match=f"no state dict of tensors.*{found}"):
        tensors.unwrap(content, "f.pth")


def test_damaged_missing_and_foreign_files(official, tmp_path):
    official.write_bytes(official.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no intact safetensors file"):
        tensors.read(official)
    with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
        tensors.read(tmp_path / "nowhere.safetensors")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoints end in .safetensors"):
        tensors.read(tmp_path / "weights.h5")


def test_a_failed_write_leaves_the_old_file(official):
    before, limits = official.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may grow beyond: as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            tensors.write(official, {"a": np.zeros(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert official.read_bytes() == before and list(official.parent.iterdir()) == [official]


def test_an_unknown_dialect_is_refused(official):
    with pytest.raises(ValueError, match="'keras' is none of mdistiller, shortcut"):
        checkpoint.load_official(MODEL, official, dialect="keras")


def test_import_is_what_the_map_of_names_says(variables, official):
    rules = backbones.family(MODEL).NAMES["mdistiller"]
    assert_same(names.from_official(variables, safetensors.numpy.load_file(official), rules), variables)
