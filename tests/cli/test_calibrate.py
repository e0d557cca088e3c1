"""`vivace calibrate` on a tiny model in a folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vivace.calibration.artifact import Calibration
from vivace.calibration.gram import schedule_error
from vivace.core.context import Clock
from vivace.plans.plan import Plan
from vivace.plans.solving import schedule_for

SMALL = (
    "--steps",
    "6",
    "--frames",
    "5",
    "--height",
    "32",
    "--width",
    "32",
    "--dtype",
    "fp32",
    "--device",
    "cpu",
)


def test_file_and_schedule(vivace, folder: Path, here: Path) -> None:
    run = vivace(
        "calibrate", "-m", str(folder), "--count", "2", *SMALL, "-o", "new/c.json", "--target", "speedup=2"
    )
    assert run.code == 0, run.err
    made = Calibration.load(here / "new" / "c.json")
    assert (made.key.steps, made.key.frames, made.prompts) == (6, 5, 2)
    assert "6 of 12" in run.out
    assert "new/c.json" in run.out
    found = schedule_for(made, "speedup", 2.0, 0)
    assert found.nfe == 6
    error = schedule_error(made.matrix, made.sigmas, found.cond, found.delta, 0, made.key.guidance)["end"]
    assert found.error("end") == pytest.approx(error)
    # A bound on the loss is kept by the fewest evaluations that keep it.
    bound = schedule_for(made, "loss", error, 0)
    assert bound.nfe <= 6
    assert bound.error("end") <= error * (1 + 1e-9)
    assert schedule_for(made, "loss", 0.0, 0).nfe == 12


def test_prompts_from_a_file(vivace, folder: Path, here: Path) -> None:
    (here / "p.txt").write_text("a red ball\n\ntwo cones\n")
    run = vivace("calibrate", "-m", str(folder), "--prompts", "p.txt", *SMALL)
    assert run.code == 0, run.err
    assert Calibration.load(here / "calibration.json").prompts == 2


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (("--target", "speed=2"), "neither speedup=X"),
        (("--target", "speedup=0.5"), "neither speedup=X"),
        (("--prompts", "none.txt"), "cannot be read"),
        (("--count", "9"), "9 prompts are asked for and 4 are there"),
        (("--frames", "6"), "frames must be"),
        (("--device", "cuda:99"), "there is no GPU"),
    ],
)
def test_errors_are_one_sentence(vivace, folder: Path, here: Path, arguments: tuple, phrase: str) -> None:
    run = vivace("calibrate", "-m", str(folder), *arguments)
    assert run.code == 2
    assert phrase in run.sentence
    assert not (here / "calibration.json").exists()


def test_an_empty_prompt_file(vivace, folder: Path, here: Path) -> None:
    (here / "p.txt").write_text("\n \n")
    run = vivace("calibrate", "-m", str(folder), "--prompts", "p.txt")
    assert (run.code, "holds no prompt" in run.sentence) == (2, True)


def test_the_schedule_as_a_plan(vivace, folder: Path, here: Path) -> None:
    run = vivace(
        "calibrate",
        "-m",
        str(folder),
        "--count",
        "1",
        *SMALL,
        "--target",
        "speedup=2",
        "--plan-file",
        "s.yaml",
    )
    assert run.code == 0, run.err
    assert not list(here.glob("*.part"))
    made = Plan.load(here / "s.yaml")
    (technique,) = made.techniques
    cond, uncond = technique.schedule(6)
    assert len(cond) + len(uncond) == 6
    alone = vivace("calibrate", "-m", str(folder), "--count", "1", *SMALL, "--plan-file", "s.yaml")
    assert alone.code == 2
    assert "needs a --target" in alone.err


@pytest.mark.parametrize("technique", ["teacache@warmup=1", "first_block_cache@warmup=1,tail=0"])
def test_a_threshold_as_a_plan(vivace, folder: Path, here: Path, technique: str) -> None:
    arguments = ("calibrate", "-m", str(folder), "--count", "1", *SMALL, "--target", "speedup=1.5")
    run = vivace(*arguments, "--technique", technique, "--plan-file", "t.yaml")
    assert run.code == 0, run.err
    for word in ("asked", "predicted", "counted", "threshold"):
        assert word in run.out
    (cache,) = Plan.load(here / "t.yaml").techniques
    assert cache.card.name == technique.partition("@")[0]
    assert cache.warmup == 1
    if cache.card.name == "teacache":
        assert Path(cache.calibration) == (here / "calibration.json").resolve()
    assert "speedup=1.5" in Plan.load(here / "t.yaml").summary


@pytest.mark.parametrize("technique", ["teacache@warmup=1", "optimal_schedule"])
def test_a_loss_is_measured(vivace, folder: Path, here: Path, technique: str) -> None:
    arguments = ("calibrate", "-m", str(folder), "--count", "1", *SMALL, "--target", "loss=0.3")
    run = vivace(*arguments, "--technique", technique, "--plan-file", "l.yaml")
    assert run.code == 0, run.err
    told = re.search(r"counted +([\d.]+) times less work, relative error ([\d.e-]+)", run.out)
    assert told
    assert float(told[1]) >= 1.0
    assert float(told[2]) <= 0.3 or "no setting that was tried keeps the error" in run.out
    assert "measured" in Plan.load(here / "l.yaml").summary


def test_without_a_check_nothing_is_counted(vivace, folder: Path, here: Path) -> None:
    run = vivace(
        *("calibrate", "-m", str(folder), "--count", "1", *SMALL, "--target", "loss=0.2"),
        *("--technique", "magcache@retention=0.0", "--no-verify"),
    )
    assert run.code == 0, run.err
    assert "not checked" in run.out
    assert "checking" not in run.err


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (("--technique", "teacache"), "needs a --target"),
        (("--target", "loss=0"), "X above 0"),
        (("--technique", "fora", "--target", "speedup=2"), "cannot be solved for"),
        (("--technique", "teacache@warmup=x", "--target", "speedup=2"), "warmup"),
    ],
)
def test_wrong_techniques_are_one_sentence(vivace, folder, here, arguments: tuple, phrase: str) -> None:
    run = vivace("calibrate", "-m", str(folder), *arguments)
    assert run.code == 2
    assert phrase in run.sentence
    assert not list(here.iterdir())


@pytest.mark.parametrize("more", [(), ("--solver", "2")], ids=["calibration", "solver"])
def test_an_interrupt_says_that_the_same_command_goes_on(
    vivace, folder: Path, here: Path, monkeypatch, more: tuple
) -> None:
    """In the second prompt's third step; before the first prompt is done there is nothing to go on from."""
    arguments = ("calibrate", "-m", str(folder), "--count", "2", *SMALL, *more)
    part, advance, seen = "calibration.json.part", Clock.advance, []

    def interrupt(clock, after):
        seen.append(clock.step)
        if len(seen) > after:
            raise KeyboardInterrupt
        return advance(clock)

    monkeypatch.setattr(Clock, "advance", lambda clock: interrupt(clock, 2))
    early = vivace(*arguments)
    assert early.code == 130
    assert early.err.strip().splitlines()[-1] == "error: interrupted; unfinished files were removed."
    assert not list(here.iterdir())

    seen.clear()
    monkeypatch.setattr(Clock, "advance", lambda clock: interrupt(clock, 8))
    ran = vivace(*arguments)
    assert ran.code == 130
    last = ran.err.strip().splitlines()[-1]
    assert last.startswith("error: interrupted; unfinished files were removed. Finished prompts are kept in ")
    assert f"{part}: the same command goes on behind them." in last
    assert [p.name for p in here.iterdir()] == [part]

    seen.clear()
    monkeypatch.setattr(Clock, "advance", lambda clock: interrupt(clock, 10**6))
    done = vivace(*arguments, "--no-verify")
    assert done.code == 0, done.err
    assert "2 of 2" in done.err
    assert "1 of 2" not in done.err
    assert [p.name for p in here.iterdir()] == ["calibration.json"]
