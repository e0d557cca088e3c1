"""FVD and JEDi: distances of features of a video network whose file the user gives.

    export VIVACE_FVD_I3D=/models/i3d_torchscript.pt     # I3D, Kinetics-400
    export VIVACE_JEDI=/models/vjepa_ssv2.pt             # V-JEPA

The file holds the network with its weights, as TorchScript, or as a program of torch.export (`.pt2`). It is called with
one clip (1, 3, T, H, W) and gives one row of features. Nothing is fetched.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vivace.core.errors import WeightsError
from vivace.evaluation import two_sample
from vivace.evaluation.metrics.base import (
    Backbone,
    Better,
    Context,
    Group,
    MetricCard,
    Scope,
    Series,
    SetMetric,
    SetValue,
)
from vivace.evaluation.metrics.frechet import LEAST_CLIPS, frechet_value

if TYPE_CHECKING:
    import torch

SIDE = 224
"""Pixels of the square that frames are resized to."""


class VideoBackboneMetric(SetMetric):
    """Base: features by the user's network. Subclasses say how it wants its clips, and compare the tables.

    Args:
        device: torch device that runs the network.
        file: the network; None: the file that the environment variable `variable` names.
    """

    abstract: ClassVar[bool] = True
    variable: ClassVar[str]
    network_name: ClassVar[str]
    frames: ClassVar[int | None] = None
    """Frames picked evenly from the clip; None: all."""
    mean: ClassVar[tuple[float, float, float]]
    scale: ClassVar[tuple[float, float, float]]

    def __init__(self, device: Any = "cpu", file: str | Path | None = None) -> None:
        super().__init__(device)
        given = file or os.environ.get(self.variable)
        self.file = Path(given) if given else None
        if self.file is not None and self.file.is_file():
            # The class's card cannot know which file a user gives; the record must.
            object.__setattr__(self, "card", replace(self.card, backbone=self._backbone(self.file)))

    def missing(self) -> str:
        wish = f"set {self.variable} to a TorchScript or .pt2 file of {self.network_name}"
        if self.file is None:
            return super().missing() or f"{self.card.name} needs a network that is not packaged; {wish}."
        if not self.file.is_file():
            return f"{self.card.name} needs {self.file}, which is not there; {wish}."
        if self.file.suffix == ".safetensors":
            return f"{self.file} holds weights without their network; {wish}."
        return super().missing()

    def embed(self, clips: torch.Tensor, context: Context) -> np.ndarray:
        return np.stack([self._row(clip) for clip in clips])

    @cached_property
    def network(self) -> Any:
        """The user's network, ready to be called.

        Raises:
            WeightsError: the file cannot be read.
        """
        assert self.file is not None, "missing() was asked before"
        return load_network(self.file, self.device)

    def prepare(self, clip: torch.Tensor) -> torch.Tensor:
        """A clip (T, H, W, 3) in [0, 1] as the network wants it, (1, 3, T, 224, 224)."""
        import torch
        from torch.nn import functional as F

        if self.frames is not None:
            picked = torch.linspace(0, len(clip) - 1, self.frames).round().long()
            clip = clip[picked.to(clip.device)]
        flat = clip.movedim(-1, 1)
        if flat.shape[-2:] != (SIDE, SIDE):
            flat = F.interpolate(flat, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        mean, scale = (flat.new_tensor(v)[:, None, None] for v in (self.mean, self.scale))
        return ((flat - mean) / scale).movedim(0, 1)[None]

    def _row(self, clip: torch.Tensor) -> np.ndarray:
        import torch

        with torch.no_grad():
            try:
                out = self.network(self.prepare(clip))
            except RuntimeError as error:
                why = str(error).strip().splitlines()[-1]
                raise WeightsError(
                    f"{self.file} cannot take a clip ({why}); give a network for (1, 3, T, {SIDE}, {SIDE})."
                ) from error
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            raise WeightsError(
                f"{self.file} gives {type(out).__name__}; give a network that returns features."
            )
        return out.double().cpu().numpy().reshape(-1)

    def _backbone(self, file: Path) -> Backbone:
        state = file.stat()
        return Backbone(
            name=self.network_name,
            sha256=_sha256(str(file.resolve()), state.st_size, state.st_mtime_ns),
            licence="that of the user's file",
            source=file.name,
        )


class Fvd(VideoBackboneMetric):
    """Frechet video distance (Unterthiner et al., arXiv:1812.01717) by the user's I3D network."""

    variable = "VIVACE_FVD_I3D"
    network_name = "I3D (Kinetics-400)"
    mean, scale = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    card = MetricCard(
        name="fvd",
        version=1,
        title="Frechet video distance (I3D)",
        scope=Scope.SET,
        group=Group.DISTRIBUTION,
        series=(
            Series(
                name="fvd",
                better=Better.LOWER,
                about="Squared Wasserstein distance of Gaussians fitted to I3D features of both sets.",
                low=0.0,
            ),
        ),
        convention=(
            "All frames, squeezed to 224 x 224 (bilinear, antialiased), in [-1, 1]; a network with the argument "
            "return_features is asked for features. The reference is the exact run, not real video. Given for "
            f"{LEAST_CLIPS} clips or more; interval by jackknife over ten blocks of prompts."
        ),
        sees=("blur", "noise"),
        blind_to=("wrong_clip",),
        cite="arXiv:1812.01717",
        symmetric=True,
    )

    def distance(
        self, reference: np.ndarray, candidate: np.ndarray, groups: Sequence[int], seed: int = 0
    ) -> dict[str, SetValue]:
        return {"fvd": frechet_value("fvd", reference, candidate, groups, instead="jedi or trajectory_mmd")}


class Jedi(VideoBackboneMetric):
    """JEDi (Luo et al., arXiv:2410.05203) by the user's V-JEPA network, with an unbiased estimate for paired sets."""

    variable = "VIVACE_JEDI"
    network_name = "V-JEPA"
    frames = 16
    mean, scale = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    card = MetricCard(
        name="jedi",
        version=1,
        title="JEDi (kernel, V-JEPA)",
        scope=Scope.SET,
        group=Group.DISTRIBUTION,
        series=(
            Series(
                name="jedi",
                better=Better.LOWER,
                about="100 times the unbiased squared kernel distance of V-JEPA features; 0 when equal, can be below.",
            ),
        ),
        convention=(
            "16 frames picked evenly, squeezed to 224 x 224 (bilinear, antialiased), ImageNet mean and deviation; "
            "kernel (x.y/D)^2, value times 100, as published; published values are biased upwards, these are not: "
            f"{two_sample.PROCEDURE}"
        ),
        sees=("blur", "noise"),
        blind_to=("wrong_clip",),
        cite="arXiv:2410.05203",
        symmetric=True,
    )

    def distance(
        self, reference: np.ndarray, candidate: np.ndarray, groups: Sequence[int], seed: int = 0
    ) -> dict[str, SetValue]:
        x, y, numbers = two_sample.paired_tables(reference, candidate, groups)
        h = 100.0 * two_sample.pairs(x, y, _square)
        return {"jedi": two_sample.compare_sets(h, numbers, seed)}


def load_network(file: Path, device: Any = "cpu") -> Any:
    """A callable on clips (1, 3, T, H, W) from a TorchScript file, or from a program of torch.export (`.pt2`).

    Raises:
        WeightsError: the file cannot be read.
    """
    import torch

    try:
        if file.suffix == ".pt2":
            return torch.export.load(str(file)).module().to(device)
        with warnings.catch_warnings():  # files of this kind are what the field has
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(file), map_location=device).eval()
    except Exception as error:  # a damaged archive can fail in any way at all
        raise WeightsError(f"{file} cannot be read as a network; save it with torch.jit.save.") from error
    known = {argument.name for argument in module.forward.schema.arguments}
    wanted = {"return_features": True, "rescale": False, "resize": False}
    options = {name: value for name, value in wanted.items() if name in known}
    return lambda clip: module(clip, **options)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1]) ** 2


@lru_cache(maxsize=8)
def _sha256(path: str, size: int, changed: int) -> str:
    """Size and time of change are there so that another file of the same name is read again."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
