"""`vivace calibrate`: run the exact model a few times and keep what changes from step to step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vivace.cli.shared import options
from vivace.cli.shared.options import DType, Request

if TYPE_CHECKING:
    from rich.table import Table

    from vivace.calibration.artifact import Calibration
    from vivace.calibration.schedule import Schedule
    from vivace.cli.shared.run import Job
    from vivace.plans.plan import Plan

CAPTIONS = (
    "a person walks along a beach at sunset",
    "a close-up of a cat that turns its head",
    "cars drive through a city street at night in the rain",
    "a slow aerial view over a forest in autumn",
)
"""Neutral prompts for models whose world is not ours."""
DEVELOPMENT = "world-dev"
"""The embedded model is calibrated on prompts that no reported number uses."""
COUNT = 4


def calibrate(
    model: options.Model = "tiny",
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file, one prompt a line.", show_default=False),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Use only the first so many prompts  [default: {COUNT}]", show_default=False
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")] = Path(
        "calibration.json"
    ),
    target: Annotated[
        str | None,
        typer.Option(
            help="Also solve for speedup=2.0 (evaluations) or loss=0.01 (error of the final latent).",
            show_default=False,
        ),
    ] = None,
    order: Annotated[
        int, typer.Option(min=0, max=2, help="Degree of the extrapolation that --target assumes.")
    ] = 0,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            help="With --target: write the schedule as a plan, ready for --plan.", show_default=False
        ),
    ] = None,
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
    prompt when the same command is given again.
    """
    from rich.markup import escape

    from vivace.cli.shared.output import Outputs
    from vivace.cli.shared.run import load, prepare
    from vivace.cli.shared.screen import screen
    from vivace.core.errors import ConfigError
    from vivace.plans.plan import Plan

    wish = _target(target) if target else None
    if plan_file is not None and wish is None:
        raise ConfigError("--plan-file needs a --target, for example --target speedup=2.")
    texts = _prompts(prompts, model, count)
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
    with Outputs() as outputs:
        hidden = outputs.reserve(output)
        written = outputs.reserve(plan_file) if plan_file is not None else None
        part = output.with_name(output.name + ".part")
        made = _made(job, load(job), texts, part)
        made.save(hidden)
        found = schedule_for(made, *wish, order) if wish is not None else None
        if written is not None and found is not None:
            _plan(made, found, order).save(written)
    part.unlink(missing_ok=True)
    out = screen()
    out.print(_facts(made))
    if found is not None:
        out.print(_solved(made, found))
    out.print(f"\n[bold]{escape(str(output))}[/]", soft_wrap=True)
    if plan_file is not None:
        out.print(
            f"[bold]{escape(str(plan_file))}[/]  a plan: --plan {escape(str(plan_file))}", soft_wrap=True
        )


def _target(text: str) -> tuple[str, float]:
    """`speedup=2.0` as ("speedup", 2.0)."""
    from vivace.core.errors import ConfigError

    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    least = {"speedup": 1.0, "loss": 0.0}.get(name)
    if least is None or not least <= number < float("inf"):
        raise ConfigError(
            f"the target '{text}' is neither speedup=X with X from 1 on nor loss=X with X from 0 on."
        )
    return name, number


def _prompts(file: Path | None, model: str, count: int | None) -> list[str]:
    from vivace.core.errors import ConfigError
    from vivace.models.loading import EMBEDDED

    if file is None:
        from vivace.evaluation.task import Task

        known = Task.load(DEVELOPMENT).prompt_texts() if model == EMBEDDED else CAPTIONS
        texts, limit = list(known), count or COUNT
    else:
        try:
            texts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"the prompt file {file} cannot be read: {reason}.") from None
        limit = count or len(texts)
    if not texts:
        raise ConfigError(f"the prompt file {file} holds no prompt; write one a line.")
    if limit > len(texts):
        raise ConfigError(
            f"{limit} prompts are asked for and {len(texts)} are there; give a file with --prompts."
        )
    return texts[:limit]


def _plan(made: Calibration, found: Schedule, order: int) -> Plan:
    """The schedule as a plan."""
    from vivace.plans.plan import Plan
    from vivace.techniques.caching.optimal_schedule import OptimalSchedule

    schedule = OptimalSchedule(
        cond=found.cond, uncond=found.delta, steps=made.key.steps, order=order, delta_order=order
    )
    return Plan([schedule], name="calibrated")


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


def _solved(made: Calibration, found: Schedule) -> Table:
    """A schedule and what it is predicted to cost, with thresholds that skip as many steps."""
    from vivace.calibration import solve
    from vivace.cli.shared.screen import facts
    from vivace.core.errors import ConfigError

    total = _evaluations(made)
    rows = facts()
    rows.add_row("evaluations", f"{found.nfe} of {total}, {total / found.nfe:.2f} times fewer")
    rows.add_row("error", f"{found.error('end'):.4g} of a network output, predicted, at the end")
    rows.add_row("conditional", _listed(found.cond))
    if found.delta:
        rows.add_row("guidance", _listed(found.delta))
    n, share = made.key.steps, 1.0 - found.nfe / total
    ratio, moved = made.joined("cond", "residual_ratio"), made.joined("cond", "first_block_change")
    policies = {
        "magcache": lambda t: solve.magcache(ratio, t, n, 0.2),
        "first block": lambda t: solve.accumulated(moved, t),
    }
    for policy, simulate in policies.items():
        try:
            threshold = solve.threshold_for(
                lambda t, s=simulate: solve.share(s(t)), share, max(0.03, 1.0 / n)
            )
            rows.add_row(policy, f"threshold {threshold:.4g} skips {solve.share(simulate(threshold)):.0%}")
        except ConfigError as error:
            rows.add_row(policy, str(error))
    return rows


def schedule_for(made: Calibration, name: str, value: float, order: int) -> Schedule:
    """The best schedule for a target: `speedup` fixes the evaluations, `loss` bounds the final latent's error.

    Raises:
        ConfigError: more speed than two evaluations give.
    """
    from vivace.calibration.schedule import Problem, split

    guidance = made.key.guidance if _guided(made) else 1.0
    problem = Problem(made.matrix, made.sigmas, order=order, guidance=guidance)

    def ask(nfe: int) -> Schedule:
        return split(problem, nfe)

    total = _evaluations(made)
    if name == "speedup":
        return ask(int(total / value + 1e-9))
    low, high = total // made.key.steps, total
    best = ask(high)
    while low < high:
        middle = (low + high) // 2
        if (tried := ask(middle)).error("end") <= value:
            best, high = tried, middle
        else:
            low = middle + 1
    return best


def _guided(made: Calibration) -> bool:
    return any("uncond" in branches for branches in made.curves.values())


def _evaluations(made: Calibration) -> int:
    return made.key.steps * (2 if _guided(made) else 1)


def _listed(steps: tuple[int, ...]) -> str:
    return f"{len(steps)} steps: " + " ".join(map(str, steps))
