"""The golden check itself: every golden passes, and what should fail does."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from research.port import verify
from research.port.verify import Golden, Tolerance, allowed_error, compare, tolerance

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*.npz"))
CASE, KEY = "vanillakd/lr_schedule", "y/lr_A1"


@pytest.fixture(autouse=True)
def promotion():
    """Float64 files meet float32 defaults of JAX's own functions, as they do when the command runs."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("case", CASES)
def test_golden(case, capsys):
    assert verify.main([str(GOLDEN / case)]) == 0
    assert capsys.readouterr().out.startswith(f"PASS {case.removesuffix('.npz')} max_abs=")


def golden(y, suggestion=None):
    meta = {} if suggestion is None else {"suggested_tolerance": suggestion}
    return Golden(pathlib.Path("method/case.npz"), {}, {}, {k: np.asarray(v) for k, v in y.items()}, meta)


def perturbed(tmp_path, key, change, case=CASE, stem=None):
    """A copy of a golden file with one array changed, in a folder named as its method."""
    with np.load(GOLDEN / f"{case}.npz") as data:
        arrays = {name: data[name] for name in data.files}
    arrays[key] = change(arrays[key])
    target = tmp_path / f"{case.split('/')[0]}/{stem or case.split('/')[1]}.npz"
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, **arrays)
    return target


def test_a_perturbed_golden_fails(tmp_path, capsys):
    path = perturbed(tmp_path, KEY, lambda y: y * (1 + 1e-5))
    assert verify.main([str(path)]) == 1
    line = capsys.readouterr().out
    assert line.startswith("FAIL vanillakd/lr_schedule max_abs=") and "(worst: lr_A1)" in line


def test_a_perturbed_weight_fails(tmp_path):
    path = perturbed(tmp_path, "w/fc.bias", lambda w: w + 1e-3, case="backbones/resnet_basic")
    assert verify.main([str(path)]) == 1


def test_a_variant_is_checked_by_the_checker_of_its_case(tmp_path, capsys):
    path = perturbed(tmp_path, KEY, lambda y: y, stem="lr_schedule__other")
    assert verify.main([str(path)]) == 0
    assert capsys.readouterr().out.startswith("PASS vanillakd/lr_schedule__other ")


def test_a_missing_checker_fails_and_the_others_still_run(tmp_path, capsys):
    (tmp_path / "nowhere").mkdir()
    shutil.copy(GOLDEN / f"{CASE}.npz", tmp_path / "nowhere" / "lr_schedule.npz")
    perturbed(tmp_path, KEY, lambda y: y, stem="unheard_of")
    perturbed(tmp_path, KEY, lambda y: y)
    assert verify.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["FAIL", "nowhere/lr_schedule"],
        ["PASS", "vanillakd/lr_schedule"],
        ["FAIL", "vanillakd/unheard_of"],
    ]
    assert "no checker for case 'unheard_of' of method 'vanillakd'" in lines[2]


def test_a_damaged_file_fails_on_one_line(tmp_path, capsys):
    path = tmp_path / "vanillakd" / "lr_schedule.npz"
    path.parent.mkdir()
    path.write_bytes(b"not an archive")
    assert verify.main([str(path)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_path_without_goldens_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no golden file at"):
        verify.main([str(tmp_path)])


@pytest.mark.parametrize(
    "text, values, gradients",
    [
        (None, Tolerance(1e-5), Tolerance(1e-4)),
        ("rtol 1e-4, atol 1e-5", Tolerance(1e-4, 1e-5), Tolerance(1e-4, 1e-5)),
        ("rtol 1e-6", Tolerance(1e-6), Tolerance(1e-6)),
        (
            "rtol 1e-5, atol 1e-6 (float32); gradients rtol 1e-4, atol 1e-7",
            Tolerance(1e-5, 1e-6),
            Tolerance(1e-4, 1e-7),
        ),
        ("rtol 1e-4 loss; gradient through SVD rtol 1e-2 (optional)", Tolerance(1e-4), Tolerance(1e-2)),
    ],
)
def test_suggested_tolerances_are_read(text, values, gradients):
    assert tolerance(golden({}, text)) == (values, gradients)


def test_gradients_have_their_own_tolerance():
    expected = golden({"grad_x": [1.0], "loss": [1.0]}, "rtol 1e-5; gradients rtol 1e-3")
    assert compare(expected, {"grad_x": [1.0005], "loss": [1.0]})[0]
    assert not compare(expected, {"grad_x": [1.0], "loss": [1.0005]})[0]


def test_an_absolute_tolerance_does_not_hide_small_values():
    small = np.array([1e-6, 2e-6])
    np.testing.assert_allclose(allowed_error(small, Tolerance(1e-5, 1e-6)), 1e-5 * (small + 2e-6), rtol=1e-6)
    assert not compare(golden({"a": small}, "rtol 1e-5, atol 1e-6"), {"a": small * 1.01})[0]
    assert compare(golden({"a": [1.0, 0.0]}), {"a": [1.0, 9e-6]})[0]
    assert not compare(golden({"a": [1.0, 0.0]}), {"a": [1.0, 1.1e-5]})[0]


def test_integers_must_be_equal():
    assert compare(golden({"a": [1, 2]}), {"a": [1.0, 2.0]})[0]
    assert not compare(golden({"a": [10**6, 2]}), {"a": [10**6 + 1, 2]})[0]


@pytest.mark.parametrize("expected, got", [([1.0], [np.nan]), ([np.nan], [1.0]), ([np.inf], [1.0]), ([1.0], [np.inf])])
def test_what_is_not_finite_must_match(expected, got):
    assert not compare(golden({"a": expected}), {"a": got})[0]
    assert compare(golden({"a": expected}), {"a": expected})[0]


def test_missing_outputs_and_wrong_shapes_are_named():
    assert compare(golden({"a": [1.0], "b": [1.0]}), {"a": [1.0]}) == (False, "not computed: b")
    assert compare(golden({"a": [1.0]}), {"a": [[1.0]]}) == (False, "a: shape (1, 1), expected (1,)")
