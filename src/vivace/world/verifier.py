"""The verifier: a small network that reads the attributes of a clip from its frames alone."""

from __future__ import annotations

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
_PAIRS = len(SHAPES) * len(COLOURS)
_EVIDENCE = _PAIRS + len(SHAPES) * len(SIZES)
_WEIGHTS = {"colour": 3.0}  # of the heads in the loss, where not 1
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


class _Time(nn.Module):
    """A convolution over three frames: a 1x1 convolution that sees each frame beside its neighbours.

    Written with 2-D kernels alone, which are fast in bfloat16 everywhere. (B, T, C, h, w) in and out; `stride` keeps
    every so many frames.
    """

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.mix = nn.Conv2d(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        around = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))
        beside = torch.cat([around[:, :-2], x, around[:, 2:]], dim=2)[:, :: self.stride]
        return self.mix(beside.flatten(0, 1)).unflatten(0, beside.shape[:2])


class _Block(nn.Module):
    """Residual block on (B, T, C, h, w): a 3x3 convolution in space, then one over three frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.space = nn.Conv2d(width, width, 3, padding=1)
        self.mid = nn.GroupNorm(8, width)
        self.time = _Time(width)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.space(F.silu(self.norm(x.flatten(0, 1))))
        return x + self.time(F.silu(self.mid(flat)).unflatten(0, x.shape[:2]))


class _Down(nn.Module):
    """Halve the sides (and, if asked, the number of frames) of (B, T, C, h, w) while changing the width."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, frames: bool = False) -> None:
        super().__init__()
        self.space = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2)
        self.time = _Time(outputs, stride=2) if frames else nn.Identity()
        self.norm = nn.GroupNorm(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.time(self.space(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return F.silu(self.norm(x.flatten(0, 1))).unflatten(0, x.shape[:2])


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
        self.stem = nn.Sequential(
            _Down(3, 32, kernel=5), _Down(32, 48), _Down(48, 96), _Block(96), _Block(96)
        )
        # What each place shows: evidence for every (shape, colour) and (shape, size); the renderer's masks teach it.
        last = nn.Conv2d(96, _EVIDENCE, 1)
        assert last.bias is not None
        nn.init.constant_(last.bias, -5.0)  # most places show nothing
        self.places = nn.Sequential(nn.GroupNorm(8, 96), nn.SiLU(), last)
        self.body = nn.Sequential(_Down(96 + _PAIRS, 128, frames=True), _Block(128), _Block(128))
        self.neck = nn.Linear(256 + _EVIDENCE, FEATURES)
        heads = {
            "colour": len(SHAPES) * (len(COLOURS) + 1),
            "size": len(SHAPES) * len(SIZES),
            "motion": len(MOTIONS),
            "count": MAX_OBJECTS,
            "floor": len(FLOORS),
            "camera": len(CAMERAS),
        }
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, width) for name, width in heads.items()})

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places (B, T, 1 + 40, h, w), evidence (B, 50) and features (B, 192) of clips on the grid (B, 3, T, H, W)."""
        x = self.stem(x.transpose(1, 2))  # (B, T, C, h, w) from here on
        local = self.places(x.flatten(0, 1)).unflatten(0, x.shape[:2]).float()
        # The strongest place of each frame (softly), mean over time: an object is somewhere in every frame.
        evidence = local.flatten(3).logsumexp(-1).mean(1)
        places = F.pad(local[:, :, :_PAIRS], (0, 0, 0, 0, 1, 0))  # class 0, nothing there, has the logit 0
        seen = places.softmax(2)[:, :, 1:].to(x.dtype)
        x = F.silu(self.body(torch.cat([x, seen], dim=2)))
        pooled = torch.cat([x.mean((1, 3, 4)), x.amax((1, 3, 4)), evidence.to(x.dtype)], dim=1)
        return places, evidence, F.silu(self.neck(pooled))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of clips on the grid (B, 3, T, H, W) in [-1, 1], the classes last.

        colour (B, 5, 9), size (B, 5, 2), motion, count, floor and camera (B, classes), and places (B, T, h, w, 41).
        """
        places, evidence, features = self._embed(x)
        logits = {name: head(features).float() for name, head in self.heads.items()}
        colour, size = evidence.split([_PAIRS, _EVIDENCE - _PAIRS], dim=1)
        present = F.pad(
            colour.unflatten(1, (len(SHAPES), len(COLOURS))), (0, 1)
        )  # no evidence speaks for absence
        logits["colour"] = logits["colour"].unflatten(1, (len(SHAPES), len(COLOURS) + 1)) + present
        logits["size"] = (logits["size"] + size).unflatten(1, (len(SHAPES), len(SIZES)))
        return logits | {"places": places.movedim(2, -1)}

    @property
    def device(self) -> torch.device:
        return self.neck.weight.device

    @torch.no_grad()
    def features(self, video: Tensor) -> Tensor:
        """Features (B, 192), float32 on the verifier's device, for a Frechet distance between sets of clips."""
        parts = [
            self._embed(resample(part.to(self.device), self.frames, self.side))[2].float()
            for part in video.split(_AT_ONCE)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, FEATURES, device=self.device)

    @torch.no_grad()
    def verify(self, video: Tensor) -> list[Prediction]:
        """What is seen in clips (B, T, H, W, 3), uint8 or float in [0, 1]. Raises `ShapeError` as `resample` does."""
        seen: list[Prediction] = []
        for part in video.split(_AT_ONCE):
            logits = self(resample(part.to(self.device), self.frames, self.side))
            choice = {name: value.argmax(-1).tolist() for name, value in logits.items() if name != "places"}
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
        save_file(state, partial, metadata={"grid": f"{self.frames}x{self.side}"})
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
                frames, side = file.metadata()["grid"].split("x")
                model = cls(int(frames), int(side))
                model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, RuntimeError, OSError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"the verifier's weights {target} are damaged: fetch or train them again"
            ) from error
        return model.eval().requires_grad_(False).to(device)


def targets(attributes: list[Attributes], index: Tensor) -> dict[str, Tensor]:
    """Class indices of complete attributes for each head, on the device of `index`.

    The size of an absent shape is -100 (ignored). `index` (B, T, h, w) says which object each place shows (0: none, as
    in `Clip.index`); it becomes the class 1 + (shape, colour) of that object.
    """
    colour = torch.full((len(attributes), len(SHAPES)), len(COLOURS))
    size = torch.full((len(attributes), len(SHAPES)), -100)
    pair = torch.zeros(len(attributes), MAX_OBJECTS + 1, dtype=torch.long)
    for b, truth in enumerate(attributes):
        for i, spec in enumerate(truth.objects):
            at, hue = SHAPES.index(str(spec.shape)), COLOURS.index(str(spec.colour))
            colour[b, at], size[b, at] = hue, SIZES.index(str(spec.size))
            pair[b, i + 1] = 1 + at * len(COLOURS) + hue
    classes = {
        "colour": colour,
        "size": size,
        "motion": torch.tensor([MOTIONS.index(str(truth.motion)) for truth in attributes]),
        "count": torch.tensor([truth.count - 1 for truth in attributes]),
        "floor": torch.tensor([FLOORS.index(str(truth.floor)) for truth in attributes]),
        "camera": torch.tensor([CAMERAS.index(str(truth.camera)) for truth in attributes]),
    }
    classes = {name: value.to(index.device) for name, value in classes.items()}
    clips = torch.arange(len(attributes), device=index.device)[:, None, None, None]
    return classes | {"places": pair.to(index.device)[clips, index.long()]}


def to_places(index: Tensor, like: Tensor) -> Tensor:
    """Bring an index of pixels (B, T, H, W) to the grid of the logits `like` (B, T, h, w, classes)."""
    frames = torch.linspace(0, index.shape[1] - 1, like.shape[1]).round().long().to(index.device)
    return F.adaptive_max_pool2d(index[:, frames].float(), like.shape[2:4])


def loss(logits: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the heads' cross-entropies in nats, and each head's own (detached).

    Places with and without an object count alike, however few the former are; the mean over five shapes, most of them
    absent, gets more weight.
    """
    parts = {}
    for name, value in logits.items():
        each = F.cross_entropy(
            value.flatten(0, -2), wanted[name].flatten(), reduction="none", ignore_index=-100
        )
        counted = wanted[name].flatten() > 0 if name == "places" else wanted[name].flatten() >= 0
        parts[name] = (each * counted).sum() / counted.sum().clamp_min(1)
        if name == "places":
            parts[name] = 0.5 * (parts[name] + (each * ~counted).sum() / (~counted).sum().clamp_min(1))
    total = torch.stack([_WEIGHTS.get(name, 1.0) * part for name, part in parts.items()]).sum()
    return total, {name: part.detach() for name, part in parts.items()}
