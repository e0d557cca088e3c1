"""The file of a fitted solver: it comes back as it was, and a damaged one is refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vivace.calibration.artifact import Key
from vivace.calibration.solver import SolverFile
from vivace.core.errors import ConfigError

KEY = Key(
    family="wan",
    model_hash="abc",
    scheduler="shift 3",
    steps=4,
    frames=9,
    height=32,
    width=32,
    guidance=5.0,
    solver="euler",
)
GUIDED = ((0.9, -0.1), (0.8, -0.2, -0.3))
PAIR = ((0.9, -0.5, 0.4), (0.8, -0.4, 0.3, -0.2, 0.1))
"""By hand: one weight of the noise, then one or two for every evaluation so far."""


def made(basis: str) -> SolverFile:
    return SolverFile(
        key=KEY,
        nodes=(0, 2),
        sigmas=(1.0, 0.75, 0.5, 0.25, 0.0),
        weights=PAIR if basis == "pair" else GUIDED,
        basis=basis,
        prompts=2,
        prompts_sha256="d",
        seed=3,
        error=0.01,
        vivace="0",
    )


@pytest.mark.parametrize("basis", ["guided", "pair"])
def test_a_file_comes_back_as_it_was(tmp_path, basis):
    path = made(basis).save(tmp_path / "new" / "solver.json")
    assert SolverFile.load(path) == made(basis)
    assert made(basis).steps == 2


def test_seven_digits_are_kept(tmp_path):
    third = 1.0 / 3.0
    kept = SolverFile.load(
        replace(made("guided"), weights=((third, -third), GUIDED[1])).save(tmp_path / "s.json")
    )
    assert kept.weights[0][0] == pytest.approx(third, rel=1e-7)


def test_own_steps_have_no_weights(tmp_path):
    """By hand: two steps of the scheduler's, then one that goes from 0.5 to the end."""
    file = replace(made("guided"), nodes=(0, 1, 2), own=2, weights=((0.9, 0.1, -0.2, -0.3),))
    assert SolverFile.load(file.save(tmp_path / "s.json")) == file
    assert file.increments() == [pytest.approx([-0.1, 0.1, -0.2, -0.3])]


@pytest.mark.parametrize(("basis", "weights"), [("guided", GUIDED), ("pair", PAIR)])
def test_increments_add_up_to_the_weights(basis, weights):
    total: list[float] = [1.0]
    for row, known in zip(made(basis).increments(), weights, strict=True):
        total = [a + b for a, b in zip(row, [*total, *[0.0] * (len(row) - len(total))], strict=True)]
        assert total == pytest.approx(known, abs=1e-12)


def test_noise_levels_that_differ_do_not_fit():
    file = made("guided")
    assert file.fits([1.0, 0.75, 0.5, 0.25, 0.0])
    assert file.fits([0.9995, 0.75, 0.5, 0.25, 0.0])  # Wan's first level
    assert not file.fits([1.0, 0.8, 0.5, 0.25, 0.0])
    assert not file.fits([1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "no fitted solver"),
        ({"version": 9}, "format 9 and this Vivace reads 1"),
        ({"nodes": [0, 0]}, "rise from 0"),
        ({"nodes": [1, 2]}, "rise from 0"),
        ({"nodes": []}, "rise from 0"),
        ({"nodes": [0, 4]}, "rise from 0"),
        ({"sigmas": [1.0, 0.0]}, "5 noise levels, not 2"),
        ({"weights": [[0.9, -0.1]]}, "rows"),
        ({"weights": [[0.9, -0.1], [0.8, -0.2]]}, "rows"),
        ({"weights": [[0.9, -0.1], [0.8, -0.2, float("nan")]]}, "no number"),
        ({"basis": "pair"}, "rows"),
        ({"own": 1}, "leave out some of the grid"),
        ({"own": -1}, "leave out some of the grid"),
        ({"own": "one"}, "damaged"),
        ({"basis": "both"}, "basis"),
        ({"key": None}, "damaged"),
        ({"surprise": 1}, "damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, says):
    path = made("guided").save(tmp_path / "solver.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=says) as caught:
        SolverFile.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no fitted solver"),
        (b"{", "cannot be read"),
        (b"[1]", "no fitted"),
        (b"\xff", "cannot"),
    ],
)
def test_what_is_no_file_of_ours_is_refused(tmp_path, content, says):
    path = tmp_path / "solver.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        SolverFile.load(path)
