"""The contenders of `compression_world.py` can run on the embedded model, and its table says what records say."""

from __future__ import annotations

import json
import sys

import pytest
from small_store import FOLDER, put, script

from vivace.evaluation.contender import parse
from vivace.evaluation.subject import Subject
from vivace.evaluation.task import Task

world, table = script("compression_world"), script("compression_table")


def test_all_can_run(tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    world.save(tmp_path)
    model = Subject(Task.load("world-short@1")).description
    everyone = [parse(s) for s in world.specs(list(world.GROUPS), [], tmp_path)]
    assert {c.name: why for c in everyone if (why := c.refuse(model))} == {}
    assert len({c.name for c in everyone}) == len(everyone) >= len(world.FORMATS) + len(world.TOKENS)


def test_combinations_have_their_parts():
    assert {part for name in world.COMBINED for part in name.split("+")} <= set(world.COMBINED)


def test_the_table_compares_clip_by_clip(tmp_path, monkeypatch, capsys):
    put(tmp_path, "exact", {"attributes": [1.0] * 8}, kind="exact", repeats=2)
    put(
        tmp_path,
        "half",
        {"attributes": [0.5, 1.0] * 4, "lpips_alex": [0.1] * 8, "psnr": [30.0] * 8},
        techniques=[{"technique": "int8_linear"}],
        flops=500.0,
        repeats=2,
    )
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), "--json", str(tmp_path / "out.json")])
    assert table.main() == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["stores"][tmp_path.name]
    assert (row["name"], row["clips"]) == ("half", 8)
    assert row["accuracy_difference"]["value"] == pytest.approx(-0.25)
    assert row["lpips_alex"]["value"] == pytest.approx(0.1)
    assert row["flops_share"] == pytest.approx(0.5)
    assert not row["within_points"]
    assert "half" in capsys.readouterr().out


def test_a_folder_without_records_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        table.main()
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
