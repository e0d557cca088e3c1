"""`vivace bench`: contenders on a task under one protocol, ending in records and a report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vivace.cli.shared import options
from vivace.cli.shared.options import DType

if TYPE_CHECKING:
    from vivace.evaluation.bench import Bench, Outcome
    from vivace.evaluation.task import Task

WHO, HOW = "Who runs", "How it runs"
_DTYPES = {DType.FP32: "float32", DType.BF16: "bfloat16", DType.FP16: "float16"}


def bench(
    task: Annotated[
        str, typer.Option("--task", "-t", help="A task (`vivace bench --list`) or a YAML file.")
    ] = "world-smoke@1",
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan",
            "-p",
            help="A plan of ours, also with a change: fast@few_steps.steps=12. May be given often.",
            rich_help_panel=WHO,
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="The exact run with fewer steps: the control.",
            rich_help_panel=WHO,
            show_default=False,
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Somebody else's acceleration, e.g. diffusers.mag_cache@threshold=0.06; NAME@sweep for all its knobs.",
            rich_help_panel=WHO,
            show_default=False,
        ),
    ] = None,
    anchors: Annotated[
        bool, typer.Option(help="Also the noise floor and the seed ceiling.", rich_help_panel=WHO)
    ] = True,
    output: Annotated[Path, typer.Option("--out", "-o", help="The store's folder.")] = Path("bench"),
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="For tasks that let you choose.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of prompts, for tasks that let you choose.", show_default=False),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(min=0, help="Only the first so many prompts (a trial); 0: all.", rich_help_panel=HOW),
    ] = 0,
    quality: Annotated[bool, typer.Option(help="Make and judge all clips.", rich_help_panel=HOW)] = True,
    timing: Annotated[bool, typer.Option(help="Time warm runs, in turns.", rich_help_panel=HOW)] = True,
    memory: Annotated[bool, typer.Option(help="Measure memory.", rich_help_panel=HOW)] = True,
    audit: Annotated[
        bool, typer.Option(help="On a speed task, count a run of each.", rich_help_panel=HOW)
    ] = True,
    energy: Annotated[bool, typer.Option(help="Measure energy (NVML).", rich_help_panel=HOW)] = False,
    warmups: Annotated[
        int | None, typer.Option(min=1, help="Before timing.", rich_help_panel=HOW, show_default=False)
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed calls of each.", rich_help_panel=HOW, show_default=False)
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Shorter warm-up calls, for slow models.", rich_help_panel=HOW, show_default=False
        ),
    ] = None,
    peer_samples: Annotated[
        int,
        typer.Option(min=0, help="Only the first so many samples for peers; 0: all.", rich_help_panel=HOW),
    ] = 0,
    coupled_samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="The same for those that decide once for a whole batch and so run one by one; 0: all.",
            rich_help_panel=HOW,
        ),
    ] = 0,
    anchor_samples: Annotated[
        int, typer.Option(min=0, help="The same for the anchors; 0: all.", rich_help_panel=HOW)
    ] = 0,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Only these of the task's metrics, e.g. psnr,lpips_alex,attributes.",
            rich_help_panel=HOW,
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="Processes of the quality run; on CUDA they share all visible GPUs.",
            rich_help_panel=HOW,
        ),
    ] = 1,
    dtype: options.Precision = DType.AUTO,
    device: options.Device = "auto",
    threads: options.Threads = None,
    note: Annotated[
        list[str] | None, typer.Option(help="A sentence to keep in the records.", show_default=False)
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the tasks and stop.")] = False,
) -> None:
    """Run contenders on a task under one protocol: quality, counts, time and memory, as records.

    The exact run is always the baseline. A killed bench continues when the same command is given again.
    """
    from vivace.cli.shared.run import device_here
    from vivace.evaluation.bench import Bench, Options
    from vivace.evaluation.task import Task

    if list_:
        _list()
        return
    chosen = Task.load(task)
    job = Bench(
        chosen,
        _specs(chosen, plan or [], steps or [], peer or [], anchors),
        output,
        Options(
            device=device_here(device),
            dtype=_DTYPES.get(dtype, ""),
            model=model,
            texts=_texts(prompts, chosen),
            quality=quality,
            timing=timing,
            memory=memory,
            audit=audit,
            energy=energy,
            limit=limit,
            peer_samples=peer_samples,
            coupled_samples=coupled_samples,
            anchor_samples=anchor_samples,
            metrics=_metrics(metrics, chosen),
            jobs=jobs,
            threads=threads or 0,
            warmups=warmups,
            repeats=repeats,
            warmup_steps=warmup_steps,
            command=shlex.join(["vivace", *sys.argv[1:]]),
            notes=tuple(note or ()),
        ),
    )
    _show(_watched(job), output)


def _specs(task: Task, plans: list[str], steps: list[int], peers: list[str], anchors: bool) -> list[str]:
    out = [f"steps={n}" for n in steps] + [f"plan:{p}" for p in plans]
    for text in peers:
        name, _, rest = text.partition("@")
        if rest != "sweep":
            out.append(f"peer:{text}")
            continue
        from vivace.evaluation.peers import contender_name, get

        found = get(name)
        values = [{found.card.knob: v} for v in found.card.sweep] or [{}]
        out += [f"peer:{contender_name(found, v)}" for v in values]
    return out + (["floor", "seed"] if anchors and task.kind == "quality" else [])


def _metrics(text: str | None, task: Task) -> tuple[str, ...]:
    from vivace.core.errors import ConfigError

    if text is None:
        return ()
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        known = ", ".join(use.name for use in task.metrics)
        raise ConfigError(
            "--metrics names no metric; " + (f"choose from {known}." if known else "leave it out.")
        )
    return found


def _texts(file: Path | None, task: Task) -> tuple[str, ...]:
    from vivace.core.errors import ConfigError

    if file is None:
        return ()
    if task.prompts.file:
        raise ConfigError(f"the task {task.full_name} has prompts of its own; leave --prompts out.")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the prompts {file} cannot be read; give a text file, one prompt a line."
        ) from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise ConfigError(f"the file {file} holds no prompt; write one a line.")
    return found


def _watched(job: Bench) -> Outcome:
    """Run with a progress line: what runs, how much is done, the time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vivace.cli.shared.screen import screen

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen(stderr=True)) as line:
        row = line.add_task("starting", total=None)
        job.watch = lambda what, done, of: line.update(
            row, description=what, **({} if of < 0 else {"completed": done, "total": of})
        )
        return job.run()


def _show(outcome: Outcome, output: Path) -> None:
    from rich.markup import escape

    from vivace.cli.shared.screen import screen, table, warn
    from vivace.evaluation.store import Store

    rows = table("contender", "NFE", "work", "seconds", "record", right=(1, 2, 3))
    store = Store(output)
    records = {name: store.record(id_) for name, id_ in outcome.records.items()}
    full = records["exact"].counts.get("flops") if "exact" in records else None
    for name, record in records.items():
        share = record.counts.get("flops", 0.0) / full if full else None
        seconds = record.timing.stages["total"].median if record.timing else None
        rows.add_row(
            f"[name]{escape(name)}[/]",
            f"{record.counts.get('nfe', 0):g}",
            "" if share is None else f"{share:.1%}",
            "" if seconds is None else f"{seconds:.2f}",
            f"[quiet]{record.id}[/]",
        )
    screen().print(rows)
    for name, why in {**outcome.refused, **outcome.failed}.items():
        warn(f"{name} was left out: {why}")
    screen().print(f"[quiet]vivace report {escape(str(output))} makes the page[/]")
    if outcome.failed:
        raise typer.Exit(1)


def _list() -> None:
    from vivace.cli.shared.screen import screen, table
    from vivace.evaluation.task import Task, names

    rows = table("task", "kind", "model", "prompts", "what it is")
    for name in names():
        task = Task.load(name)
        count = f"{task.prompts.count} x {task.per_prompt}" if task.prompts.count else "your own"
        count = count if task.kind == "quality" else ""
        rows.add_row(f"[name]{name}[/]", task.kind, task.model, count, task.title)
    screen().print(rows)
