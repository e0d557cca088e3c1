"""EfficientNet-Lite0, the ImageNet network whose features some metrics rest on.

The B0 network of Tan and Le (arXiv:1905.11946) without squeeze-and-excitation and with ReLU6: inverted residual
blocks (MBConv, arXiv:1801.04381). The weights are those of `vivace.evaluation.weights`; nothing is fetched here.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vivace.core.errors import WeightsError
from vivace.evaluation import weights

if TYPE_CHECKING:
    from collections.abc import Mapping

WEIGHTS = "efficientnet_lite0"
FEATURES = 1280
SIDE = 160
"""Length of the shorter side, in pixels, that frames are resized to."""
FRAMES_AT_ONCE = 32
MEAN, SCALE = 127.0 / 255.0, 128.0 / 255.0
"""The network was trained on (level - 127) / 128 for levels in [0, 255]."""
BATCH_NORM_EPS = 1e-3
_STAGES = (
    # blocks, kernel, stride of the first, expansion, channels out
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _Conv(nn.Module):
    """Convolution with the padding that keeps ceil(size / stride), batch norm folded in, and ReLU6 where `active`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        active: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups)
        self.kernel, self.stride, self.active = kernel, stride, active

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in (x.shape[-1], x.shape[-2]):  # an odd pixel of padding goes to the right and to the bottom
            whole = max((math.ceil(size / self.stride) - 1) * self.stride + self.kernel - size, 0)
            pads += [whole // 2, whole - whole // 2]
        x = self.conv(F.pad(x, pads) if any(pads) else x)
        return F.relu6(x) if self.active else x


class _Block(nn.Module):
    """Widen by a 1x1 convolution, filter each channel, narrow again; the input is added where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _Conv(inputs, wide) if expansion > 1 else nn.Identity()
        self.depthwise = _Conv(wide, wide, kernel, stride, groups=wide)
        self.project = _Conv(wide, outputs, active=False)
        self.keeps = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.keeps else out


class EfficientNetLite0(nn.Module):
    """Frames (N, 3, H, W) on the network's scale (see `prepare`) to ImageNet logits (N, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, 32, 3, 2)
        blocks, width = [], 32
        for count, kernel, stride, expansion, outputs in _STAGES:
            for k in range(count):
                blocks.append(_Block(width, outputs, kernel, stride if k == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _Conv(width, FEATURES)
        self.classify = nn.Linear(FEATURES, 1000)

    def pooled(self, x: Tensor) -> Tensor:
        """Features before the classifier, mean over places: (N, 1280)."""
        return self.head(self.blocks(self.stem(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.pooled(x))

    def load_published(self, state: Mapping[str, Tensor]) -> EfficientNetLite0:
        """Take over a state dict with the published file's names, batch norms folded into the convolutions.

        Raises:
            WeightsError: a tensor is missing or has another shape.
        """
        names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
        for k, block in enumerate(self.blocks):
            for part, number in (("expand", 0), ("depthwise", 1), ("project", 2)):
                if isinstance(getattr(block, part), _Conv):
                    names[f"blocks.{k}.{part}"] = (f"_blocks.{k}._{part}_conv", f"_blocks.{k}._bn{number}")
        folded: dict[str, Tensor] = {}
        try:
            for own, (conv, norm) in names.items():
                # In float64: folding then costs no more than one rounding of each weight.
                mean, var, gain, shift = (
                    state[f"{norm}.{n}"].double() for n in ("running_mean", "running_var", "weight", "bias")
                )
                gain = gain / (var + BATCH_NORM_EPS).sqrt()
                weight = state[f"{conv}.weight"].double() * gain[:, None, None, None]
                folded[f"{own}.conv.weight"], folded[f"{own}.conv.bias"] = (
                    weight.float(),
                    (shift - mean * gain).float(),
                )
            for name in ("weight", "bias"):
                folded[f"classify.{name}"] = state[f"_fc.{name}"].float()
            self.load_state_dict(folded)
        except (KeyError, RuntimeError) as error:
            raise WeightsError(
                f"these are not the weights of EfficientNet-Lite0; fetch them with {weights.COMMAND}."
            ) from error
        return self


def prepare(clips: Tensor, side: int = SIDE) -> Tensor:
    """Frames (..., H, W, 3) in [0, 1] as (N, 3, h, w) on the network's scale, the shorter side `side` pixels long."""
    flat = clips.flatten(0, -4).movedim(-1, 1).float()
    height, width = flat.shape[-2:]
    size = tuple(max(1, round(v * side / min(height, width))) for v in (height, width))
    if size != (height, width):
        flat = F.interpolate(flat, size, mode="bilinear", align_corners=False, antialias=True)
    return (flat - MEAN) / SCALE


def missing() -> str:
    """Why the features cannot be had here, in a sentence that says what to do; empty when they can."""
    return weights.missing(WEIGHTS)


@lru_cache(maxsize=4)
def network(device: str = "cpu") -> EfficientNetLite0:
    """The trained network for inference in float32, loaded once for each device.

    Raises:
        UnavailableError: its weights were not fetched yet.
        WeightsError: the file is damaged.
    """
    model = EfficientNetLite0().load_published(weights.load(WEIGHTS))
    return model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def features(clips: Tensor, device: Any = "cpu", side: int = SIDE) -> Tensor:
    """Features (B, T, 1280), float32 on `device`, of clips (B, T, H, W, 3) in [0, 1].

    Frames are resized to a shorter side of `side` pixels (bilinear, antialiased). The frames of one clip are never in
    one pass with those of another, so a clip has the same features in any batch.

    Raises:
        UnavailableError: the weights were not fetched yet.
        WeightsError: the file is damaged.
    """
    model = network(str(device))
    rows = [
        torch.cat([model.pooled(prepare(part.to(device), side)) for part in clip.split(FRAMES_AT_ONCE)])
        for clip in clips
    ]
    return torch.stack(rows)


__all__ = ["FEATURES", "SIDE", "WEIGHTS", "EfficientNetLite0", "features", "missing", "network", "prepare"]
