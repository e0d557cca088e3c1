"""Cost under the protocol: cold run, warm timed runs interleaved A B A B, memory run, energy.

Never in the same call as counting: here all counters are off. On a GPU time is taken between CUDA events, elsewhere by
the monotonic clock. Every contender keeps a session of its own open, so that what it compiled or calibrated stays, and
the contenders take turns, so that a drifting clock hits them all alike. Call r makes sample r of the task for
everybody: the spread of an adaptive method is that over prompts.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vivace.core.errors import ConfigError, VivaceError
from vivace.evaluation.contender import Contender
from vivace.evaluation.record import Energy, Memory, Spread, Timing
from vivace.evaluation.shards import told, write
from vivace.evaluation.subject import Subject
from vivace.evaluation.task import Sample

STAGES = ("text", "denoise", "vae", "other", "total")
LEAST_WARMUPS, LEAST_REPEATS = 3, 10
"""What the protocol asks for on a GPU."""
ENERGY_WINDOW = 10.0
Watch = Callable[[str, int, int], None]
"""(what is running, done, of how many)"""


def quiet_watch(what: str, done: int, total: int) -> None:
    """Nobody watches."""


@dataclass
class Series:
    """Timed calls of one contender so far: plain data, kept in the work folder."""

    runs: list[dict[str, float]] = field(default_factory=list)
    """Seconds by stage of every timed call."""
    clips: list[str] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    """Seconds of the warm-up calls after the first."""
    cold: float | None = None
    setup: float | None = None


def timed(
    subject: Subject,
    contenders: Sequence[Contender],
    samples: Sequence[Sample],
    *,
    warmups: int,
    repeats: int,
    file: Path,
    warmup_steps: int | None = None,
    failed: dict[str, str] | None = None,
    watch: Watch = quiet_watch,
) -> dict[str, Timing]:
    """Time contenders in turns; what was timed before in `file` is kept and only the missing rounds are run.

    Args:
        samples: at least one; call r makes sample r modulo their number, one clip a call.
        warmups: calls before the first timed one, the cold call included.
        repeats: timed calls of each.
        file: where the raw seconds are kept, round by round, so that a killed run goes on.
        warmup_steps: solver steps of a warm-up call where a whole one would take minutes; there is no cold time then.
        failed: gets a sentence for each contender that raised; it is out of the turns from then on.

    Returns:
        Timing by contender name; contenders that failed are missing.
    """
    kept, failed = _read(file), {} if failed is None else failed
    if not any(len(_of(kept, c).runs) < repeats for c in contenders):
        return _timings(subject, contenders, kept, warmups, warmup_steps)
    with contextlib.ExitStack() as stack:
        sessions = {}
        for contender in contenders:
            pipeline, start = subject.pipeline(), time.perf_counter()
            try:
                sessions[contender.name] = stack.enter_context(
                    contender.session(pipeline, subject.description, subject.task.steps, False, file.parent)
                )
            except Exception as error:
                failed[contender.name] = told(error, file.parent)
                continue
            _of(kept, contender).setup = time.perf_counter() - start
        begun = min(len(_of(kept, c).runs) for c in contenders)
        total = len(contenders) * (warmups + repeats - begun)
        done = 0
        for turn in range(-warmups, repeats - begun):
            sample = samples[(turn + begun) % len(samples) if turn >= 0 else 0]
            for contender in contenders:
                watch(contender.name, done, total)
                done += 1
                series = _of(kept, contender)
                if contender.name in failed or (turn >= 0 and len(series.runs) > begun + turn):
                    continue  # had one round more than the others when the last bench was killed
                short = warmup_steps if turn < 0 else None
                try:
                    stages = _one(subject, contender, sessions[contender.name], sample, short)
                except Exception as error:
                    failed[contender.name] = told(error, file.parent)
                    continue
                if turn < 0:
                    if turn == -warmups and warmup_steps is None:
                        series.cold = stages["total"]
                    else:
                        series.warm.append(stages["total"])
                    continue
                series.runs.append(stages)
                series.clips.append(sample.id)
                _keep(file, kept)
        _keep(file, kept)
    return _timings(subject, contenders, kept, warmups, warmup_steps)


def _one(
    subject: Subject, contender: Contender, session: Any, sample: Sample, steps: int | None
) -> dict[str, float]:
    """Seconds by stage of one call that makes one clip."""
    decode = subject.task.output == "frames"
    # A peer is set up for its number of steps.
    steps = contender.call_steps(subject.task.steps) if contender.peer or steps is None else steps
    made = subject.make(session, [sample], steps, decode=decode)
    return {name: float(made.receipt.stages.get(name, 0.0)) for name in STAGES}


def _timings(
    subject: Subject,
    contenders: Sequence[Contender],
    kept: dict[str, Series],
    warmups: int,
    warmup_steps: int | None,
) -> dict[str, Timing]:
    cuda = subject.device.type == "cuda"
    names = tuple(c.name for c in contenders)
    out = {}
    for contender in contenders:
        series = _of(kept, contender)
        if not series.runs:
            continue
        short = []
        if cuda and warmups < LEAST_WARMUPS:
            short.append(f"{warmups} warm-up calls instead of {LEAST_WARMUPS}")
        if cuda and len(series.runs) < LEAST_REPEATS:
            short.append(f"{len(series.runs)} timed calls instead of {LEAST_REPEATS}")
        if warmup_steps is not None:
            short.append(f"warm-up calls of {warmup_steps} steps")
        out[contender.name] = Timing(
            stages={n: Spread.of([run[n] for run in series.runs]) for n in STAGES},
            batch=1,
            warmups=warmups,
            cold=series.cold,
            setup_seconds=series.setup,
            interleaved_with=tuple(n for n in names if n != contender.name),
            clock="cuda events" if cuda else "wall",
            clips=tuple(series.clips),
            shortfall="; ".join(short),
        )
    return out


def _of(kept: dict[str, Series], contender: Contender) -> Series:
    return kept.setdefault(contender.spec, Series())


def _read(file: Path) -> dict[str, Series]:
    if not file.is_file():
        return {}
    return {spec: Series(**data) for spec, data in json.loads(file.read_text(encoding="utf-8")).items()}


def _keep(file: Path, kept: dict[str, Series]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({spec: vars(series) for spec, series in kept.items()})
    write(file, lambda stream: stream.write(text.encode()))


# -- memory ---------------------------------------------------------------------------------------------------


def memory(subject: Subject, contender: Contender, sample: Sample, folder: Path | None = None) -> Memory:
    """Bytes of one warm call that makes one clip. On a GPU by stage, on a CPU the peak of this process.

    A process's peak never falls, so on a CPU this belongs into a process of its own (`memory_apart`).
    """
    import resource

    import torch

    cuda = subject.device.type == "cuda"
    by_stage: dict[str, int] = {}
    steps = contender.call_steps(subject.task.steps)
    decode = subject.task.output == "frames"
    with contender.session(
        subject.pipeline(), subject.description, subject.task.steps, False, folder
    ) as session:

        def on_step(clock: Any, record: Any) -> None:
            if cuda:
                by_stage["denoise"] = max(
                    by_stage.get("denoise", 0), torch.cuda.max_memory_allocated(subject.device)
                )
                torch.cuda.reset_peak_memory_stats(subject.device)

        if cuda:
            subject.make(session, [sample], steps, decode=decode)
            torch.cuda.synchronize(subject.device)
            torch.cuda.reset_peak_memory_stats(subject.device)
        session.engine.listener = on_step
        receipt = subject.make(session, [sample], steps, decode=decode).receipt
        if cuda:
            torch.cuda.synchronize(subject.device)
            by_stage["vae"] = torch.cuda.max_memory_allocated(subject.device)
        return Memory(
            peak_allocated=max(by_stage.values()) if cuda else None,
            peak_reserved=torch.cuda.max_memory_reserved(subject.device) if cuda else None,
            resident=None if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            weights=receipt.weight_bytes,
            cache=receipt.cache_bytes,
            by_stage=by_stage,
        )


def memory_apart(job: Any, spec: str) -> Memory:
    """`memory` in a new process, so that a process-wide peak is that of one contender."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_memory_there, job, spec).result()


def _memory_there(job: Any, spec: str) -> Memory:
    from vivace.evaluation.contender import parse
    from vivace.evaluation.shards import Worker

    contender = parse(spec)
    return memory(Worker(job).subject, contender, job.samples(contender)[0], job.work)


# -- energy ---------------------------------------------------------------------------------------------------


def energy_missing(device: Any) -> str:
    """Why energy cannot be measured here; empty when it can."""
    if getattr(device, "type", "cpu") != "cuda":
        return "energy is read from the GPU's own counter; there is no GPU."
    try:
        with _meter(device) as read:
            read()
    except (ImportError, VivaceError) as error:
        return f"energy cannot be read ({error}); pip install nvidia-ml-py."
    return ""


def energy(
    subject: Subject,
    contender: Contender,
    sample: Sample,
    window: float = ENERGY_WINDOW,
    folder: Path | None = None,
) -> Energy:
    """Joules of one warm call: calls are repeated for at least `window` seconds between two readings of NVML's counter.

    The idle power of the seconds before is taken off for `net`.

    Raises:
        ConfigError: the counter cannot be read here.
    """
    import torch

    steps = contender.call_steps(subject.task.steps)
    decode = subject.task.output == "frames"
    with (
        contender.session(
            subject.pipeline(), subject.description, subject.task.steps, False, folder
        ) as session,
        _meter(subject.device) as read,
    ):
        subject.make(session, [sample], steps, decode=decode)
        torch.cuda.synchronize(subject.device)
        before, start = read(), time.perf_counter()
        time.sleep(min(2.0, window / 4))
        idle = (read() - before) / (time.perf_counter() - start)
        calls, before, start = 0, read(), time.perf_counter()
        while (spent := time.perf_counter() - start) < window or not calls:
            subject.make(session, [sample], steps, decode=decode)
            calls += 1
        torch.cuda.synchronize(subject.device)
        joules, spent = read() - before, time.perf_counter() - start
    return Energy(
        joules=joules / calls,
        net=(joules - idle * spent) / calls,
        idle_watts=idle,
        window_seconds=spent,
    )


@contextlib.contextmanager
def _meter(device: Any) -> Iterator[Callable[[], float]]:
    """A function that reads the GPU's energy counter in joules."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise ConfigError(f"NVML says {error}") from None
    try:
        yield lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000.0
    finally:
        pynvml.nvmlShutdown()
