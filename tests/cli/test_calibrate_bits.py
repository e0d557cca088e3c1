"""`vivace calibrate --technique quantized_linear`: formats layer by layer and activation maxima, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vivace.plans import quant_searching
from vivace.plans.plan import Plan
from vivace.techniques.compression.activation_maxima import ActivationMaxima
from vivace.techniques.compression.mixed_bits import BitErrors, MixedBits

SMALL = (
    *("--steps", "2", "--frames", "9", "--height", "32", "--width", "32"),
    *("--dtype", "fp32", "--device", "cpu", "--count", "1"),
)
ROLES = "quantized_linear@by=role,calls=1"


def shot(vivace, folder: Path, plan: str):
    return vivace("generate", "a ball", "-m", str(folder), *SMALL[:-2], "--plan", plan, "-o", "c.mp4")


def test_formats_within_bits_and_a_plan_that_runs(vivace, folder: Path, here: Path) -> None:
    run = vivace(
        *(
            "calibrate",
            "-m",
            str(folder),
            *SMALL,
            "--technique",
            f"{ROLES},formats=int4+int8,smooth=0.5,group=32",
        ),
        *("--target", "bits=9", "-o", "new/mixed.json", "--plan-file", "p.yaml"),
    )
    assert run.code == 0, run.err
    made = MixedBits.load(here / "new" / "mixed.json")
    errors = BitErrors.load(here / "new" / "mixed.errors.json")
    maxima = ActivationMaxima.load(here / "new" / "mixed.maxima.safetensors")
    assert set(maxima.layers) == set(made.layers) == {s for unit in errors.units.values() for s in unit}
    assert [c["weights"] for c in errors.candidates] == ["int4", "int8"]
    assert made.told["bits"] <= 9
    assert made == errors.choose(bits=9.0)
    assert {s["weights"] for s in made.layers.values() if s} <= {"int4", "int8"}
    (technique,) = Plan.load(here / "p.yaml").techniques
    assert Path(technique.mixed) == (here / "new" / "mixed.json").resolve()
    assert Path(technique.maxima) == (here / "new" / "mixed.maxima.safetensors").resolve()
    assert technique.smooth == 0.5
    # What is told are the layers of the file.
    given = [s["weights"] if s else "as it was" for s in made.layers.values()]
    told = {f: int(n) for f, n in re.findall(r"^ *(int4|int8|as it was) +(\d+) of \d+ layers", run.out, re.M)}
    assert told == {f: given.count(f) for f in set(given)}
    assert re.search(r"measured +relative error [\d.e-]+ of the latent", run.out)
    assert not list(here.rglob("*.part"))
    assert shot(vivace, folder, "p.yaml").code == 0


def test_bytes_and_loss_are_budgets_too(vivace, folder: Path, here: Path) -> None:
    arguments = ("calibrate", "-m", str(folder), *SMALL, "--technique", ROLES)
    run = vivace(*arguments, "--target", "loss=0.1", "-o", "l.json")
    assert run.code == 0, run.err
    measured = float(re.search(r"relative error ([\d.e-]+) of the latent", run.out)[1])
    assert measured <= 0.1 or "no choice that was tried keeps the error" in run.out
    errors, loose = BitErrors.load(here / "l.errors.json"), MixedBits.load(here / "l.json")
    budget = 0.6 * sum(errors.full_bytes)
    run = vivace(*arguments, "--target", f"bytes={budget:.0f}", "-o", "b.json", "--no-verify")
    assert run.code == 0, run.err
    assert "not checked" in run.out
    tight = MixedBits.load(here / "b.json")
    assert tight.told["bytes"] <= budget
    # Exact runs and rounding are the same both times, whatever the budget.
    assert BitErrors.load(here / "b.errors.json") == errors
    assert loose.told["bytes"] < sum(errors.full_bytes)


def test_maxima_alone(vivace, folder: Path, here: Path) -> None:
    run = vivace(
        *("calibrate", "-m", str(folder), *SMALL, "--technique", "quantized_linear@smooth=0.4,weights=int4"),
        *("-o", "q.json", "--plan-file", "p.yaml"),
    )
    assert run.code == 0, run.err
    assert sorted(p.name for p in here.iterdir()) == ["p.yaml", "q.maxima.safetensors"]
    (technique,) = Plan.load(here / "p.yaml").techniques
    assert (technique.smooth, technique.weights, technique.mixed) == (0.4, "int4", "")
    assert shot(vivace, folder, "p.yaml").code == 0


def test_only_the_layers_that_the_technique_takes(vivace, folder: Path, here: Path) -> None:
    run = vivace(
        *("calibrate", "-m", str(folder), *SMALL, "--technique", f"{ROLES},roles=ffn,skip_blocks=1"),
        *("--target", "bits=10", "--no-verify"),
    )
    assert run.code == 0, run.err
    layers = MixedBits.load(here / "calibration.json").layers
    assert {s.rsplit(".blocks.", 1)[1].split(".")[0] for s in layers} == {"1", "2"}
    assert all(".ffn." in s for s in layers)


def test_an_interrupted_measurement_goes_on_behind_its_layers(
    vivace, folder, here: Path, monkeypatch
) -> None:
    arguments = ("calibrate", "-m", str(folder), *SMALL, "--technique", ROLES, "--target", "bits=9")
    replay, seen, stop = quant_searching.replay, [], [20]

    def counted(module, call):
        seen.append(1)
        if len(seen) > stop[0]:
            raise KeyboardInterrupt
        return replay(module, call)

    monkeypatch.setattr(quant_searching, "replay", counted)
    run = vivace(*arguments)
    assert run.code == 130
    last = run.err.strip().splitlines()[-1]
    assert "Finished layers are kept in calibration.json.part" in last
    assert [p.name for p in here.iterdir()] == ["calibration.json.part"]
    kept = len(json.loads((here / "calibration.json.part").read_text())["errors"])
    assert kept > 0
    first, stop[0] = len(seen), 10**6
    seen.clear()
    run = vivace(*arguments, "--no-verify")
    assert run.code == 0, run.err
    errors = BitErrors.load(here / "calibration.errors.json")
    calls = len(errors.calls)
    assert len(seen) == calls + (len(errors.units) - kept) * len(errors.candidates) * calls
    assert first == 21
    assert not (here / "calibration.json.part").exists()
    # Another question begins again.
    seen.clear()
    run = vivace(*arguments, "--no-verify", "-o", "again.json")
    assert run.code == 0, run.err
    assert BitErrors.load(here / "again.errors.json") == errors


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (("--technique", "quantized_linear"), "needs a --target"),
        (("--technique", "quantized_linear", "--target", "speedup=2"), "none of bits=X"),
        (("--technique", "quantized_linear", "--target", "bits=0"), "none of bits=X"),
        (
            ("--technique", "quantized_linear@mixed=x.json", "--target", "bits=5"),
            "leave out mixed and maxima",
        ),
        (("--technique", "quantized_linear", "--target", "bits=2"), "codes take 4 and scales come on top"),
        (("--technique", "quantized_linear@formats=int3", "--target", "bits=5"), "no recipe of int3"),
        (("--technique", "quantized_linear@by=head", "--target", "bits=5"), "by is one of"),
        (("--technique", "quantized_linear@wieghts=int4", "--target", "bits=5"), "wieghts"),
        (("--technique", "quantized_linear", "--solver", "3"), "leave --target and --technique out"),
        (("--target", "bits=5"), "neither speedup=X"),
    ],
)
def test_wrong_words_are_one_sentence(vivace, folder: Path, here: Path, arguments, phrase: str) -> None:
    run = vivace("calibrate", "-m", str(folder), *SMALL, *arguments)
    assert run.code == 2
    assert phrase in run.err.strip().splitlines()[-1]
    assert not list(here.iterdir())


def test_a_budget_that_cannot_be_met_keeps_what_was_measured(vivace, folder: Path, here: Path) -> None:
    arguments = ("calibrate", "-m", str(folder), *SMALL, "--technique", ROLES)
    run = vivace(*arguments, "--target", "bits=4.01")
    assert run.code == 2
    assert "smallest formats take" in run.err
    assert [p.name for p in here.iterdir()] == ["calibration.json.part"]
