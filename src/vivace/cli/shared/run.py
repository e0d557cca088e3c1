"""One run of a model: everything that can be wrong is found before weights are read, then it is made and watched."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.cli.shared.options import DType, Request
from vivace.cli.shared.screen import screen, warn

if TYPE_CHECKING:
    import numpy as np

    from vivace.core.receipt import Receipt
    from vivace.core.shapes import Workload
    from vivace.models.adapter import ModelDescription
    from vivace.plans.plan import Plan

DEFAULT_FPS = 16.0
"""The rate of Wan 2.1, for models that name none."""
_DTYPES = {DType.FP32: "float32", DType.BF16: "bfloat16", DType.FP16: "float16"}


@dataclass(frozen=True)
class Job:
    """A request that has been checked against its model's description."""

    request: Request
    model: ModelDescription
    workload: Workload
    fps: float

    @property
    def embedded(self) -> bool:
        """Whether the model is the one that comes with Vivace, whose world we know."""
        from vivace.models.loading import EMBEDDED

        return self.request.model == EMBEDDED

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline. Steps and guidance only when asked for: else they are the plan's to choose."""
        w, r = self.workload, self.request
        call: dict[str, Any] = {"num_frames": w.frames, "height": w.height, "width": w.width}
        if r.steps is not None:
            call["num_inference_steps"] = r.steps
        if r.guidance is not None:
            call["guidance_scale"] = r.guidance
        return call

    @property
    def raw_bytes(self) -> int:
        """Size of the frames of one clip; no mp4 of ours is larger."""
        return self.workload.frames * self.workload.height * self.workload.width * 3


@dataclass(frozen=True)
class Made:
    """One clip, its receipt (which times the generation), and the seconds it took to put the plan in force before."""

    frames: np.ndarray
    receipt: Receipt
    setup: float


def prepare(request: Request, *plans: Plan) -> Job:
    """Check a request and its plans against the model's description; reads no weights.

    Raises:
        ModelError, ShapeError, PlanError: what speaks against it, in one sentence.
    """
    from vivace.core.errors import ConfigError
    from vivace.models.loading import describe

    if not request.prompt.strip():
        raise ConfigError("the prompt is empty; say what the clip shows.")
    model = describe(request.model)
    workload = model.workload(**request.shape)
    if model.pixels is not None:
        model.pixels.check(workload.frames, workload.height, workload.width)
    for plan in plans:
        plan.check(model)
    fps = request.fps if request.fps is not None else model.defaults.get("fps", DEFAULT_FPS)
    job = Job(request, model, workload, float(fps))
    if job.embedded:
        _warn_of_unknown_words(request.prompt)
    return job


def _warn_of_unknown_words(prompt: str) -> None:
    from vivace.world import unknown_words

    if words := unknown_words(prompt):
        known = f"the embedded model does not know {_listed(words)}"
        warn(f"{known}; the clip will show what the other words say.")


def _listed(words: Any) -> str:
    quoted = [f"'{word}'" for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def load(job: Job) -> Any:
    """The pipeline of a job, on its device.

    Raises:
        ConfigError: the device does not exist here.
        OfflineError, WeightsError: the model cannot be had.
    """
    with screen(stderr=True).status(f"[quiet]loading {job.request.model}"):
        import torch
        from diffusers.utils import logging as of_diffusers
        from transformers.utils import logging as of_transformers

        from vivace.models import loading

        of_diffusers.disable_progress_bar()
        of_transformers.disable_progress_bar()
        if job.request.threads:
            torch.set_num_threads(job.request.threads)
        dtype = getattr(torch, _DTYPES[job.request.dtype]) if job.request.dtype in _DTYPES else None
        pipeline = loading.load(job.request.model, dtype=dtype, device=device_here(job.request.device))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def device_here(name: str) -> str:
    """A device that exists here, as torch names it."""
    import torch

    from vivace.core.errors import ConfigError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"'{name}' is no device; use auto, cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ConfigError(f"there is no GPU '{name}' here; use --device cpu, or see `vivace doctor`.")
    if device.type not in ("cpu", "cuda") and not getattr(torch, device.type).is_available():
        raise ConfigError(f"there is no device '{name}' here; use --device cpu.")
    return name


def make(job: Job, pipeline: Any, plan: Plan, *, steps: int | None = None) -> Made:
    """Make one clip under a plan, with its progress on the screen.

    Args:
        steps: solver steps; wins over the request's.
    """
    from vivace.cli.shared.progress import Steps
    from vivace.core.errors import ModelError
    from vivace.plans.session import accelerate

    call = job.call | ({"num_inference_steps": steps} if steps is not None else {})
    total = call.get("num_inference_steps") or plan.steps(job.model)
    with Steps(plan.name, total) as watcher:
        start = time.perf_counter()
        with accelerate(pipeline, plan, model=job.model, on_step=watcher.on_step) as session:
            setup = time.perf_counter() - start
            out = session(job.request.prompt, seed=job.request.seed, **call)
    if out.frames is None:
        raise ModelError(f"{job.model.pipeline_class} gave no frames; Vivace makes videos only.")
    return Made(out.frames, out.receipt, setup)


def warm_up(job: Job, pipeline: Any) -> None:
    """One solver step that nobody keeps, so that the first of two runs does not pay for what both need."""
    from vivace.plans.plan import Plan
    from vivace.plans.session import accelerate

    with (
        screen(stderr=True).status("[quiet]warming up"),
        accelerate(pipeline, Plan(), model=job.model, counters=False) as session,
    ):
        session(job.request.prompt, seed=job.request.seed, **job.call | {"num_inference_steps": 1})
