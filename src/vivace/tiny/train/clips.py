"""A bank of rendered clips on the device, and crops of it. Data are free here: the bank is renewed while it is used."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vivace.world import Scene, render, sample_scenes
from vivace.world.splits import train_seeds


@dataclass(frozen=True, kw_only=True)
class ClipShape:
    """What is rendered: frames, height, width in pixels, and the side of the square supersampling grid."""

    frames: int = 29
    height: int = 128
    width: int = 128
    supersample: int = 2

    def render(self, seeds: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Frames uint8 (B, T, H, W, 3) and object mask bool (B, T, H, W) of the scenes of `seeds`."""
        return self.draw(sample_scenes(seeds), device)

    def draw(self, scenes: Sequence[Scene], device: torch.device) -> tuple[Tensor, Tensor]:
        """The same of given scenes."""
        clip = render(
            scenes,
            frames=self.frames,
            height=self.height,
            width=self.width,
            device=device,
            supersample=self.supersample,
        )
        return clip.video, clip.mask


class ClipBank:
    """`size` clips of a stream of training seeds; `refresh` replaces the oldest `portion` by the next ones.

    Its state is one number, so a resumed run holds the same clips again.
    """

    def __init__(self, shape: ClipShape, size: int, portion: int, stream: int, device: torch.device) -> None:
        if size % portion:
            raise ValueError(f"a bank of {size} clips cannot be renewed {portion} at a time; use a divisor.")
        self.shape, self.size, self.portion, self.stream, self.device = shape, size, portion, stream, device
        extent = (size, shape.frames, shape.height, shape.width)
        self.video = torch.empty(*extent, 3, dtype=torch.uint8, device=device)
        self.mask = torch.empty(extent, dtype=torch.bool, device=device)
        self.rendered = 0
        self.seconds_per_portion = 0.0

    def fill(self, rendered: int = 0) -> None:
        """Render the clips the bank holds after `rendered` clips in all; measures the cost of one portion."""
        self.rendered = max(rendered - self.size, 0)
        self.refresh()  # the first call pays for compilation and allocation
        started = time.perf_counter()
        for _ in range(self.size // self.portion - 1):
            self.refresh()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds_per_portion = (time.perf_counter() - started) / max(self.size // self.portion - 1, 1)

    def refresh(self) -> None:
        start = self.rendered % self.size
        video, mask = self.shape.render(train_seeds(self.rendered, self.portion, self.stream), self.device)
        self.video[start : start + self.portion] = video
        self.mask[start : start + self.portion] = mask
        self.rendered += self.portion

    def crops(self, count: int, frames: int, side: int) -> tuple[Tensor, Tensor]:
        """Random crops: video uint8 (count, frames, side, side, 3), mask bool (count, frames, side, side).

        The first half is centred (with jitter) on a random object pixel of its middle frame, where there is one.
        """
        shape, device = self.shape, self.device
        clip = torch.randint(self.size, (count,), device=device)
        start = torch.randint(shape.frames - frames + 1, (count,), device=device)
        top = torch.randint(shape.height - side + 1, (count,), device=device)
        left = torch.randint(shape.width - side + 1, (count,), device=device)
        if side < min(shape.height, shape.width):
            half = count // 2
            weight = self.mask[clip[:half], start[:half] + frames // 2].flatten(1).float()
            pixel = torch.multinomial(weight + 1e-9, 1).squeeze(1)
            jitter = torch.randint(-side // 4, side // 4 + 1, (2, half), device=device)
            row, column = pixel // shape.width + jitter[0], pixel % shape.width + jitter[1]
            top[:half] = (row - side // 2).clamp(0, shape.height - side)
            left[:half] = (column - side // 2).clamp(0, shape.width - side)
        where = (
            clip.view(-1, 1, 1, 1),
            (start.view(-1, 1) + torch.arange(frames, device=device)).view(count, frames, 1, 1),
            (top.view(-1, 1) + torch.arange(side, device=device)).view(count, 1, side, 1),
            (left.view(-1, 1) + torch.arange(side, device=device)).view(count, 1, 1, side),
        )
        return self.video[where], self.mask[where]

    def state_dict(self) -> dict[str, Any]:
        return {"rendered": self.rendered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fill(state["rendered"])


def to_model(video: Tensor) -> Tensor:
    """uint8 (B, T, H, W, 3) -> fp32 (B, 3, T, H, W) in [-1, 1], channels last in memory."""
    return video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def to_frames(video: Tensor) -> Tensor:
    """(B, 3, T, H, W) in [-1, 1] -> uint8 (B, T, H, W, 3), rounded."""
    return ((video.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
