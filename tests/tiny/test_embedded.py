"""The packaged weights: whole, small, as good as their records say, and exactly what plain diffusers runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vivace
from vivace.models.student import students_folder
from vivace.tiny.load import WEIGHTS, load_tiny, verify_weights
from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.evaluate import accuracy, load_check, prompts_of, render_scenes
from vivace.tiny.train.seeds import held_out
from vivace.tiny.train.vae_quality import measure_vae
from vivace.world import sample_scenes
from vivace.world.splits import TEST
from vivace.world.verifier import WEIGHTS as VERIFIER

CPU = torch.device("cpu")
RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-23"


def record(name: str) -> dict[str, Any]:
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def embedded():
    return load_tiny(torch.float32)


def own_files() -> list[Path]:
    """Files of the model itself. Its students name the weights that they belong to (tests/techniques/distillation)."""
    return [p for p in WEIGHTS.rglob("*") if p.is_file() and students_folder() not in p.parents]


def test_the_manifest_agrees_and_names_every_file():
    verify_weights(WEIGHTS)
    named = json.loads((WEIGHTS / "manifest.json").read_text(encoding="utf-8")).keys()
    there = {path.relative_to(WEIGHTS).as_posix() for path in own_files()}
    assert there == named | {"manifest.json"}


def test_all_weights_together_are_small():
    assert sum(path.stat().st_size for path in (*own_files(), VERIFIER)) <= 26 * 2**20


def test_an_exact_session_is_plain_diffusers():
    call = {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 64}
    prompt = "a large red sphere slides left on a checkered floor"
    pipe = vivace.load("tiny")
    plain = pipe(
        prompt, generator=torch.Generator().manual_seed(7), guidance_scale=4.0, output_type="np", **call
    )
    with vivace.accelerate(pipe, "exact") as fast:
        made = fast(prompt, seed=7, **call)
    assert made.frames.shape == (17, 64, 64, 3)
    assert np.array_equal(made.frames, (plain.frames[0] * 255.0).round().astype(np.uint8))


def test_the_verifier_reads_renders_it_never_saw():
    # Past the 2,048 clips of its record and the prompts and clips of the others.
    scenes = sample_scenes(TEST[200_000:200_024])
    clips = render_scenes(scenes, ClipShape(), CPU, batch=8)
    seen = accuracy(load_check(None, CPU), clips, prompts_of(scenes), CPU, batch=8)
    assert seen["mean"] >= 0.95


def test_the_vae_gives_held_out_clips_back(embedded):
    quality = measure_vae(embedded.vae, held_out("vae", 2), ClipShape(), CPU, batch=1)
    assert quality["psnr"] >= 32.0


def test_the_record_of_the_vae_meets_its_bars():
    quality = record("train-vae")["quality"]
    assert quality["psnr"] >= 32.0
    assert quality["psnr_objects"] >= 26.0
    frames = quality["psnr_per_frame"]
    assert abs(frames[-1] - np.mean(frames)) <= 1.0, "quality must not decay along the clip"


@pytest.mark.parametrize(
    ("name", "path", "mean", "each"),
    [
        ("train-verifier", ("held_out", "test"), 0.99, 0.97),
        ("text-to-video-evaluation", ("accuracy",), 0.90, 0.75),
    ],
)
def test_the_records_of_accuracy_meet_their_bars(name, path, mean, each):
    table = record(name)
    for key in path:
        table = table[key]
    assert table["mean"] >= mean
    assert min(table.values()) >= each
