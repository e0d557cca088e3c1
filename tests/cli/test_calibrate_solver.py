"""`vivace calibrate --solver` on a tiny model in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from vivace.calibration.solver import SolverFile
from vivace.plans.plan import Plan

SMALL = (
    *("--steps", "6", "--frames", "5", "--height", "32", "--width", "32"),
    *("--dtype", "fp32", "--device", "cpu"),
)


def test_a_solver_is_fitted_tried_and_written_as_a_plan(vivace, folder: Path, here: Path) -> None:
    asked = ("--count", "2", "--solver", "3", "--rounds", "1", "--search", "0.5")
    run = vivace("calibrate", "-m", str(folder), *SMALL, *asked, "-o", "s.json", "--plan-file", "p.yaml")
    assert run.code == 0, run.err
    assert "6 evaluations in the place of 12" in " ".join(run.out.split())
    made = SolverFile.load(here / "s.json")
    assert (made.steps, made.key.steps, made.prompts, made.basis) == (3, 6, 2, "pair")
    (technique,) = Plan.load(here / "p.yaml").techniques
    assert technique.to_dict()["file"] == str((here / "s.json").resolve())
    shot = ("generate", "a red ball", "-m", str(folder), *SMALL, "--plan", "p.yaml", "-o", "clip.mp4")
    run = vivace(*shot)
    assert run.code == 0, run.err


def test_the_plan_runs_from_another_folder(vivace, folder: Path, here: Path, monkeypatch) -> None:
    asked = ("--count", "1", "--solver", "3", "--no-verify")
    run = vivace("calibrate", "-m", str(folder), *SMALL, *asked, "-o", "s.json", "--plan-file", "p.yaml")
    assert run.code == 0, run.err
    assert "in the place of" not in run.out
    away = here / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    run = vivace("generate", "a ball", "-m", str(folder), *SMALL, "--plan", "../p.yaml", "-o", "clip.mp4")
    assert run.code == 0, run.err


@pytest.mark.parametrize("when", ["fitting", "trying"])
def test_an_interrupted_fit_goes_on_behind_its_recorded_runs(
    vivace, folder: Path, here: Path, monkeypatch, when: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    name = {
        "fitting": "vivace.plans.solver_fitting.fit",
        "trying": "vivace.cli.calibrate_solver._tried",
    }[when]
    asked = ("--count", "1", "--solver", "3", "-o", "new/s.json", "--plan-file", "p.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(name, interrupted)
        run = vivace("calibrate", "-m", str(folder), *SMALL, *asked)
    assert run.code == 130
    left = [str(f.relative_to(here)) for f in here.rglob("*") if f.is_file()]
    assert sorted(left) == ["new/s.json.part/0.pt", "new/s.json.part/header.json"]
    # The same command asks the pipeline for no exact run again.
    with monkeypatch.context() as patch:
        patch.setattr("vivace.plans.solver_fitting.SolverRecorder", interrupted)
        run = vivace("calibrate", "-m", str(folder), *SMALL, *asked)
    assert run.code == 0, run.err
    assert SolverFile.load(here / "new" / "s.json").steps == 3
    assert sorted(f.name for f in here.rglob("*") if f.is_file()) == ["p.yaml", "s.json"]


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (("--solver", "9"), "from 1 to 6"),
        (("--solver", "3", "--target", "speedup=2"), "leave --target"),
        (("--rounds", "1"), "need --solver"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(
    vivace, folder: Path, here: Path, arguments: tuple[str, ...], phrase: str
) -> None:
    run = vivace("calibrate", "-m", str(folder), *SMALL, *arguments, "-o", "s.json")
    assert run.code == 2
    assert phrase in " ".join(run.err.split())
    assert not list(here.iterdir())
