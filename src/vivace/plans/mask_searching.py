"""Making the files of per-head attention masks: the exact pipeline runs in a session, and a recorder watches.

    from vivace.plans.mask_searching import search_masks, search_orders
    search_masks(pipeline, prompts, PATTERNS).save("masks.json")      # sparse_vdit, sliding_tile, efficient_vdit
    search_orders(pipeline, prompts, mass=0.9).save("orders.json")    # paro

PATTERNS is what the technique's module offers (`vivace.techniques.attention.sparse_vdit.PATTERNS`), or a choice of your
own. Runs of few steps will do: the patterns of heads hardly change from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vivace.calibration.artifact import Key, key_of, prompts_digest
from vivace.core.errors import ConfigError
from vivace.models.adapter import ModelDescription
from vivace.models.describe import describe_pipeline
from vivace.plans.engine import StepListener
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.attention.axis_orders import AxisMass, OrderFile
from vivace.techniques.attention.head_patterns import parse
from vivace.techniques.attention.mask_file import MaskFile
from vivace.techniques.attention.mask_search import MaskErrors, Recorder


def search_masks(
    pipeline: Any,
    prompts: Sequence[str],
    patterns: Sequence[str],
    *,
    model: ModelDescription | None = None,
    seed: int = 0,
    block: int = 128,
    rows: int = 64,
    every: int = 1,
    on_step: StepListener | None = None,
    **call: Any,
) -> MaskFile:
    """Run the exact pipeline once for each prompt and measure what each pattern would cost each head.

    Args:
        pipeline: a diffusers pipeline that no session holds.
        prompts: one clip each.
        patterns: candidates (`vivace.techniques.attention.head_patterns`).
        model: its description; found from the pipeline when left out.
        seed: of the first clip; clip i gets seed + i.
        block: most tokens of a block.
        rows: queries that are looked at in every attention call.
        every: of so many steps one is measured.
        on_step: called after every step, as in a session.
        call: the pipeline's arguments (steps, shape, guidance); what is left out is the model's default.

    Raises:
        ConfigError: no prompts, no or wrong patterns.
        PlanError: the model's attention cannot be addressed.
    """
    if not patterns:
        raise ConfigError("a search needs at least one pattern.")
    for pattern in patterns:
        parse(pattern)
    recorder = MaskErrors(patterns=tuple(patterns), block=block, rows=rows, every=every)
    model = model or describe_pipeline(pipeline)
    key = _watch(recorder, pipeline, prompts, model, seed, on_step, call)
    return recorder.file(model, key, len(prompts), prompts_digest(prompts), seed, _version())


def search_orders(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    mass: float = 0.9,
    density: float = 0.0,
    model: ModelDescription | None = None,
    seed: int = 0,
    block: int = 128,
    rows: int = 2,
    every: int = 1,
    on_step: StepListener | None = None,
    **call: Any,
) -> OrderFile:
    """Run the exact pipeline once for each prompt, and find each head's order of the axes and its mask.

    Args:
        mass: share of a head's probability that its mask holds; used when `density` is 0.
        density: share of blocks that a mask has, instead.
        rows: queries of every block that are looked at.
        pipeline, prompts, model, seed, block, every, on_step, call: as for `search_masks`.

    Raises:
        ConfigError: no prompts, or a share out of range.
        PlanError: the model's attention cannot be addressed.
    """
    if not 0.0 < mass <= 1.0 or not 0.0 <= density <= 1.0:
        raise ConfigError(f"mass and density are shares, not {mass} and {density}.")
    recorder = AxisMass(block=block, rows=rows, every=every)
    model = model or describe_pipeline(pipeline)
    key = _watch(recorder, pipeline, prompts, model, seed, on_step, call)
    return recorder.file(
        model, key, len(prompts), prompts_digest(prompts), seed, _version(), mass=mass, density=density
    )


def _watch(
    recorder: Recorder,
    pipeline: Any,
    prompts: Sequence[str],
    model: ModelDescription,
    seed: int,
    on_step: StepListener | None,
    call: dict[str, Any],
) -> Key:
    """The exact runs; returns what they are valid for."""
    if not prompts:
        raise ConfigError("a search needs at least one prompt.")
    workload = model.asked(call)
    key = key_of(model, pipeline, workload)
    call = {"num_inference_steps": workload.steps, "output_type": "latent"} | call
    with accelerate(pipeline, Plan([recorder]), model=model, counters=False, on_step=on_step) as session:
        for i, prompt in enumerate(prompts):
            session(prompt, seed=seed + i, **call)
    return key


def _version() -> str:
    import vivace

    return vivace.__version__
