"""Interactions against combinations whose errors were made from those of their parts."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from small_store import DENSE, put, script

composition = script("composition")
PROMPTS = 40
rng = np.random.default_rng(0)
EXACT = np.full(PROMPTS, 0.9)
SINGLES = {n: rng.uniform(0.1, 0.2, PROMPTS) for n in "abc"}


def columns(error: np.ndarray) -> dict[str, list[float]]:
    """All series from one error: latents on the first half of the prompts only."""
    latents = np.where(np.arange(PROMPTS) < PROMPTS // 2, error, math.nan)
    return {
        "latent_rel_l2": latents.tolist(),
        "lpips_alex": error.tolist(),
        "psnr": (-20.0 * np.log10(error)).tolist(),
        "attributes": (EXACT - error / 10).tolist(),
    }


def fill(folder, combined: dict[str, np.ndarray], share: float = 0.5):
    put(folder, "exact", {"attributes": EXACT.tolist()}, kind="exact")
    for name, error in (SINGLES | combined).items():
        put(folder, name, columns(error), flops=share * DENSE)
    _, cells = composition.read(folder)
    return {n: composition.interactions(cells[n], cells) for n in combined}


def test_a_sum_is_additive_and_more_or_less_is_told(tmp_path):
    a, b, c = SINGLES.values()
    jitter = np.where(np.arange(PROMPTS) % 2, 1e-3, -1e-3)
    found = fill(tmp_path, {"a+b": a + b + jitter, "a+c": 1.5 * (a + c), "b+c": np.sqrt(b * b + c * c)})
    for series in composition.SERIES:
        verdicts = {n: r["series"][series]["verdict"] for n, r in found.items()}
        assert verdicts == {"a+b": "additive", "a+c": "super-additive", "b+c": "sub-additive"}
    more = found["a+c"]["series"]["lpips_alex"]
    assert more["interaction"]["value"] == pytest.approx(0.5 * float((a + c).mean()), rel=1e-5)
    assert more["sum"] == pytest.approx(float((a + c).mean()), rel=1e-5)
    lost = found["a+c"]["series"]["attributes_lost"]
    assert lost["interaction"]["value"] == pytest.approx(0.05 * float((a + c).mean()), rel=1e-5)


def test_independent_errors_add_as_squares(tmp_path):
    b, c = SINGLES["b"], SINGLES["c"]
    row = fill(tmp_path, {"b+c": np.sqrt(b * b + c * c)})["b+c"]["series"]
    assert row["latent_rel_l2"]["beyond_independent"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert row["pixel_rmse"]["beyond_independent"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert "beyond_independent" not in row["lpips_alex"]
    assert row["latent_rel_l2"]["clips"] == PROMPTS // 2
    assert row["pixel_rmse"]["clips"] == PROMPTS


def test_third_order_is_what_pairs_leave_unexplained(tmp_path):
    a, b, c = SINGLES.values()
    pairs = {"a+b": a + b + 0.03, "a+c": a + c - 0.02, "b+c": b + c}
    found = fill(tmp_path, {**pairs, "a+b+c": a + b + c + 0.01 + 0.04})
    row = found["a+b+c"]["series"]["lpips_alex"]
    assert row["interaction"]["value"] == pytest.approx(0.05, abs=1e-6)
    assert row["third_order"]["value"] == pytest.approx(0.04, abs=1e-6)
    assert "third_order" not in found["a+b"]["series"]["lpips_alex"]


def test_work_is_beside_the_product_and_lonely_combinations_are_left_out(tmp_path):
    found = fill(tmp_path, {"a+b": SINGLES["a"] + SINGLES["b"], "a+missing": SINGLES["a"]}, share=0.4)
    assert found["a+missing"] is None
    assert found["a+b"]["work"] == pytest.approx(0.4)
    assert found["a+b"]["work_of_parts"] == pytest.approx(0.16)


def test_the_table_and_the_file(tmp_path, capsys, monkeypatch):
    store, file = tmp_path / "store", tmp_path / "out.json"
    fill(store, {"a+b": 2.0 * (SINGLES["a"] + SINGLES["b"])})
    monkeypatch.setattr("sys.argv", ["composition.py", str(store), "--json", str(file)])
    composition.main()
    text, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "super-additive  a+b" in text
    assert set(found["alone"]) == {"a", "b"}
    assert found["alone"]["a"]["lpips_alex"]["value"] == pytest.approx(float(SINGLES["a"].mean()), rel=1e-5)
    assert [r["name"] for r in found["combinations"]] == ["a+b"]


def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch):
    def refused(folder) -> str:
        monkeypatch.setattr("sys.argv", ["composition.py", str(folder)])
        with pytest.raises(SystemExit) as stop:
            composition.main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "there is no folder" in refused(tmp_path / "nothing")
    fill(tmp_path / "few", {})
    assert "no combination" in refused(tmp_path / "few")
