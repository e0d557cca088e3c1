"""A signal in the spatial spectrum: how much of the latents' change is picture and not noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vivace.core.context import Clock
from vivace.techniques.caching.memory import Memory
from vivace.techniques.caching.signals import Moment, Signal, relative_change

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SpectralChange(Signal):
    """Change of the latents from step to step, both seen through a Wiener filter for the current noise level.

    Latents of a row are (..., H, W), or tokens (S, C) in the order of the grid.
    """

    reference: str = "step"
    exponent: float = 3.0

    def measure(self, memory: Memory, moment: Moment, row: int) -> torch.Tensor:
        import torch

        marks, now, clock = memory.row(moment.who[row]).marks, moment.hidden[row], moment.clock
        before = marks.get("before")
        marks["now"] = now
        if before is None or clock is None:
            return torch.full((), float("inf"), device=now.device)
        sigma = noise_level(clock)
        seen = [seen_through(as_pictures(x, clock), sigma, self.exponent) for x in (now, before)]
        return relative_change(*seen)


def seen_through(pictures: torch.Tensor, sigma: float, exponent: float) -> torch.Tensor:
    """Pictures (..., H, W) after the filter, float32."""
    import torch

    height, width = pictures.shape[-2:]
    gain = wiener(height, width, sigma, exponent, pictures.device)
    return torch.fft.irfft2(torch.fft.rfft2(pictures.float()) * gain, s=(height, width))


def noise_level(clock: Clock) -> float:
    """Noise level of the step from 0 to 1, on the straight line from data to noise."""
    sigma = clock.sigma
    if not 0.0 <= sigma <= 1.0:  # also NaN
        sigma = clock.timestep / 1000.0
    return min(max(sigma, 0.0), 1.0)


def as_pictures(latents: torch.Tensor, clock: Clock) -> torch.Tensor:
    """A row's latents with height and width as the last two axes."""
    grid = clock.evaluation.grid if clock.evaluation is not None else None
    if latents.ndim > 2 or grid is None or latents.shape[0] != grid.video:
        return latents
    return latents.unflatten(0, (grid.frames, grid.height, grid.width)).movedim(-1, 0)


def wiener(height: int, width: int, sigma: float, exponent: float, device: torch.device) -> torch.Tensor:
    """Gain (H, W // 2 + 1) float32 of every spatial frequency: the share of its power that is signal.

    Power falls as frequency^-exponent, counted in periods per picture and level below one, with mean 1 over all
    frequencies of the picture; white noise has power 1 as well. At sigma = 1 nothing is signal, and the gain is the
    limit's shape, S over its largest value.
    """
    import torch

    y = torch.fft.fftfreq(height, 1.0 / height, device=device).unsqueeze(1)

    def power(x: torch.Tensor) -> torch.Tensor:
        return (y.square() + x.square()).sqrt().clamp_min(1.0) ** -exponent

    whole = power(torch.fft.fftfreq(width, 1.0 / width, device=device))
    signal = power(torch.fft.rfftfreq(width, 1.0 / width, device=device)) / whole.mean()
    clean, noise = (1.0 - sigma) ** 2, sigma**2
    if clean < 1e-6:
        return signal / signal.amax()
    return clean * signal / (clean * signal + noise)
