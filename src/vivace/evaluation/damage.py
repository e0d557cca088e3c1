"""Deliberate damage to clips, to ask each metric what it sees and what it is blind to.

Every damage is a pure function of clips `(B, T, H, W, 3)` and a strength; it keeps shape and type (uint8, or
floating point in [0, 1]), and what it does to a clip does not depend on the clips beside it (`wrong_clip` apart). The
names are those that metric cards use in `sees` and `blind_to`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vivace.core.errors import ConfigError

_GREY = 1.0 / math.sqrt(3.0)


@dataclass(frozen=True)
class Damage:
    """One kind of damage; call it with clips and, if need be, a strength and a seed."""

    name: str
    about: str
    """What it does to the clip."""
    unit: str
    """What the strength counts."""
    strength: float
    """The default, and the one that the cards are tested with."""
    apply: Callable[[Tensor, float, int], Tensor]
    low: float = 0.0
    high: float = math.inf

    def __call__(self, clips: Tensor, strength: float | None = None, seed: int = 0) -> Tensor:
        """The damaged clips, of the shape and type of `clips`.

        Raises:
            ConfigError: not `(B, T, H, W, 3)`, neither uint8 nor floating point, or the strength is out of range.
        """
        strength = self.strength if strength is None else strength
        if not self.low <= strength <= self.high:
            bounds = f"[{self.low:g}, {self.high:g}]"
            raise ConfigError(f"{self.name} takes a strength ({self.unit}) in {bounds}, not {strength:g}.")
        if clips.ndim != 5 or clips.shape[-1] != 3:
            raise ConfigError(f"{self.name} wants clips (B, T, H, W, 3), not {tuple(clips.shape)}.")
        if clips.dtype != torch.uint8 and not clips.is_floating_point():
            raise ConfigError(f"{self.name} wants uint8 or floating-point clips, not {clips.dtype}.")
        return self.apply(clips, strength, seed)


def _pick(clips: Tensor, order: Tensor) -> Tensor:
    return clips[:, order.to(clips.device)]


def _levels(clips: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `change` to float32 values in [0, 1], clip, and go back to the type of `clips`."""
    if clips.dtype == torch.uint8:
        return (change(clips.float() / 255.0).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    return change(clips.float()).clamp(0.0, 1.0).to(clips.dtype)


def _freeze(clips: Tensor, strength: float, seed: int) -> Tensor:
    frames = clips.shape[1]
    last = round((frames - 1) * (1.0 - strength))
    return _pick(clips, torch.arange(frames).clamp(max=last))


def _stutter(clips: Tensor, strength: float, seed: int) -> Tensor:
    hold = round(strength)
    return _pick(clips, torch.arange(clips.shape[1]) // hold * hold)


def _shuffle(clips: Tensor, strength: float, seed: int) -> Tensor:
    frames = clips.shape[1]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(frames, generator=generator)[: round(strength * frames)].sort().values
    order = torch.arange(frames)
    order[chosen] = chosen[torch.randperm(len(chosen), generator=generator)]
    return _pick(clips, order)


def _reverse(clips: Tensor, strength: float, seed: int) -> Tensor:
    return clips.flip(1)


def _there_and_back(clips: Tensor, strength: float, seed: int) -> Tensor:
    """First half at double speed, then the way back: the path is wrong, the pictures are right."""
    last = clips.shape[1] - 1
    turn = round(strength * last)
    ahead = [min(last, round(t * last / max(turn, 1))) for t in range(turn)]
    back = [round(last * (1.0 - (t - turn) / max(last - turn, 1))) for t in range(turn, last + 1)]
    return _pick(clips, torch.tensor(ahead + back))


def _mirror(clips: Tensor, strength: float, seed: int) -> Tensor:
    return clips.flip(3)


def _wrong_clip(clips: Tensor, strength: float, seed: int) -> Tensor:
    return clips.roll(round(strength), 0)


def _flicker(clips: Tensor, strength: float, seed: int) -> Tensor:
    gain = 1.0 + strength * (1.0 - 2.0 * (torch.arange(clips.shape[1]) % 2))
    return _levels(clips, lambda x: x * gain.to(x.device)[:, None, None, None])


def _blur(clips: Tensor, strength: float, seed: int) -> Tensor:
    if strength == 0:
        return clips.clone()
    reach = max(1, math.ceil(3 * strength))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=clips.device)
    taps = torch.exp(-(offsets**2) / (2.0 * strength**2))
    taps = (taps / taps.sum()).expand(3, 1, -1)

    def change(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1).movedim(-1, 1)
        flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), "replicate"), taps.unsqueeze(2), groups=3)
        flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), "replicate"), taps.unsqueeze(3), groups=3)
        return flat.movedim(1, -1).unflatten(0, x.shape[:2])

    return _levels(clips, change)


def _noise(clips: Tensor, strength: float, seed: int) -> Tensor:
    noise = torch.randn(clips.shape[1:], generator=torch.Generator().manual_seed(seed))
    return _levels(clips, lambda x: x + noise.to(x.device) * (strength / 255.0))


def _colour_shift(clips: Tensor, strength: float, seed: int) -> Tensor:
    gain = torch.tensor((1.0 + strength, 1.0, 1.0 - strength))
    return _levels(clips, lambda x: x * gain.to(x.device))


def _colour_drift(clips: Tensor, strength: float, seed: int) -> Tensor:
    grow = torch.linspace(0.0, strength, clips.shape[1])
    gain = 1.0 + grow[:, None] * torch.tensor((1.0, 0.0, -1.0))
    return _levels(clips, lambda x: x * gain.to(x.device)[:, None, None])


def _wrong_colour(clips: Tensor, strength: float, seed: int) -> Tensor:
    """Turn every colour about the grey axis (Rodrigues); a third of a turn exchanges the channels in a ring."""
    angle = 2.0 * math.pi * strength
    cos, sin = math.cos(angle), math.sin(angle)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) * _GREY
    turn = torch.eye(3) * cos + cross * sin + torch.full((3, 3), (1.0 - cos) / 3.0)
    return _levels(clips, lambda x: x @ turn.T.to(x.device))


def _warp_jitter(clips: Tensor, strength: float, seed: int) -> Tensor:
    """Every frame is looked up along its own smooth random field, of `strength` pixels root mean square."""
    frames, height, width = clips.shape[1:4]
    coarse = torch.randn(frames, 2, 5, 5, generator=torch.Generator().manual_seed(seed))
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    field = field * (strength / field.square().mean().sqrt())
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = xs + field[:, 0], ys + field[:, 1]
    grid = torch.stack((2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1), dim=-1)

    def change(values: Tensor) -> Tensor:
        where = grid.to(values.device)
        moved = [
            F.grid_sample(clip.movedim(-1, 1), where, padding_mode="border", align_corners=True)
            for clip in values
        ]
        return torch.stack(moved).movedim(2, -1)

    return _levels(clips, change)


DAMAGES: Mapping[str, Damage] = {
    name: Damage(name, about, unit, strength, apply, *bounds)
    for name, about, unit, strength, apply, *bounds in (
        ("freeze", "The last part of the clip stands still.", "share of the clip", 1.0, _freeze, 0.0, 1.0),
        ("stutter", "Every frame is held, the ones between are lost.", "frames held", 2.0, _stutter, 1.0),
        ("shuffle", "Frames change places.", "share of the frames", 1.0, _shuffle, 0.0, 1.0),
        ("reverse", "The clip runs backwards.", "no effect", 1.0, _reverse),
        (
            "there_and_back",
            "The whole path, then back again.",
            "where it turns",
            0.5,
            _there_and_back,
            0.0,
            1.0,
        ),
        ("wrong_motion", "The picture is mirrored: left and right change places.", "no effect", 1.0, _mirror),
        ("wrong_clip", "Each prompt gets another's clip.", "places in the batch", 1.0, _wrong_clip, 1.0),
        ("flicker", "Every second frame is darker.", "relative amplitude", 0.08, _flicker, 0.0, 1.0),
        ("blur", "Gaussian blur of every frame.", "sigma in pixels", 1.5, _blur),
        ("noise", "Gaussian noise, new in every frame.", "sigma in 8-bit levels", 10.0, _noise),
        ("colour_shift", "All frames turn warmer alike.", "gain of red", 0.15, _colour_shift, 0.0, 1.0),
        (
            "colour_drift",
            "Frames turn warmer with time.",
            "gain of red at last",
            0.3,
            _colour_drift,
            0.0,
            1.0,
        ),
        ("wrong_colour", "Every hue is turned.", "turns", 1.0 / 3.0, _wrong_colour),
        ("warp_jitter", "Every frame is bent along its own smooth field.", "pixels, rms", 1.5, _warp_jitter),
    )
}
"""All kinds of damage, by name."""


__all__ = ["DAMAGES", "Damage"]
