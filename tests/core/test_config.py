"""Configs: typed overrides, locking, error texts, JSON and run folders."""

import argparse
import json
import pathlib
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from research.core import config as configs
from research.core.errors import UserError

FILE = """
    from ml_collections import ConfigDict, config_dict

    def get_config(arg):
        config = ConfigDict(dict(
            arg=arg, batch_size=8, lr=0.1, name="a", flag=False, nothing=None, sizes=(1, 2), betas=(0.9, 0.999),
            size=config_dict.placeholder(int), log=dict(every=10), rules=((".*", "fsdp"),),
            data=dict(path="digits", workers=2, options=dict()),
            students=[dict(loss="kd", sizes=[1, 2]), dict(loss="dkd")], optimizer=dict(lr=0.5, name="sgd"),
        ))
        config.twice = config.get_ref("batch_size") * 2
        return config
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "configs" / "small.py"
    path.parent.mkdir()
    path.write_text(textwrap.dedent(FILE))
    return "configs/small.py"


def test_loads_by_path_and_passes_the_argument(file):
    assert configs.load(file).arg == ""
    assert configs.load(f"{file}:smoke,x=1").arg == "smoke,x=1"
    assert configs.load(str(pathlib.Path(file).resolve()) + ":y").arg == "y"


def test_is_locked_inside_sequences_too(file):
    config = configs.load(file)
    with pytest.raises(AttributeError):
        config.new = 1
    with pytest.raises(AttributeError):
        config.students[0].new = 1
    assert config.students[1].loss == "dkd" and isinstance(config.students, tuple)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("batch_size=1e3", "batch_size", 1000),
        ("batch_size=12345678901234567891", "batch_size", 12345678901234567891),
        ("lr=1", "lr", 1.0),
        ("lr=None", "lr", None),
        ("name=3", "name", "3"),
        ("name=a=b,c", "name", "a=b,c"),
        ("flag=true", "flag", True),
        ("flag=0", "flag", False),
        ("nothing=2.5", "nothing", 2.5),
        ("nothing=text", "nothing", "text"),
        ("nothing=(1,[2,3])", "nothing", (1, (2, 3))),
        ("size=7", "size", 7),
        ("sizes=3", "sizes", (3,)),
        ("sizes=(4,5,6)", "sizes", (4, 5, 6)),
        ("sizes=[]", "sizes", ()),
        ("sizes=1,None", "sizes", (1, None)),
        ("betas=1,2", "betas", (1.0, 2.0)),
        ("rules=[['a=b,c', 'tensor:1'], ('.*', 'fsdp')]", "rules", (("a=b,c", "tensor:1"), (".*", "fsdp"))),
        ("students.1.loss=dist", "students.1.loss", "dist"),
        ("data.options.cache=/tmp/x", "data.options.cache", "/tmp/x"),
        ("data.options.cache_gb=2", "data.options.cache_gb", 2),
        ("students.0.sizes.1=9", "students.0.sizes", (1, 9)),
        ("optimizer.lr=.25", "optimizer.lr", 0.25),
        ("data.path=/a b/c", "data.path", "/a b/c"),
    ],
)
def test_an_override_takes_the_type_of_the_old_value(file, override, path, value):
    got = configs.get(configs.load(file, [f"--config.{override}"]), path)
    assert got == value and type(got) is type(value)


def test_overrides_reach_values_derived_from_them_and_the_last_one_wins(file):
    assert configs.load(file, ["--config.batch_size=16", "--config.batch_size=32"]).twice == 64


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("--config.bath_size=1", "--config.bath_size: no such key; did you mean --config.batch_size?"),
        ("--config.optimzer.lr=1", "--config.optimzer.lr: no such key; did you mean --config.optimizer.lr?"),
        ("--config.optimizer.lrr=1", "did you mean --config.optimizer.lr?"),
        ("--config.loss=kd", "did you mean --config.students.0.loss?"),
        ("--config.students.0.los=kd", "did you mean --config.students.0.loss?"),
        ("--config.zzz=1", "--config.zzz: no such key (keys there: arg, batch_size,"),
        ("--config.name.x=1", "no such key"),
        ("--config.students.2.loss=kd", "'2' is no entry of a list of 2"),
        ("--config.students=kd", "set one entry, --config.students.0.<key>=<value>"),
        ("--config.optimizer=sgd", "--config.optimizer.<key>=<value>"),
        ("--config.batch_size=1.5", "--config.batch_size: expected a whole number, got '1.5'"),
        ("--config.batch_size=inf", "expected a whole number"),
        ("--config.lr=fast", "expected a number, got 'fast'"),
        ("--config.flag=2", "expected true or false, got '2'"),
        ("--config.sizes=a,b", "expected a whole number, got 'a'"),
        ("--config.size=a", "expected a whole number"),
        ("--config.rules=fsdp", "expected a list of lists such as [['.*', 'fsdp']], got 'fsdp'"),
        ("--config.rules=['a','b']", "expected a list of lists"),
        ("--config.lr", "an override is written --config.key=value"),
    ],
)
def test_a_wrong_override_is_a_clear_error(file, override, text):
    with pytest.raises(UserError) as error:
        configs.load(file, [override])
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_names_the_nearest(file):
    with pytest.raises(FileNotFoundError, match=r"no config file configs/smal\.py; did you mean configs/small\.py\?"):
        configs.load("configs/smal.py")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("x = 1", "defines no get_config"),
        ("def get_config(arg): return {}", "returned dict, expected an ml_collections.ConfigDict"),
        ("import ml_collections as m\ndef get_config(arg): return m.ConfigDict({'a': {'f': len}})", "--config.a.f: a"),
        (
            "import ml_collections as m\nfrom ml_collections import config_dict as d\n"
            "def get_config(arg): return m.ConfigDict({'a': {'f': d.required_placeholder(int)}})",
            "--config.a.f: needs a value; add --config.a.f=<value>",
        ),
    ],
)
def test_a_wrong_file_is_a_clear_error(tmp_path, body, text):
    path = tmp_path / "wrong.py"
    path.write_text(body)
    with pytest.raises(UserError, match=text):
        configs.load(str(path))


def test_a_value_that_has_to_be_given_can_be(tmp_path):
    path = tmp_path / "needs.py"
    path.write_text(
        "import ml_collections as m\nfrom ml_collections import config_dict as d\n"
        "def get_config(arg): return m.ConfigDict({'a': {'f': d.required_placeholder(int)}})"
    )
    assert configs.load(str(path), ["--config.a.f=3"]).a.f == 3
    with pytest.raises(UserError, match="expected a whole number"):
        configs.load(str(path), ["--config.a.f=x"])


def test_argument_options_are_typed_and_named():
    options = configs.parse_arg("smoke,res=64", smoke=False, res=224, name="a")
    assert (options.smoke, options.res, options.name) == (True, 64, "a")
    with pytest.raises(UserError, match="no such option; did you mean smoke"):
        configs.parse_arg("smok", smoke=False)


def test_launcher_arguments_are_split_and_misspelt_options_refused():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--workdir")
    known, overrides = configs.parse_args(parser, ["--config.a=1", "--workdir", "w", "--config.b.c=d"])
    assert known.workdir == "w" and overrides == ["--config.a=1", "--config.b.c=d"]
    with pytest.raises(UserError, match="--workdr=w: no such option; did you mean --workdir"):
        configs.parse_args(parser, ["--workdr=w"])
    with pytest.raises(UserError, match="--config.a=<value>"):
        configs.parse_args(parser, ["--config.a", "1"])


def test_json_gives_the_same_config_back(file):
    config = configs.load(file)
    again = configs.from_json(configs.to_json(config))
    assert again == config and again.is_locked and again.students[0].is_locked
    assert configs.to_json(again) == configs.to_json(config)
    with pytest.raises(UserError, match="not a config"):
        configs.from_json('{"a": 1')


leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
names = st.text("abc", min_size=1, max_size=2)
trees = st.dictionaries(
    names, st.recursive(leaf, lambda t: st.lists(t, max_size=3) | st.dictionaries(names, t, max_size=3), max_leaves=8)
)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(trees, trees)
def test_difference_is_empty_exactly_for_equal_configs(a, b):
    frozen = [configs.from_json(json.dumps(tree)) for tree in (a, b)]
    assert configs.difference(frozen[0], configs.from_json(configs.to_json(frozen[0]))) == []
    assert (configs.difference(*frozen) == []) == (configs.plain(frozen[0]) == configs.plain(frozen[1]))


def test_difference_names_old_and_new(file):
    a = configs.load(file)
    b = configs.load(file, ["--config.students.1.loss=dist", "--config.sizes=1,2,3"])
    assert configs.difference(a, b) == ["sizes: [1, 2] -> [1, 2, 3]", 'students.1.loss: "dkd" -> "dist"']
    lines = configs.difference(ConfigDict({"a": 1}), ConfigDict({"b": None}))
    assert lines == ["a: 1 -> (absent)", "b: (absent) -> null"]


def test_a_run_folder_is_claimed_once_and_then_resumed(file, tmp_path):
    config, folder = configs.load(file), tmp_path / "runs" / "one"
    assert configs.claim(folder, config) is False
    assert configs.from_json((folder / "config.json").read_text()) == config
    assert configs.claim(folder, config) is True
    assert configs.claim(folder, configs.load(file, ["--config.log.every=1", "--config.data.workers=0"])) is True
    assert [p.name for p in folder.iterdir()] == ["config.json"]


def test_a_folder_of_another_config_is_refused_and_left_alone(file, tmp_path):
    folder = tmp_path / "one"
    configs.claim(folder, configs.load(file))
    before = (folder / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        configs.claim(folder, configs.load(file, ["--config.optimizer.lr=2"]))
    assert "optimizer.lr: 0.5 -> 2.0" in str(error.value)
    assert "same config" in str(error.value) and "another --workdir" in str(error.value)
    assert (folder / "config.json").read_bytes() == before


def test_a_broken_or_foreign_folder_is_refused(file, tmp_path):
    (tmp_path / "config.json").write_text('{"lr": ')
    with pytest.raises(UserError, match="config.json: not a config"):
        configs.claim(tmp_path, configs.load(file))
    (tmp_path / "config.json").unlink()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds metrics.jsonl but no config.json"):
        configs.claim(tmp_path, configs.load(file))
    assert not (tmp_path / "config.json").exists()


def test_none_is_a_word_where_words_are_expected():
    assert configs.parse_arg("arms=none", arms="kd").arms == "none"
    assert configs.parse_arg("arms=None", arms="kd").arms is None
    assert configs.parse_arg("size=none", size=3).size is None
