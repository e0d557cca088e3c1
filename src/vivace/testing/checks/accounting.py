"""The figures: what was counted was predicted, and was really saved."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from vivace.testing.case import Case, NotApplicable, check, expect
from vivace.testing.checks.effect import ROUNDING
from vivace.testing.subjects import OTHER_PROMPT, Subject, distance, estimate_of


@check
def check_counts_are_as_estimated(case: Case) -> None:
    """Counted NFE, blocks, attention pairs and FLOPs lie in the estimate, for every setting, shape and step count."""
    subject = case.subject()
    calls: list[dict[str, Any]] = [{}, {"height": subject.defaults["height"] + 32}]
    for label, technique in case.variants().items():
        for call in calls if technique is case.main else calls[:1]:
            estimate = estimate_of(
                technique, subject.model, subject.workload(**call), subject.base_estimate(**call)
            )
            run = subject.run(technique, **call) if call else case.alone(technique)
            wrong = estimate.problems(run.receipt.counts)
            expect(not wrong, f"{label}: {'; '.join(wrong)}")


@check
def check_receipt_adds_up(case: Case) -> None:
    """Executed work is never more than requested, sums over steps agree, and saved work names its cause."""
    for label, technique in case.variants().items():
        receipt = case.alone(technique).receipt
        expect(receipt.completed, f"{label}: the generation is not marked as completed")
        expect(
            0 < receipt.nfe <= receipt.nfe_requested, f"{label}: {receipt.nfe} NFE of {receipt.nfe_requested}"
        )
        expect(receipt.blocks_run <= receipt.blocks_total + 1e-6, f"{label}: more blocks ran than there are")
        branches = [b for s in receipt.steps for b in s.branches]
        expect(math.isclose(sum(b.blocks_run for b in branches), receipt.blocks_run, abs_tol=1e-4),
               f"{label}: the steps' blocks do not sum to the total")  # fmt: skip
        blame = [b for b in branches if b.action != "computed" and not b.by]
        expect(
            not blame, f"{label}: {len(blame)} evaluations are {blame[0].action if blame else ''} by nobody"
        )


@check
def check_savings_are_real(case: Case) -> None:
    """The receipt's share of the exact FLOPs is not below the share that PyTorch's own counter sees executed."""
    subject = case.subject()
    exact = _executed_exactly(case.family, tuple(sorted(case.call.items())))
    told = case.alone(case.main).receipt.flops / subject.exact().receipt.flops
    seen = _executed(subject, case.main) / exact
    expect(seen <= told * 1.02 + 1e-3, f"{told:.1%} of the FLOPs are told, {seen:.1%} are executed")


@functools.cache
def _executed_exactly(family: str, call: tuple[tuple[str, Any], ...]) -> float:
    return _executed(Subject(family, dict(call)))


def _executed(subject: Subject, *techniques: Any) -> float:
    """FLOPs that PyTorch dispatches inside the transformer in one generation."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    total = 0.0
    with subject.open(*techniques) as session:
        module = subject.pipeline.transformer
        old = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal total
            counter = FlopCounterMode(display=False, custom_mapping=mapping)
            with counter:
                out = old(*args, **kwargs)
            total += counter.get_total_flops()
            return out

        vars(module)["forward"] = forward
        try:
            subject.generate(session)
        finally:
            vars(module)["forward"] = old
    vars(module).pop("forward", None)
    return total


@check
def check_knobs_are_monotone(case: Case) -> None:
    """Turning a monotone knob up never costs more of the work it promises to save."""
    knobs = {n: k for n, k in case.technique.knobs().items() if k.monotone}
    if not knobs:
        raise NotApplicable("no knob is declared monotone")
    for name, knob in knobs.items():
        prefix = f"{name}="
        settings = {getattr(case.main, name): case.main}
        for label, technique in case.variants(inside=4).items():
            if label.startswith(prefix):
                settings[getattr(technique, name)] = technique
        ordered = sorted(settings)
        costs = [case.alone(settings[v]).receipt.counts[knob.monotone] for v in ordered]
        for low, high, before, after in zip(ordered, ordered[1:], costs, costs[1:], strict=False):
            expect(after <= before * (1 + 1e-9), f"{name} from {low} to {high}: {knob.monotone} grows from "
                   f"{before:g} to {after:g}")  # fmt: skip


@check
def check_blocks_compile_once(case: Case) -> None:
    """Block bodies compile as whole graphs; other steps and prompts compile nothing new and change nothing."""
    import torch._dynamo as dynamo

    subject = case.subject(layers=2)
    technique = case.fitted(subject)
    if technique is None:
        raise NotApplicable("is refused on a model of two blocks")
    eager = subject.run(technique)
    dynamo.reset()
    try:
        with (
            dynamo.config.patch(recompile_limit=4),
            subject.open(technique, compile_backend=_counting_backend()) as session,
        ):
            first, warm = subject.generate(session), _compilations()
            expect(warm > 0, "no block body is compiled")
            error = distance(first.latents, eager.latents)
            expect(error <= ROUNDING, f"compiled blocks change the latents by {error:.2g}")
            expect(first.receipt.counts == eager.receipt.counts, "compiled blocks change the counts")
            subject.generate(session, num_inference_steps=12)
            new = _compilations() - warm
            expect(not new, f"{new} new compilations with other steps: a per-step value became a guard")
            subject.generate(session, OTHER_PROMPT, seed=3, num_inference_steps=5)
            new = _compilations() - warm
            expect(not new, f"{new} new compilations with another prompt")
    finally:
        dynamo.reset()
        _graphs.clear()


_graphs: list[str] = []


def _compilations() -> int:
    return len(_graphs)


@functools.cache
def _counting_backend() -> str:
    """The name of a `torch.compile` backend that runs graphs as they are and counts them."""
    from torch._dynamo import register_backend

    def count(graph: Any, inputs: Any) -> Any:
        _graphs.append(type(graph).__name__)
        return graph.forward

    register_backend(count, name="vivace_contract")
    return "vivace_contract"
