"""generate and compare on a real pipeline: the files are there, whole, and agree with one another."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vivace.core.receipt import Receipt
from vivace.evaluation.video import read_mp4
from vivace.models.loading import load
from vivace.plans.session import accelerate
from vivace.tiny.build import TinyConfig, build_pipeline
from vivace.tiny.defaults import DEFAULTS

PROMPT = "a red sphere"


def test_generate_writes_clip_and_receipt(vivace, here, small):
    ran = vivace("generate", PROMPT, *small, "--steps", "4", "--fps", "8", "-o", "clips/out.mp4")
    assert ran.code == 0, ran.err
    assert sorted(p.name for p in (here / "clips").iterdir()) == ["out.mp4", "out.receipt.json"]
    frames, fps = read_mp4(here / "clips" / "out.mp4")
    assert frames.shape == (9, 32, 32, 3)
    assert fps == 8
    receipt = Receipt.from_dict(json.loads((here / "clips" / "out.receipt.json").read_text()))
    assert receipt.completed
    assert len(receipt.steps) == 4
    assert receipt.plan["name"] == "fast"
    assert "evaluations" in ran.out
    assert "4/4" in ran.err


def test_generate_makes_what_the_library_makes(vivace, here, folder, small):
    """Same plan, seed and shape: the counts of the receipt, and the decoded pictures up to the codec."""
    assert vivace("generate", PROMPT, *small, "--seed", "3", "-o", "a.mp4").code == 0
    pipe = load(folder)
    pipe.set_progress_bar_config(disable=True)
    with accelerate(pipe, "fast") as fast:
        out = fast(PROMPT, seed=3, num_frames=9, height=32, width=32)
    mine = Receipt.from_dict(json.loads((here / "a.receipt.json").read_text()))
    assert mine.counts == out.receipt.counts
    frames, _ = read_mp4(here / "a.mp4")
    assert np.abs(frames.astype(int) - out.frames.astype(int)).mean() < 12


def test_receipt_goes_where_it_is_told(vivace, here, small):
    ran = vivace("generate", PROMPT, *small, "--steps", "1", "--receipt", "r/mine.json")
    assert ran.code == 0, ran.err
    assert {p.name for p in here.iterdir()} == {"out.mp4", "r"}
    assert (here / "r" / "mine.json").is_file()


def test_markup_in_names_is_text(vivace, here, small):
    ran = vivace("generate", "a [bold]red[/ sphere", *small, "--steps", "1", "-o", "[x].mp4")
    assert ran.code == 0, ran.err
    assert "[x].mp4" in ran.out


@pytest.fixture
def compared(vivace, here, small):
    ran = vivace("compare", PROMPT, *small, "--exact-steps", "6", "--steps", "3", "-o", "both")
    assert ran.code == 0, ran.err
    return ran, here / "both"


def test_compare_writes_everything(compared):
    ran, where = compared
    assert sorted(p.name for p in where.iterdir()) == [
        "comparison.json",
        "exact.mp4",
        "exact.receipt.json",
        "fast.mp4",
        "fast.receipt.json",
        "report.html",
        "side_by_side.mp4",
    ]
    exact, _ = read_mp4(where / "exact.mp4")
    fast, _ = read_mp4(where / "fast.mp4")
    both, _ = read_mp4(where / "side_by_side.mp4")
    assert exact.shape == fast.shape == (9, 32, 32, 3)
    assert len(both) == 9
    assert both.shape[2] > 3 * 32
    receipts = [json.loads((where / f"{n}.receipt.json").read_text()) for n in ("exact", "fast")]
    assert [len(r["steps"]) for r in receipts] == [6, 3]
    facts = json.loads((where / "comparison.json").read_text())
    seconds = [r["stages"]["total"] for r in receipts]
    assert facts["speed_up"] == pytest.approx(seconds[0] / seconds[1])
    assert facts["flops_share"] == pytest.approx(receipts[1]["flops"] / receipts[0]["flops"])
    assert {m["name"] for m in facts["metrics"]} == {"psnr", "ssim", "lpips"}
    assert facts["attributes"] == []
    assert "embedded model only" in facts["attributes_unchecked"]
    page = (where / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 3
    assert PROMPT in page
    assert "speed-up" in ran.out


def test_compare_of_equal_runs_is_identical(vivace, here, small):
    ran = vivace("compare", PROMPT, *small, "-p", "exact", "--exact-steps", "2", "--steps", "2")
    assert ran.code == 0, ran.err
    assert "identical" in ran.out
    facts = json.loads((here / "comparison" / "comparison.json").read_text())
    assert facts["metrics"][0]["pooled"] is None
    assert (here / "comparison" / "exact.mp4").read_bytes() == (here / "comparison" / "fast.mp4").read_bytes()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The embedded pipeline as it is before training, in the layout of the packaged weights."""
    home = tmp_path_factory.mktemp("embedded")
    build_pipeline(config=TinyConfig(heads=2, layers=2, ffn_dim=128)).save_pretrained(home)
    (home / "manifest.json").write_text("{}")
    return home


def test_the_embedded_model_is_judged(vivace, here, untrained, monkeypatch):
    monkeypatch.setattr("vivace.tiny.load.WEIGHTS", untrained)
    prompt = "a red sphere slides left past a zebra"
    size = ("--frames", "9", "--height", "32", "--width", "32", "--exact-steps", "2", "--steps", "2")
    ran = vivace("compare", prompt, *size, "-o", "both")
    assert ran.code == 0, ran.err
    assert "does not know" in ran.err
    assert "'zebra'" in ran.err
    facts = json.loads((here / "both" / "comparison.json").read_text())
    assert facts["request"]["fps"] == DEFAULTS["fps"]
    asked = {c["name"]: c["wanted"] for c in facts["attributes"] if c["wanted"] is not None}
    assert asked == {"object": "sphere", "colour": "red sphere", "motion": "slide_left", "count": "1"}
