"""The quality run, shard by shard: clips are made with counters on, measured before any codec, and forgotten.

A shard is a handful of samples of one contender. What a finished shard gave lies in the work folder, so that a killed
bench goes on where it was, and shards can be made by several processes. The baseline's clips are kept as they were
decoded until the bench is done, because every paired metric needs them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vivace.core.errors import VivaceError
from vivace.evaluation.contender import Contender, parse
from vivace.evaluation.metrics.base import Context, Metric, Scope, Trajectory, registry
from vivace.evaluation.subject import Made, Subject
from vivace.evaluation.task import Sample, Task

if TYPE_CHECKING:
    import torch

ANCHORS = ("floor", "seed")
COUNTS = (
    "nfe",
    "nfe_requested",
    "blocks_run",
    "blocks_total",
)
PER_CLIP = ("attention_pairs", "attention_pairs_dense", "flops", "flops_dense", "cache_hits")
"""Counts that a receipt gives for the whole batch."""


@dataclass(frozen=True)
class Job:
    """What every process of a bench must know: plain data, so that it can be sent to a new process."""

    task: Task
    work: Path
    device: str = "cpu"
    dtype: str = ""
    model: str | None = None
    prompts: int = 0
    """Only the first so many prompts; 0 means all."""
    peer_samples: int = 0
    coupled_samples: int = 0
    anchor_samples: int = 0
    """Only the first so many samples for peers, for contenders that must be made one by one, for anchors; 0: all."""
    threads: int = 0
    texts: tuple[str, ...] = ()
    """Prompts of the user's own, for a task without a file: a task does not carry them to another process."""
    metrics: tuple[str, ...] = ()
    """Names of the task's metrics that are measured; empty: all."""

    def samples(self, contender: Contender) -> list[Sample]:
        """The samples of a contender, in order."""
        task = self.task.with_prompts(self.texts, self.task.model) if self.texts else self.task
        first = task.per_prompt if contender.own_noise else 0
        samples = task.samples(self.prompts, first)
        if contender.kind in ANCHORS and self.anchor_samples:
            return samples[: self.anchor_samples]
        if contender.batch_coupled and self.coupled_samples:
            return samples[: self.coupled_samples]
        if contender.peer is not None and self.peer_samples:
            return samples[: self.peer_samples]
        return samples

    def shards(self, contender: Contender) -> list[list[Sample]]:
        """The samples in shards of the task's batch."""
        samples, size = self.samples(contender), self.task.batch
        return [samples[i : i + size] for i in range(0, len(samples), size)]

    def folder(self, contender: Contender) -> Path:
        """Where a contender's shards lie."""
        slug = re.sub(r"[^\w.=@,-]+", "_", contender.name)[:80]
        return self.work / f"{slug}-{hashlib.sha256(contender.spec.encode()).hexdigest()[:6]}"

    def done(self, contender: Contender, shard: int) -> bool:
        """Whether a shard has been made and measured."""
        return (self.folder(contender) / f"{shard}.json").is_file()


@dataclass
class Shard:
    """What a finished shard says; features of set metrics lie beside it as arrays."""

    ids: list[str]
    prompt: list[int]
    k: list[int]
    seed: list[int]
    columns: dict[str, list[float]]
    hashes: list[str]
    counts: dict[str, float]
    calls: int
    warnings: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Metrics that could not take these clips, with the reason."""
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)

    def save(self, folder: Path, number: int) -> None:
        """Features first, the JSON last: a shard is done when its JSON is there."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.features:
            write(folder / f"{number}.npz", lambda f: np.savez(f, **self.features))  # type: ignore[arg-type]
        data = {k: v for k, v in vars(self).items() if k != "features"}
        write(folder / f"{number}.json", lambda f: f.write(json.dumps(data).encode()))

    @classmethod
    def load(cls, folder: Path, number: int) -> Shard:
        """A finished shard."""
        shard = cls(**json.loads((folder / f"{number}.json").read_text(encoding="utf-8")))
        if (file := folder / f"{number}.npz").is_file():
            with np.load(file) as found:
                shard.features = {name: found[name] for name in found.files}
        return shard


class Worker:
    """Makes and measures shards. One for each process; pipelines and networks are built once and kept."""

    def __init__(self, job: Job) -> None:
        import torch

        self.job = job
        if job.threads:
            torch.set_num_threads(job.threads)
        self.subject = Subject(
            job.task, job.device, getattr(torch, job.dtype) if job.dtype else None, job.model
        )
        self._pipelines: dict[str, Any] = {}

    @cached_property
    def metrics(self) -> list[tuple[Metric, int]]:
        """The task's metrics that can run here, with how many samples each measures (0: all)."""
        job = self.job
        uses = [use for use in job.task.metrics if not job.metrics or use.name in job.metrics]
        made = ((registry[use.name](self.subject.device), use.limit) for use in uses)
        return [(metric, limit) for metric, limit in made if not metric.missing()]

    def pipeline(self, contender: Contender) -> Any:
        """The pipeline a contender runs on: plans share one, a peer gets one of its own, the last peer's is dropped."""
        key = contender.name.partition("@")[0] if contender.peer is not None else ""
        if key not in self._pipelines:
            for other in [k for k in self._pipelines if k]:
                del self._pipelines[other]
            self._pipelines[key] = self.subject.pipeline()
        return self._pipelines[key]

    def run(self, spec: str, number: int) -> str:
        """Make and measure one shard; a finished one is left as it is. Returns the contender's name."""
        contender, job = parse(spec), self.job
        if job.done(contender, number):
            return contender.name
        samples = job.shards(contender)[number]
        made = self._make(contender, samples, first=number == 0)
        reference = None
        if contender.kind == "exact":
            self._keep(number, made)
        else:
            reference = self._reference(number)
        shard = self._measure(contender, number, samples, made, reference)
        self._clips(contender, number, samples, made)
        shard.save(job.folder(contender), number)
        return contender.name

    # -- making -----------------------------------------------------------------------------------------------

    def _make(self, contender: Contender, samples: Sequence[Sample], first: bool) -> list[Made]:
        task = self.job.task
        size = 1 if contender.batch_coupled else len(samples)
        keep = task.latent_samples if first else 0
        out = []
        with contender.session(
            self.pipeline(contender), self.subject.description, task.steps, True
        ) as session:
            for start in range(0, len(samples), size):
                part = samples[start : start + size]
                wanted = max(0, min(keep - start, len(part)))
                made = self.subject.make(session, part, contender.call_steps(task.steps), trajectories=wanted)
                out.append(made)
        return out

    def _keep(self, number: int, made: list[Made]) -> None:
        import torch

        folder = self.job.work / "baseline"
        folder.mkdir(parents=True, exist_ok=True)
        clips = torch.cat([m.clips for m in made if m.clips is not None])
        write(folder / f"{number}.npy", lambda f: np.save(f, clips.cpu().numpy()))
        if (trajectory := joined(made)) is not None:
            write(
                folder / f"{number}.latents.npz",
                lambda f: np.savez(f, sigmas=np.array(trajectory.sigmas), latents=trajectory.latents.numpy()),
            )

    def _reference(self, number: int) -> tuple[torch.Tensor, Trajectory | None]:
        import torch

        folder = self.job.work / "baseline"
        clips = torch.from_numpy(np.load(folder / f"{number}.npy")).to(self.subject.device)
        file = folder / f"{number}.latents.npz"
        if not file.is_file():
            return clips, None
        with np.load(file) as found:
            latents = torch.from_numpy(found["latents"])
            return clips, Trajectory(tuple(float(s) for s in found["sigmas"]), latents)

    # -- measuring --------------------------------------------------------------------------------------------

    def _measure(
        self,
        contender: Contender,
        number: int,
        samples: Sequence[Sample],
        made: list[Made],
        reference: tuple[torch.Tensor, Trajectory | None] | None,
    ) -> Shard:
        import torch

        clips = torch.cat([m.clips for m in made if m.clips is not None])
        offset = number * self.job.task.batch
        columns: dict[str, list[float]] = {}
        features: dict[str, np.ndarray] = {}
        curves: dict[str, list[list[float]]] = {}
        skipped: dict[str, str] = {}
        trajectory = joined(made)
        for metric, limit in self.metrics:
            scope, whole = metric.card.scope, len(samples)
            use = whole if not limit else max(0, min(limit - offset, whole))
            context = Context(
                prompts=tuple(s.text for s in samples[:use]),
                fps=self.job.task.fps,
                reference=None if reference is None else reference[0][:use],
                trajectory=trajectory,
                reference_trajectory=None if reference is None else reference[1],
            )
            if use == 0 or (scope in (Scope.PAIR, Scope.LATENT) and reference is None):
                continue
            if scope is Scope.LATENT:
                if trajectory is None or context.reference_trajectory is None or contender.own_noise:
                    continue
                use = trajectory.latents.shape[1]
            try:
                if scope is Scope.SET:
                    features[metric.card.name] = metric.features(clips, context)
                    continue
                found = metric.measure(clips[:use], context)
            except VivaceError as error:
                skipped[metric.card.name] = str(error)
                continue
            for series, values in found.items():
                columns[series] = [float(v) for v in values] + [math.nan] * (whole - use)
            curve = getattr(metric, "curve", None)
            if scope is Scope.LATENT and curve is not None:
                curves |= {k: [list(map(float, row)) for row in v] for k, v in curve(context).items()}
        levels = (clips.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        return Shard(
            ids=[s.id for s in samples],
            prompt=[s.prompt for s in samples],
            k=[s.k for s in samples],
            seed=[s.seed for s in samples],
            columns=columns,
            hashes=[hashlib.sha256(v.tobytes()).hexdigest()[:16] for v in levels],
            counts=counts_of(made),
            calls=len(made),
            warnings=sorted({w for m in made for w in m.receipt.warnings}),
            skipped=skipped,
            curves=curves,
            features=features,
        )

    def _clips(self, contender: Contender, number: int, samples: Sequence[Sample], made: list[Made]) -> None:
        """A few clips of the first shard, as H.264, for the eye."""
        import torch

        from vivace.evaluation.video import write_mp4

        if number or not self.job.task.clips:
            return
        clips = torch.cat([m.clips for m in made if m.clips is not None])[: self.job.task.clips]
        folder = self.job.folder(contender) / "clips"
        for sample, clip in zip(samples, clips, strict=False):
            levels = (clip.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
            write_mp4(folder / f"{sample.prompt}.{sample.k}.mp4", levels, self.job.task.fps, crf=20)


def joined(made: Sequence[Made]) -> Trajectory | None:
    """The trajectories of several calls as one; None where no latents were kept."""
    import torch

    parts = [m.trajectory for m in made if m.trajectory is not None]
    if not parts:
        return None
    return Trajectory(parts[0].sigmas, torch.cat([p.latents for p in parts], dim=1))


def write(path: Path, fill: Any) -> None:
    """A file appears under its name only when it is whole."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with partial.open("wb") as stream:
            fill(stream)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def counts_of(made: Sequence[Made]) -> dict[str, float]:
    """Counts of one clip, the mean over the shard's clips."""
    clips = sum(m.receipt.samples for m in made) or 1
    out = {n: sum(getattr(m.receipt, n) for m in made) / len(made) for n in COUNTS}
    out |= {n: sum(getattr(m.receipt, n) for m in made) / clips for n in PER_CLIP}
    out["cache_bytes"] = max(m.receipt.cache_bytes for m in made)
    out["weight_bytes"] = made[0].receipt.weight_bytes
    return out


# -- several processes ----------------------------------------------------------------------------------------

_worker: Worker | None = None


def start_worker(job: Job, started: Any = None) -> None:
    """Initialiser of a worker process.

    Args:
        started: a shared integer, how many workers have started before this one; None: the job's device is taken as
            it is.
    """
    global _worker
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if started is not None and job.device.startswith("cuda"):
        import torch

        with started.get_lock():
            index = started.value
            started.value += 1
        job = replace(job, device=device_of_worker(job.device, index, torch.cuda.device_count()))
        # Kernels that are launched without a device go to the current one.
        torch.cuda.set_device(torch.device(job.device))
    _worker = Worker(job)


def device_of_worker(device: str, index: int, gpus: int) -> str:
    """Where the worker with this number runs: `cuda` is dealt out over the visible GPUs, any other device stays.

    Args:
        device: of the job, as torch names it.
        index: of the worker, from 0.
        gpus: how many GPUs are visible.
    """
    return f"cuda:{index % gpus}" if device == "cuda" and gpus > 0 else device


def _end_with_parent(parent: int) -> None:
    """A bench that was killed must not leave processes behind that go on for minutes; shards are written whole."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def run_in_worker(spec: str, number: int) -> tuple[str, int, str]:
    """One shard in a worker process: (contender, shard, what went wrong)."""
    if _worker is None:
        raise RuntimeError("the worker process was not initialised")
    return spec, number, attempt(_worker, spec, number)


def attempt(worker: Worker, spec: str, number: int) -> str:
    """Run one shard; says what went wrong, or nothing.

    A peer is other people's code and may raise anything; the others must not suffer, and the traceback is kept.
    """
    try:
        worker.run(spec, number)
    except VivaceError as error:
        return str(error)
    except Exception as error:
        return told(error, worker.job.work)
    return ""


def told(error: Exception, folder: Path) -> str:
    """One line about an error that nobody foresaw; its traceback goes to a file in `folder`."""
    import traceback

    file = folder / "errors" / f"{uuid.uuid4().hex[:8]}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]} (see {file})"
