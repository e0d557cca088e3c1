"""plan, methods and doctor: what they say, and that what they say is so."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from vivace import catalogue
from vivace.models.loading import describe
from vivace.plans.plan import Plan, preset_names
from vivace.techniques.base import registry


def test_plan_list_names_all_presets(vivace):
    out = vivace("plan", "list").out
    assert {"exact", "fast", "near-exact"} <= set(preset_names())
    assert all(name in out for name in preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_presets_check_on_a_wan_model(vivace, folder, name):
    ran = vivace("plan", "check", name, "--model", str(folder))
    assert ran.code == 0
    assert "can run" in ran.out


@pytest.mark.parametrize("name", preset_names())
def test_plan_show_yaml_is_a_plan_file(vivace, here, name):
    (here / "mine.yaml").write_text(vivace("plan", "show", name, "--yaml").out, encoding="utf-8")
    assert Plan.load("mine.yaml") == Plan.load(name)


def test_plan_show_lists_techniques_in_order(vivace):
    out = vivace("plan", "show", "fast").out
    places = [out.index(t.card.name) for t in Plan.load("fast").ordered()]
    assert places == sorted(places)
    assert "no techniques" in vivace("plan", "show", "exact").out


def test_plan_check_tells_all_problems_at_once(vivace, here, folder):
    items = [
        {"technique": "first_block_cache", "warmup": 12},
        {"technique": "few_steps", "steps": 12},
        {"technique": "few_steps", "steps": 8},
        {"technique": "solver", "solver": "sde-dpm++2m"},
    ]
    (here / "wrong.yaml").write_text(yaml.safe_dump({"techniques": items}), encoding="utf-8")
    expected = Plan.load("wrong.yaml").problems(describe(folder))
    ran = vivace("plan", "check", "wrong.yaml", "--model", str(folder))
    assert ran.code == 2
    assert len(expected) >= 3
    assert all(str(problem) in ran.out for problem in expected)


def test_plan_diff(vivace):
    ran = vivace("plan", "diff", "exact", "fast")
    assert ran.out.splitlines() == Plan.load("exact").diff(Plan.load("fast"))
    assert "do the same" in vivace("plan", "diff", "fast", "fast").out


def test_methods_lists_every_technique(vivace):
    out = vivace("methods").out
    assert all(name in out for name in registry)


@pytest.mark.parametrize("name", list(registry))
def test_methods_show_explains(vivace, name):
    out = " ".join(vivace("methods", "show", name).out.split())
    entry = catalogue.entry(name)
    assert entry.source in out
    for setting in entry.settings:
        assert setting.name in out
        assert setting.doc, f"{name}.{setting.name} has no meaning in words"


def test_the_catalogue_agrees_with_the_cards():
    for entry in catalogue.entries():
        technique = registry[entry.name]
        assert entry.summary == technique.card.summary
        assert [s.name for s in entry.settings] == [f.name for f in dataclasses.fields(technique)]


def test_doctor_json(vivace):
    ran = vivace("doctor", "--json")
    report = json.loads(ran.out)
    assert ran.code == (0 if report["ready"] else 1)
    sections = {check["section"] for check in report["checks"]}
    assert {"Software", "Machine", "Embedded model", "Video", "Optional", "Disk"} <= sections
    assert report["ready"] == all(check["state"] != "bad" for check in report["checks"])


def test_doctor_names_a_damaged_weights_file(vivace, monkeypatch, tmp_path):
    (tmp_path / "manifest.json").write_text('{"vae/model.safetensors": {"bytes": 3, "sha256": "0"}}')
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"abc")
    monkeypatch.setattr("vivace.tiny.load.WEIGHTS", tmp_path)
    ran = vivace("doctor")
    assert ran.code == 1
    assert "vae/model.safetensors is damaged" in ran.out
