"""What blocks, heads and channels cost, counted: FLOPs and attention pairs of one call, by module.

The rules are those of the receipt: matrix products, convolutions and attention, a multiply-add is two. On the meta
device nothing is computed, which is how a pruned model's counts are known before anything is loaded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vivace.core.context import COND, FUSED, UNCOND
from vivace.core.counters import linear_flops
from vivace.core.shapes import Workload
from vivace.core.surgery import Surgery
from vivace.models.adapter import Adapter, Expert, ExpertDescription, Guidance, ModelDescription
from vivace.models.pruning import Anatomy, Kept, Part, Unit, anatomy, cut


@dataclass(slots=True)
class Counts:
    """Of one transformer call: FLOPs by module path, those of attention by attention path, pairs in all."""

    products: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    attention: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    pairs: float = 0.0

    @property
    def flops(self) -> float:
        """Of the whole call."""
        return sum(self.products.values()) + sum(self.attention.values())

    def inside(self, path: str) -> float:
        """FLOPs of a module and all in it."""
        tables = (self.products, self.attention)
        return sum(v for t in tables for k, v in t.items() if k == path or k.startswith(path + "."))


@torch.no_grad()
def counted(expert: Expert, call: Mapping[str, Any]) -> Counts:
    """Count one call of a transformer (on any device; on `meta` it costs nothing)."""
    counts, hooks, cut_off = Counts(), [], len(expert.name) + 1

    def product(path: str) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            if isinstance(module, nn.Linear):
                rows = args[0].numel() // module.in_features
                counts.products[path] += linear_flops(rows, module.in_features, module.out_features)
            else:
                counts.products[path] += 2.0 * out.numel() * (module.weight.numel() // module.out_channels)

        return hook

    def attended(site: Any) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            rows, queries, keys = site.lengths(args, kwargs)
            pairs = float(rows) * site.heads * queries * keys
            counts.pairs += pairs
            counts.attention[site.site[cut_off:]] += 4.0 * pairs * site.head_dim

        return hook

    for path, module in expert.module.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            hooks.append(module.register_forward_hook(product(path)))
    hooks += [s.module.register_forward_hook(attended(s), with_kwargs=True) for s in expert.attentions]
    try:
        expert.module(**call, return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def unit_costs(whole: Anatomy, units: Iterable[Unit], counts: Counts) -> dict[Unit, float]:
    """FLOPs that each unit takes with it."""

    def share(part: Part, unit: Unit, extra: float) -> float:
        linears = sum(
            counts.products[x.site[len(whole.expert.name) + 1 :]] for x in (*part.rows, *part.columns)
        )
        return (linears + extra) * len(unit.members) / part.size

    out: dict[Unit, float] = {}
    for unit in units:
        if unit.kind == "block":
            out[unit] = counts.inside(unit.path)
        elif unit.kind == "head":
            out[unit] = share(whole.attentions[unit.path], unit, counts.attention[unit.path])
        else:
            out[unit] = share(whole.feed_forwards[unit.path], unit, 0.0)
    return out


@dataclass(frozen=True, slots=True)
class Step:
    """One solver step of one expert, all guidance branches: blocks, pairs and FLOPs."""

    blocks: float
    pairs: float
    flops: float


def step_costs(
    model: ModelDescription, expert: ExpertDescription, workload: Workload, kept: Kept | None
) -> tuple[Step, Step]:
    """(whole, pruned) costs of a step, from configurations alone.

    Raises:
        ConfigError: `kept` does not fit the model.
    """
    adapter: Adapter | None = model.adapter
    assert adapter is not None
    guided = model.guidance is not Guidance.NONE and workload.branches == 2
    fused = guided and model.guidance is Guidance.FUSED
    branches = (FUSED,) if fused else (COND, UNCOND) if guided else (COND,)
    whole = _built(adapter, expert)

    def step(live: Expert) -> Step:
        pairs = flops = blocks = 0.0
        for branch in branches:
            rows = workload.batch * (2 if branch == FUSED else 1)
            call = adapter.dummy_call(model, workload.with_(batch=rows), "meta", torch.float32, branch)
            counts = counted(live, call)
            pairs, flops = pairs + counts.pairs, flops + counts.flops
            blocks += len(live.blocks) * (2 if branch == FUSED else 1)
        return Step(blocks, pairs, flops)

    before = step(whole.expert)
    if kept is None:
        return before, before
    cut(Surgery(), whole, kept)
    return before, step(adapter.expert(expert.name, whole.expert.module))


def buildable(expert: ExpertDescription) -> bool:
    """Whether diffusers knows the class, so that the transformer can be had from its configuration."""
    import diffusers

    return hasattr(diffusers, expert.class_name)


def _built(adapter: Adapter, expert: ExpertDescription) -> Anatomy:
    """The whole transformer on the meta device."""
    import diffusers

    config = {k: v for k, v in expert.config.items() if not k.startswith("_")}
    with torch.device("meta"):
        module = getattr(diffusers, expert.class_name).from_config(config).eval()
    return anatomy(adapter, module, expert.name)


def on_meta(adapter: Adapter, expert: ExpertDescription, kept: Kept) -> tuple[list[float], Expert]:
    """The pruned transformer on the meta device, and for each block of the whole one the share of its weights left.

    Raises:
        ConfigError: `kept` does not fit the model.
    """
    whole = _built(adapter, expert)
    blocks = [whole.expert.module.get_submodule(b) for b in whole.blocks]
    before = [sum(p.numel() for p in b.parameters()) for b in blocks]
    cut(Surgery(), whole, kept)
    after = [sum(p.numel() for p in b.parameters()) for b in blocks]
    stays = [path in kept.blocks for path in whole.blocks]
    shares = [a / b if s and b else 0.0 for a, b, s in zip(after, before, stays, strict=True)]
    return shares, adapter.expert(expert.name, whole.expert.module)


def steps_of(model: ModelDescription, workload: Workload) -> dict[str, int]:
    """Solver steps of each expert, by name: which of them lie above the boundary is asked of the scheduler."""
    if len(model.experts) == 1:
        return {model.experts[0].name: workload.steps}
    import diffusers

    scheduler = getattr(diffusers, model.scheduler_class).from_config(dict(model.scheduler))
    scheduler.set_timesteps(workload.steps)
    boundary = (model.boundary_ratio or 0.0) * scheduler.config.num_train_timesteps
    high = int((scheduler.timesteps >= boundary).sum())
    counts = (high, len(scheduler.timesteps) - high)
    return {e.name: n for e, n in zip(model.experts, counts, strict=True)}
