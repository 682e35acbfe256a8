"""Records of jobs: kept, found again, never mixed up."""

import json

import pytest

from research.core.errors import UserError
from research.pods import records


def record(name, **values):
    made = dict(topology="cpu:1", config="c.py", workdir="/w", folders=["/w"], parallel=0, commit="1" * 40)
    made |= dict(submitted="2026-01-01T00:00:00+00:00", options={"time": "5"}, command=["python"])
    return records.Record(name, "slurm", ["1"], **{**made, **values})


def test_a_record_comes_back_as_it_was(tmp_path):
    records.save(tmp_path / "jobs", record("a"))
    assert records.load(tmp_path / "jobs", "a") == record("a")


def test_the_newest_is_last(tmp_path):
    records.save(tmp_path, record("a", submitted="2026-01-02T00:00:00+00:00"))
    records.save(tmp_path, record("b"))
    assert [one.name for one in records.every(tmp_path)] == ["b", "a"]
    assert records.every(tmp_path / "none") == []


def test_an_unknown_name_gets_the_nearest(tmp_path):
    records.save(tmp_path, record("resnet"))
    with pytest.raises(UserError, match="resnett: no job of that name in .*; did you mean resnet?"):
        records.load(tmp_path, "resnett")
    with pytest.raises(UserError, match="there are resnet"):
        records.load(tmp_path, "q")


@pytest.mark.parametrize("text", ["", "[]", '{"name": "a"}'])
def test_a_broken_record_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json: not a record"):
        records.load(tmp_path, "a")


def test_a_name_belongs_to_one_work_folder(tmp_path):
    records.save(tmp_path, record("a"))
    records.check_free(tmp_path, "a", "/w")
    records.check_free(tmp_path, "b", "/other")
    with pytest.raises(UserError, match="--name a: is the job of /w; give this one another --name"):
        records.check_free(tmp_path, "a", "/other")


def test_progress_is_read_from_the_runs_themselves(tmp_path):
    rows = [{"step": 5, "time": 0.0, "kind": "train"}, {"step": 9, "time": 1.0, "kind": "done"}]
    for name, lines in (("half", rows[:1]), ("whole", rows)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    said = records.progress([str(tmp_path / name) for name in ("half", "whole", "none")])
    assert [line.partition(": ")[2] for line in said] == ["step 5", "finished, step 9", "not started"]
