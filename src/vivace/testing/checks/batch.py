"""A sample is the same alone and in company, and guidance the same in one call and in two."""

from __future__ import annotations

from typing import Any

import torch

from vivace.core.errors import NoEffectError
from vivace.models.adapter import Need
from vivace.testing.case import Case, NotApplicable, check, expect
from vivace.testing.guided import GuidedLoop, fused_family
from vivace.testing.subjects import Run, Subject, distance

COMPANY = 1e-3
"""Relative L2 difference that other batch sizes of the same kernels may make."""


def _adversarial(subject: Subject) -> list[dict[str, torch.Tensor]]:
    """One still sample and one lively one: what is safe for one is not for the other."""
    pipe = subject.pipeline
    text, latents = subject.pipeline.text_encoder.config.d_model, subject.exact().latents
    length = int(subject.defaults.get("max_sequence_length", 16))
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(latents.shape, generator=generator) for _ in range(2)]
    words = [torch.randn(1, length, text, generator=generator) for _ in range(4)]
    del pipe
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
    subject = case.subject()
    samples = _adversarial(subject)
    together = {k: torch.cat([s[k] for s in samples]) for k in samples[0]}
    for label, technique in case.variants(inside=4).items():
        with subject.open(technique) as session:
            both = _embedded(subject, session, together, [1, 2])
            alone = [_embedded(subject, session, s, [i + 1]) for i, s in enumerate(samples)]
        for i, one in enumerate(alone):
            error = distance(both.latents[i : i + 1], one.latents)
            expect(error <= COMPANY, f"{label}: sample {i} changes by {error:.2g} with its batch mate")
        done, apart = both.receipt.flops, sum(one.receipt.flops for one in alone)
        expect(
            abs(done - apart) <= 1e-6 * apart,
            f"{label}: a batch costs {done / apart:.3f} of its samples alone",
        )


def _embedded(subject: Subject, session: Any, sample: dict[str, torch.Tensor], seeds: list[int]) -> Run:
    return subject.generate(session, None, seeds, **sample)


@check
def check_fused_guidance_is_separate_guidance(case: Case) -> None:
    """Both guidance branches in one batched call give the same as two calls, and the same counts."""
    model = case.model
    if case.family != "wan2.1":
        raise NotApplicable("the loop that can fuse guidance drives Wan")
    with fused_family():
        runs: dict[bool, list[Run]] = {}
        for fused in (False, True):
            loop = GuidedLoop(Subject("wan2.1", case.call), fused=fused)
            case.world.watch(loop)
            runs[fused] = []
            for label, technique in case.variants().items():
                if not case.legal(technique, model=loop.model):
                    raise NotApplicable(f"{label} does not run in a bare denoising loop")
                try:
                    runs[fused].append(loop.run(technique))
                except NoEffectError:
                    raise NotApplicable("changes parts that a bare denoising loop does not have") from None
    for label, two, one in zip(case.variants(), runs[False], runs[True], strict=True):
        error = distance(one.latents, two.latents)
        expect(error <= COMPANY, f"{label}: fused guidance changes the latents by {error:.2g}")
        for count in ("nfe", "nfe_requested", "blocks_run", "attention_pairs", "flops"):
            a, b = two.receipt.counts[count], one.receipt.counts[count]
            expect(
                abs(a - b) <= 1e-6 * max(a, 1.0), f"{label}: {count} is {a:g} in two calls and {b:g} in one"
            )
    expect(Need.GUIDANCE in model.offers, "the loop has no guidance")
