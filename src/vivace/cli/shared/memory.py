"""`vivace doctor --shape`: what a clip takes by component and stage, and the cheapest way to make it fit."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any

import typer

from vivace.cli.shared.options import DType
from vivace.core.errors import ConfigError
from vivace.core.footprint import DECODE, DENOISE, STAGES, TEXT
from vivace.report.units import size

if TYPE_CHECKING:
    from vivace.core.shapes import Workload
    from vivace.models.adapter import ModelDescription
    from vivace.plans.memory import Proposal

_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_TYPES = {DType.AUTO: "bfloat16", DType.BF16: "bfloat16", DType.FP16: "float16", DType.FP32: "float32"}
_TITLES = {TEXT: "text encoding", DENOISE: "denoising", DECODE: "decoding"}
SPARE = 0.92
"""Share of the memory that tensors may take: the rest is the allocator's rounding and gaps, and library workspace."""


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """The memory of the device that computes."""

    what: str
    bytes: int
    accelerator: bool


def room(gib: float | None) -> Room:
    """What this machine has free, or what the user says."""
    import torch

    if gib is not None:
        return Room(f"a device of {gib:g} GiB", int(gib * 2**30), True)
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Room(f"{torch.cuda.get_device_name()}, free now", free, True)
    return Room("main memory, available now", _available(), False)


def _available() -> int:
    """Bytes of main memory that a new process may take; 0 where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            facts = dict(line.split(":", 1) for line in file)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


def tell(
    model: str, shape: str, plan: str | None, dtype: DType, device_gib: float | None, as_json: bool
) -> None:
    """Print the prediction and the proposal.

    Raises:
        ConfigError: a shape that is none.
        ShapeError: a clip that the model cannot make.
        PlanError: the plan cannot run on the model.
    """
    from vivace.cli.shared.screen import screen
    from vivace.models.loading import describe
    from vivace.plans import memory
    from vivace.plans.plan import Plan

    match = _SHAPE.fullmatch(shape)
    if match is None:
        raise ConfigError(f"'{shape}' is no shape; write FRAMESxHEIGHTxWIDTH, such as 81x480x832.")
    frames, height, width = map(int, match.groups())
    description = describe(model)
    if description.pixels is not None:
        description.pixels.check(frames, height, width)
    workload = description.workload(frames=frames, height=height, width=width)
    wanted = Plan.load(plan) if plan is not None else Plan(name="exact")
    errors = [p for p in wanted.problems(description) if p.severity == "error" and p.kind != "device"]
    if errors:
        from vivace.core.errors import PlanError

        raise PlanError(errors)
    with screen(stderr=True).status("[quiet]counting on a model without weights"):
        base = memory.exact(description, workload, dtype=_TYPES[dtype], vae_dtype=_TYPES[dtype])
        place = room(device_gib)
        ways = memory.proposals(description, workload, base, wanted, accelerator=place.accelerator)
    first = next((w for w in ways if w.footprint.total <= place.bytes * SPARE), None)
    if as_json:
        typer.echo(json.dumps(_data(description, workload, place, ways, first), indent=2))
    else:
        _show(description, workload, place, ways, first)


def _data(
    model: ModelDescription, workload: Workload, place: Room, ways: list[Proposal], first: Proposal | None
) -> dict[str, Any]:
    return {
        "model": model.name,
        "shape": [workload.frames, workload.height, workload.width],
        "device": {"what": place.what, "bytes": place.bytes, "usable": int(place.bytes * SPARE)},
        "components": {p.name: {"weights": p.weights, "working": p.working} for p in ways[0].footprint.parts},
        "ways": [
            {"way": w.label, "peaks": w.footprint.peaks, "fits": w.footprint.total <= place.bytes * SPARE}
            for w in ways
        ],
        "proposal": first.label if first is not None else None,
    }


def _show(
    model: ModelDescription, workload: Workload, place: Room, ways: list[Proposal], first: Proposal | None
) -> None:
    from rich.markup import escape

    from vivace.cli.shared.screen import mark, screen, table

    out, planned = screen(), ways[0].footprint
    clip = f"{workload.frames} frames of {workload.width}x{workload.height}"
    out.print(f"\n[bold]{escape(model.name)}[/], {clip}, {escape(ways[0].plan.name)}")
    parts = table("component", "stage", "weights", "one call")
    for part in planned.parts:
        working = planned.working(DECODE) if part.stage == DECODE else part.working
        parts.add_row(
            part.name,
            _TITLES[part.stage],
            size(part.weights),
            size(working) if working else "[quiet]not counted[/]",
        )
    out.print(parts)
    stages = table("way", *(_TITLES[s] for s in STAGES), "most")
    for way in ways:
        fits = way.footprint.total <= place.bytes * SPARE
        stages.add_row(
            f"{mark('good' if fits else 'bad')} {escape(way.label)}",
            *(size(way.footprint.peak(s)) for s in STAGES),
            size(way.footprint.total),
        )
    out.print(stages)
    if planned.kept:
        out.print(f"[quiet]of denoising, {size(planned.kept)} is what caches keep[/]")
    out.print(
        f"{escape(place.what)}: {size(place.bytes)}, of which tensors may take {size(place.bytes * SPARE)}"
    )
    out.print(_verdict(place, ways, first), soft_wrap=True)


def _verdict(place: Room, ways: list[Proposal], first: Proposal | None) -> str:
    from vivace.cli.shared.screen import mark

    if first is None:
        least = min(ways, key=lambda w: w.footprint.total)
        return (
            f"\n{mark('bad')} does not fit: the least is {size(least.footprint.total)} with {least.label}; "
            "make a smaller or shorter clip."
        )
    if first is ways[0]:
        return f"\n{mark('good')} fits as it is"
    return f"\n{mark('fair')} fits with {first.label}: add it to the plan" + (
        ", without the technique that decodes in one pass" if "chunked" in first.label else ""
    )
