"""`vivace generate`: one clip under a plan, with the receipt of what really ran."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.shared import options
from vivace.cli.shared.options import CLIP, DType, Request, mp4


def generate(
    prompt: options.Prompt,
    model: options.Model = "tiny",
    plan: options.PlanName = "fast",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The mp4 file to write.", rich_help_panel=CLIP)
    ] = Path("out.mp4"),
    receipt: Annotated[
        Path | None,
        typer.Option(help="The receipt, as JSON  \\[default: beside the clip]", show_default=False),
    ] = None,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    guidance: options.Guidance = None,
    fps: options.Fps = None,
    dtype: options.Precision = DType.AUTO,
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Make one clip, fast, and say what it cost.

    Writes the clip and its receipt: evaluations, blocks, FLOPs, time, and what each technique did.
    """
    from rich.markup import escape

    from vivace.cli.shared.output import Outputs
    from vivace.cli.shared.run import load, make, prepare
    from vivace.cli.shared.screen import screen, warn
    from vivace.cli.shared.summary import receipt_facts
    from vivace.evaluation.video import write_mp4
    from vivace.plans.plan import Plan

    request = Request(
        prompt=prompt,
        model=model,
        seed=seed,
        steps=steps,
        frames=frames,
        height=height,
        width=width,
        guidance=guidance,
        fps=fps,
        dtype=dtype,
        device=device,
        threads=threads,
    )
    chosen = Plan.load(plan)
    clip = mp4(output)
    paper = receipt or clip.with_suffix(".receipt.json")
    job = prepare(request, chosen)
    with Outputs(need=job.raw_bytes) as outputs:
        hidden_clip, hidden_paper = outputs.reserve(clip), outputs.reserve(paper)
        made = make(job, load(job), chosen)
        write_mp4(hidden_clip, made.frames, job.fps)
        hidden_paper.write_text(made.receipt.to_json() + "\n", encoding="utf-8")
    out = screen()
    out.print()
    out.print(receipt_facts(made.receipt))
    for sentence in made.receipt.warnings:
        warn(sentence)
    count, height, width = made.frames.shape[:3]
    out.print(
        f"\n[bold]{escape(str(clip))}[/]  [quiet]{count} frames of {width}x{height}, {job.fps:g} fps[/]",
        soft_wrap=True,
    )
    out.print(f"[quiet]{escape(str(paper))}[/]", soft_wrap=True)
