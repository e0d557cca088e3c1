"""`vivace calibrate --technique NAME` for methods whose heads have masks of their own, on a tiny model in a folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vivace.plans.plan import Plan
from vivace.techniques.attention import efficient_vdit, sliding_tile, sparse_vdit
from vivace.techniques.attention.axis_orders import OrderFile
from vivace.techniques.attention.mask_file import MaskFile

SMALL = (
    *("--steps", "2", "--frames", "9", "--height", "32", "--width", "32"),
    *("--dtype", "fp32", "--device", "cpu", "--count", "1"),
)


@pytest.mark.parametrize(
    ("technique", "patterns"),
    [
        ("sparse_vdit@density=0.6,dense_steps=1", sparse_vdit.PATTERNS),
        ("sliding_tile", sliding_tile.PATTERNS),
        ("efficient_vdit@threshold=0.5", efficient_vdit.PATTERNS),
    ],
)
def test_masks_and_a_plan_that_runs(vivace, folder: Path, here: Path, technique: str, patterns) -> None:
    run = vivace(
        *("calibrate", "-m", str(folder), *SMALL, "--technique", technique),
        *("-o", "new/masks.json", "--plan-file", "p.yaml"),
    )
    assert run.code == 0, run.err
    found = MaskFile.load(here / "new" / "masks.json")
    assert (found.patterns, found.prompts, found.key.frames) == (patterns, 1, 9)
    (made,) = Plan.load(here / "p.yaml").techniques
    assert made.card.name == technique.partition("@")[0]
    assert Path(made.file) == (here / "new" / "masks.json").resolve()
    assert (made.density, made.dense_steps) == ((0.6, 1) if "density" in technique else (0.0, 0))
    # The heads that are told are those that the plan gives its patterns.
    told = {p: int(n) for p, n in re.findall(r"^ *(\S+) +(\d+) of 8 heads", run.out, re.M)}
    assert sum(told.values()) == 8
    given = [n for layer in range(4) for n in made.assigned("transformer", layer, 2)]
    assert told == {patterns[n]: given.count(n) for n in set(given)}
    assert re.search(r"counted +[\d.]+ times less work, relative error [\d.e-]+", run.out)
    again = vivace("generate", "a ball", "-m", str(folder), *SMALL[:-2], "--plan", "p.yaml", "-o", "c.mp4")
    assert again.code == 0, again.err


def test_orders_hold_the_mass_that_is_asked_for(vivace, folder: Path, here: Path) -> None:
    for mass in (0.5, 0.9):
        run = vivace(
            *("calibrate", "-m", str(folder), *SMALL, "--technique", f"paro@mass={mass},dense_layers=1"),
            *("--no-verify", "--plan-file", "p.yaml"),
        )
        assert run.code == 0, run.err
        found = OrderFile.load(here / "calibration.json")
        assert found.mass >= mass
        assert f"hold {found.mass:.1%}" in run.out
        assert "counted" not in run.out
    (made,) = Plan.load(here / "p.yaml").techniques
    assert (made.card.name, made.dense_layers, made.block) == ("paro", 1, found.block)


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (("--technique", "sparse_vdit", "--target", "speedup=2"), "cannot be solved for"),
        (("--technique", "sparse_vdit", "--solver", "3"), "leave --target and --technique out"),
        (("--technique", "sparse_vdit@file=x.json"), "leave out file"),
        (("--technique", "sparse_vdit@density"), "write key=value"),
        (("--technique", "sparse_vdit@width=3"), "width"),
        (("--technique", "sparse_vdit@density=2"), "density"),
        (("--technique", "paro@mass=much"), "shares from 0 to 1"),
        (("--technique", "paro@mass=1.5"), "are shares"),
        (("--technique", "sparse"), "no technique is called 'sparse'"),
    ],
)
def test_wrong_words_are_one_sentence(vivace, folder: Path, here: Path, arguments, phrase: str) -> None:
    run = vivace("calibrate", "-m", str(folder), *SMALL, *arguments)
    assert run.code == 2
    assert phrase in run.err.strip().splitlines()[-1]
    assert not list(here.iterdir())
