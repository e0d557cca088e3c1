"""The attribute check of a prompt agrees with the verifier's own rule, and unknown words are told."""

from __future__ import annotations

import dataclasses
import random

import pytest

from vivace.cli.shared.judge import _checks
from vivace.cli.shared.options import Request
from vivace.cli.shared.run import Job, _warn_of_unknown_words
from vivace.models.loading import describe
from vivace.world import COLOURS, SHAPES, SIZES, Attributes, parse_prompt, sample_scene
from vivace.world.attributes import CAMERAS, FLOORS, MOTIONS
from vivace.world.verifier import Prediction


def _truth(seed: int) -> Attributes:
    return sample_scene(seed).attributes


def _seen(truth: Attributes) -> Prediction:
    objects = {o.shape: (o.colour, o.size) for o in truth.objects}
    return Prediction(objects, truth.motion, truth.count, truth.floor, truth.camera)


def _disturbed(seen: Prediction, rng: random.Random) -> Prediction:
    """One thing seen otherwise."""
    objects = dict(seen.objects)
    shape = rng.choice(list(objects))
    kind = rng.choice(("shape", "colour", "size", "motion", "floor", "camera", "count"))
    if kind == "shape":
        look = objects.pop(shape)
        objects[rng.choice([s for s in SHAPES if s not in seen.objects])] = look
    elif kind == "colour":
        objects[shape] = (rng.choice(COLOURS), objects[shape][1])
    elif kind == "size":
        objects[shape] = (objects[shape][0], rng.choice(SIZES))
    lists = {"motion": MOTIONS, "floor": FLOORS, "camera": CAMERAS, "count": (1, 2, 3)}
    changes = {kind: rng.choice(lists[kind])} if kind in lists else {}
    return dataclasses.replace(seen, objects=objects, **changes)


@pytest.mark.parametrize("seed", range(40))
def test_checks_agree_with_the_verifier(seed):
    rng, truth = random.Random(seed), _truth(seed)
    exact, fast = _seen(truth), _disturbed(_seen(truth), rng)
    # A prompt that leaves things unsaid, and one that says all.
    partly = Attributes(
        tuple(dataclasses.replace(o, size=None, material=None) for o in truth.objects), truth.motion
    )
    for wanted in (truth, partly):
        checks = _checks(wanted, exact, fast)
        stated = {c.name: c for c in checks if c.wanted is not None}
        assert {n: c.holds(c.exact) for n, c in stated.items()} == exact.matches(wanted)
        assert {n: c.holds(c.fast) for n, c in stated.items()} == fast.matches(wanted)
        assert all(c.holds(c.exact) for c in stated.values())


def test_a_prompt_without_attributes_asks_nothing():
    seen = _seen(_truth(0))
    assert all(c.wanted is None for c in _checks(parse_prompt("a thing"), seen, seen))


def test_unknown_words_are_named(capsys):
    _warn_of_unknown_words("a red sphere rides a unicorn")
    err = capsys.readouterr().err
    assert err.startswith("warning: ")
    assert "'unicorn'" in err
    assert "'sphere'" not in err
    _warn_of_unknown_words("a red sphere slides left")
    assert capsys.readouterr().err == ""


def test_other_models_are_not_judged(folder):
    from vivace.cli.shared.judge import attribute_checks

    model = describe(folder)
    job = Job(Request(prompt="a red sphere", model=str(folder)), model, model.workload(), 16.0)
    checks, reason = attribute_checks(job, None, None)
    assert checks == ()
    assert "embedded model only" in reason
