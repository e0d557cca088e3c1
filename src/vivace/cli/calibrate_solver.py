"""`vivace calibrate --solver`: fit a solver of a few evaluations to the model's exact runs, and try it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vivace.calibration.solver import SolverFile
    from vivace.cli.shared.run import Job
    from vivace.plans.plan import Plan


def fit_solver(
    job: Job,
    prompts: Sequence[str],
    unseen: str,
    *,
    steps: int,
    seed: int,
    seconds: float,
    rounds: int,
    output: Path,
    plan_file: Path | None,
    verify: bool,
) -> None:
    """Record, fit, write and say what came of it.

    Args:
        job: model, shape and steps of the exact run.
        prompts: one exact run each.
        unseen: a prompt that is not among them, for the trial.
        steps: evaluations of the solver.
        seconds: of search for the steps' places.
        rounds: Gauss-Newton steps.
        plan_file: where a plan with the solver is written.
        verify: whether it is tried.

    Raises:
        ConfigError: more steps than the exact run has.
    """
    from rich.markup import escape

    from vivace.cli.shared.output import Outputs
    from vivace.cli.shared.progress import Steps
    from vivace.cli.shared.run import load
    from vivace.cli.shared.screen import screen
    from vivace.core.context import Clock
    from vivace.core.receipt import StepRecord
    from vivace.plans.plan import Plan
    from vivace.plans.solver_fitting import fit, place, record
    from vivace.techniques.trajectory.fitted_solver import FittedSolver

    place(steps, job.workload.steps)  # a wrong number is told before anything is run
    out = screen()
    part = output.with_name(output.name + ".part")
    with Outputs() as outputs:
        hidden = outputs.reserve(output)
        written = outputs.reserve(plan_file) if plan_file is not None else None
        pipeline = load(job)
        with contextlib.ExitStack() as lines:
            watchers: list[Steps] = []

            def on_prompt(number: int) -> None:
                lines.pop_all().close()
                title = f"{number + 1} of {len(prompts)}"
                watchers[:] = [lines.enter_context(Steps(title, job.workload.steps))]

            def on_step(clock: Clock, step: StepRecord) -> None:
                watchers[0].on_step(clock, step)

            exact = record(
                pipeline,
                prompts,
                seed=seed,
                model=job.model,
                on_prompt=on_prompt,
                on_step=on_step,
                part=part,
                **job.call,
            )
        made, _ = fit(
            exact, steps, seconds=seconds, rounds=rounds, watch=lambda text: out.print(escape(text))
        )
        made.save(hidden)
        if verify:
            out.print(
                _tried(
                    job, pipeline, unseen, seed + len(prompts), Plan([FittedSolver(file=str(hidden))]), made
                )
            )
        if written is not None:
            # The plan may be used from another folder.
            Plan([FittedSolver(file=str(output.resolve()))], name="fitted").save(written)
    shutil.rmtree(part, ignore_errors=True)
    out.print(f"\n[bold]{escape(str(output))}[/]", soft_wrap=True)
    if plan_file is not None:
        out.print(
            f"[bold]{escape(str(plan_file))}[/]  a plan: --plan {escape(str(plan_file))}", soft_wrap=True
        )


def _tried(job: Job, pipeline: object, prompt: str, seed: int, plan: Plan, made: SolverFile) -> str:
    """What the solver saves and costs on a prompt it has not seen."""
    from vivace.cli.shared.progress import Steps
    from vivace.plans.plan import Plan as Exact
    from vivace.plans.session import accelerate

    found = []
    for title, tried, steps in (("exact", Exact(), job.workload.steps), ("fitted", plan, made.steps)):
        with (
            Steps(title, steps) as line,
            accelerate(pipeline, tried, model=job.model, on_step=line.on_step) as session,
        ):
            made_here = session(prompt, seed=seed, output_type="latent", **job.call)
        frames = made_here.raw.frames if hasattr(made_here.raw, "frames") else made_here.raw[0]
        found.append((frames.float(), made_here.receipt.nfe))
    (goal, full), (mine, few) = found
    off = float((mine - goal).norm() / goal.norm())
    return (
        f"on a prompt that was not fitted: {few} evaluations in the place of {full} ({full / few:.2f} times fewer), "
        f"latents {off:.1%} off (fitted ones {made.error:.1%})"
    )
