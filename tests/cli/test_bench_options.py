"""`vivace bench`: what its options refuse before anything runs, and that they arrive."""

from __future__ import annotations

from pathlib import Path

import pytest

from vivace.evaluation.store import Store
from vivace.evaluation.task import Task

BENCH = ("bench", "--task", "world-smoke@1", "--limit", "1", "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--metrics", "psnr,fid,lpips"],
            "world-smoke@1 has no metric 'fid' or 'lpips'; choose from psnr, ssim, lpips_alex",
        ),
        (["--metrics", " , "], "--metrics names no metric; choose from psnr, ssim"),
        (["--peer", "diffusers.taylorsier@interval=3"], "diffusers.taylorseer"),
        (["--peer", "diffusers.taylorseer@gap=3"], "gap"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_leaves_nothing(vivace, arguments, words):
    ran = vivace(*BENCH, *arguments)
    assert ran.code == 2
    assert words in ran.sentence
    assert not list(Path().iterdir())


def test_metrics_of_a_speed_task_are_refused(vivace):
    ran = vivace("bench", "--task", "speed-wan1.3b-480p@1", "--metrics", "psnr", "--device", "cpu")
    assert ran.code == 2
    assert "leave --metrics out" in ran.sentence


def test_a_tiny_task_with_a_set_peer_and_one_metric(vivace):
    smoke = Task.load("world-smoke@1")
    Path("tiny.yaml").write_text(
        "vivace_task: 1\nname: trial\nversion: 1\ntitle: Trial\nabout: A few frames.\nkind: quality\n"
        f"prompts: {{file: {smoke.prompts.file}, sha256: {smoke.prompts.sha256}, count: 2}}\n"
        "frames: 5\nheight: 32\nwidth: 32\nfps: 8\nsteps: 4\nguidance: 4.0\nclips: 0\n"
        "metrics: [{name: psnr, version: 1}, {name: sharpness, version: 1}]\n",
        encoding="utf-8",
    )
    peer = "diffusers.taylorseer@interval=2,order=2,start=1"
    ran = vivace(
        *("bench", "--task", "tiny.yaml", "--peer", peer, "--limit", "1", "--metrics", "psnr"),
        *("--no-anchors", "--no-timing", "--no-memory", "--device", "cpu", "--out", "store"),
    )
    assert ran.code == 0
    records = {r.contender.name: r for r in Store(Path("store")).records()}
    assert set(records) == {"exact", peer}
    quality = records[peer].quality
    assert [m.name for m in quality.metrics] == ["psnr"]
    assert quality.skipped == {"sharpness": "left out by --metrics."}
    assert "measured 1 of 2 metrics: psnr." in records[peer].warnings
    assert records[peer].counts["flops"] < records["exact"].counts["flops"]
    assert records[peer].contender.settings == {"interval": 2, "order": 2, "start": 1}
