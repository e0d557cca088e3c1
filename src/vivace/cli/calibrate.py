"""`vivace calibrate`: run the exact model a few times and keep what changes from step to step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.cli.shared import options
from vivace.cli.shared.options import DType, Request

if TYPE_CHECKING:
    from rich.table import Table

    from vivace.calibration.artifact import Calibration
    from vivace.cli.calibrate_target import Answer
    from vivace.cli.shared.run import Job

CAPTIONS = (
    "a person walks along a beach at sunset",
    "a close-up of a cat that turns its head",
    "cars drive through a city street at night in the rain",
    "a slow aerial view over a forest in autumn",
)
"""Neutral prompts for models whose world is not ours."""
UNSEEN = "a small boat drifts on a calm lake in the morning"
"""What a solved threshold is checked on when all of those were calibrated on."""
SCHEDULE = "optimal_schedule"
DEVELOPMENT = "world-dev"
"""The embedded model is calibrated on prompts that no reported number uses."""
COUNT = 4
SOLVER = "A fitted solver"


def calibrate(
    model: options.Model = "tiny",
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file, one prompt a line.", show_default=False),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Use only the first so many prompts  \\[default: {COUNT}]", show_default=False
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")] = Path(
        "calibration.json"
    ),
    target: Annotated[
        str | None,
        typer.Option(
            help="Also solve for speedup=2.0 (times less work) or loss=0.05 (relative error of the final latent); "
            "for quantized_linear bits=5, bytes=4e9 or loss=0.05.",
            show_default=False,
        ),
    ] = None,
    technique: Annotated[
        str,
        typer.Option(
            help="What --target is solved for: optimal_schedule, teacache, magcache, first_block_cache or easycache, "
            "with settings where wanted (teacache@warmup=2,tail=1). Without --target: search the attention masks of "
            "sparse_vdit, sliding_tile, efficient_vdit or paro (paro@mass=0.9). quantized_linear: choose formats layer "
            "by layer for the target (@formats=int4+int8,by=layer), record activation maxima (@smooth=0.5), or both."
        ),
    ] = SCHEDULE,
    verify: Annotated[
        bool,
        typer.Option(help="Try what was solved or fitted in real runs, and correct what misses its target."),
    ] = True,
    order: Annotated[int, typer.Option(min=0, max=2, help="Degree of the schedule's extrapolation.")] = 0,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            help="With --target, --solver or masks: write the result as a plan, ready for --plan.",
            show_default=False,
        ),
    ] = None,
    solver: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Instead: fit a solver of so many evaluations to the exact runs; the file holds it.",
            show_default=False,
            rich_help_panel=SOLVER,
        ),
    ] = None,
    search: Annotated[
        float,
        typer.Option(min=0.0, help="Seconds of search for where its steps lie.", rich_help_panel=SOLVER),
    ] = 0.0,
    rounds: Annotated[
        int,
        typer.Option(
            min=0,
            help="Gauss-Newton steps on its weights; each takes about STEPS^2 / 2 short runs.",
            rich_help_panel=SOLVER,
        ),
    ] = 0,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    guidance: options.Guidance = None,
    dtype: options.Precision = DType.AUTO,
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Measure once, for one model, shape and number of steps, what caches and schedules can be set by.

    Runs the exact model on each prompt and writes one small file. An interrupted run goes on behind the last finished
    prompt when the same command is given again. With --target the schedule or threshold is solved on that file, and
    real runs of a prompt that was not measured show what it saves (and costs, for a loss) and correct it. With --solver
    a solver is fitted to the exact runs instead, with the --technique of a mask method its masks are searched (from the
    beginning, also after an interrupt). With quantized_linear what each format costs each layer is measured; an
    interrupted measurement goes on behind the last finished layer.
    """
    from rich.markup import escape

    from vivace.cli import calibrate_bits as bits
    from vivace.cli.calibrate_masks import is_masked, search_and_tell, wanted
    from vivace.cli.calibrate_target import Check, Question, as_plan, told
    from vivace.cli.shared.output import Outputs
    from vivace.cli.shared.run import load, prepare
    from vivace.cli.shared.screen import screen
    from vivace.core.errors import ConfigError
    from vivace.plans.plan import Plan
    from vivace.plans.solving import technique_for
    from vivace.techniques.base import registry

    quantised = solver is None and bits.is_quantised(technique)
    formats = bits.wanted(technique, target) if quantised else None
    wish = _target(target) if target and formats is None else None
    if solver is not None and (wish is not None or technique != SCHEDULE):
        raise ConfigError("--solver fits a solver and nothing else; leave --target and --technique out.")
    if solver is None and (search or rounds):
        raise ConfigError("--search and --rounds need --solver, for example --solver 12.")
    sought = wanted(technique) if solver is None and wish is None and is_masked(technique) else None
    alone = solver is None and wish is None and sought is None and formats is None
    if alone and (plan_file is not None or technique != SCHEDULE):
        if technique != SCHEDULE:
            registry[technique.partition("@")[0]]  # a wrong name is told before what else is missing
        option = "--plan-file" if plan_file is not None else "--technique"
        raise ConfigError(f"{option} needs a --target, for example --target speedup=2.")
    # Wrong names and settings are told before anything is run.
    cache = technique_for(technique, output) if wish is not None and technique != SCHEDULE else None
    texts, unseen = _prompts(prompts, model, count)
    request = Request(
        prompt=texts[0],
        model=model,
        seed=seed,
        steps=steps,
        frames=frames,
        height=height,
        width=width,
        guidance=guidance,
        dtype=dtype,
        device=device,
        threads=threads,
    )
    job = prepare(request, Plan())
    kept: dict[str, Any] = {"seed": seed, "output": output, "plan_file": plan_file, "verify": verify}
    if sought is not None:
        search_and_tell(job, texts, unseen, sought, **kept)
        return
    part = output.with_name(output.name + ".part")
    if formats is not None:
        with _resumable(part, "layers"):
            bits.calibrate_and_tell(job, texts, unseen, formats, part=part, **kept)
        return
    if solver is not None:
        from vivace.cli.calibrate_solver import fit_solver

        with _resumable(part):
            fit_solver(job, texts, unseen, steps=solver, seconds=search, rounds=rounds, **kept)
        return
    answer: Answer | None = None
    with _resumable(part), Outputs() as outputs:
        hidden = outputs.reserve(output)
        written = outputs.reserve(plan_file) if plan_file is not None else None
        pipeline = load(job)
        made = _made(job, pipeline, texts, part)
        made.save(hidden)
        if wish is not None:
            question = Question(made, wish, order, cache, hidden)
            answer = question.solved()
            if verify:
                answer = question.verified(answer, Check(job, pipeline, unseen, seed + len(texts)))
            if written is not None:
                as_plan(answer, wish, output).save(written)
    part.unlink(missing_ok=True)
    out = screen()
    out.print(_facts(made))
    if answer is not None and wish is not None:
        out.print(told(made, answer, wish, unseen))
    out.print(f"\n[bold]{escape(str(output))}[/]", soft_wrap=True)
    if plan_file is not None:
        out.print(
            f"[bold]{escape(str(plan_file))}[/]  a plan: --plan {escape(str(plan_file))}", soft_wrap=True
        )


@contextlib.contextmanager
def _resumable(part: Path, what: str = "prompts") -> Iterator[None]:
    """An interrupt says that what is finished is kept, where anything is: in a file, or in the files of a folder."""
    import shutil

    from vivace.core.errors import Interrupted

    try:
        yield
    except KeyboardInterrupt:
        if not part.is_file() and not any(part.glob("*.pt")):
            shutil.rmtree(part, ignore_errors=True)
            raise
        raise Interrupted(
            f"interrupted; unfinished files were removed. Finished {what} are kept in {part}: "
            "the same command goes on behind them."
        ) from None


def _target(text: str) -> tuple[str, float]:
    """`speedup=2.0` as ("speedup", 2.0)."""
    from vivace.core.errors import ConfigError

    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    least = {"speedup": 1.0, "loss": 1e-6}.get(name)
    if least is None or not least <= number < float("inf"):
        raise ConfigError(
            f"the target '{text}' is neither speedup=X with X from 1 on nor loss=X with X above 0."
        )
    return name, number


def _prompts(file: Path | None, model: str, count: int | None) -> tuple[list[str], str]:
    """What is calibrated on, and one more to check on: the next of the list, or the first again where none is left."""
    from vivace.core.errors import ConfigError
    from vivace.models.loading import EMBEDDED

    if file is None:
        from vivace.evaluation.task import Task

        known = Task.load(DEVELOPMENT).prompt_texts() if model == EMBEDDED else CAPTIONS
        texts, limit = list(known), count or COUNT
        spare = [] if model == EMBEDDED else [UNSEEN]
    else:
        try:
            texts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"the prompt file {file} cannot be read: {reason}.") from None
        limit, spare = count or len(texts), []
    if not texts:
        raise ConfigError(f"the prompt file {file} holds no prompt; write one a line.")
    if limit > len(texts):
        raise ConfigError(
            f"{limit} prompts are asked for and {len(texts)} are there; give a file with --prompts."
        )
    return texts[:limit], [*texts[limit:], *spare, texts[0]][0]


def _made(job: Job, pipeline: object, prompts: list[str], part: Path) -> Calibration:
    """One progress line for each prompt."""
    import contextlib

    from vivace.cli.shared.progress import Steps
    from vivace.core.context import Clock
    from vivace.core.receipt import StepRecord
    from vivace.plans.calibrating import calibrate as run

    with contextlib.ExitStack() as lines:
        watchers: list[Steps] = []

        def on_prompt(number: int, prompt: str) -> None:
            lines.pop_all().close()
            watchers[:] = [lines.enter_context(Steps(f"{number + 1} of {len(prompts)}", job.workload.steps))]

        def on_step(clock: Clock, record: StepRecord) -> None:
            watchers[0].on_step(clock, record)

        return run(
            pipeline,
            prompts,
            model=job.model,
            seed=job.request.seed,
            on_step=on_step,
            on_prompt=on_prompt,
            part=part,
            **job.call,
        )


def _facts(made: Calibration) -> Table:
    from rich.markup import escape

    from vivace.cli.shared.screen import facts

    k, rows = made.key, facts()
    rows.add_row("model", f"{k.family}, {k.model_hash}")
    rows.add_row("clip", f"{k.frames} frames of {k.width}x{k.height}, guidance {k.guidance:g}")
    rows.add_row("steps", f"{k.steps}, {escape(k.scheduler)}")
    rows.add_row("prompts", f"{made.prompts}, seeds from {made.seed}")
    return rows
