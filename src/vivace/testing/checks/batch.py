"""A sample is the same alone and in company, and guidance the same in one call and in two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vivace.core.errors import NoEffectError
from vivace.plans.session import Session
from vivace.techniques.base import Technique
from vivace.testing.case import Case, NotApplicable, check, expect
from vivace.testing.guided import GuidedLoop, fused_family
from vivace.testing.subjects import Run, Subject, distance

COMPANY = 1e-3
"""Relative L2 difference that other batch sizes of the same kernels may make."""
DIGITS = tuple(1.0 + k * 3e-7 for k in (-4, -3, -2, -1, 1, 2, 3, 4))
"""Factors that change a float32 input in its last digits only."""


def _expect_same(
    one: torch.Tensor, other: torch.Tensor, rerun: Callable[[float], torch.Tensor], what: str
) -> None:
    """`other` is `one` up to rounding. `rerun(factor)` makes `one` again from an input times `factor`.

    Where a technique itself rounds (int8 codes), a last digit can tip a value over and be amplified from there on;
    so a larger difference is allowed when a change of the last digits makes one too.
    """
    error = distance(other, one)
    if error > COMPANY:
        noise = max(distance(rerun(factor), one) for factor in DIGITS)
        expect(error <= 3.0 * noise, f"{what} by {error:.2g}; the last digits of the input by {noise:.2g}")


def _expect_equal(a: float, b: float, sentence: str) -> None:
    expect(abs(a - b) <= 1e-6 * max(abs(a), 1.0), sentence)


def _adversarial(subject: Subject) -> list[dict[str, torch.Tensor]]:
    """One still sample and one lively one: what is safe for one is not for the other."""
    width, latents = subject.pipeline.text_encoder.config.d_model, subject.exact().latents
    length = int(subject.defaults["max_sequence_length"])
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(latents.shape, generator=generator) for _ in range(2)]
    words = [torch.randn(1, length, width, generator=generator) for _ in range(4)]
    return [
        {
            "latents": noise[0] * 0.02,
            "prompt_embeds": words[0] * 0.01,
            "negative_prompt_embeds": words[1] * 0.01,
        },
        {
            "latents": noise[1] * 4.0,
            "prompt_embeds": words[2] * 30.0,
            "negative_prompt_embeds": words[3] * 5.0,
        },
    ]


@check
def check_batch_mates_do_not_matter(case: Case) -> None:
    """In a batch of a still and a lively sample each is what it is alone, at every setting; or the card says so."""
    if case.technique.card.batch_coupled:
        raise NotApplicable("the card declares it batch-coupled")
    if not case.family.startswith("wan"):
        raise NotApplicable("the adversarial batch is made for Wan's inputs")
    subject = case.subject()
    samples = _adversarial(subject)
    together = {k: torch.cat([s[k] for s in samples]) for k in samples[0]}
    for label, technique in case.variants(inside=3).items():
        with subject.open(technique) as session:
            both = _embedded(subject, session, together)
            alone = [_embedded(subject, session, sample) for sample in samples]
            for i, (one, sample) in enumerate(zip(alone, samples, strict=True)):

                def rerun(factor: float, sample: Any = sample, session: Any = session) -> torch.Tensor:
                    return _embedded(
                        subject, session, sample | {"latents": sample["latents"] * factor}
                    ).latents

                what = f"{label}: its batch mate changes sample {i}"
                _expect_same(one.latents, both.latents[i : i + 1], rerun, what)
        apart = sum(one.receipt.flops for one in alone)
        ratio = both.receipt.flops / apart
        _expect_equal(ratio, 1.0, f"{label}: a batch costs {ratio:.3f} of its samples alone")


def _embedded(subject: Subject, session: Session, sample: dict[str, torch.Tensor]) -> Run:
    return subject.generate(session, None, list(range(sample["latents"].shape[0])), **sample)


@check
def check_fused_guidance_is_separate_guidance(case: Case) -> None:
    """Both guidance branches in one batched call give the same as two calls, and the same counts."""
    if case.family != "wan2.1":
        raise NotApplicable("the loop that can fuse guidance drives Wan")
    ran = 0
    with fused_family():
        separate, fused = (GuidedLoop(Subject("wan2.1", case.call), fused=f) for f in (False, True))
        for loop in (separate, fused):
            case.world.watch(loop)
        for label, technique in case.variants().items():
            if all(case.legal(technique, model=loop.model) for loop in (separate, fused)):
                ran += _fused_as_separate(separate, fused, technique, label)
    if not ran:
        raise NotApplicable("changes nothing that a bare denoising loop has")


def _fused_as_separate(separate: GuidedLoop, fused: GuidedLoop, technique: Technique, label: str) -> bool:
    """Whether the technique acts on a bare loop; if so, both loops must agree."""
    try:
        two, one = separate.run(technique), fused.run(technique)
    except NoEffectError:
        return False

    def rerun(factor: float) -> torch.Tensor:
        return separate.run(technique, factor).latents

    _expect_same(two.latents, one.latents, rerun, f"{label}: fused guidance changes the latents")
    for count in ("nfe", "nfe_requested", "blocks_run", "attention_pairs", "flops"):
        a, b = two.receipt.counts[count], one.receipt.counts[count]
        _expect_equal(a, b, f"{label}: {count} is {a:g} in two calls and {b:g} in one")
    return True
