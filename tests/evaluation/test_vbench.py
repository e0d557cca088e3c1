"""VBench's aggregation against numbers held here, its prompts, and the way to its own code."""

from __future__ import annotations

import hashlib
import math
import stat
import sys
from collections import Counter
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from vivace.core.errors import ConfigError, UnavailableError, UnknownNameError
from vivace.evaluation import vbench, vbench_run
from vivace.evaluation.metrics.base import Context
from vivace.evaluation.metrics.vbench_official import VBenchOfficial

# name: (raw score of some model, low, high, weight), from the published constants and written down here once more.
QUALITY = {
    "subject_consistency": (0.95, 0.1462, 1.0, 1.0),
    "background_consistency": (0.96, 0.2615, 1.0, 1.0),
    "temporal_flickering": (0.98, 0.6293, 1.0, 1.0),
    "motion_smoothness": (0.985, 0.706, 0.9975, 1.0),
    "dynamic_degree": (0.6, 0.0, 1.0, 0.5),
    "aesthetic_quality": (0.6, 0.0, 1.0, 1.0),
    "imaging_quality": (0.65, 0.0, 1.0, 1.0),
}
SEMANTIC = {
    "object_class": (0.85, 0.0, 1.0, 1.0),
    "multiple_objects": (0.65, 0.0, 1.0, 1.0),
    "human_action": (0.94, 0.0, 1.0, 1.0),
    "color": (0.9, 0.0, 1.0, 1.0),
    "spatial_relationship": (0.7, 0.0, 1.0, 1.0),
    "scene": (0.5, 0.0, 0.8222, 1.0),
    "appearance_style": (0.2, 0.0009, 0.2855, 1.0),
    "temporal_style": (0.24, 0.0, 0.364, 1.0),
    "overall_consistency": (0.26, 0.0, 0.364, 1.0),
}
RAW = {name: row[0] for name, row in (QUALITY | SEMANTIC).items()}


def test_constants_are_the_published_ones() -> None:
    found = {d.name: (d.low, d.high, d.weight) for d in vbench.dimensions().values()}
    assert found == {name: row[1:] for name, row in (QUALITY | SEMANTIC).items()}
    assert {d.name for d in vbench.dimensions().values() if d.group == "quality"} == set(QUALITY)


def test_total_worked_out_by_hand() -> None:
    # Quality: .941438 + .945836 + .946048 + .957118 + .5 * .6 + .6 + .65 = 5.340441, over 6.5.
    # Semantic: .85 + .65 + .94 + .9 + .7 + .608124 + .699578 + .659341 + .714286 = 6.721329, over 9.
    result = vbench.aggregate(RAW)
    assert result.quality == pytest.approx(5.340441 / 6.5, abs=1e-6)
    assert result.semantic == pytest.approx(6.721329 / 9, abs=1e-6)
    assert result.total == pytest.approx((4 * 5.340441 / 6.5 + 6.721329 / 9) / 5, abs=1e-6)
    assert result.absent == ()


def test_ends_of_the_scale_and_no_clipping() -> None:
    lows = {d.name: d.low for d in vbench.dimensions().values()}
    highs = {d.name: d.high for d in vbench.dimensions().values()}
    assert vbench.aggregate(lows).total == pytest.approx(0.0)
    assert vbench.aggregate(highs).total == pytest.approx(1.0)
    assert vbench.aggregate(highs | {"motion_smoothness": 1.0}).quality > 1.0


def test_names_with_spaces_are_the_same_names() -> None:
    spaced = {name.replace("_", " "): value for name, value in RAW.items()}
    assert vbench.aggregate(spaced) == vbench.aggregate(RAW)


def test_a_dimension_that_is_not_there_is_an_error_or_counts_as_zero_when_asked() -> None:
    part = {name: value for name, value in RAW.items() if name != "scene"}
    with pytest.raises(ConfigError, match="scene were not measured"):
        vbench.aggregate(part)
    official = vbench.aggregate(part, as_official=True)
    assert official.absent == ("scene",)
    assert official.semantic == pytest.approx((6.721329 - 0.5 / 0.8222) / 9, abs=1e-6)
    # Raw 0 lies below the low end of this one, so the script's zero is worse than the worst.
    rest = {name: value for name, value in RAW.items() if name != "subject_consistency"}
    assert vbench.aggregate(rest, as_official=True).normalised["subject_consistency"] < -0.17


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="scene"):
        vbench.aggregate(RAW | {"scene": value})
    with pytest.raises(UnknownNameError, match="colour"):
        vbench.aggregate(RAW | {"colour": 0.5})


def test_prompts_are_all_there_and_each_knows_its_dimensions() -> None:
    folder = resources.files("vivace.evaluation") / "tasks" / "prompts"
    text = (folder / "vbench.txt").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) == 946
    assert len(set(lines)) == len(vbench.prompts()) == 944
    assert set(lines) == set(vbench.prompts())
    assert hashlib.sha256(text.encode()).hexdigest().startswith("f9b50654f81ab732")
    counts = Counter(d for p in vbench.prompts().values() for d in p.dimensions)
    wanted = {
        "subject_consistency": 72,
        "background_consistency": 86,
        "temporal_flickering": 75,
        "human_action": 100,
    }
    assert {name: counts[name] for name in wanted} == wanted
    assert set(counts) == set(vbench.dimensions())
    assert "Apache License" in (folder / "NOTICE").read_text(encoding="utf-8")
    assert vbench.prompts()["a red bicycle"].auxiliary == {"color": {"color": "red"}}
    both = vbench.prompts()["The bund Shanghai, oil painting"]
    assert set(both.dimensions) == {
        "appearance_style",
        "overall_consistency",
        "aesthetic_quality",
        "imaging_quality",
    }


# -- VBench's own code --------------------------------------------------------------------------------------------

FAKE = '''
import json, os
class VBench:
    """Stands where VBench stands: the mean level of the file's first byte is no score, but it is one a file."""
    def __init__(self, device, info, out):
        self.info, self.out = json.load(open(info)), out
    def evaluate(self, videos_path, name, prompt_list, dimension_list, local, mode, **more):
        assert os.environ["VBENCH_CACHE_DIR"] and local
        (dimension,) = dimension_list
        rows = []
        if mode == "vbench_standard":
            for row in self.info:
                if dimension in row["dimension"]:
                    for k in range(5):
                        path = f"{videos_path}/{row['prompt_en']}-{k}.mp4"
                        if os.path.exists(path):
                            rows.append({"video_path": path, "video_results": 10.0 + k})
        else:
            assert dimension != "color"
            rows = [{"video_path": f"{videos_path}/{f}", "video_results": 50.0} for f in prompt_list]
        json.dump({dimension: [0, rows]}, open(f"{self.out}/{name}_eval_results.json", "w"))
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter with a package `vbench` of ours, and a folder with two of the weight files."""
    (tmp_path / "site" / "vbench").mkdir(parents=True)
    (tmp_path / "site" / "vbench" / "__init__.py").write_text(FAKE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    weights = tmp_path / "weights"
    for part in ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth", "grit_model/grit_b_densecap_objectdet.pth"):
        (weights / part).parent.mkdir(parents=True)
        (weights / part).touch()
    monkeypatch.setenv(vbench_run.WEIGHTS, str(weights))
    monkeypatch.setenv(vbench_run.PYTHON, str(python))
    return tmp_path


def test_every_prompt_goes_to_its_own_dimensions(installed: Path) -> None:
    assert vbench_run.missing() == ""
    assert "temporal_flickering" in vbench_run.runnable()
    assert "scene" not in vbench_run.runnable()
    texts = ["a red bicycle", "a prompt of my own", *["a red bicycle"] * 5]
    clips = torch.zeros(len(texts), 2, 16, 16, 3)
    scores = VBenchOfficial().measure(clips, Context(prompts=tuple(texts)))
    assert len(scores) == 16
    # The sixth clip of one prompt opens a second folder, where it is number 0 again.
    assert scores["vbench_color"] == pytest.approx([10, math.nan, 11, 12, 13, 14, 10], nan_ok=True)
    # Imaging quality of a single video is on a scale of 100.
    assert scores["vbench_imaging_quality"][1] == 0.5
    assert math.isnan(scores["vbench_imaging_quality"][0])
    assert all(math.isnan(v) for v in scores["vbench_scene"])


def test_its_failure_is_told(installed: Path) -> None:
    (installed / "site" / "vbench" / "__init__.py").write_text("raise RuntimeError('no detectron2')")
    with pytest.raises(ConfigError, match="no detectron2"):
        vbench_run.official([np.zeros((2, 16, 16, 3), np.uint8)], ["a red bicycle"], fps=8.0)


def test_it_is_skipped_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vbench_run.WEIGHTS, raising=False)
    metric = VBenchOfficial()
    assert vbench_run.WEIGHTS in metric.missing()
    with pytest.raises(UnavailableError, match="weights"):
        metric.measure(torch.zeros(1, 2, 16, 16, 3), Context(prompts=("a",)))
    monkeypatch.setenv(vbench_run.WEIGHTS, str(tmp_path / "absent"))
    assert "no folder" in metric.missing()
    monkeypatch.setenv(vbench_run.WEIGHTS, str(tmp_path))
    monkeypatch.setenv(vbench_run.PYTHON, str(tmp_path / "python"))
    assert "pip install vbench" in metric.missing()
