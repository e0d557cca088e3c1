"""Random numbers of one update: they depend on the seed, the update and the role, and not on the number of processes.

Every process draws for the whole batch and keeps its rows, so that w processes with b samples are one process with w b
samples, and a run that is taken up needs no state of a generator. Drawing is a thousandth of an update's time.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class Chance:
    """Draws in a fixed order from a generator of its own, on the device.

    Args:
        device: where numbers are drawn; other kinds of devices draw other numbers.
        seed, update, role: what the stream of numbers depends on.
        rank, world: this process among how many.
    """

    def __init__(
        self,
        device: torch.device | str,
        seed: int,
        update: int,
        role: str = "",
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        mixed = hashlib.sha256(f"{seed} {update} {role}".encode()).digest()[:7]
        self.generator = torch.Generator(device).manual_seed(int.from_bytes(mixed, "big"))
        self.shared = torch.Generator("cpu").manual_seed(int.from_bytes(mixed, "big"))
        self.rank, self.world = rank, world

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal float32 numbers of a batch's shape (B, ...)."""
        whole = (self.world * like.shape[0], *like.shape[1:])
        return self._own(torch.randn(whole, generator=self.generator, device=self.generator.device), like)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform float32 numbers in [0, 1) for each sample, (B,)."""
        whole = self.world * like.shape[0]
        return self._own(torch.rand(whole, generator=self.generator, device=self.generator.device), like)

    def spread(self, like: Tensor) -> Tensor:
        """Uniform numbers (B,), one from each B-th part of [0, 1) in random order: less noise than `uniform`."""
        count, device = self.world * like.shape[0], self.generator.device
        order = torch.randperm(count, generator=self.generator, device=device)
        within = torch.rand(count, generator=self.generator, device=device)
        return self._own((order + within) / count, like)

    def below(self, high: int) -> int:
        """A whole number from 0 to high - 1, the same in every process."""
        return int(torch.randint(high, (), generator=self.shared))

    def _own(self, whole: Tensor, like: Tensor) -> Tensor:
        count = like.shape[0]
        return whole[self.rank * count : (self.rank + 1) * count].to(like.device)
