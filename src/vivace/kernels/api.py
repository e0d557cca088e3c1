"""Choosing a kernel: an explicit, recorded decision. Nothing falls back in silence.

The choice goes by an order of preference, or by times measured on this device (`measure`, `measured`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vivace.core.errors import ConfigError

AUTO = "auto"
SLEEP = 1_500_000
"""Cycles that a GPU waits before a timed run: longer than it takes to start one."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen implementation of an operation and the reason."""

    op: str
    name: str
    why: str
    run: Callable[..., Any] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One implementation: whether it can run in a context, and how to get it. Imports happen in `load`."""

    name: str
    refuse: Callable[[Mapping[str, Any]], str | None]
    """The reason why it cannot run in this context, or None."""
    load: Callable[[], Callable[..., Any]]
    avoid: Callable[[Mapping[str, Any]], str | None] = lambda context: None
    """The reason why it can run here but is taken only when asked for by name, or None."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What one candidate took for all calls together, in seconds over `repeats` runs."""

    name: str
    seconds: float
    """Median."""
    spread: float
    """Distance of the quartiles."""
    repeats: int

    def __str__(self) -> str:
        return f"{self.name} {_duration(self.seconds)}"


@dataclass(frozen=True, slots=True)
class Measured:
    """Times of an operation's candidates on given inputs, fastest first, and why the others have none."""

    op: str
    ranking: tuple[Timing, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def seconds(self, name: str) -> float | None:
        """Median of a candidate; None for one that was not measured."""
        return next((t.seconds for t in self.ranking if t.name == name), None)

    def __str__(self) -> str:
        return ", ".join(map(str, self.ranking))


_OPS: dict[str, list[Candidate]] = {}
_measured: dict[tuple[Any, ...], Measured] = {}


def register(op: str, candidate: Candidate) -> None:
    """Add an implementation; earlier ones are preferred when a caller leaves the choice open."""
    _OPS.setdefault(op, []).append(candidate)


def candidates(op: str) -> list[Candidate]:
    """Implementations of an operation in order of preference."""
    import importlib

    importlib.import_module(f"vivace.kernels.{op}.spec")
    return _OPS[op]


def select(op: str, prefer: str = AUTO, *, measured: Measured | None = None, **context: Any) -> Choice:
    """Choose an implementation.

    Args:
        op: name of the operation's folder under `vivace.kernels`.
        prefer: a candidate's name, or "auto" for the first that can run.
        measured: times of this operation; "auto" then means the fastest of those that can run.
        context: what the choice depends on (device, dtype, block size ...).

    Raises:
        ConfigError: the preferred candidate cannot run here, or none can; the sentence gives the reasons.
    """
    refused = {
        c.name: c.refuse(context) or (None if prefer == c.name else c.avoid(context)) for c in candidates(op)
    }
    if prefer == AUTO and measured is not None and (choice := _fastest(op, measured, refused)) is not None:
        return choice
    for candidate in candidates(op):
        if prefer in (AUTO, candidate.name) and refused[candidate.name] is None:
            passed_over = [f"{n}: {r}" for n, r in refused.items() if r and prefer == AUTO]
            why = "asked for by name" if prefer != AUTO else "first that fits here"
            return Choice(op, candidate.name, "; ".join([why, *passed_over]), candidate.load())
    if prefer != AUTO and prefer not in refused:
        raise ConfigError(f"{op} has no kernel called '{prefer}'; it has {', '.join(refused)}.")
    reasons = refused if prefer == AUTO else {prefer: refused[prefer]}
    raise ConfigError(
        f"no kernel for {op} can run here: {'; '.join(f'{n}: {r}' for n, r in reasons.items())}."
    )


def _fastest(op: str, measured: Measured, refused: Mapping[str, str | None]) -> Choice | None:
    """The fastest measured candidate that nothing speaks against; None where there is none."""
    if measured.op != op:
        raise ValueError(f"these are times of {measured.op}, not of {op}")
    fit = [t for t in measured.ranking if t.name in refused and refused[t.name] is None]
    if not fit:
        return None
    reasons = {n: r or measured.left_out.get(n, "not measured") for n, r in refused.items()}
    passed_over = [f"{n}: {r}" for n, r in reasons.items() if all(n != t.name for t in fit)]
    first = f"fastest of {len(fit)} measured" if len(fit) > 1 else "the only one measured"
    why = "; ".join([f"{first}: {', '.join(map(str, fit))}", *passed_over])
    run = next(c for c in candidates(op) if c.name == fit[0].name).load()
    return Choice(op, fit[0].name, why, run)


def measure(
    op: str,
    calls: Sequence[tuple[Any, ...]],
    context: Mapping[str, Any],
    *,
    names: Iterable[str] | None = None,
    prepare: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    repeats: int = 5,
    warmup: int = 2,
    budget: float = float("inf"),
) -> Measured:
    """Time the candidates of an operation, in turns, so that a drifting clock hits all alike.

    Args:
        op: name of the operation.
        calls: arguments of one or more calls; a candidate is timed over all of them together. Must not be empty.
        context: as for `select`; its `device` says which clock is used (CUDA events, or the monotonic one).
        names: candidates to time, also ones that are otherwise only taken by name; by default all that do not
            refuse and are not avoided.
        prepare: makes what is called with `calls` from what a candidate loads, outside the timed part; by default the
            loaded function itself.
        repeats: timed runs of each candidate.
        warmup: runs before them (compilation, caches).
        budget: seconds after which no further round is begun; one is always timed.

    Returns:
        The ranking. A candidate that fails is left out with its error as the reason.
    """
    import torch

    wanted = None if names is None else set(names)
    left_out: dict[str, str] = {}
    ready: dict[str, Callable[[], None]] = {}
    for candidate in candidates(op):
        if wanted is not None and candidate.name not in wanted:
            left_out[candidate.name] = "not asked for"
        elif reason := candidate.refuse(context) or (wanted is None and candidate.avoid(context)):
            left_out[candidate.name] = str(reason)
        else:
            try:
                run = candidate.load()
                run = _all(run if prepare is None else prepare(run), calls)
                with torch.no_grad():
                    for _ in range(warmup):
                        run()
                ready[candidate.name] = run
            # A kernel of somebody else's may fail in any way; which did, and how, stands in the result.
            except Exception as error:
                left_out[candidate.name] = f"failed: {_sentence(error)}"
    with torch.no_grad():
        times = timed(ready, str(context.get("device", "cpu")), repeats, left_out, budget)
    ranking = sorted((_timing(name, t) for name, t in times.items()), key=lambda t: t.seconds)
    return Measured(op, tuple(ranking), left_out)


def timed(
    runs: Mapping[str, Callable[[], Any]],
    device: str,
    repeats: int,
    failed: dict[str, str] | None = None,
    budget: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of every run, `repeats` times in turns, or fewer when `budget` seconds are over.

    A GPU is kept waiting before each, so that its time is the kernels' and not that of starting them.
    One that fails is dropped, with the reason in `failed`; without such a dictionary the error is raised.
    """
    import time

    import torch

    from vivace.core.env import Stopwatch

    watch, device_type = Stopwatch(torch.device(device)), torch.device(device).type
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + budget
    for turn in range(repeats):
        if turn and time.monotonic() > end:
            break
        for name, run in runs.items():
            if name not in times:
                continue
            try:
                if device_type == "cuda":
                    torch.cuda._sleep(SLEEP)
                start = watch.mark()
                run()
                times[name].append(watch.seconds(start, watch.mark()))
            except Exception as error:
                del times[name]
                if failed is None:
                    raise
                failed[name] = f"failed: {_sentence(error)}"
    return times


def measured(
    op: str, calls: Sequence[tuple[Any, ...]], context: Mapping[str, Any], **options: Any
) -> Measured:
    """`measure`, once for each operation, device name, context, and shapes and types of the arguments.

    Measuring a second time would let a busy moment change the choice; so the first result stays for the process.
    """
    key = (op, device_name(context), *_frozen(context), *map(_signature, calls), *_frozen(options))
    if key not in _measured:
        _measured[key] = measure(op, calls, context, **options)
    return _measured[key]


def forget() -> None:
    """Drop what `measured` remembers."""
    _measured.clear()


def device_name(context: Mapping[str, Any]) -> str:
    """The name of a context's processor or GPU."""
    from vivace.core.env import cpu_name

    device = str(context.get("device", "cpu"))
    if not device.startswith("cuda"):
        return cpu_name() if device == "cpu" else device
    import torch

    return torch.cuda.get_device_name(torch.device(device))


def _all(run: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Callable[[], None]:
    def both() -> None:
        for call in calls:
            run(*call)

    return both


def _timing(name: str, times: Sequence[float]) -> Timing:
    low, middle, high = (
        statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    )
    return Timing(name, middle, high - low, len(times))


def _signature(call: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shapes and types of a call's tensors; the other arguments by their text."""
    return tuple(
        (tuple(x.shape), str(x.dtype)) if hasattr(x, "shape") and hasattr(x, "dtype") else repr(x)
        for x in call
    )


def _frozen(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, str(value)) for name, value in values.items()))


def _sentence(error: Exception) -> str:
    """The first line of an error, for a list of reasons."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1.0 else f"{seconds:.3g} s"
