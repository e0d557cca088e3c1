"""`vivace calibrate --target`: a schedule or threshold is solved, tried in real runs, and told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from vivace.calibration.artifact import Calibration
    from vivace.calibration.schedule import Schedule
    from vivace.cli.shared.run import Job
    from vivace.plans.plan import Plan
    from vivace.plans.solving import Prediction, Simulator, Trial
    from vivace.techniques.base import Technique
    from vivace.techniques.caching.engine import CacheTechnique

Wish = tuple[str, float]
"""`speedup` or `loss`, and how much."""


@dataclass(frozen=True)
class Answer:
    """What was solved for: a technique, what is predicted of it, and what real runs counted."""

    technique: Technique
    speedup: float
    error: float
    schedule: Schedule | None = None
    simulator: Simulator | None = None
    trials: tuple[Trial, ...] = ()
    kept: Trial | None = None
    """The trial of this technique."""

    @property
    def threshold(self) -> float:
        """Of a cache; of a schedule, which has none, the number of its evaluations."""
        return self.schedule.nfe if self.schedule is not None else getattr(self.technique, "threshold", 0.0)

    def at(self, found: Prediction) -> Answer:
        """The same cache at another threshold."""
        technique = self.technique.replace(threshold=found.threshold)
        return replace(self, technique=technique, speedup=found.speedup, error=found.error)


@dataclass(frozen=True)
class Question:
    """What is solved for on a calibration.

    Args:
        made: the calibration.
        wish: the target.
        order: degree of a schedule's extrapolation.
        cache: the online cache; None for a schedule.
        file: where the calibration lies now, for caches that read it.
    """

    made: Calibration
    wish: Wish
    order: int
    cache: CacheTechnique | None
    file: Path

    def solved(self, wish: Wish | None = None) -> Answer:
        """The answer to the target, or to another one; predicted only.

        Raises:
            ConfigError: nothing comes near.
        """
        from vivace.plans.solving import Simulator, as_technique, evaluations, schedule_for, solved

        wish = wish or self.wish
        if self.cache is None:
            found = schedule_for(self.made, *wish, self.order)
            technique = as_technique(self.made, found, self.order)
            speedup = evaluations(self.made) / found.nfe
            return Answer(technique, speedup, found.error("end"), schedule=found)
        reads = getattr(self.cache, "calibration", "")
        cache = self.cache.replace(calibration=str(self.file)) if reads else self.cache
        simulator = Simulator(self.made, cache)
        return Answer(cache, 1.0, 0.0, simulator=simulator).at(solved(simulator, *wish))

    def verified(self, answer: Answer, check: Check) -> Answer:
        """The answer with what real runs counted; one that misses the target is corrected."""
        from vivace.plans.solving import best, corrected, within

        name, value = self.wish
        if name == "loss":
            tried = within(
                lambda bound: self.solved(("loss", bound)),
                lambda a: check.trial(a.technique, a.threshold, True),
                value,
            )
            trials = tuple(t for _, t in tried)
            kept = best(trials, loss=value)
            return replace(next(a for a, t in tried if t is kept), trials=trials, kept=kept)
        if answer.simulator is None:
            trial = check.trial(answer.technique, answer.threshold)
            return replace(answer, trials=(trial,), kept=trial)
        trials = corrected(
            answer.simulator,
            value,
            lambda t: check.trial(answer.technique.replace(threshold=t), t).counted,
            answer.threshold,
        )
        kept = best(trials, speedup=value)
        if kept.threshold != answer.threshold:
            answer = answer.at(answer.simulator.predict(kept.threshold))
        return replace(answer, trials=tuple(trials), kept=kept)


@dataclass
class Check:
    """Real runs of one prompt that was not calibrated on."""

    job: Job
    pipeline: object
    prompt: str
    seed: int
    _exact: list[torch.Tensor] = field(default_factory=list)

    def trial(self, technique: Technique, threshold: float, loss: bool = False) -> Trial:
        """What a run counts, and with `loss` how far its latent ends from the exact run's."""
        from vivace.plans.solving import Trial

        made, share = self._run("checking", technique)
        if not loss:
            return Trial(threshold, 1.0 / share)
        if not self._exact:
            self._exact.append(self._run("exact")[0])
        goal = self._exact[0]
        return Trial(threshold, 1.0 / share, float((made - goal).norm() / goal.norm()))

    def _run(self, title: str, *techniques: Technique) -> tuple[torch.Tensor, float]:
        from vivace.cli.shared.progress import Steps
        from vivace.plans.plan import Plan
        from vivace.plans.session import accelerate

        job = self.job
        with (
            Steps(title, job.workload.steps) as line,
            accelerate(self.pipeline, Plan(techniques), model=job.model, on_step=line.on_step) as session,
        ):
            out = session(self.prompt, seed=self.seed, output_type="latent", **job.call)
        frames = out.raw.frames if hasattr(out.raw, "frames") else out.raw[0]
        return frames.float(), out.receipt.compute_share


def as_plan(answer: Answer, wish: tuple[str, float], output: Path) -> Plan:
    """What was solved, as a plan; a technique that reads the calibration reads it where it will lie."""
    from vivace.plans.plan import Plan

    technique, file = answer.technique, output.resolve()
    if getattr(technique, "calibration", ""):
        technique = technique.replace(calibration=str(file))
    counted = f", counted {answer.kept.counted:.2f}" if answer.kept is not None else ""
    if answer.kept is not None and wish[0] == "loss":
        counted += f", measured {answer.kept.loss:.2g}"
    told = f"{wish[0]}={wish[1]:g}, predicted {answer.speedup:.2f} times less work{counted}, from {file}"
    return Plan([technique], name="calibrated", summary=told)


def told(made: Calibration, answer: Answer, wish: tuple[str, float], unseen: str) -> Table:
    """What was asked for, what is predicted, what was counted."""
    from rich.markup import escape

    from vivace.cli.shared.screen import facts
    from vivace.plans.solving import TOLERANCE, evaluations

    rows, found, trials, kept = facts(), answer.schedule, answer.trials, answer.kept
    speed = wish[0] == "speedup"
    asked = f"{wish[1]:.2f} times less work" if speed else f"a relative error of {wish[1]:g} at most"
    rows.add_row("asked", asked)
    rows.add_row(
        "predicted",
        f"{answer.speedup:.2f} times less work, error {answer.error:.4g} of a network output at the end",
    )
    if kept is None:
        rows.add_row("counted", "not checked")
    else:
        measured = "" if speed else f", relative error {kept.loss:.4g}"
        rows.add_row("counted", f"{kept.counted:.2f} times less work{measured}: {escape(unseen)}")
    if found is not None:
        rows.add_row("evaluations", f"{found.nfe} of {evaluations(made)}")
        rows.add_row("conditional", _listed(found.cond))
        if found.delta:
            rows.add_row("guidance", _listed(found.delta))
    else:
        rows.add_row("threshold", f"{answer.threshold:.4g}")
    if len(trials) > 1:
        runs = (f"{t.threshold:.4g} {t.counted if speed else t.loss:.4g}" for t in trials)
        missed = f"more than {TOLERANCE:.0%} off" if speed else "not near enough"
        rows.add_row("corrected", f"{missed} at first: " + ", ".join(runs))
    if speed and found is None and kept is not None and abs(kept.counted / wish[1] - 1.0) > TOLERANCE:
        rows.add_row("", f"no threshold that was tried comes within {TOLERANCE:.0%}; the nearest is kept")
    if not speed and kept is not None and kept.loss > wish[1]:
        rows.add_row("", "no setting that was tried keeps the error; the nearest is kept")
    return rows


def _listed(steps: tuple[int, ...]) -> str:
    return f"{len(steps)} steps: " + " ".join(map(str, steps))
