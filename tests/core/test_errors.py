"""What a launcher shows: one line for the user's mistakes, a traceback for ours."""

import importlib.util
import json

import jax.numpy as jnp
import pytest

from research.core import errors, storage


def own_error():
    raise ValueError("--config.x: wrong; use y")


def file_error():
    with open("/nonexistent/data.zip"):
        pass


def full_disk():
    with storage._named("/dev/full"), open("/dev/full", "w") as file:
        file.write("x")


def user_error():
    raise errors.UserError("a\nb")


def bug_in_a_library():
    json.loads("{")


def bug_in_jax():
    jnp.zeros((2,)).reshape(3)


def bug_in_a_builtin():
    int("x")


def bug():
    raise RuntimeError("broken")


def run(function, *arguments):
    def main(argv):
        function()

    main.__module__ = "launch.train"
    return errors.cli(main)(list(arguments))


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (own_error, "train: --config.x: wrong; use y\n"),
        (file_error, "train: /nonexistent/data.zip: no such file or directory\n"),
        (full_disk, "train: /dev/full: no space left on device\n"),
        (user_error, "train: a\nb\n"),
    ],
)
def test_a_deliberate_error_is_one_message_and_status_1(function, line, capsys, monkeypatch):
    monkeypatch.delenv(errors.ENVIRONMENT, raising=False)
    assert run(function) == 1
    assert capsys.readouterr().err == line
    assert run(function, "--traceback") == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv(errors.ENVIRONMENT, "1")
    assert run(function) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("function", [bug_in_a_library, bug_in_jax, bug_in_a_builtin, bug])
def test_a_bug_keeps_its_traceback_and_gives_status_1(function, capsys, monkeypatch):
    monkeypatch.delenv(errors.ENVIRONMENT, raising=False)
    assert run(function) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and function.__name__ in err


def test_a_raise_in_a_config_file_of_the_user_is_deliberate(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(arg):\n    raise ValueError(\n        f'unknown {arg}'\n    )\n")
    spec = importlib.util.spec_from_file_location("mine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError) as error:
        module.get_config("x")
    assert errors.deliberate(error.value)


def test_status_and_arguments_pass_through():
    seen = []

    @errors.cli
    def main(argv):
        seen.extend(argv)
        return 42

    assert main(["--a", "--traceback"]) == 42 and seen == ["--a"]
    assert errors.cli(lambda argv: None)([]) == 0


def test_an_interrupt_gives_130(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert run(interrupt) == 130
    assert capsys.readouterr().err == "train: interrupted\n"
