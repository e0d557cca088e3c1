"""The benchmark of VAE decoding: every contender is measured, and errors are against plain diffusers."""

from __future__ import annotations

import json

import torch
from small_store import script

bench = script("vae_decode")


def test_a_trial_of_the_published_configuration(tmp_path):
    out = tmp_path / "record.json"
    given = "--vae wan2.1-1.3b --tiny-vae --size 5 16 16 --device cpu --repeats 1 --compile 0"
    bench.main([*given.split(), "--out", str(out)])
    data = json.loads(out.read_text())
    assert data["benchmark"] == "VAE decoding"
    assert not data["left_out"]
    rows = data["configurations"][0]["contenders"]
    assert {"plain", "whole clip", "fast", "fast, 1 latent frames", "tiny"} <= set(rows)
    assert all(row["seconds"] > 0.0 and row["repeats"] == 1 for row in rows.values())
    exact = [name for name in rows if not name.startswith("tiny") and "float" not in name]
    assert all(rows[name]["errors"]["max_levels"] < 0.01 for name in exact)
    assert rows["tiny"]["errors"]["max_levels"] > 1.0
    assert "plain/it" in bench.table(rows)


def test_errors_are_in_levels_of_8_bits():
    want = torch.tensor([-1.0, 1.0])
    found = bench.errors(want + torch.tensor([0.0, 2.0 / 255.0]), want)
    assert abs(found["max_levels"] - 1.0) < 1e-4
    assert abs(found["mean_levels"] - 0.5) < 1e-4
