"""The verifier: a small network that reads the attributes of a clip from its frames alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vivace.core.errors import ShapeError, WeightsError
from vivace.world.attributes import CAMERAS, COLOURS, FLOORS, MAX_OBJECTS, MOTIONS, SHAPES, SIZES, Attributes

WEIGHTS = Path(__file__).parent / "weights" / "verifier.safetensors"
GRID_FRAMES, GRID_SIDE = 16, 96
"""The grid that every clip is resampled to by default."""
MIN_FRAMES = 9
FEATURES = 192
ATTRIBUTES = ("object", "colour", "size", "motion", "count", "floor", "camera")
_AT_ONCE = 32  # clips per forward pass of `verify` and `features`


@dataclass(frozen=True)
class Prediction:
    """What the verifier saw. `objects` maps each shape that is present to its (colour, size)."""

    objects: Mapping[str, tuple[str, str]]
    motion: str
    count: int
    floor: str
    camera: str

    def matches(self, wanted: Attributes) -> dict[str, bool]:
        """Whether each attribute that `wanted` states was seen; keys are those of `ATTRIBUTES` that are stated.

        `object` compares the set of shapes; `colour` and `size` must hold for every object they are stated of,
        looked up by shape.
        """
        result: dict[str, bool] = {}
        shapes = [spec.shape for spec in wanted.objects if spec.shape is not None]
        if wanted.objects:
            result["object"] = set(shapes) == set(self.objects)
            result["count"] = wanted.count == self.count
        for place, kind in enumerate(("colour", "size")):
            said = [
                (spec.shape, value) for spec in wanted.objects if (value := getattr(spec, kind)) is not None
            ]
            if said:
                result[kind] = all(self._saw(shape, place, value) for shape, value in said)
        for kind in ("motion", "floor", "camera"):
            if (value := getattr(wanted, kind)) is not None:
                result[kind] = value == getattr(self, kind)
        return {kind: result[kind] for kind in ATTRIBUTES if kind in result}

    def _saw(self, shape: str | None, place: int, value: str) -> bool:
        candidates = self.objects.values() if shape is None else [self.objects.get(shape, ("", ""))]
        return any(candidate[place] == value for candidate in candidates)


class _Block(nn.Module):
    """Residual block: a 3x3 convolution in space, then one over three frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.space = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
        self.mid = nn.GroupNorm(8, width)
        self.time = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.time(F.silu(self.mid(self.space(F.silu(self.norm(x))))))


class _Down(nn.Sequential):
    """Halve the sides (and, if asked, the number of frames) while changing the width."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, frames: bool = False) -> None:
        layers: list[nn.Module] = [
            nn.Conv3d(
                inputs, outputs, (1, kernel, kernel), stride=(1, 2, 2), padding=(0, kernel // 2, kernel // 2)
            )
        ]
        if frames:
            layers.append(nn.Conv3d(outputs, outputs, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0)))
        super().__init__(*layers, nn.GroupNorm(8, outputs), nn.SiLU())


def resample(video: Tensor, frames: int = GRID_FRAMES, side: int = GRID_SIDE) -> Tensor:
    """Put clips (B, T, H, W, 3), uint8 or float in [0, 1], on a grid: float (B, 3, frames, side, side) in [-1, 1].

    Frames are picked, not blended. Raises `ShapeError` for anything but square RGB clips of nine frames or more.
    """
    if video.ndim != 5 or video.shape[-1] != 3 or video.shape[2] != video.shape[3] or video.shape[2] % 16:
        raise ShapeError(
            f"the verifier reads square clips (B, T, H, W, 3) with sides divisible by 16, not {tuple(video.shape)}"
        )
    if video.shape[1] < MIN_FRAMES:
        raise ShapeError(
            f"the verifier needs at least {MIN_FRAMES} frames to see a motion, not {video.shape[1]}"
        )
    picked = torch.linspace(0, video.shape[1] - 1, frames).round().long().to(video.device)
    x = video[:, picked]
    x = x.float() / 255.0 if video.dtype == torch.uint8 else x.float()
    flat = x.flatten(0, 1).permute(0, 3, 1, 2)
    if flat.shape[-1] != side:
        flat = F.interpolate(flat, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return flat.unflatten(0, (len(video), frames)).transpose(1, 2) * 2.0 - 1.0


class Verifier(nn.Module):
    """Frames to attributes: 2-D stem, factorised space and time convolutions (R(2+1)D, Tran et al., CVPR 2018), heads.

    For every shape there is one head for its colour (the last class: absent) and one for its size. `frames` and `side`
    are the grid that every clip is resampled to; saved weights remember theirs.
    """

    def __init__(self, frames: int = GRID_FRAMES, side: int = GRID_SIDE) -> None:
        super().__init__()
        self.frames, self.side = frames, side
        self.body = nn.Sequential(
            _Down(3, 32, kernel=5),
            _Down(32, 48),
            _Down(48, 96),
            _Block(96),
            _Block(96),
            _Down(96, 128, frames=True),
            _Block(128),
            _Block(128),
            nn.GroupNorm(8, 128),
            nn.SiLU(),
        )
        self.neck = nn.Linear(256, FEATURES)
        heads = {
            "colour": len(SHAPES) * (len(COLOURS) + 1),
            "size": len(SHAPES) * len(SIZES),
            "motion": len(MOTIONS),
            "count": MAX_OBJECTS,
            "floor": len(FLOORS),
            "camera": len(CAMERAS),
        }
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, width) for name, width in heads.items()})

    def embed(self, x: Tensor) -> Tensor:
        """Features (B, 192) of clips on the grid (B, 3, T, H, W) in [-1, 1]."""
        x = self.body(x)
        pooled = torch.cat([x.mean((2, 3, 4)), x.amax((2, 3, 4))], dim=1)
        return F.silu(self.neck(pooled))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of clips on the grid: colour (B, 5, 9), size (B, 5, 2), motion, count, floor, camera (B, classes)."""
        features = self.embed(x)
        logits = {name: head(features).float() for name, head in self.heads.items()}
        logits["colour"] = logits["colour"].unflatten(1, (len(SHAPES), len(COLOURS) + 1))
        logits["size"] = logits["size"].unflatten(1, (len(SHAPES), len(SIZES)))
        return logits

    @property
    def device(self) -> torch.device:
        return self.neck.weight.device

    @torch.no_grad()
    def features(self, video: Tensor) -> Tensor:
        """Features (B, 192), float32 on the verifier's device, for a Frechet distance between sets of clips."""
        parts = [
            self.embed(resample(part.to(self.device), self.frames, self.side)).float()
            for part in video.split(_AT_ONCE)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, FEATURES, device=self.device)

    @torch.no_grad()
    def verify(self, video: Tensor) -> list[Prediction]:
        """What is seen in clips (B, T, H, W, 3), uint8 or float in [0, 1]. Raises `ShapeError` as `resample` does."""
        seen: list[Prediction] = []
        for part in video.split(_AT_ONCE):
            logits = self(resample(part.to(self.device), self.frames, self.side))
            choice = {name: value.argmax(-1).tolist() for name, value in logits.items()}
            for b in range(len(part)):
                objects = {
                    shape: (COLOURS[colour], SIZES[size])
                    for shape, colour, size in zip(
                        SHAPES, choice["colour"][b], choice["size"][b], strict=True
                    )
                    if colour < len(COLOURS)
                }
                seen.append(
                    Prediction(
                        objects,
                        MOTIONS[choice["motion"][b]],
                        choice["count"][b] + 1,
                        FLOORS[choice["floor"][b]],
                        CAMERAS[choice["camera"][b]],
                    )
                )
        return seen

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights as bfloat16 safetensors, whole or not at all."""
        from safetensors.torch import save_file

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        state = {
            name: value.detach().to("cpu", torch.bfloat16).contiguous()
            for name, value in self.state_dict().items()
        }
        save_file(state, partial, metadata={"frames": str(self.frames), "side": str(self.side)})
        os.replace(partial, target)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str] = WEIGHTS, device: str | torch.device = "cpu") -> Self:
        """The trained verifier in float32, for inference. Raises `WeightsError` naming a missing or damaged file."""
        from safetensors import SafetensorError, safe_open

        target = Path(path)
        if not target.is_file():
            raise WeightsError(
                f"the verifier's weights {target} are missing: train them with python -m vivace.world.train_verifier"
            )
        try:
            with safe_open(target, framework="pt") as file:
                grid = file.metadata()
                model = cls(int(grid["frames"]), int(grid["side"]))
                model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise WeightsError(
                f"the verifier's weights {target} are damaged: fetch or train them again"
            ) from error
        return model.eval().requires_grad_(False).to(device)


def targets(attributes: list[Attributes]) -> dict[str, Tensor]:
    """Class indices of complete attributes, one tensor for each head; the size of an absent shape is -100 (ignored)."""
    colour = torch.full((len(attributes), len(SHAPES)), len(COLOURS))
    size = torch.full((len(attributes), len(SHAPES)), -100)
    for b, truth in enumerate(attributes):
        for spec in truth.objects:
            at = SHAPES.index(str(spec.shape))
            colour[b, at] = COLOURS.index(str(spec.colour))
            size[b, at] = SIZES.index(str(spec.size))
    return {
        "colour": colour,
        "size": size,
        "motion": torch.tensor([MOTIONS.index(str(truth.motion)) for truth in attributes]),
        "count": torch.tensor([truth.count - 1 for truth in attributes]),
        "floor": torch.tensor([FLOORS.index(str(truth.floor)) for truth in attributes]),
        "camera": torch.tensor([CAMERAS.index(str(truth.camera)) for truth in attributes]),
    }


def loss(logits: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Sum of the heads' cross-entropies in nats, and each head's own value."""
    parts = {
        name: F.cross_entropy(value.flatten(0, -2), wanted[name].flatten(), ignore_index=-100)
        for name, value in logits.items()
    }
    total = torch.stack(list(parts.values())).sum() + 2.0 * parts["colour"]  # five shapes share one mean
    values = torch.stack([part.detach() for part in parts.values()]).tolist()
    assert all(math.isfinite(value) for value in values)
    return total, dict(zip(parts, values, strict=True))
