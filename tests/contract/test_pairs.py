"""Pairs of registered techniques: they work in whatever order they are written, or are refused with a reason.

`make contract` takes every pair. Without it: every pair of the techniques of `WHOLE`, and every other technique beside
int8 linears, a sparse kernel and the first-block cache.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import WHOLE, case_of, full

from vivace.core.errors import PlanError
from vivace.techniques.base import registry
from vivace.testing.fingerprints import differences, fingerprint
from vivace.testing.subjects import Subject, plan_of

PARTNERS = ("int8_linear", "radial")


def chosen(first: str, second: str) -> bool:
    """Whether a pair belongs to this run."""
    whole = (first in WHOLE) + (second in WHOLE)
    return full() or whole == 2 or (whole == 1 and bool({first, second} & {*PARTNERS, "first_block_cache"}))


PAIRS = [pair for pair in itertools.combinations(registry, 2) if chosen(*pair)]


def larger(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """The larger of two clips, on which both techniques act."""
    return max(a, b, key=lambda call: call["num_frames"] * call["height"] * call["width"])


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " + ".join(pair))
def test_pair_works_or_is_refused(pair: tuple[str, str]):
    first, second = (case_of(name) for name in pair)
    subject = Subject("wan2.1", larger(first.call, second.call))
    both = (first.main, second.main)
    problems = [sorted(map(str, _errors(order, subject))) for order in (both, both[::-1])]
    assert problems[0] == problems[1], "a refusal depends on the order"
    before = fingerprint(subject.pipeline)
    if problems[0]:
        assert all(len(p) > 20 for p in problems[0]), "a refusal gives no reason"
        with pytest.raises(PlanError):
            subject.open(*both)
        assert not differences(before, fingerprint(subject.pipeline))
        return
    glance = subject.glance()
    before = fingerprint(subject.pipeline)
    run, turned = subject.run(*both), subject.run(*both[::-1])
    again = subject.run(*both) if full() else turned
    assert torch.isfinite(run.latents).all()
    assert run.latents.equal(turned.latents), "the result depends on the order of the plan"
    assert run.latents.equal(again.latents), "two equal runs differ"
    assert run.receipt.counts == turned.receipt.counts == again.receipt.counts
    assert {t.name for t in run.receipt.techniques} == {t.card.name for t in plan_of(*both).techniques}
    assert all(t.edits > 0 for t in run.receipt.techniques)
    assert not differences(before, fingerprint(subject.pipeline))
    assert subject.glance().equal(glance), "the output is not exact after the pair is undone"


def _errors(techniques, subject: Subject):
    return [p for p in plan_of(*techniques).problems(subject.model) if p.severity == "error"]
