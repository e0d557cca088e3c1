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


def test_methods_lists_the_field_by_family(vivace):
    out = vivace("methods").out
    places = [out.index(f"\n{f.name.capitalize()}") for f in catalogue.families()]
    assert places == sorted(places)
    assert all(m.name in out for m in catalogue.methods())


def test_methods_filters_add_up(vivace):
    options = ("--family", "caching", "--training", "none", "--base", "wan", "--search", "threshold")
    found = catalogue.select(family="caching", training="none", base="wan", text="threshold")
    assert 0 < len(found) < 20
    out = vivace("methods", *options).out
    assert all(m.name in out for m in found)
    assert f"{len(found)} methods" in out
    assert {m["name"] for m in json.loads(vivace("methods", *options, "--json").out)} == {
        m.name for m in found
    }


def test_methods_json_holds_everything(vivace):
    (found,) = json.loads(vivace("methods", "--search", "magcache retention", "--json").out)
    assert found["name"] == "magcache"
    assert found["family"] == "cache and trajectory"
    assert found["sub_family"] == ["D1 Feature cache"]
    assert found["claims"][0]["evidence"] == "repository README"
    assert found["measured"] == []


@pytest.mark.parametrize(
    ("options", "offer"),
    [
        (("--family", "cachng"), "did you mean"),
        (("--status", "done"), "known: "),
        (("--base", "sora99"), "no base model is called 'sora99'"),
        (("--records", "nowhere"), "there is no folder nowhere"),
    ],
)
def test_methods_refuses_in_one_sentence(vivace, options, offer):
    ran = vivace("methods", *options)
    assert ran.code == 2
    assert offer in ran.sentence


def test_methods_show_puts_claim_and_measurement_together(vivace, here):
    ran = vivace("methods", "show", "MagCache")
    assert "not measured here" in ran.out
    for claim in catalogue.method("magcache").claims:
        assert claim.evidence in ran.out
    record = {
        "created": "2026-11-24T10:00:00",
        "contender": {"name": "diffusers.mag_cache@threshold=0.1", "kind": "peer"},
        "task": {"name": "world-smoke@1"},
        "counts": {"nfe": 62},
    }
    (here / "store" / "records").mkdir(parents=True)
    (here / "store" / "records" / "cafe.json").write_text(json.dumps(record), encoding="utf-8")
    out = vivace("methods", "show", "MagCache", "--records", "store").out
    assert "measured: diffusers.mag_cache@threshold=0.1 62 evaluations" in out
    assert "world-smoke@1, 2026-11-24, record cafe" in out
    assert "not measured here" not in out


def test_methods_show_by_paper_name_ends_at_our_technique(vivace):
    out = " ".join(vivace("methods", "show", "STA").out.split())
    assert catalogue.method("sta").idea in out
    assert " ".join(catalogue.entry("sliding_tile").differs.split()) in out
    assert "technique: sliding_tile" in out


def test_methods_show_offers_the_nearest(vivace):
    ran = vivace("methods", "show", "teecache")
    assert ran.code == 2
    assert "did you mean teacache" in ran.sentence


def test_methods_page_writes_one_file(vivace, here):
    ran = vivace("methods", "page", "-o", "field.html")
    assert ran.code == 0
    assert [p.name for p in here.iterdir()] == ["field.html"]
    assert (here / "field.html").read_text(encoding="utf-8").startswith("<!doctype html>")


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
