"""A bench: contenders on a task under the protocol, from nothing to records in a store.

Work that is done lies in `OUT/work/<key>`; the same command continues a killed bench. The store beside it only grows.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from vivace.core.env import environment
from vivace.core.errors import ConfigError
from vivace.evaluation import protocol
from vivace.evaluation.assemble import code, mean_counts, quality_of, samples_of
from vivace.evaluation.contender import Contender, parse
from vivace.evaluation.metrics.base import registry
from vivace.evaluation.protocol import Watch, quiet_watch
from vivace.evaluation.record import Energy, Memory, Model, Quality, Record, Timing, canonical
from vivace.evaluation.shards import (
    ANCHORS,
    Job,
    Shard,
    Worker,
    attempt,
    counts_of,
    run_in_worker,
    start_worker,
    told,
)
from vivace.evaluation.store import Store
from vivace.evaluation.subject import Subject
from vivace.evaluation.task import Task

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a bench runs.

    `limit`: only the first so many prompts (a trial; the record says so). `peer_samples`, `coupled_samples` and
    `anchor_samples`: only the first so many samples for peers, for contenders that are made one by one, for the
    anchors; 0: all. `repeats`, `warmups`: of the timed run; None: the task's. `warmup_steps`: shorter warm-up calls,
    where a whole one takes minutes. `jobs`: processes of the quality run, on CUDA dealt out over all visible GPUs.
    `audit`: count a call of each contender of a speed task, which costs a whole run. `metrics`: only these of the
    task's; empty: all.
    """

    device: str = "cpu"
    dtype: str = ""
    model: str | None = None
    texts: tuple[str, ...] = ()
    quality: bool = True
    timing: bool = True
    memory: bool = True
    audit: bool = True
    energy: bool = False
    limit: int = 0
    peer_samples: int = 0
    coupled_samples: int = 0
    anchor_samples: int = 0
    metrics: tuple[str, ...] = ()
    jobs: int = 1
    threads: int = 0
    warmups: int | None = None
    repeats: int | None = None
    warmup_steps: int | None = None
    energy_window: float = protocol.ENERGY_WINDOW
    keep_frames: bool = False
    command: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What a bench gave: records by contender, and why others have none."""

    records: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Bench:
    """One task, its contenders, one machine.

    Args:
        task: what is made and measured.
        specs: contenders as texts (`vivace.evaluation.contender`). The baseline runs whether it is named or not.
        out: the store's folder.
        watch: called with what is running, how much of the phase is done, and of how much.

    Raises:
        ConfigError, UnknownNameError: a contender, a metric or the model cannot be found; nothing has been started.
    """

    def __init__(
        self, task: Task, specs: Sequence[str], out: Path, options: Options, watch: Watch = quiet_watch
    ) -> None:
        import torch

        if options.texts:
            task = task.with_prompts(options.texts, task.model)
        elif task.kind == "quality" and not task.prompts.file:
            raise ConfigError(f"the task {task.full_name} needs {task.needs}.")
        for use in task.metrics:
            registry[use.name]
        self.metrics = chosen_metrics(task, options.metrics)
        self.task, self.options, self.watch = task, options, watch
        self.store = Store(out)
        dtype = getattr(torch, options.dtype) if options.dtype else None
        self.subject = Subject(task, options.device, dtype, options.model)
        found = [parse(spec) for spec in dict.fromkeys(["exact", *specs])]
        self.contenders = list({c.name: c for c in found}.values())
        self.outcome = Outcome()
        self._notes: list[str] = []
        self._timing: dict[str, Timing] = {}
        self._memory: dict[str, Memory] = {}
        self._energy: dict[str, Energy] = {}

    # -- what it rests on -------------------------------------------------------------------------------------

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Hardware and software, with a fingerprint."""
        return environment(self.subject.device)

    @cached_property
    def model(self) -> Model:
        """The model as it stands in the records; loads it once."""
        return self.subject.identity(self.subject.pipeline())

    @cached_property
    def work(self) -> Path:
        """Where unfinished work lies: named by everything that decides a clip, and by what is measured of it."""
        parts: list[Any] = [
            self.task.ref.sha256,
            self.model.sha256,
            self.model.dtype,
            self.environment["fingerprint"],
            self.options.limit,
            self.options.peer_samples,
            self.options.coupled_samples,
            self.options.anchor_samples,
        ]
        if self.metrics:
            parts.append(list(self.metrics))
        return self.store.path / "work" / hashlib.sha256(canonical(parts).encode()).hexdigest()[:12]

    @cached_property
    def job(self) -> Job:
        """What a worker process must know."""
        o = self.options
        return Job(
            task=self.task,
            work=self.work,
            device=o.device,
            dtype=o.dtype,
            model=o.model,
            prompts=o.limit,
            peer_samples=o.peer_samples,
            coupled_samples=o.coupled_samples,
            anchor_samples=o.anchor_samples,
            threads=o.threads,
            texts=o.texts,
            metrics=self.metrics,
        )

    # -- the run ----------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """All phases, then the records. Can be interrupted anywhere; the same call continues."""
        self._refuse()
        self.work.mkdir(parents=True, exist_ok=True)
        if self.options.quality and self.task.kind == "quality":
            self._quality()
        self._cost()
        for contender in self.contenders:
            if contender.name not in self.outcome.failed and contender.name not in self.outcome.records:
                self._record(contender)
        if not self.options.keep_frames and not self.outcome.failed:
            shutil.rmtree(self.work / "baseline", ignore_errors=True)
        return self.outcome

    def _refuse(self) -> None:
        kept = []
        for contender in self.contenders:
            if why := contender.refuse(self.subject.description):
                self.outcome.refused[contender.name] = why
            else:
                kept.append(contender)
        self.contenders = kept
        if not any(c.kind == "exact" for c in kept):
            raise ConfigError(f"the baseline cannot run here: {self.outcome.refused['exact']}")

    def _quality(self) -> None:
        """All shards of all contenders; the baseline's first, because the others are measured against them."""
        job = self.job
        baseline = next(c for c in self.contenders if c.kind == "exact")
        rest = [c for c in self.contenders if c is not baseline]
        missing = [(c, n) for c in rest for n in range(len(job.shards(c))) if not job.done(c, n)]
        shards = range(len(job.shards(baseline)))
        # The baseline's clips are thrown away when a bench is done; a contender added later needs them again.
        for n in shards if missing else ():
            if job.done(baseline, n) and not (self.work / "baseline" / f"{n}.npy").is_file():
                (job.folder(baseline) / f"{n}.json").unlink()
        first = [(baseline, n) for n in shards if not job.done(baseline, n)]
        total = len(first) + len(missing)
        if not total:
            return
        for done, (name, why) in enumerate(self._shards(first, missing), 1):
            if why:
                self.outcome.failed[name] = why
            elif self._only_quality:
                # What is finished is kept even if the rest is killed.
                contender = next(c for c in self.contenders if c.name == name)
                if all(job.done(contender, n) for n in range(len(job.shards(contender)))):
                    self._record(contender)
            self.watch(name, done, total)

    @property
    def _only_quality(self) -> bool:
        """Whether records wait for no other measurement."""
        return not (self.options.timing or self.options.memory or self.options.energy)

    def _shards(
        self, first: Sequence[tuple[Contender, int]], rest: Sequence[tuple[Contender, int]]
    ) -> Iterator[tuple[str, str]]:
        """Runs shards, here or in processes; gives (contender, what went wrong) as they finish."""
        if self.options.jobs <= 1:
            worker = Worker(self.job)
            for contender, number in (*first, *rest):
                if contender.name in self.outcome.failed:
                    yield contender.name, self.outcome.failed[contender.name]
                    continue
                self.watch(contender.name, -1, -1)
                yield contender.name, attempt(worker, contender.spec, number)
            return
        context = multiprocessing.get_context("spawn")
        started = context.Value("i", 0)
        with ProcessPoolExecutor(
            self.options.jobs, mp_context=context, initializer=start_worker, initargs=(self.job, started)
        ) as pool:
            try:
                for part in (first, rest):
                    waiting: dict[Future[Any], Contender] = {
                        pool.submit(run_in_worker, c.spec, n): c for c, n in part
                    }
                    while waiting:
                        done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                        for future in done:
                            contender = waiting.pop(future)
                            yield contender.name, future.result()[2]
            except BaseException:
                # What is under way is made again by the next call; waiting for it could take minutes.
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise

    def _cost(self) -> None:
        o, task, device = self.options, self.task, self.subject.device
        cuda = device.type == "cuda"
        # The anchors cost what the baseline costs.
        timed = [c for c in self.contenders if c.kind not in ANCHORS and c.name not in self.outcome.failed]
        samples = task.samples(o.limit)
        if o.timing:
            self._timing = protocol.timed(
                self.subject,
                timed,
                samples,
                warmups=o.warmups if o.warmups is not None else (task.warmups if cuda else task.cpu_warmups),
                repeats=o.repeats if o.repeats is not None else (task.repeats if cuda else task.cpu_repeats),
                file=self.work / "timing.json",
                warmup_steps=o.warmup_steps,
                failed=self.outcome.failed,
                watch=lambda what, n, of: self.watch(f"timing {what}", n, of),
            )
        if o.memory:
            for n, contender in enumerate(timed):
                self.watch(f"memory {contender.name}", n, len(timed))
                found = self._guarded(
                    lambda c=contender: (
                        protocol.memory(self.subject, c, samples[0], self.work)
                        if cuda
                        else protocol.memory_apart(self.job, c.spec)
                    )
                )
                if found is not None:
                    self._memory[contender.name] = found
        if o.energy and (why := protocol.energy_missing(device)):
            self._notes.append(why)
        elif o.energy:
            for n, contender in enumerate(timed):
                self.watch(f"energy {contender.name}", n, len(timed))
                found = self._guarded(
                    lambda c=contender: protocol.energy(
                        self.subject, c, samples[0], o.energy_window, self.work
                    )
                )
                if found is not None:
                    self._energy[contender.name] = found

    def _guarded(self, run: Callable[[], T]) -> T | None:
        """A measurement that may fail in other people's code; then there is none, and the record says why."""
        try:
            return run()
        except Exception as error:
            self._notes.append(told(error, self.work))
            return None

    # -- records ----------------------------------------------------------------------------------------------

    def _record(self, contender: Contender) -> None:
        wanted = len(self.job.shards(contender)) if self.task.kind == "quality" else 0
        done = [n for n in range(wanted) if self.job.done(contender, n)]
        if done and len(done) < wanted:
            # Half a contender would be measured on other prompts than the rest.
            self.outcome.failed[contender.name] = f"{len(done)} of {wanted} shards are made; run it again."
            return
        note = self.job.folder(contender) / "record.txt"
        if self._only_quality and note.is_file():
            known = note.read_text(encoding="utf-8")
            if known in self.store:
                # Of the same work, before an interruption.
                self.outcome.records[contender.name] = known
                return
        shards = [Shard.load(self.job.folder(contender), n) for n in done]
        timing = self._timing.get(contender.name)
        if not shards and timing is None:
            return
        samples, quality = (
            (samples_of(shards), self._quality_of(contender, shards)) if shards else (None, None)
        )
        counts, counted = self._counts(contender, shards)
        described = contender.described
        if found := contender.calibrated(self.work):
            described = described.model_copy(update={"settings": {**described.settings, **found}})
        record = Record(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            code=code(),
            contender=described,
            model=self.model,
            task=self.task.ref,
            environment=self.environment,
            counts=counts,
            counted=counted,
            timing=timing,
            memory=self._memory.get(contender.name),
            energy=self._energy.get(contender.name),
            quality=quality,
            clips=self._clips(contender) if shards else {},
            command=self.options.command,
            warnings=tuple(
                dict.fromkeys(
                    [
                        *self.options.notes,
                        *self._notes,
                        *([self._partial] if shards and self.metrics else []),
                        *(w for s in shards for w in s.warnings),
                    ]
                )
            ),
        )
        self.outcome.records[contender.name] = self.store.add(record, samples)
        if self._only_quality and shards:
            note.write_text(self.outcome.records[contender.name], encoding="utf-8")

    @property
    def _partial(self) -> str:
        """That only some metrics were measured, for a record."""
        return f"measured {len(self.metrics)} of {len(self.task.metrics)} metrics: {', '.join(self.metrics)}."

    def _quality_of(self, contender: Contender, shards: Sequence[Shard]) -> Quality:
        baseline = self.job.folder(parse("exact"))
        theirs = [] if contender.kind == "exact" else [Shard.load(baseline, n) for n in range(len(shards))]
        return quality_of(
            self.task.metrics, contender.kind, shards, theirs, self.subject.device, self.metrics
        )

    def _counts(self, contender: Contender, shards: Sequence[Shard]) -> tuple[dict[str, float], str]:
        """Counts of one clip: the mean over the audited clips; for a speed task one audit call."""
        if shards:
            counts, made = mean_counts(shards), sum(len(s.ids) for s in shards)
            size = "one by one" if contender.batch_coupled else f"in batches of {self.task.batch}"
            every = len(self.task.samples(self.options.limit))
            which = "all" if made == every else f"of {every} the first"
            counted = f"eager, counters on, {which} {made} clips, made {size}"
        elif self.options.audit:
            counts, counted = self._audit(contender)
        else:
            return dict(self.around), "not audited"
        full = counts["flops_dense"] / counts["nfe_requested"] if counts.get("nfe_requested") else 0.0
        if full:
            counts["full_equivalents"] = counts["flops"] / full
        return counts | self.around, counted

    @cached_property
    def around(self) -> dict[str, float]:
        """FLOPs of the text encoders and of the VAE's own decoding, one clip: what no technique here counts live."""
        from vivace.evaluation.flops import stage_flops

        model = self.subject.description
        pipeline = self.subject.pipeline()
        try:
            return stage_flops(pipeline, model, model.workload())
        except (RuntimeError, TypeError) as error:
            self._notes.append(f"text and VAE FLOPs were not counted: {str(error).splitlines()[0]}")
            return {}

    def _audit(self, contender: Contender) -> tuple[dict[str, float], str]:
        file = self.work / f"audit-{self.job.folder(contender).name}.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8")), "eager, counters on, one clip"
        self.watch(f"audit {contender.name}", 0, 1)
        with contender.session(
            self.subject.pipeline(), self.subject.description, self.task.steps, True
        ) as session:
            made = self.subject.make(
                session,
                self.task.samples(1)[:1],
                contender.call_steps(self.task.steps),
                decode=False,
            )
        counts = counts_of([made])
        file.write_text(canonical(counts), encoding="utf-8")
        return counts, "eager, counters on, one clip"

    def _clips(self, contender: Contender) -> dict[str, str]:
        folder = self.job.folder(contender) / "clips"
        return {file.stem: self.store.add_clip(file.read_bytes()) for file in sorted(folder.glob("*.mp4"))}


def chosen_metrics(task: Task, wanted: Sequence[str]) -> tuple[str, ...]:
    """The metrics of a task that are to be measured, in the task's order; empty where that is all of them.

    Raises:
        ConfigError: a name is not among the task's metrics.
    """
    known = [use.name for use in task.metrics]
    if wanted and not known:
        raise ConfigError(f"the task {task.full_name} measures no quality; leave --metrics out.")
    if strange := [name for name in dict.fromkeys(wanted) if name not in known]:
        raise ConfigError(
            f"the task {task.full_name} has no metric {' or '.join(map(repr, strange))}; choose from "
            f"{', '.join(known)}."
        )
    chosen = tuple(name for name in known if name in wanted)
    return () if len(chosen) == len(known) else chosen


__all__ = ["Bench", "Options", "Outcome", "chosen_metrics"]
