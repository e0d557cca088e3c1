"""Other models: any depth, two experts, two block lists, a text stream, fused guidance, an image condition."""

from __future__ import annotations

import torch

from vivace.testing import models
from vivace.testing.case import Case, NotApplicable, check, expect
from vivace.testing.fingerprints import differences, fingerprint
from vivace.testing.subjects import Subject, estimate_of


def _runs(case: Case, subject: Subject, where: str) -> bool:
    """Whether the technique is legal there; if so it must be finite, within its estimate, and gone without a trace."""
    technique = case.fitted(subject)
    if technique is None:
        return False
    subject.glance()
    before = fingerprint(subject.pipeline)
    run = subject.run(technique)
    expect(torch.isfinite(run.latents).all(), f"{where}: the latents are not finite")
    estimate = estimate_of(technique, subject.model, subject.workload(), subject.base_estimate())
    wrong = estimate.problems(run.receipt.counts)
    expect(not wrong, f"{where}: {'; '.join(wrong)}")
    changed = differences(before, fingerprint(subject.pipeline))
    expect(not changed, f"{where}: {changed}")
    return True


@check
def check_any_depth(case: Case) -> None:
    """Transformers of 1, 2 and 6 blocks: it runs within its estimate, or is refused with a sentence."""
    if "wan" not in case.family:
        raise NotApplicable("the depth of this tiny model is fixed")
    ran = [_runs(case, case.subject(layers=n), f"with {n} blocks") for n in (1, 2, 6)]
    expect(any(ran), "runs at no other depth")


@check
def check_every_family(case: Case) -> None:
    """Every tiny model whose plan check it passes: two experts, two block lists, text streams, image conditions."""
    others = [family for family in models.BUILDERS if family != case.family]
    ran = [_runs(case, case.subject(family), family) for family in others]
    if not any(ran):
        raise NotApplicable("no other tiny model is legal for the main example")
