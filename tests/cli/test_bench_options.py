"""`vivace bench`: what its options refuse, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

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
