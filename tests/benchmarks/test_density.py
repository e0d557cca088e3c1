"""The density table against records with known truth."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from small_store import MODEL, put, script

density = script("density")
PROMPTS = 40
rng = np.random.default_rng(0)
EXACT = rng.choice([0.8, 1.0], PROMPTS).tolist()


def columns(lost: float, lpips: float, psnr: float = 30.0) -> dict[str, list[float]]:
    """Each prompt loses `lost` of its attributes, more or less."""
    noise = np.where(np.arange(PROMPTS) % 2, 0.01, -0.01)
    return {
        "attributes": (np.array(EXACT) - lost + noise).tolist(),
        "lpips_alex": (lpips * (1.0 + noise)).tolist(),
        "psnr": [psnr] * (PROMPTS - 1) + [math.inf],
    }


def technique(name: str, **settings) -> list[dict]:
    return [{"technique": name, **settings}, {"technique": "whole_clip_decode", "optional": True}]


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "store"
    put(folder, "exact", {"attributes": EXACT}, kind="exact")
    put(
        folder,
        "good",
        columns(0.002, 0.02),
        techniques=technique("pisa", share=0.2),
        pairs=300.0,
        flops=600.0,
    )
    put(folder, "sparser", columns(0.05, 0.10), techniques=technique("pisa"), pairs=150.0, flops=500.0)
    put(
        folder,
        "second",
        columns(0.02, 0.05),
        techniques=technique("sparge_attention"),
        pairs=320.0,
        flops=650.0,
    )
    # The best of all, but meant to be trained.
    put(folder, "raw", columns(0.0, 0.01), techniques=technique("vsa", top=4), pairs=100.0, flops=450.0)
    put(folder, "low-bit", columns(0.0, 0.005), techniques=technique("sage_attention"))
    both = [*technique("pisa"), {"technique": "first_block_cache"}]
    put(folder, "with-cache", columns(0.0, 0.001), techniques=both, pairs=90.0, flops=100.0)
    put(folder, "steps=15", columns(0.0, 0.001), kind="steps", pairs=300.0, flops=300.0)
    return folder


def run(*arguments, capsys, monkeypatch) -> str:
    monkeypatch.setattr("sys.argv", ["density.py", *map(str, arguments)])
    density.main()
    return capsys.readouterr().out


def test_densities_and_differences_are_those_of_the_records(store, tmp_path, capsys, monkeypatch):
    file = tmp_path / "out.json"
    text = run(store, "--json", file, capsys=capsys, monkeypatch=monkeypatch)
    found = json.loads(file.read_text())
    rows = {r["name"]: r for r in found["settings"]}
    assert set(rows) == {"good", "sparser", "second", "raw", "low-bit", "steps=15"}
    good = rows["good"]
    assert (good["method"], good["density"], good["flops_share"]) == ("pisa", 0.3, 0.6)
    assert good["settings"] == {"share": 0.2}
    change = good["accuracy_difference"]
    assert change["value"] == pytest.approx(-0.002)
    # Student's interval of differences that are 0.01 to either side of their mean.
    reach = 2.0227 * 0.01 * math.sqrt(PROMPTS / (PROMPTS - 1)) / math.sqrt(PROMPTS)
    assert change["high"] - change["low"] == pytest.approx(2 * reach, rel=1e-3)
    assert good["psnr"]["value"] == pytest.approx(30.0)
    assert good["psnr"]["left_out"] == 1
    assert good["shown_within_points"]
    assert not rows["second"]["within_points"]
    assert rows["raw"]["kind"] == "untrained"
    assert "untrained" in next(line for line in text.splitlines() if "raw" in line)
    assert found["task"] == "world-short@1"


def test_the_bar_takes_the_least_lpips_of_training_free_sparse_methods(store, tmp_path, capsys, monkeypatch):
    file = tmp_path / "out.json"
    arguments = (store, "--bars", "0.05", "0.2", "0.35", "1.0", "--json", file)
    text = run(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    none, low, bar, most = json.loads(file.read_text())["bars"]
    assert none["best"] is None
    assert (low["best"], low["best_within_points"]) == ("sparser", False)
    # Low bits leave no pair out, a control is no method, and the better ones stand beside a cache or want training.
    assert bar["best"] == most["best"] == "good"
    assert bar["best_within_points"] and bar["best_shown_within_points"]  # noqa: PT018
    assert bar["second"] == "second"
    assert bar["second_less_best_lpips"]["value"] == pytest.approx(0.03, abs=1e-4)
    assert "at most  35%: good, 30.0%, -0.20 within (shown at 95 %)" in text
    assert "sparser, 15.0%, -5.00 NOT within" in text


def test_repeats_of_a_prompt_count_once(tmp_path):
    for repeats in (1, 2):
        folder = tmp_path / f"{repeats}"
        put(folder, "exact", {"attributes": EXACT * repeats}, kind="exact", repeats=repeats)
        table = {k: v * repeats for k, v in columns(0.01, 0.1).items()}
        put(folder, "a", table, techniques=technique("pisa"), pairs=300.0, repeats=repeats)
    found = []
    for repeats in (1, 2):
        _, exact, points = density.read([tmp_path / f"{repeats}"])
        found.append(density.measured(points[0], exact, 0.01)["accuracy_difference"])
    assert found[0]["low"] == pytest.approx(found[1]["low"])
    assert found[1]["n"] == PROMPTS


def test_settings_with_a_file_are_searched_or_trained(tmp_path):
    put(tmp_path, "exact", {"attributes": EXACT}, kind="exact")
    searched = technique("sparse_vdit", file="masks.json", density=0.3)
    put(tmp_path, "a", columns(0.0, 0.1), techniques=searched, pairs=300.0)
    put(tmp_path, "b", columns(0.0, 0.1), techniques=technique("sla", file="weights"), pairs=300.0)
    _, _, points = density.read([tmp_path])
    kinds = {p.name: (p.kind, p.searched, p.free) for p in points}
    assert kinds["a"] == ("training-free", True, True)
    assert kinds["b"] == ("trained", False, False)


def test_bad_input_is_one_sentence(store, tmp_path, capsys, monkeypatch):
    def refused(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["density.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            density.main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "there is no folder" in refused(tmp_path / "nothing")
    assert "between 0 and 1" in refused(store, "--bars", "30")
    other = MODEL.model_copy(update={"sha256": "v" * 64})
    put(store, "foreign", columns(0.0, 0.1), techniques=technique("pisa"), model=other)
    assert "foreign in" in (text := refused(store))
    assert "another model than exact" in text
    alone = tmp_path / "alone"
    put(alone, "a", columns(0.0, 0.1), techniques=technique("pisa"))
    assert "no record of the exact run" in refused(alone)
