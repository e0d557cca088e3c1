"""`vivace distill`: a student with its plan, what it refuses, and what it tells beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vivace import Plan
from vivace.cli import distill_told
from vivace.cli.distill import recipe_of
from vivace.core.errors import ConfigError
from vivace.training.distillation import run as runs
from vivace.training.distillation.recipes import RECIPES
from vivace.training.distillation.run import Choices

QUICK = ("--size", "9", "32", "32", "--clips", "4", "--batch", "2", "--device", "cpu")


@pytest.fixture
def few_captions(monkeypatch):
    """Validation on two captions in the place of 32."""
    made = Choices.__init__
    monkeypatch.setattr(Choices, "__init__", lambda self, **choices: made(self, **choices | {"captions": 2}))


def test_a_student_its_plan_and_the_line_that_uses_it(vivace, here: Path, few_captions) -> None:
    run = vivace(
        *("distill", "--recipe", "progressive", "--student-steps", "2", "--set", "substeps=1"),
        *("--updates", "2", "--out", "new/s.safetensors", "--seed", "3", *QUICK),
    )
    assert run.code == 0, run.err
    assert 'use it: vivace generate "a red sphere rolls left" --plan new/s.plan.yaml' in run.out
    record = json.loads((here / "new" / "s.json").read_text())
    assert (record["steps"], record["settings"]["substeps"], record["choices"]["seed"]) == (2, 1, 3)
    plan = Plan.load(here / "new" / "s.plan.yaml")
    checkpoint, sampler = plan.techniques
    assert (checkpoint.card.name, sampler.card.name) == ("student_checkpoint", "student_sampler")
    assert (checkpoint.path, sampler.steps) == ("new/s.safetensors", 2)
    made = vivace(
        *("generate", "a red sphere rolls left", "--plan", "new/s.plan.yaml", "-o", "clip.mp4"),
        *("--frames", "9", "--height", "32", "--width", "32", "--device", "cpu"),
    )
    assert made.code == 0, made.err
    assert json.loads((here / "clip.receipt.json").read_text())["nfe"] == 2


def test_clips_of_a_folder_have_their_own_size(vivace, here: Path, few_captions) -> None:
    made = vivace("encode", "--from", "world", "--out", "d", "--count", "2", "--size", "9", "32", "32")
    assert made.code == 0, made.err
    told = ("distill", "--recipe", "pcm", "--data", "d", "--updates", "1", "--batch", "1", "--device", "cpu")
    wrong = vivace(*told, "--size", "9", "64", "64", "--out", "a.safetensors")
    assert (wrong.code, "are 9x32x32" in wrong.err) == (2, True), wrong.err
    run = vivace(*told, "--out", "b.safetensors")
    assert run.code == 0, run.err
    assert json.loads((here / "b.json").read_text())["choices"]["size"] == [9, 32, 32]


def test_an_interrupted_run_says_what_is_kept(vivace, here: Path, monkeypatch) -> None:
    def stopped(recipe, choices, processes):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", stopped)
    arguments = ("distill", "--recipe", "lcm", *QUICK)
    early = vivace(*arguments)
    assert (early.code, "before training began; nothing is kept" in early.err) == (130, True)
    (here / "student.ckpt").touch()
    late = vivace(*arguments)
    assert late.code == 130
    assert "is kept in student.ckpt: the same command goes on behind it" in late.err


def test_settings_have_the_types_of_the_recipes_fields() -> None:
    found = recipe_of("dmd2", ["ratio=3", "gan=0.5", "guidance=none", "rate=1e-5", "shift=3"], 2)
    assert (found.steps, found.ratio, found.gan, found.guidance, found.shift) == (2, 3, 0.5, None, 3.0)
    assert type(found.ratio) is int
    assert recipe_of("meanflow", ["derivative=difference"]).derivative == "difference"
    with pytest.raises(ConfigError, match=r"the settings of lcm are steps, shift, .*intervals, huber"):
        recipe_of("lcm", ["ratio=3"])


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ((), "--recipe is missing; choose one of lcm"),
        (("--recipe", "magic"), "no recipe 'magic'"),
        (("--recipe", "lcm", "--set", "intervals"), "--set takes KEY=VALUE, not 'intervals'"),
        (("--recipe", "lcm", "--set", "intervals=few"), "--set intervals takes a whole number, not 'few'"),
        (("--recipe", "lcm", "--set", "shift=nan"), "--set shift takes a number or none, not 'nan'"),
        (("--recipe", "lcm", "--student-steps", "2", "--set", "steps=3"), "--student-steps says it too"),
        (("--recipe", "lcm", "--minutes", "1", "--updates", "3"), "give one of them"),
        (("--recipe", "lcm", "--minutes", "0"), "nothing to train"),
        (("--recipe", "lcm", "--price", "2"), "--price is for --dry-run only"),
        (("--recipe", "lcm", "--out", "student.pt"), "ends in .safetensors"),
        (("--recipe", "lcm", "--store", "zip"), "a student is stored as"),
        (("--recipe", "lcm", "--init", "none.safetensors"), "there is no student file none.safetensors"),
        (("--recipe", "lcm", "--size", "6", "32", "32"), "frames must be"),
        (("--recipe", "lcm", "--size", "5", "32", "32"), "square clips of 9 frames or more"),
        (("--recipe", "lcm", "--size", "9", "32", "64"), "square clips of 9 frames or more"),
        (("--recipe", "lcm", "--model", "nobody"), "no model is called 'nobody'"),
        (("--recipe", "lcm", "--device", "cuda:99"), "there is no GPU"),
    ],
)
def test_what_is_wrong_is_one_sentence(vivace, here: Path, arguments: tuple, phrase: str) -> None:
    run = vivace("distill", *arguments)
    assert run.code == 2
    assert phrase in run.sentence
    assert not list(here.iterdir())


def test_the_recipes_are_listed(vivace) -> None:
    out = vivace("distill", "--list").out
    for name, kind in RECIPES.items():
        assert any(name in line and kind.paper in line and kind.solver in line for line in out.splitlines())


def test_a_dry_run_tells_memory_work_and_cost(vivace, here: Path, monkeypatch) -> None:
    rate = distill_told.Rate(1e12, 1e12, 0.5, "1 TFLOP/s of nobody")
    monkeypatch.setattr(distill_told, "rate_of", lambda device: rate)
    monkeypatch.setenv("WORLD_SIZE", "4")
    arguments = ("--recipe", "reflow", "--updates", "100", "--price", "3", "--dry-run", *QUICK)
    run = vivace("distill", *arguments)
    assert run.code == 0, run.err
    out = " ".join(run.out.replace("\N{NO-BREAK SPACE}", " ").split())
    for words in ("activations", "pipeline", "in all", "100 updates", "50% of 1 TFLOP/s", "at 3 an hour"):
        assert words in out
    assert "3.0 forward passes for each of 2 clips" in out
    assert not list(here.iterdir())


def test_a_rate_is_measured_where_no_name_is_known() -> None:
    import torch

    rate = distill_told.rate_of(torch.device("cpu"))
    assert (rate.plain, rate.share) == (rate.peak, distill_told.MEASURED_MFU)
    assert 1e9 < rate.peak < 1e14


@pytest.mark.parametrize("command", ["distill", "calibrate", "generate", "encode"])
def test_what_is_taken_by_default_is_in_the_help(vivace, command: str) -> None:
    assert "[default: " in " ".join(vivace(command, "--help").out.split())


def test_help_names_defaults_in_words(vivace) -> None:
    out = {c: " ".join(vivace(c, "--help").out.split()) for c in ("distill", "calibrate", "generate")}
    assert "[default: the recipe's]" in out["distill"]
    assert "[default: 4]" in out["calibrate"]
    assert "[default: beside the clip]" in out["generate"]


def test_the_page_has_the_recipes_as_they_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text(encoding="utf-8")
    for name, kind in RECIPES.items():
        beside = ", ".join(sorted(kind.roles)) or "-"
        assert f"| `{name}` | {kind.summary} | {kind.paper} | {kind.solver} | {beside} |\n" in page
    table = page.partition("<!-- recipes")[2].partition("<!-- end of recipes -->")[0]
    assert table.count("\n| `") == len(RECIPES)
