"""Run it again: same result, whatever ran before, however it ended, whoever started it."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from vivace.plans.session import Session
from vivace.techniques.base import Card, Cite, Paradigm, Stage, Target, Technique, shared
from vivace.testing.case import Case, ContractViolation, check, counting_tensors, expect
from vivace.testing.subjects import OTHER_PROMPT, PROMPT, Run, Subject


class Stop(RuntimeError):
    """The user pressed stop."""


def same(a: Run, b: Run) -> bool:
    """Whether two generations are bit-equal in latents and counts."""
    return a.latents.equal(b.latents) and a.receipt.counts == b.receipt.counts


@check
def check_deterministic(case: Case) -> None:
    """Equal inputs give bit-equal latents and equal counts, on two pipelines of the same weights."""
    for label, technique in case.variants().items():
        again = case.subject().run(technique)
        expect(same(again, case.alone(technique)), f"{label}: two equal generations on two pipelines differ")


@check
def check_generations_are_independent(case: Case) -> None:
    """What was generated before does not show in what is generated next."""
    subject = case.subject()
    for label, technique in case.variants().items():
        with subject.open(technique) as session:
            subject.generate(session, OTHER_PROMPT, seed=99)
            again = subject.generate(session)
        expect(same(again, case.alone(technique)), f"{label}: another prompt before it changes the result")


@check
def check_aborted_generation_leaves_nothing(case: Case) -> None:
    """A generation stopped at any step leaves no state and no trace in the next one."""
    subject = case.subject()
    with subject.open(case.main) as session:
        alone = case.alone(case.main)
        last = len(alone.receipt.steps) - 1
        stops = [(step, False) for step in sorted({0, last // 2, max(0, last - 1)})] + [(last // 2, True)]
        for step, direct in stops:
            try:
                _stopped(subject, session, step, direct)
            except Stop:
                expect(direct or not len(session.store), f"state is left after a stop at step {step}")
            else:
                raise ContractViolation(f"a generation cannot be stopped at step {step}")
            how = "driven directly" if direct else "by the session"
            same_again = same(subject.generate(session), alone)
            expect(same_again, f"a generation {how} and stopped at step {step} changes the next one")


def _stopped(subject: Subject, session: Session, at: int, direct: bool) -> None:
    def stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise Stop
        return tensors

    run = subject.plain if direct else lambda **call: subject.generate(session, **call)
    run(prompt=OTHER_PROMPT, seed=99, callback_on_step_end=stop)


@check
def check_calls_may_change(case: Case) -> None:
    """Steps, shape, batch and guidance may change from call to call; each result is a fresh session's."""
    subject, fresh = case.subject(), case.subject()
    height = subject.defaults["height"]
    changes: dict[str, dict[str, Any]] = {
        "fewer steps": {"num_inference_steps": 5},
        "a taller clip": {"height": height + 32},
        "a longer clip": {"num_frames": subject.defaults["num_frames"] + 8},
        "a batch": {"prompt": ["a", "b"], "seed": [1, 2]},
        "no guidance": {"guidance_scale": 1.0},
        "the first call": {},
    }
    with subject.open(case.main) as session:
        subject.generate(session)
        for label, change in changes.items():
            run = subject.generate(session, **change)
            expect(torch.isfinite(run.latents).all(), f"{label}: the latents are not finite")
            expect(same(run, fresh.run(case.main, **change)), f"{label}: not what a fresh session gives")
            if "num_inference_steps" in change:
                expect(len(run.receipt.steps) == 5, "the number of steps the user asked for is not kept")


@check
def check_direct_drive_is_the_same(case: Case) -> None:
    """The pipeline called directly in a session gives the session's latents and receipt."""
    subject = case.subject()
    with subject.open(case.main) as session:
        called = subject.generate(session)
        latents = subject.plain()
        expect(latents.equal(called.latents), "the pipeline driven directly gives other latents")
        counts = session.receipt().counts
        expect(counts == called.receipt.counts, "the pipeline driven directly gives another receipt")
        expect(not len(session.store), "state is left after a generation driven directly")


@check
def check_plan_order_is_irrelevant(case: Case) -> None:
    """A plan gives the same result in whatever order it is written."""
    subject = case.subject()
    results = [subject.run(*order) for order in itertools.permutations((case.main, *BYSTANDERS))]
    expect(
        all(same(r, results[0]) for r in results), "the order in which a plan is written changes the result"
    )


@check
def check_memory_is_released(case: Case) -> None:
    """State lives for one generation; after the session no tensor of the technique is alive."""
    subject = case.subject()
    with subject.open(case.main) as session:
        subject.generate(session)
        expect(not len(session.store), "state is left after a generation")
    del session
    with counting_tensors() as alive:
        fresh = case.subject()
        fresh.glance()
        before = alive()
        for label, prompt in (("the first", PROMPT), ("another", OTHER_PROMPT)):
            fresh.run(case.main, prompt=prompt)
            fresh.glance()
            kept = alive() - before
            expect(kept <= 0, f"{kept} tensors stay alive after {label} session on a pipeline")


def _bystander(label: str, stage: Stage, gain: float) -> Technique:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Bystander(Technique):
        """Scales what the first block returns: a neighbour at some stage that minds its own business."""

        def apply(self, target: Target) -> None:
            block = target.experts[0].blocks[0]

            def handler(call: Any, run: Any) -> Any:
                hidden, text = run(call)
                target.report(label, "calls", 1)
                return hidden * gain, text

            target.around_block(block, handler)

    Bystander.card = Card(
        name=label,
        paradigm=Paradigm.TRAJECTORY,
        summary="A neighbour in a plan.",
        objective="test",
        stage=stage,
        claims=(shared("block.output"),),
        cite=Cite("contract suite"),
    )
    return Bystander()


BYSTANDERS = (
    _bystander("a_contract_bystander", Stage.CACHE, 1.01),
    _bystander("z_contract_bystander", Stage.TRAJECTORY, 0.98),
)
