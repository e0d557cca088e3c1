"""Other models: any depth, two experts, two block lists, a text stream, fused guidance, an image condition."""

from __future__ import annotations

import torch

from vivace.testing import models
from vivace.testing.case import Case, NotApplicable, check, expect
from vivace.testing.fingerprints import differences, fingerprint
from vivace.testing.subjects import Subject


def _expect_runs(case: Case, subject: Subject, where: str) -> None:
    """Finite, within its estimate, and gone without a trace."""
    subject.glance()
    before = fingerprint(subject.pipeline)
    run = subject.run(case.main)
    expect(torch.isfinite(run.latents).all(), f"{where}: the latents are not finite")
    estimate = case.main.estimate(subject.model, subject.workload(), subject.base_estimate())
    wrong = estimate.problems(run.receipt.counts)
    expect(not wrong, f"{where}: {'; '.join(wrong)}")
    changed = differences(before, fingerprint(subject.pipeline))
    expect(not changed, f"{where}: {changed}")


@check
def check_any_depth(case: Case) -> None:
    """Transformers of 1, 2 and 6 blocks: it runs within its estimate, or is refused with a sentence."""
    if "wan" not in case.family:
        raise NotApplicable("the depth of this tiny model is fixed")
    ran = 0
    for layers in (1, 2, 6):
        subject = case.subject(layers=layers)
        if case.legal(case.main, model=subject.model):
            _expect_runs(case, subject, f"with {layers} blocks")
            ran += 1
    expect(ran, "runs at no other depth")


@check
def check_every_family(case: Case) -> None:
    """Every tiny model whose plan check it passes: two experts, two block lists, text streams, image conditions."""
    ran = []
    for family in models.BUILDERS:
        if family == case.family:
            continue
        subject = case.subject(family)
        if case.legal(case.main, model=subject.model):
            _expect_runs(case, subject, family)
            ran.append(family)
    if not ran:
        raise NotApplicable("no other tiny model is legal for the main example")
