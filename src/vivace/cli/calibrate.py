"""`vivace calibrate`: run the exact model a few times and keep what changes from step to step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vivace.cli.shared import options
from vivace.cli.shared.options import DType, Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from vivace.calibration.artifact import Calibration
    from vivace.calibration.schedule import Schedule
    from vivace.cli.shared.run import Job
    from vivace.plans.plan import Plan
    from vivace.plans.solving import Prediction, Simulator, Trial
    from vivace.techniques.base import Technique
    from vivace.techniques.caching.engine import CacheTechnique

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
            min=1, help=f"Use only the first so many prompts  [default: {COUNT}]", show_default=False
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")] = Path(
        "calibration.json"
    ),
    target: Annotated[
        str | None,
        typer.Option(
            help="Also solve for speedup=2.0 (times less work) or loss=0.01 (error of the final latent).",
            show_default=False,
        ),
    ] = None,
    technique: Annotated[
        str,
        typer.Option(
            help="What --target is solved for: optimal_schedule, teacache, magcache, first_block_cache or easycache, "
            "with settings where wanted (teacache@warmup=2,tail=1)."
        ),
    ] = SCHEDULE,
    verify: Annotated[
        bool,
        typer.Option(
            help="Try what was solved or fitted in a real run; a threshold over 5 % off is corrected."
        ),
    ] = True,
    order: Annotated[int, typer.Option(min=0, max=2, help="Degree of the schedule's extrapolation.")] = 0,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            help="With --target or --solver: write the result as a plan, ready for --plan.",
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
    one more run of a prompt that was not measured shows what it really saves. With --solver a solver is fitted to the
    exact runs instead.
    """
    from rich.markup import escape

    from vivace.cli.shared.output import Outputs
    from vivace.cli.shared.run import load, prepare
    from vivace.cli.shared.screen import screen
    from vivace.core.errors import ConfigError
    from vivace.plans.plan import Plan

    wish = _target(target) if target else None
    if solver is not None and (wish is not None or technique != SCHEDULE):
        raise ConfigError("--solver fits a solver and nothing else; leave --target and --technique out.")
    if solver is None and (search or rounds):
        raise ConfigError("--search and --rounds need --solver, for example --solver 12.")
    if solver is None and wish is None and (plan_file is not None or technique != SCHEDULE):
        option = "--plan-file" if plan_file is not None else "--technique"
        raise ConfigError(f"{option} needs a --target, for example --target speedup=2.")
    # Wrong names and settings are told before anything is run.
    cache = _cache(technique, output) if wish is not None else None
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
    if solver is not None:
        from vivace.cli.calibrate_solver import fit_solver

        fit_solver(
            job,
            texts,
            unseen,
            steps=solver,
            seed=seed,
            seconds=search,
            rounds=rounds,
            output=output,
            plan_file=plan_file,
            verify=verify,
        )
        return
    answer: Answer | None = None
    with Outputs() as outputs:
        hidden = outputs.reserve(output)
        written = outputs.reserve(plan_file) if plan_file is not None else None
        part = output.with_name(output.name + ".part")
        pipeline = load(job)
        made = _made(job, pipeline, texts, part)
        made.save(hidden)
        if wish is not None:
            if cache is None:
                answer = _scheduled(made, wish, order)
            else:
                answer = _thresholded(made, wish, _reading(cache, hidden))
            if verify:
                count_run = _counter(job, pipeline, unseen, seed + len(texts))
                answer = _verified(answer, wish, count_run)
            if written is not None:
                _plan(answer, wish, output).save(written)
    part.unlink(missing_ok=True)
    out = screen()
    out.print(_facts(made))
    if answer is not None and wish is not None:
        out.print(_told(made, answer, wish, unseen))
    out.print(f"\n[bold]{escape(str(output))}[/]", soft_wrap=True)
    if plan_file is not None:
        out.print(
            f"[bold]{escape(str(plan_file))}[/]  a plan: --plan {escape(str(plan_file))}", soft_wrap=True
        )


@dataclass(frozen=True)
class Answer:
    """What was solved for: a technique, what is predicted of it, and what real runs counted."""

    technique: Technique
    speedup: float
    error: float
    schedule: Schedule | None = None
    simulator: Simulator | None = None
    trials: tuple[Trial, ...] = ()

    @property
    def threshold(self) -> float:
        """Of a cache; 0 for a schedule, which has none."""
        return getattr(self.technique, "threshold", 0.0)

    def at(self, found: Prediction) -> Answer:
        """The same cache at another threshold."""
        technique = self.technique.replace(threshold=found.threshold)
        return replace(self, technique=technique, speedup=found.speedup, error=found.error)


def _cache(text: str, output: Path) -> CacheTechnique | None:
    """The online cache to be solved for; None for a schedule."""
    from vivace.plans.solving import technique_for

    return None if text == SCHEDULE else technique_for(text, output)


def _reading(technique: CacheTechnique, file: Path) -> CacheTechnique:
    """The technique with the calibration at `file`, when it reads one."""
    return technique.replace(calibration=str(file)) if getattr(technique, "calibration", "") else technique


def _scheduled(made: Calibration, wish: tuple[str, float], order: int) -> Answer:
    from vivace.plans.solving import as_technique, evaluations, schedule_for

    found = schedule_for(made, *wish, order)
    technique = as_technique(made, found, order)
    return Answer(technique, evaluations(made) / found.nfe, found.error("end"), schedule=found)


def _thresholded(made: Calibration, wish: tuple[str, float], technique: CacheTechnique) -> Answer:
    from vivace.plans.solving import Simulator, solved

    simulator = Simulator(made, technique)
    return Answer(technique, 1.0, 0.0, simulator=simulator).at(solved(simulator, *wish))


def _counter(job: Job, pipeline: object, prompt: str, seed: int) -> Callable[[Technique], float]:
    """Technique -> the speed-up that the receipt of a real run counts."""
    from vivace.cli.shared.progress import Steps
    from vivace.plans.plan import Plan
    from vivace.plans.session import accelerate

    def count(technique: Technique) -> float:
        with (
            Steps("checking", job.workload.steps) as watcher,
            accelerate(pipeline, Plan([technique]), model=job.model, on_step=watcher.on_step) as session,
        ):
            receipt = session(prompt, seed=seed, output_type="latent", **job.call).receipt
        return 1.0 / receipt.compute_share

    return count


def _verified(answer: Answer, wish: tuple[str, float], count: Callable[[Technique], float]) -> Answer:
    """The answer with what real runs counted; a threshold that is too far off is corrected."""
    from vivace.plans.solving import Trial, best, corrected

    simulator, technique = answer.simulator, answer.technique
    start = answer.threshold
    if simulator is None or wish[0] != "speedup":
        return replace(answer, trials=(Trial(start, count(technique)),))
    trials = corrected(simulator, wish[1], lambda t: count(technique.replace(threshold=t)), start)
    kept = best(trials, wish[1])
    moved = answer if kept.threshold == start else answer.at(simulator.predict(kept.threshold))
    return replace(moved, trials=tuple(trials))


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


def _plan(answer: Answer, wish: tuple[str, float], output: Path) -> Plan:
    """What was solved, as a plan; a technique that reads the calibration reads it where it will lie."""
    from vivace.plans.plan import Plan

    technique, file = answer.technique, output.resolve()
    if getattr(technique, "calibration", ""):
        technique = technique.replace(calibration=str(file))
    counted = ""
    if answer.trials:
        from vivace.plans.solving import best

        counted = f", counted {best(answer.trials, wish[1] if wish[0] == 'speedup' else 1.0).counted:.2f}"
    told = f"{wish[0]}={wish[1]:g}, predicted {answer.speedup:.2f} times less work{counted}, from {file}"
    return Plan([technique], name="calibrated", summary=told)


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


def _told(made: Calibration, answer: Answer, wish: tuple[str, float], unseen: str) -> Table:
    """What was asked for, what is predicted, what was counted."""
    from rich.markup import escape

    from vivace.cli.shared.screen import facts
    from vivace.plans.solving import TOLERANCE, best, evaluations

    rows, found, trials = facts(), answer.schedule, answer.trials
    target = wish[1] if wish[0] == "speedup" else answer.speedup
    asked = f"{target:.2f} times less work" if wish[0] == "speedup" else f"an error of {wish[1]:g} at most"
    rows.add_row("asked", asked)
    rows.add_row(
        "predicted",
        f"{answer.speedup:.2f} times less work, error {answer.error:.4g} of a network output at the end",
    )
    if not trials:
        rows.add_row("counted", "not checked")
    else:
        rows.add_row("counted", f"{best(trials, target).counted:.2f} times less work: {escape(unseen)}")
    if found is not None:
        rows.add_row("evaluations", f"{found.nfe} of {evaluations(made)}")
        rows.add_row("conditional", _listed(found.cond))
        if found.delta:
            rows.add_row("guidance", _listed(found.delta))
        return rows
    rows.add_row("threshold", f"{answer.threshold:.4g}")
    if len(trials) > 1:
        rows.add_row(
            "corrected",
            "more than 5 % off at first: " + ", ".join(f"{t.threshold:.4g} {t.counted:.2f}" for t in trials),
        )
    if wish[0] == "speedup" and trials and abs(best(trials, target).counted / target - 1.0) > TOLERANCE:
        rows.add_row("", f"no threshold that was tried comes within {TOLERANCE:.0%}; the nearest is kept")
    return rows


def _listed(steps: tuple[int, ...]) -> str:
    return f"{len(steps)} steps: " + " ".join(map(str, steps))
