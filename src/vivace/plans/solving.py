"""From a target to a setting: a cache's policy is simulated on a calibration, solved, and checked by real runs.

`Simulator` follows a technique's own rules (warm-up, tail, longest run of skips) on every calibrated clip. Its
predictions hold as far as a run that skips stays near the exact trajectory, so `corrected` compares them with counted
runs and moves the threshold where they differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from vivace.calibration import solve
from vivace.calibration.artifact import COMMAND, Calibration
from vivace.calibration.schedule import Problem, Schedule, split
from vivace.core.errors import ConfigError
from vivace.techniques.base import registry
from vivace.techniques.caching.engine import NETWORK, CacheTechnique
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.caching.magcache import MagCache, nearest
from vivace.techniques.caching.optimal_schedule import OptimalSchedule
from vivace.techniques.caching.teacache import TeaCache, published

SCHEDULE = "optimal_schedule"
ONLINE = ("teacache", "magcache", "first_block_cache", "easycache")
SOLVABLE = (SCHEDULE, *ONLINE)
"""Techniques that a target can be solved for."""
TOLERANCE = 0.05
"""How far, relatively, a counted speed-up may be from the target before the threshold is corrected."""
CORRECTIONS = 3
"""Most runs of a correction beside the first."""
_MOST_OFF = 0.03
_LEAST = 1e-5
"""Least threshold that is tried."""
_SAME = 0.01
_PUSH = 1.2
_NEAR = 0.7
"""Share of the asked loss from which on a run is near enough."""
_AIM = 0.9
"""Where a correction aims, as a share of the asked loss: the next run need not follow the last one's factor."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A threshold and what it is predicted to do.

    `speedup` is 1 / share of the exact run's FLOPs, a mean over the calibrated clips of the share; `error` the error
    of the final latent in units of a network output (`solve.mask_error`), a mean likewise.
    """

    threshold: float
    speedup: float
    error: float


@dataclass(frozen=True, slots=True)
class Trial:
    """A threshold, the speed-up that a real run's receipt counted with it, and its loss where that was measured."""

    threshold: float
    counted: float
    loss: float = math.nan
    """|x - exact x| / |exact x| of the final latent."""


class Setting(Protocol):
    """What is predicted of a setting."""

    @property
    def error(self) -> float:
        """Of the final latent, in units of a network output."""
        ...


S = TypeVar("S", bound=Setting)


class Simulator:
    """An online cache's decisions on a calibration.

    Args:
        made: the calibration.
        technique: its settings; the threshold is what is looked for.

    Raises:
        ConfigError: the technique cannot be simulated, or the calibration lacks what it needs.
    """

    def __init__(self, made: Calibration, technique: CacheTechnique) -> None:
        if technique.card.name not in ONLINE:
            raise ConfigError(
                f"{technique.card.name} cannot be solved for a target; these can: {', '.join(SOLVABLE)}."
            )
        if not made.signals or not made.costs:
            raise ConfigError(
                "the calibration was made by a Vivace that kept no signals of online caches; "
                f"make it again with `{COMMAND}`."
            )
        self.made, self.technique, self.steps = made, technique, made.key.steps
        knob = technique.knobs()["threshold"]
        self.low, self.high = max(_LEAST, float(knob.low)), float(knob.high)
        self._weights = self._savings()
        self._change = self._tea_changes() if isinstance(technique, TeaCache) else []
        self._ask = functools.cache(self._masks)

    @property
    def fixed(self) -> bool:
        """Whether the mask does not depend on the clip."""
        return isinstance(self.technique, (TeaCache, MagCache))

    def masks(self, threshold: float) -> list[list[bool]]:
        """Of every clip (one for all where they cannot differ): True where a step is skipped."""
        return self._ask(threshold)

    def saved(self, threshold: float) -> float:
        """Share of the exact run's FLOPs that is not executed, a mean over clips."""
        return float(np.mean([self._weights @ np.asarray(m, dtype=float) for m in self.masks(threshold)]))

    def error(self, threshold: float) -> float:
        """Predicted error of the final latent, a mean over clips."""
        made, adds = self.made, self.technique.span == NETWORK and self.technique.feature == "residual"
        guidance = made.key.guidance if made.guided else 1.0
        ask = functools.partial(
            solve.mask_error, made.matrix, made.sigmas, guidance=guidance, adds_input=adds
        )
        return float(np.mean([ask(skipped=m) for m in self.masks(threshold)]))

    def predict(self, threshold: float) -> Prediction:
        """What a threshold does."""
        return Prediction(threshold, 1.0 / (1.0 - self.saved(threshold)), self.error(threshold))

    def nearest(self, saved: float) -> float:
        """The threshold whose predicted saving is nearest."""
        return solve.threshold_for(self.saved, saved, math.inf, self.low, self.high)

    def _savings(self) -> np.ndarray:
        """(n,): share of the run's FLOPs that skipping a step saves."""
        t, made, out = self.technique, self.made, np.zeros(self.steps)
        outside = 1.0 - sum(map(sum, made.costs.values()))
        for expert, curves in made.curves.items():
            ran, blocks = curves["cond"].steps, made.costs[expert]
            out[ran] = sum(blocks[t.front : len(blocks) - t.back]) / len(ran)
        return out + outside / self.steps if t.span == NETWORK else out

    def _tea_changes(self) -> list[float]:
        t = self.technique
        assert isinstance(t, TeaCache)
        out = np.zeros(self.steps)
        for curves in self.made.curves.values():
            own = curves["cond"]
            given = t.coefficients or (published()[t.fit] if t.fit != "none" else ())
            out[own.steps] = np.polyval(given or own.tea_polynomial, own.time_change)
        return out.tolist()

    def _masks(self, threshold: float) -> list[list[bool]]:
        t, n, made = self.technique, self.steps, self.made
        guard = solve.Guard(t.head_steps(n), t.tail_steps(n), t.max_consecutive, made.starts)
        if isinstance(t, TeaCache):
            return [solve.accumulated(self._change, threshold, guard)]
        if isinstance(t, MagCache):
            ratios = nearest(t.ratios, n) if t.ratios else made.joined("cond", "residual_ratio")
            return [
                solve.magcache(
                    ratios, threshold, guard.max_skip, t.retention, t.warmup, guard.last, guard.starts
                )
            ]
        if isinstance(t, FirstBlockCache):
            return [solve.first_block(s.first_block, threshold, guard) for s in made.signals]
        return [solve.easycache(s.inputs, s.outputs, s.sizes, threshold, guard) for s in made.signals]


def technique_for(text: str, calibration: str | Path) -> CacheTechnique:
    """An online cache by its name, with settings: `first_block_cache@warmup=1,tail=0`.

    Args:
        text: the name and settings; the threshold is what is solved for, so it cannot be given.
        calibration: the file that techniques which read one are to read.

    Raises:
        ConfigError, UnknownNameError: no such technique or setting, or one that cannot be solved for.
    """
    import yaml

    name, _, rest = text.partition("@")
    found = registry[name]
    if name not in ONLINE or not issubclass(found, CacheTechnique):
        raise ConfigError(f"{name} cannot be solved for a target; these can: {', '.join(SOLVABLE)}.")
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key in ("threshold", "calibration"):
            raise ConfigError(
                f"'{part}' is no setting that {name} can be solved with; write key=value, "
                "and leave out threshold and calibration."
            )
        values[key] = yaml.safe_load(value)
    if found is MagCache or (found is TeaCache and "fit" not in values):
        values["calibration"] = str(calibration)
    return found.from_dict({"_version": found.version, **values})


def solved(simulator: Simulator, name: str, value: float) -> Prediction:
    """The threshold for a target: `speedup` (times less work), or `loss` (error of the final latent, at most).

    Raises:
        ConfigError: no threshold comes near; the sentence gives the nearest and what to change.
    """
    s, called = simulator, simulator.technique.card.name
    if name == "loss":
        return s.predict(solve.threshold_within(lambda t: (s.saved(t), s.error(t)), value, s.low, s.high))
    wanted = solve.share_for_speedup(value)
    found = s.predict(s.nearest(wanted))
    if abs(1.0 - 1.0 / found.speedup - wanted) > max(_MOST_OFF, 1.0 / s.steps):
        raise ConfigError(
            f"no threshold of {called} makes {s.steps} steps {value:g} times cheaper; the nearest is "
            f"{found.speedup:.2f} times at {found.threshold:.4g}. Change its warmup, tail or max_consecutive, for "
            f"example --technique {called}@warmup=1, or ask for another speed-up."
        )
    return found


def corrected(
    simulator: Simulator,
    target: float,
    count: Callable[[float], float],
    start: float,
    tolerance: float = TOLERANCE,
    most: int = CORRECTIONS,
) -> list[Trial]:
    """Real runs, the first at `start`, until the counted speed-up is near the target; `best` picks among them.

    A correction takes the simulated curve's shape and shifts it, on a logarithmic scale, to where the last run was
    counted; once runs on both sides of the target are known it stays between them.

    Args:
        simulator: predictions.
        target: the speed-up asked for.
        count: threshold -> counted speed-up of a real run.
        start: the solved threshold.
        tolerance: relative distance from the target that is good enough.
        most: runs beside the first.
    """
    wanted, trials = solve.share_for_speedup(target), [Trial(start, count(start))]
    while len(trials) <= most:
        last = trials[-1]
        if abs(last.counted / target - 1.0) <= tolerance:
            break
        # A fixed mask that was counted as predicted stands on a stair: no threshold comes nearer.
        if simulator.fixed and abs(last.counted / simulator.predict(last.threshold).speedup - 1.0) < _SAME:
            break
        shift = last.threshold / simulator.nearest(1.0 - 1.0 / last.counted)
        fresh = _between(trials, target, shift * simulator.nearest(wanted))
        fresh = min(max(fresh, simulator.low), simulator.high)
        if any(t.threshold == fresh for t in trials):
            break
        trials.append(Trial(fresh, count(fresh)))
    return trials


def _between(trials: Sequence[Trial], target: float, fresh: float) -> float:
    """`fresh`, moved between the nearest trials on both sides of the target."""
    slow = max((t.threshold for t in trials if t.counted < target), default=None)
    fast = min((t.threshold for t in trials if t.counted >= target), default=None)
    if slow is not None and fast is not None and slow < fast:
        return fresh if slow * (1 + _SAME) < fresh < fast * (1 - _SAME) else math.sqrt(slow * fast)
    if fast is None and slow is not None:
        return max(fresh, slow * _PUSH)
    if slow is None and fast is not None:
        return min(fresh, fast / _PUSH)
    return fresh


def within(
    solve_at: Callable[[float], S],
    run: Callable[[S], Trial],
    loss: float,
    most: int = CORRECTIONS,
) -> list[tuple[S, Trial]]:
    """Real runs until the measured loss keeps the target and comes near it; `best` picks among them.

    Predicted errors are in other units and too low, by factors that differ from cache to cache. So each run tells
    which predicted error to ask for next; once runs on both sides of the target are known it stays between them.

    Args:
        solve_at: bound of the predicted error -> the fastest setting that keeps it.
        run: setting -> its trial.
        loss: the target.
        most: runs beside the first.

    Raises:
        ConfigError: `solve_at` finds nothing at first.
    """
    tried: list[tuple[S, Trial]] = []
    bound, kept, missed = loss, 0.0, math.inf
    for _ in range(2 * most + 1):
        try:
            found = solve_at(bound)
        except ConfigError:
            if not tried:
                raise
            # The last run's factor asked for too little: what lies between is tried.
            bound = math.sqrt(bound * tried[-1][0].error)
            continue
        if any(found.error == s.error for s, _ in tried):
            break
        trial = run(found)
        tried.append((found, trial))
        if _NEAR * loss <= trial.loss <= loss:
            break
        if trial.loss <= loss:
            kept = max(kept, found.error)
        else:
            missed = min(missed, found.error)
        bound = found.error * _AIM * loss / max(trial.loss, 1e-12)
        if not kept < bound < missed and 0.0 < kept < missed < math.inf:
            bound = math.sqrt(kept * missed)
        if len(tried) > most:
            break
    return tried


def best(trials: Sequence[Trial], *, speedup: float = 0.0, loss: float = 0.0) -> Trial:
    """The trial whose counted speed-up is nearest to the target, or the fastest that keeps a loss.

    Where none keeps it, the one with the least loss.
    """
    if loss <= 0.0:
        return min(trials, key=lambda t: abs(math.log(t.counted / speedup)))
    keep = [t for t in trials if t.loss <= loss]
    return max(keep, key=lambda t: t.counted) if keep else min(trials, key=lambda t: t.loss)


def schedule_for(made: Calibration, name: str, value: float, order: int) -> Schedule:
    """The best schedule for a target: `speedup` fixes the evaluations, `loss` bounds the final latent's error.

    Raises:
        ConfigError: more speed than two evaluations give.
    """
    guidance = made.key.guidance if made.guided else 1.0
    problem = Problem(made.matrix, made.sigmas, order=order, guidance=guidance)

    def ask(nfe: int) -> Schedule:
        return split(problem, nfe)

    total = evaluations(made)
    if name == "speedup":
        return ask(int(total / value + 1e-9))
    low, high = total // made.key.steps, total
    found = ask(high)
    while low < high:
        middle = (low + high) // 2
        if (tried := ask(middle)).error("end") <= value:
            found, high = tried, middle
        else:
            low = middle + 1
    return found


def as_technique(made: Calibration, found: Schedule, order: int) -> OptimalSchedule:
    """A schedule as a technique."""
    return OptimalSchedule(
        cond=found.cond, uncond=found.delta, steps=made.key.steps, order=order, delta_order=order
    )


def evaluations(made: Calibration) -> int:
    """Network evaluations of the exact run."""
    return made.key.steps * (2 if made.guided else 1)
