"""`vivace compare`: the same clip made exactly and made fast, side by side, with what was saved and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vivace.cli.shared import options
from vivace.cli.shared.options import CLIP, RUN, DType, Request

if TYPE_CHECKING:
    from vivace.cli.shared.pair import Pair

EXACT, FAST, BOTH, PAGE, FACTS = "exact.mp4", "fast.mp4", "side_by_side.mp4", "report.html", "comparison.json"
ROOM = 12
"""Space to ask for, in raw clips: two clips, their enlarged side by side, and a page that holds them once more."""


def compare(
    prompt: options.Prompt,
    model: options.Model = "tiny",
    plan: options.PlanName = "fast",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write.", rich_help_panel=CLIP)
    ] = Path("comparison"),
    exact_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the exact run.", show_default=False, rich_help_panel=RUN),
    ] = None,
    seed: options.Seed = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps of the fast run; wins over the plan's.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    guidance: options.Guidance = None,
    fps: options.Fps = None,
    lpips_weights: Annotated[
        Path | None,
        typer.Option(
            help="AlexNet weights for LPIPS; default: the fetched ones, without which it is skipped.",
            show_default=False,
        ),
    ] = None,
    dtype: options.Precision = DType.AUTO,
    device: options.Device = "auto",
    threads: options.Threads = None,
    browser: Annotated[bool, typer.Option("--open/--no-browser", help="Open the report when done.")] = False,
) -> None:
    """Make the same clip exactly and fast, and lay them side by side.

    Both runs share the seed and the process. The folder gets both clips, a side by side with the difference,
    both receipts, and a report to open in a browser.
    """
    from vivace.cli.shared.output import Outputs
    from vivace.cli.shared.pair import measure
    from vivace.cli.shared.run import load, make, prepare, warm_up
    from vivace.plans.plan import Plan

    request = Request(
        prompt=prompt,
        model=model,
        seed=seed,
        frames=frames,
        height=height,
        width=width,
        guidance=guidance,
        fps=fps,
        dtype=dtype,
        device=device,
        threads=threads,
    )
    exact_plan, fast_plan = Plan.load("exact"), Plan.load(plan)
    job = prepare(request, exact_plan, fast_plan)
    with Outputs(need=ROOM * job.raw_bytes) as outputs:
        names = (EXACT, FAST, BOTH, PAGE, FACTS, "exact.receipt.json", "fast.receipt.json")
        hidden = {name: outputs.reserve(output / name) for name in names}
        pipeline = load(job)
        warm_up(job, pipeline)
        exact = make(job, pipeline, exact_plan, steps=exact_steps)
        fast = make(job, pipeline, fast_plan, steps=steps)
        pair = measure(job, fast_plan, exact, fast, lpips_weights)
        _write(pair, hidden)
    _show(pair, output)
    if browser:
        typer.launch(str((output / PAGE).resolve()))


def _write(pair: Pair, to: dict[str, Path]) -> None:
    import json

    from vivace.cli.shared.screen import screen
    from vivace.evaluation.video import side_by_side, write_mp4
    from vivace.report import compare_page

    with screen(stderr=True).status("[quiet]writing clips and report"):
        write_mp4(to[EXACT], pair.exact.frames, pair.fps)
        write_mp4(to[FAST], pair.fast.frames, pair.fps)
        labels = ("exact", pair.plan.name)
        both = side_by_side(pair.exact.frames, pair.fast.frames, gain=pair.gain, labels=labels)
        write_mp4(to[BOTH], both, pair.fps)
        for name, made in (("exact", pair.exact), ("fast", pair.fast)):
            to[f"{name}.receipt.json"].write_text(made.receipt.to_json() + "\n", encoding="utf-8")
        to[FACTS].write_text(json.dumps(pair.to_dict(), indent=2) + "\n", encoding="utf-8")
        page = pair.page(to[EXACT].read_bytes(), to[FAST].read_bytes())
        to[PAGE].write_text(compare_page.render(page), encoding="utf-8")


def _show(pair: Pair, folder: Path) -> None:
    from rich.markup import escape

    from vivace.cli.shared.screen import screen, warn
    from vivace.cli.shared.summary import pair_facts, pair_table

    out = screen()
    out.print(pair_table(pair))
    out.print(pair_facts(pair))
    for sentence in pair.warnings:
        warn(sentence)
    out.print(f"\n[bold]{escape(str(folder / PAGE))}[/]", soft_wrap=True)
    out.print(f"[quiet]{escape(str(folder))}: {EXACT}, {FAST}, {BOTH}, receipts[/]", soft_wrap=True)
