"""The measurement of stored labels, small."""

import json

from launch import bench


def test_it_times_both_ways(tmp_path, capsys):
    file = tmp_path / "labels.json"
    small = ["--teacher", "resnet8", "--student", "resnet8", "--size", "8", "--batch", "16", "--steps", "1"]
    assert not bench.main(["labels", *small, "--rounds", "1", "--unseen", "1", "--json", str(file)])
    found = json.loads(file.read_text())
    assert all(seconds > 0 for rounds in found["seconds"].values() for seconds in rounds)
    assert found["macs"]["teacher"] == found["macs"]["student"] > 0
    assert "faster a step" in capsys.readouterr().out
