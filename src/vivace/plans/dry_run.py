"""What techniques that change tensors inside the transformer take: they run, on the meta device, and bytes are counted.

A transformer with two blocks of each list is built there, the techniques are put in force by a session as on any
pipeline, and a few steps are run: enough for what is remembered to be there and to be used. Nothing is computed. What
is remembered at a block is taken times the number of blocks; the working set is of two blocks, as for the exact run.
Kernels are those that run on any device: block-sparse attention gathers its blocks there, which a GPU's kernels do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vivace.core.context import COND, FUSED, UNCOND, StateStore
from vivace.core.shapes import Workload
from vivace.models.adapter import ExpertDescription, Guidance, ModelDescription

if TYPE_CHECKING:
    import torch

    from vivace.techniques.base import Technique

BUILT = 2
"""Blocks of each list that are built: the second one runs beside everything that the first one leaves."""
LEAST_STEPS = 4


@dataclass(frozen=True, slots=True)
class Taken:
    """Of one expert, in bytes: the most that a call makes beside what is kept, and what is kept from step to step."""

    working: int
    kept: int


class CannotTell(Exception):
    """A technique needs numbers to go on, and there are none on the meta device; the sentence says what failed."""


class _Steps:
    """A scheduler that only counts."""

    order = 1

    def __init__(self, config: Any) -> None:
        import torch

        self.config = config
        self.timesteps, self.sigmas = torch.zeros(0), torch.zeros(1)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        import torch

        self.sigmas = torch.linspace(1.0, 0.0, num_inference_steps + 1)
        self.timesteps = 1000.0 * self.sigmas[:-1]

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = False) -> tuple[Any]:
        return (sample,)


class _Loop:
    """The shortest pipeline: calls the transformer for every branch of every step, and counts."""

    def __init__(
        self,
        module: Any,
        model: ModelDescription,
        workload: Workload,
        dtype: torch.dtype,
        depths: dict[str, int],
    ) -> None:
        self.transformer = module
        self.model, self.workload, self.dtype, self.depths = model, workload, dtype, depths
        self.scheduler = _Steps(dict(model.scheduler))
        self.components = {"transformer": module, "scheduler": self.scheduler}
        self.store: StateStore | None = None
        self.taken = Taken(0, 0)

    def __call__(self, num_inference_steps: int = LEAST_STEPS) -> Any:
        import torch

        from vivace.core.live_bytes import FusedAttention, LiveBytes

        adapter, model, workload = self.model.adapter, self.model, self.workload
        assert adapter is not None
        self.scheduler.set_timesteps(num_inference_steps)
        branches = branches_of(model, workload)
        rows = workload.batch * (2 if FUSED in branches else 1)
        calls = {
            b: adapter.dummy_call(model, workload.with_(batch=rows), "meta", self.dtype, b) for b in branches
        }
        most = left = scaled = 0
        latents = torch.zeros(1)
        with torch.no_grad(), FusedAttention(), LiveBytes() as live:
            for timestep in self.scheduler.timesteps:
                for branch, call in calls.items():
                    live.reset()
                    with self._named(branch):
                        self.transformer(**call, return_dict=False)
                    most = max(most, live.peak)
                left = max(left, live.now)
                scaled = max(scaled, self._of_blocks())
                self.scheduler.step(latents, timestep, latents, return_dict=False)
        self.taken = Taken(most - left, left + scaled)
        return latents

    def _named(self, branch: str) -> Any:
        if branch == FUSED or not hasattr(self.transformer, "cache_context"):
            return contextlib.nullcontext()
        return self.transformer.cache_context(branch)

    def _of_blocks(self) -> int:
        """Bytes that the blocks which are not built would keep as well."""
        assert self.store is not None
        total = 0
        for key, value in self.store.items():
            for name, depth in self.depths.items():
                if any(isinstance(k, str) and f".{name}." in k for k in _flat(key)):
                    total += self.store.size(value) * (depth - min(depth, BUILT)) // min(depth, BUILT)
        return total


def branches_of(model: ModelDescription, workload: Workload) -> tuple[str, ...]:
    """The kinds of calls of one step."""
    guided = model.guidance is not Guidance.NONE and workload.branches == 2
    if not guided:
        return (COND,)
    return (FUSED,) if model.guidance is Guidance.FUSED else (COND, UNCOND)


def dry_run(
    model: ModelDescription,
    expert: ExpertDescription,
    workload: Workload,
    techniques: Sequence[Technique],
    dtype: torch.dtype,
) -> Taken:
    """What an expert takes with techniques in force.

    Args:
        model: a description with an adapter.
        techniques: those that change tensors inside the transformer.
        dtype: of weights and activations.

    Raises:
        CannotTell: a technique cannot run without numbers.
    """
    import diffusers
    import torch

    from vivace.plans.plan import Plan
    from vivace.plans.session import accelerate

    adapter = model.adapter
    assert adapter is not None
    depths = {a: int(expert.config.get(key, 0)) for a, key in adapter.depth_keys.items()}
    shallow = {key: min(depths[a], BUILT) for a, key in adapter.depth_keys.items() if depths[a]}
    config = {**expert.config, **shallow}
    with torch.device("meta"):
        module = getattr(diffusers, expert.class_name).from_config(config).eval().to(dtype)
    short = replace(
        model,
        configs={**model.configs, "transformer": config},
        experts=(replace(expert, name="transformer", config=config),),
        weights="",
    )
    # No layer is left alone for being near an end of a short stack: what lies between is what counts.
    mine = [t.replace(dense_layers=0) if getattr(t, "dense_layers", 0) else t for t in techniques]
    steps = max(LEAST_STEPS, 2 + max((_first(t) for t in mine), default=0))
    loop = _Loop(module, short, workload, dtype, {a: d for a, d in depths.items() if d})
    try:
        with accelerate(loop, Plan(mine), model=short, counters=False) as session:
            loop.store = session.store
            loop(num_inference_steps=steps)
    except RuntimeError as error:
        raise CannotTell(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    return loop.taken


def _first(technique: Technique) -> int:
    """Steps that a technique leaves alone at the start and at the end."""
    return sum(int(getattr(technique, name, 0)) for name in ("dense_steps", "warmup", "tail", "interval"))


def _flat(key: Hashable) -> Iterator[Hashable]:
    if isinstance(key, tuple):
        for part in key:
            yield from _flat(part)
    else:
        yield key
