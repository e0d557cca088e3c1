"""Where samples come from: the rendered world, a folder of videos, or a teacher that makes them itself.

A source gives samples by their numbers, so that an interrupted run goes on exactly where it was.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vivace.calibration.artifact import prompts_digest
from vivace.core.errors import ConfigError, ModelError
from vivace.core.seeding import generators
from vivace.models.adapter import EXPERTS
from vivace.tiny.train.clips import ClipShape
from vivace.training.data.encoding import Encoder, pool
from vivace.training.data.samples import Batch
from vivace.training.data.shards import TEACHER, Head
from vivace.training.data.videos import Captioned, captioned, check, clip
from vivace.world import caption, sample_scenes
from vivace.world.splits import train_seeds

STREAM = 500
"""First stream of the world's training scenes; other trainings draw from others."""


class Source(ABC):
    """Samples 0, 1, 2, ... of one kind for one pipeline.

    Args:
        encoder: of the pipeline.
        shape: frames, height, width in pixels.

    Raises:
        ShapeError: the model cannot make such clips.
    """

    kind: str
    count: int | None = None
    """How many samples there are; None for as many as anybody wants."""

    def __init__(self, encoder: Encoder, shape: ClipShape) -> None:
        self.encoder, self.shape = encoder, shape
        if encoder.model.pixels is not None:
            encoder.model.pixels.check(shape.frames, shape.height, shape.width)

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the samples depend on beside the model and the shape."""

    @abstractmethod
    def portion(self, start: int, stop: int) -> Batch:
        """Samples `start` to `stop`, by field: bf16 `latents` (n, C, T, H, W), the encoder's text fields, and more."""

    def empty(self) -> dict[str, Tensor]:
        """Text fields (L, D) of the empty prompt."""
        return {name: value[0] for name, value in self.encoder.text([""]).items()}

    def head(self, samples: int, per_shard: int) -> Head:
        """What a folder of these samples says about them."""
        shape = self.shape
        return Head(
            kind=self.kind,
            model=self.encoder.model.name,
            hashes=self.encoder.identity(),
            clip={"frames": shape.frames, "height": shape.height, "width": shape.width},
            settings=self.settings,
            per_shard=per_shard,
            samples=samples,
        )


class WorldSource(Source):
    """Rendered clips of `vivace.world` with their captions, and the objects' `mask` uint8 (n, T, H, W).

    Args:
        encoder, shape: see `Source`; `shape` also says how finely is rendered.
        seed: chooses the scenes; all are from the training split.
    """

    kind = "world"

    def __init__(self, encoder: Encoder, shape: ClipShape, seed: int = 0) -> None:
        super().__init__(encoder, shape)
        self.seed = seed

    @property
    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "stream": STREAM, "supersample": self.shape.supersample}

    def portion(self, start: int, stop: int) -> Batch:
        scenes = sample_scenes(train_seeds(start, stop - start, STREAM + self.seed))
        video, mask = self.shape.draw(scenes, self.encoder.device)
        latents = self.encoder.latents(video)
        text = self.encoder.text([caption(s.attributes, s.seed) for s in scenes])
        return {"latents": latents, "mask": pool(mask, latents), **text}


class VideoSource(Source):
    """One clip of every video in a folder, with its caption. Videos that cannot be used are left out.

    Args:
        encoder, shape: see `Source`.
        folder: see `vivace.training.data.videos.captioned`.
        fps: frames per second of the clips.

    Raises:
        ConfigError: there are no videos, captions are missing, or no video can be used.
    """

    kind = "videos"

    def __init__(self, encoder: Encoder, shape: ClipShape, folder: str | Path, fps: float) -> None:
        super().__init__(encoder, shape)
        self.folder, self.fps = Path(folder), fps
        self.videos: list[Captioned] = []
        self.refused: list[str] = []
        """A sentence for each video that is left out."""
        for video in captioned(folder):
            try:
                check(video.path, shape.frames, fps)
                self.videos.append(video)
            except ConfigError as error:
                self.refused.append(str(error))
        if not self.videos:
            raise ConfigError(f"none of the videos in {folder} can be used; the first: {self.refused[0]}")
        self.count = len(self.videos)

    @property
    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for v in self.videos:
            name = v.path.relative_to(self.folder).as_posix()
            digest.update(f"{name}\t{v.path.stat().st_size}\t{v.caption}\n".encode())
        return {"fps": self.fps, "videos": digest.hexdigest()[:16]}

    def portion(self, start: int, stop: int) -> Batch:
        some, s = self.videos[start:stop], self.shape
        video = torch.stack([clip(v.path, s.frames, s.height, s.width, self.fps) for v in some])
        return {"latents": self.encoder.latents(video), **self.encoder.text([v.caption for v in some])}


class TeacherSource(Source):
    """Pairs of noise and what the teacher's own sampler makes of it: `noise` and `latents`, both bf16 (n, C, T, H, W).

    Such pairs of a probability-flow ODE are what a student regresses on (Luhman and Luhman, arXiv 2101.02388; the
    initialisation of DMD, arXiv 2311.18828, and of CausVid, arXiv 2412.07772). The noise is rounded to bf16 *before*
    the sampler starts: what is stored is what was run.

    Args:
        encoder, shape: see `Source`; the transformer must be on the encoder's device as well.
        prompts: sample i takes prompt i modulo their number; without any, captions of `vivace.world`.
        steps, guidance: of the sampler; by default the model's.
        seed: sample i has seed + i.
        states: also keep so many states on the way, evenly spread: `trajectory` (n, K, C, T, H, W), whose noise levels
            `settings["sigmas"]` tells.
        on_step: called after every step with its number from 1 on.

    Raises:
        ModelError: the pipeline does not start from noise of that layout, or wants a picture.
        ConfigError: more states than steps between the first and the last.
    """

    kind = TEACHER

    def __init__(
        self,
        encoder: Encoder,
        shape: ClipShape,
        prompts: Sequence[str] = (),
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        states: int = 0,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(encoder, shape)
        self.prompts, self.seed, self.on_step = list(prompts), seed, on_step
        model = encoder.model
        self.workload = model.workload(
            frames=shape.frames, height=shape.height, width=shape.width, steps=steps, guidance=guidance
        )
        self.count = None
        _check_teacher(encoder, self.workload)
        steps = self.workload.steps
        if not 0 <= states < steps:
            raise ConfigError(
                f"{states} states cannot be kept of {steps} steps; ask for at most {steps - 1}."
            )
        self.kept = [math.ceil((i + 1) * steps / (states + 1)) - 1 for i in range(states)]
        """Steps (from 0) after which the state is kept."""

    @property
    def settings(self) -> dict[str, Any]:
        scheduler = self.encoder.pipeline.scheduler
        said = {
            "seed": self.seed,
            "prompts": prompts_digest(self.prompts)[:16] if self.prompts else f"world stream {STREAM}",
            "steps": self.workload.steps,
            "guidance": float(self.workload.guidance),
            "scheduler": type(scheduler).__name__,
            "shift": scheduler.config.get("flow_shift", scheduler.config.get("shift")),
        }
        if self.kept:
            scheduler.set_timesteps(self.workload.steps)
            if hasattr(scheduler, "sigmas"):
                said["sigmas"] = [round(float(scheduler.sigmas[i + 1]), 6) for i in self.kept]
        return said

    def texts(self, start: int, stop: int) -> list[str]:
        """The prompts of some samples."""
        if self.prompts:
            return [self.prompts[i % len(self.prompts)] for i in range(start, stop)]
        scenes = sample_scenes(train_seeds(start, stop - start, STREAM + self.seed))
        return [caption(s.attributes, s.seed) for s in scenes]

    @torch.no_grad()
    def portion(self, start: int, stop: int) -> Batch:
        texts, draws = self.texts(start, stop), generators(self.seed + start, stop - start)
        noise = self._noise(draws).bfloat16()
        latents, states = self.sample(texts, noise, draws)
        out = {"noise": noise, "latents": latents.bfloat16(), **self.encoder.text(texts)}
        return out | ({"trajectory": torch.stack(states, dim=1).bfloat16()} if states else {})

    def sample(
        self, texts: Sequence[str], noise: Tensor, draws: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the teacher's own pipeline from given noise.

        Args:
            texts: n prompts.
            noise: (n, C, T, H, W).
            draws: a generator for each sample, for samplers that draw on the way.

        Returns:
            The final latents (n, C, T, H, W) and the states that are kept.
        """
        pipeline, model, w = self.encoder.pipeline, self.encoder.model, self.workload
        accepted = inspect.signature(type(pipeline).__call__).parameters
        states: list[Tensor] = []

        def after(pipe: Any, step: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            if step in self.kept:
                states.append(values["latents"].clone())
            if self.on_step is not None:
                self.on_step(step + 1)
            return {}

        scale = model.adapter.guidance_argument if model.adapter else "guidance_scale"
        call = {
            **{k: v for k, v in model.defaults.items() if k != "vae"},
            "prompt": list(texts),
            "num_frames": w.frames,
            "height": w.height,
            "width": w.width,
            "num_inference_steps": w.steps,
            scale: w.guidance,
            "max_sequence_length": w.text,
            "latents": noise.to(self.encoder.device, torch.float32),
            "generator": list(draws),
            "output_type": "latent",
            "callback_on_step_end": after,
        }
        out = pipeline(**{k: v for k, v in call.items() if k in accepted})
        return out.frames, states

    def _noise(self, draws: list[torch.Generator]) -> Tensor:
        """fp32 (n, C, T, H, W), drawn as the pipeline itself draws it."""
        pipeline = self.encoder.pipeline
        transformer = next(m for e in EXPERTS if (m := getattr(pipeline, e, None)) is not None)
        return pipeline.prepare_latents(
            batch_size=len(draws),
            num_channels_latents=transformer.config.in_channels,
            height=self.shape.height,
            width=self.shape.width,
            num_frames=self.shape.frames,
            dtype=torch.float32,
            device=self.encoder.device,
            generator=draws,
        )


def _check_teacher(encoder: Encoder, workload: Any) -> None:
    pipeline, model = encoder.pipeline, encoder.model
    accepted = inspect.signature(type(pipeline).__call__).parameters
    needed = [
        n for n in ("image", "video") if n in accepted and accepted[n].default is inspect.Parameter.empty
    ]
    takes = {"latents", "output_type", "callback_on_step_end"} <= set(accepted)
    if needed or not takes or not model.takes_latents(workload):
        reason = f"it needs a {needed[0]}" if needed else "its sampler's latents are not (B, C, T, H, W)"
        raise ModelError(
            f"pairs cannot be made with {model.pipeline_class}: {reason}; use a text-to-video pipeline such as "
            "Wan's, or --from videos."
        )
