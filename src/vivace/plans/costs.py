"""What the exact run of a workload costs, counted on the meta device: no weights, no arithmetic.

The transformer is built from its configuration on the meta device and called once per guidance branch with the same
counters that count a live session, so that the prediction and the receipt of the exact run cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Hashable

from vivace.core.context import COND, FUSED, UNCOND, Clock, Evaluation
from vivace.core.counters import Cost, Meter
from vivace.core.errors import ModelError
from vivace.core.shapes import Workload
from vivace.core.surgery import Surgery
from vivace.models.adapter import Adapter, ExpertDescription, Guidance, ModelDescription, RootCall
from vivace.plans.counting import install
from vivace.techniques.base import Estimate


def baseline(model: ModelDescription, workload: Workload) -> Estimate:
    """Counts of the exact run: NFE, blocks, attention pairs and FLOPs of the transformer(s).

    Args:
        model: a description; only its configurations are used.
        workload: clip, steps, guidance and batch; `guidance` above 1 asks for both branches.

    Raises:
        ModelError: the model has no adapter, so that its transformer cannot be called without its pipeline.
    """
    if model.adapter is None:
        raise ModelError(
            f"{model.pipeline_class} has no adapter, so its cost is not known before it has run; run it once."
        )
    guided = model.guidance is not Guidance.NONE and workload.branches == 2
    fused = guided and model.guidance is Guidance.FUSED
    branches = (FUSED,) if fused else (COND, UNCOND) if guided else (COND,)
    nfe = blocks = 0.0
    total = Cost()
    for expert, steps in _steps(model, workload):
        if steps:
            total.add(_step_cost(model.adapter, model, expert, workload, branches), steps)
            nfe += steps * (2 if guided else 1)
            blocks += steps * (2 if guided else 1) * expert.depth
    return Estimate.exact(nfe, blocks, total.pairs, total.flops)


def _steps(model: ModelDescription, workload: Workload) -> list[tuple[ExpertDescription, int]]:
    """How many steps each expert carries out."""
    if len(model.experts) == 1:
        return [(model.experts[0], workload.steps)]
    import diffusers

    # Which steps lie above the boundary is the scheduler's knowledge, so it is asked.
    scheduler = getattr(diffusers, model.scheduler_class).from_config(dict(model.scheduler))
    scheduler.set_timesteps(workload.steps)
    boundary = (model.boundary_ratio or 0.0) * scheduler.config.num_train_timesteps
    high = int((scheduler.timesteps >= boundary).sum())
    return list(zip(model.experts, (high, len(scheduler.timesteps) - high), strict=True))


def _step_cost(
    adapter: Adapter,
    model: ModelDescription,
    description: ExpertDescription,
    workload: Workload,
    branches: tuple[str, ...],
) -> Cost:
    """Cost of one step: one transformer call per branch, a fused pair in one batch.

    The blocks of one list cost the same, so one block of each list is built and stands for all of them.
    """
    import diffusers
    import torch

    depths = {attribute: description.config[key] for attribute, key in adapter.depth_keys.items()}
    shallow = {key: 1 for attribute, key in adapter.depth_keys.items() if depths[attribute]}
    with torch.device("meta"):
        build = getattr(diffusers, description.class_name)
        module = build.from_config({**description.config, **shallow}).eval()
    expert = adapter.expert(description.name, module)
    stand_ins = [f"{expert.name}.{attribute}.0" for attribute, depth in depths.items() for _ in range(depth)]
    clock = Clock()
    meter, edit = Meter(clock), Surgery()
    install(edit, meter, [expert])
    clock.begin((500.0,), ())
    known: dict[Hashable, Cost] = {}
    total = Cost()
    try:
        for branch in branches:
            requested = 2 if branch == FUSED else 1
            rows = workload.batch * requested
            call = adapter.dummy_call(model, workload.with_(batch=rows), "meta", torch.float32, branch)
            key = RootCall(call, rows).key
            if key not in known:
                meter.reset()
                evaluation = Evaluation(0, branch, expert.name, requested, rows=rows, key=key)
                clock.evaluation = evaluation
                with torch.no_grad(), meter.evaluation(evaluation):
                    evaluation.enter(rows)
                    module(**call, return_dict=False)
                known[key] = meter.dense({expert.name: stand_ins})
            total.add(known[key])
    finally:
        clock.end()
        edit.close()
    return total
