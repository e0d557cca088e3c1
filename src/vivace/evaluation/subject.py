"""The subject of a bench: a task's model on a device, and how its clips are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.core.errors import ConfigError
from vivace.core.quiet import quiet
from vivace.evaluation import record
from vivace.evaluation.metrics.base import Trajectory
from vivace.evaluation.task import Sample, Task

if TYPE_CHECKING:
    import torch

    from vivace.core.receipt import Receipt
    from vivace.models.adapter import ModelDescription
    from vivace.plans.session import Session

ANY = "any"


@dataclass(frozen=True)
class Made:
    """Clips of one call: `clips` float32 (B, T, H, W, 3) in [0, 1] where they were decoded, before any codec."""

    clips: torch.Tensor | None
    receipt: Receipt
    trajectory: Trajectory | None = None


class Subject:
    """A task's model. Pipelines are built on demand: a peer that patches a class gets one of its own.

    Args:
        task: what is to be made.
        device: torch device.
        dtype: of the weights; by default what suits the device.
        model: what to load for a task whose model is `any`; refused elsewhere.

    Raises:
        ConfigError: the task asks for a model and none is named, or names one itself.
    """

    def __init__(self, task: Task, device: Any = "cpu", dtype: Any = None, model: str | None = None) -> None:
        import torch

        if task.model == ANY and not model:
            raise ConfigError(f"the task {task.full_name} needs {task.needs or 'a model (--model)'}.")
        if task.model != ANY and model not in (None, task.model):
            raise ConfigError(f"the task {task.full_name} is made on '{task.model}'; leave --model out.")
        self.task, self.device, self.dtype = task, torch.device(device), dtype
        self.source = model if task.model == ANY and model else task.model

    # -- the model --------------------------------------------------------------------------------------------

    def pipeline(self) -> Any:
        """A fresh pipeline on the device, with the task's shape and steps as its defaults."""
        from vivace.models import loading, random_weights
        from vivace.models.describe import remember

        with quiet():
            if self.task.weights == "random":
                made = random_weights.build_pipeline(self.source, device=self.device, dtype=self.dtype)
            else:
                made = loading.load(self.source, dtype=self.dtype, device=self.device)
        made.set_progress_bar_config(disable=True)
        facts = dict(self.description.defaults)
        facts.pop("vae", None)
        remember(made, self.source, facts | self._defaults)
        return made

    @property
    def _defaults(self) -> dict[str, Any]:
        task = self.task
        return {
            "num_frames": task.frames,
            "height": task.height,
            "width": task.width,
            "num_inference_steps": task.steps,
            "guidance_scale": task.guidance,
            "fps": task.fps,
        }

    @cached_property
    def description(self) -> ModelDescription:
        """The model's description with the task's defaults; reads no weights."""
        import dataclasses

        from vivace.models import loading

        found = loading.describe(self.source)
        return dataclasses.replace(found, defaults={**found.defaults, **self._defaults})

    def identity(self, pipeline: Any) -> record.Model:
        """The model as it stands in a record; the hash covers the transformer's and the VAE's weights."""
        from vivace.models import random_weights

        random = self.task.weights == "random"
        return record.Model(
            name=str(self.source) if not Path(str(self.source)).is_dir() else Path(str(self.source)).name,
            pipeline=type(pipeline).__name__,
            family=self.description.family,
            weights=self.task.weights,
            sha256=random_weights.fingerprint(self.source) if random else _weights_hash(pipeline),
            dtype=str(pipeline.transformer.dtype).removeprefix("torch."),
        )

    # -- making clips -----------------------------------------------------------------------------------------

    def make(
        self,
        session: Session,
        samples: Sequence[Sample],
        steps: int | None,
        *,
        decode: bool = True,
        trajectories: int = 0,
    ) -> Made:
        """One call of the pipeline for a batch of samples.

        Args:
            steps: solver steps, or None where the plan decides.
            decode: whether the VAE runs.
            trajectories: of how many of the first samples to keep the latents of every step.
        """
        call: dict[str, Any] = dict(self.task.call)
        if steps is not None:
            call["num_inference_steps"] = steps
        if self.task.weights == "random":
            from vivace.models import random_weights

            call |= random_weights.embeddings(session.pipeline, len(samples), self.task.text_length)
        else:
            call["prompt"] = [s.text for s in samples]
        call["guidance_scale"] = self.task.guidance
        call["output_type"] = "pt" if decode else "latent"
        keeper = _Keeper(trajectories) if trajectories else None
        if keeper is not None:
            call |= {
                "callback_on_step_end": keeper,
                "callback_on_step_end_tensor_inputs": ["latents"],
            }
        out = session(call.pop("prompt", None), seed=[s.seed for s in samples], **call)
        clips = None
        if decode:
            frames = out.raw.frames if hasattr(out.raw, "frames") else out.raw[0]
            # diffusers gives (B, T, 3, H, W) in [0, 1].
            clips = frames.detach().float().permute(0, 1, 3, 4, 2).contiguous()
        return Made(clips, out.receipt, keeper.trajectory() if keeper is not None else None)


class _Keeper:
    """Keeps the latents of the first samples after every step: diffusers' `callback_on_step_end`."""

    def __init__(self, samples: int) -> None:
        self._samples, self._sigmas, self._latents = samples, [], []

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        sigmas = getattr(pipeline.scheduler, "sigmas", None)
        if sigmas is not None and step + 1 < len(sigmas):
            self._sigmas.append(float(sigmas[step + 1]))
            self._latents.append(tensors["latents"][: self._samples].detach().float().cpu())
        return {}

    def trajectory(self) -> Trajectory | None:
        import torch

        if not self._latents:
            return None
        return Trajectory(tuple(self._sigmas), torch.stack(self._latents))


def _weights_hash(pipeline: Any) -> str:
    """sha256 over names, types and bytes of the transformers' and the VAE's weights."""
    import torch

    digest = hashlib.sha256()
    for part in ("transformer", "transformer_2", "vae"):
        module = getattr(pipeline, part, None)
        if module is None:
            continue
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()
