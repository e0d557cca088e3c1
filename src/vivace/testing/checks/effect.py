"""What a technique does: nothing at identity, something visible otherwise, within the loss it declares."""

from __future__ import annotations

from vivace.core.errors import NoEffectError
from vivace.core.receipt import Receipt
from vivace.testing.case import Case, NotApplicable, check, expect, in_force
from vivace.testing.subjects import distance

ROUNDING = 1e-4
"""Relative L2 difference that reordered float32 arithmetic may make over a whole generation."""


@check
def check_identity_is_the_exact_run(case: Case) -> None:
    """A knob at its identity value gives the exact run bit for bit; applied all the same, it still changes nothing."""
    identities = case.identities()
    if not identities:
        raise NotApplicable("no knob has an identity value")
    subject = case.subject()
    exact = subject.exact()
    for label, technique in identities.items():
        expect(technique.is_identity, f"{label} is declared the identity and not recognised as it")
        run = subject.run(technique)
        expect(run.latents.equal(exact.latents), f"a plan with {label} is not the exact run")
        expect(run.receipt.counts == exact.receipt.counts, f"a plan with {label} counts other work")
        try:
            forced = subject.run(in_force(technique))
        except NoEffectError:
            continue
        error = distance(forced.latents, exact.latents)
        expect(error <= ROUNDING, f"{label} is declared the identity and changes the latents by {error:.2g}")
        for count in ("nfe", "blocks_run"):
            done, all_of_it = forced.receipt.counts[count], exact.receipt.counts[count]
            expect(
                done == all_of_it,
                f"{label} is declared the identity and {count} is {done:g} of {all_of_it:g}",
            )


def decodes(case: Case) -> bool:
    """Whether it owns decoder, text encoder or placement, so that latents and counts may stay as they are."""
    owned = ("vae.decode", "text.encode", "placement")
    return any(claim.resource in owned for claim in case.technique.card.claims)


@check
def check_it_acts(case: Case) -> None:
    """In force, it changes output or counts; the receipt names it with its settings and its edits.

    What owns the decoder may give the same frames: it must report that it decoded them.
    """
    subject = case.subject()
    exact, run = subject.without(case.main), case.alone(case.main)
    if decodes(case):
        run = subject.frames(case.main)
        moved = any(t.effects for t in run.receipt.techniques if t.name == case.name)
    else:
        moved = not run.latents.equal(exact.latents) or run.receipt.counts != exact.receipt.counts
    expect(moved, "is applied, and neither output nor counts change")
    record = next((t for t in run.receipt.techniques if t.name == case.name), None)
    expect(record is not None, "is not in the receipt")
    assert record is not None
    expect(record.edits > 0, "is in force with no edit in the ledger")
    settings = {k: v for k, v in case.main.to_dict().items() if not k.startswith("_")}
    expect(record.settings == settings, "the receipt holds other settings")
    idle = [w for w in run.receipt.warnings if case.name in w]
    expect(not idle, f"the receipt warns: {'; '.join(idle)}")
    again = Receipt.from_dict(run.receipt.to_dict())
    expect(again.counts == run.receipt.counts, "the receipt does not come back from plain data")


@check
def check_declared_fidelity_holds(case: Case) -> None:
    """At default settings the output stays within the card's bound; a lossless method stays within rounding."""
    card = case.technique.card
    bound = ROUNDING if card.lossless else card.fidelity
    if bound is None:
        raise NotApplicable("declares no bound: it changes the picture on purpose")
    subject = case.subject()
    exact = subject.without(case.main, frames=decodes(case)).latents
    settings = case.variants()
    for label in ("default", "example"):
        if label in settings:
            technique = settings[label]
            run = subject.frames(technique) if decodes(case) else case.alone(technique)
            error = distance(run.latents, exact)
            expect(error <= bound, f"{label}: the output changes by {error:.3g}, declared at most {bound:g}")


@check
def check_outputs_are_finite(case: Case) -> None:
    """Every setting gives finite latents of the exact run's shape and type, also in bfloat16."""
    import torch

    subject = case.subject()
    exact = subject.exact().latents
    for label, technique in case.variants().items():
        latents = case.alone(technique).latents
        expect(torch.isfinite(latents).all(), f"{label}: the latents are not finite")
        expect(latents.shape == exact.shape and latents.dtype == exact.dtype, f"{label}: other shape or type")
    low = case.subject()
    low.pipeline.transformer.to(torch.bfloat16)
    expect(torch.isfinite(low.run(case.main).latents).all(), "the latents are not finite in bfloat16")
