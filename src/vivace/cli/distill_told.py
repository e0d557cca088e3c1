"""What `vivace distill` tells without training: its recipes, and what a run would take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vivace.training.distillation.recipe import Recipe
    from vivace.training.distillation.run import Choices

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s by a part of the GPU's name, from the makers' data sheets; the first that fits counts."""
TF32 = 0.5
"""Float32 products on GPUs run in TF32, at half the rate of bf16."""
MEASURED_MFU = 0.5
"""Share of a measured rate of large products that updates reach."""
SIDE, TRIES = {"cpu": 1024, "cuda": 8192}, 3


@dataclass(frozen=True)
class Rate:
    """FLOP/s of a device in its training type and in float32, the share of them that updates reach, and whence."""

    peak: float
    plain: float
    share: float
    source: str


def recipes() -> None:
    """Print the recipes as a table."""
    from vivace.cli.shared.screen import screen, table
    from vivace.training.distillation.recipes import RECIPES

    rows = table("recipe", "summary", "paper", "solver", "beside the student")
    for name, kind in RECIPES.items():
        rows.add_row(
            f"[name]{name}[/]", kind.summary, kind.paper, kind.solver, ", ".join(sorted(kind.roles)) or "-"
        )
    out = screen()
    out.print(rows)
    out.print(
        "[quiet]Papers by arXiv number. Settings: vivace distill --recipe NAME --set KEY=VALUE[/]",
        soft_wrap=True,
    )


def dry_run(recipe: Recipe, choices: Choices, device: str, price: float | None) -> None:
    """Print memory by part, work, time and cost of a run that is not started."""
    import torch

    from vivace.cli.shared.run import device_here
    from vivace.cli.shared.screen import facts, screen
    from vivace.models.loading import describe
    from vivace.report.units import count, seconds
    from vivace.report.units import size as told
    from vivace.training.distillation.estimate import estimate

    place = torch.device(device_here(device))
    model = describe(choices.model)
    frames, height, width = choices.size
    workload = model.workload(frames=frames, height=height, width=width)
    out = screen()
    with screen(stderr=True).status("[quiet]running an update without numbers"):
        found = estimate(
            model,
            recipe,
            workload,
            batch=choices.batch,
            lora=choices.lora,
            checkpointing=choices.checkpointing,
            mixed=place.type == "cuda",
        )
        pipeline = _pipeline_bytes(model, workload)
        rate = rate_of(place)
    parts: dict[str, Any] = {**found.parts, "pipeline": pipeline}
    update = found.seconds(rate.peak, rate.plain, rate.share)
    updates = choices.steps or max(1, round(60.0 * choices.minutes / update))
    total, processes = updates * update, int(os.environ.get("WORLD_SIZE", 1))
    rows = facts()
    for name, size in parts.items():
        rows.add_row(name, told(size))
    whole = sum(parts.values())
    rows.add_row("in all", f"[bold]{told(whole)}[/]{_room(place, whole)}")
    out.print("\n[bold]Memory of one process[/]")
    out.print(rows)
    rows = facts()
    passes = found.flops / (found.forward_flops * choices.batch)
    rows.add_row(
        "an update",
        f"{count(found.flops, 'FLOP')}, {passes:.1f} forward passes for each of {choices.batch} clips",
    )
    turns = ", ".join(f"{role} {often:.2f}" for role, often in found.turns.items())
    rows.add_row("turns in an update", turns)
    rows.add_row("time of an update", f"{seconds(update)} at {rate.share:.0%} of {rate.source}")
    rows.add_row("the run", f"{updates} updates, {seconds(total)}")
    word = "GPU hours" if place.type == "cuda" else "hours of this machine"
    hours = total * processes / 3600.0
    money = "" if price is None else f", {hours * price:.2f} at {price:g} an hour"
    rows.add_row("cost", f"{hours:.3g} {word}{money}")
    out.print("\n[bold]Work[/]")
    out.print(rows)
    out.print(
        "\n[quiet]Not in it: data, rendering and validation; scratch memory of kernels; gaps between blocks of memory. "
        "Memory and FLOPs are counted, the share of the peak is assumed.[/]"
    )


def rate_of(device: torch.device) -> Rate:
    """How fast a device multiplies: by its name, or timed where the name is not known."""
    import torch

    from vivace.report.units import count
    from vivace.training.distillation.estimate import MFU

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return Rate(peak, TF32 * peak, MFU, f"the {count(peak, 'FLOP/s')} of {name}")
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    peak = timed(device, kind)
    plain = timed(device, torch.float32) if kind != torch.float32 else peak
    return Rate(peak, plain, MEASURED_MFU, f"{count(peak, 'FLOP/s')} measured here")


def timed(device: torch.device, kind: torch.dtype) -> float:
    """FLOP/s of the best of a few square products."""
    import time

    import torch

    side = SIDE.get(device.type, SIDE["cpu"])
    a = torch.ones(side, side, device=device, dtype=kind)
    best = float("inf")
    for _ in range(TRIES + 1):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best


def _pipeline_bytes(model: Any, workload: Any) -> int:
    """Bytes of the pipeline's own weights in float32, which stay on the device for data and validation."""
    from vivace.plans.memory import predict

    return sum(part.weights for part in predict(model, workload, dtype="float32").parts)


def _room(device: torch.device, needed: float) -> str:
    """Whether it fits, where the device has memory of its own."""
    import torch

    from vivace.report.units import size as told

    if device.type != "cuda":
        return ""
    there = torch.cuda.get_device_properties(device).total_memory
    sign = "[good]fits[/]" if needed < 0.95 * there else "[bad]does not fit[/]"
    return f"  {sign} into {told(there)}"
