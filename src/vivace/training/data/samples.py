"""A set of training samples and its endless stream, whose place is one integer: the number of the batch.

Every epoch is a fresh permutation that depends on the seed and the epoch alone, and epochs are laid end to end. Batch k
of rank r among w processes is b samples from place (k w + r) b of that line, so that a run taken up at batch k sees
what it would have seen, and w processes together see the batches of one process with batch w b.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivace.core.digest import tensors_digest
from vivace.core.errors import ConfigError

Batch = dict[str, Tensor]
"""By field: `latents` (B, C, T, H, W), `text` (B, L, D), and what else the set holds."""


@functools.lru_cache(maxsize=4)
def shuffled(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation int64 (samples,) of one epoch; the same on every machine and with every library version.

    Sorts the numbers of a SplitMix64 generator (Steele, Lea and Flood, OOPSLA 2014), which are all different.
    """
    start = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "little")
    x = np.arange(1, samples + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


class Samples(ABC):
    """Samples with named fields: `latents`, `text`, where kept `noise`, `trajectory`, `mask`, `text_mask`, `pooled`."""

    empty: Mapping[str, Tensor]
    """Text fields (L, D) of the empty prompt, for guidance; no entries where they are not kept."""
    ahead: int = 0
    """Batches that a thread prepares in advance."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, sorted."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """Sixteen hex digits of all the data."""

    @abstractmethod
    def rows(self, index: Sequence[int] | np.ndarray, fields: Sequence[str] = ()) -> Batch:
        """Samples by their numbers, where the set keeps them. `fields`: names; () for all."""

    def picks(self, step: int, batch: int, seed: int = 0, rank: int = 0, world: int = 1) -> np.ndarray:
        """Numbers int64 (batch,) of the samples in one batch."""
        place = np.arange(batch, dtype=np.int64) + (step * world + rank) * batch
        epoch, at = np.divmod(place, len(self))
        out = np.empty(batch, dtype=np.int64)
        for e in np.unique(epoch):
            chosen = epoch == e
            out[chosen] = shuffled(len(self), seed, int(e))[at[chosen]]
        return out

    def stream(
        self,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        *,
        device: str | torch.device = "cpu",
        fields: Sequence[str] = (),
    ) -> Iterator[Batch]:
        """Batches without end, on a device, from batch number `start` on.

        Args:
            batch: samples that this process gets at a time; may exceed the size of the set.
            seed: of the shuffling.
            rank, world: this process among how many.
            start: batches that were already seen.
            device: where the tensors are put.
            fields: names of what is read; () for everything.

        Raises:
            ConfigError: there is no such field, or a number is out of range.
        """
        if batch < 1 or start < 0 or not 0 <= rank < world:
            raise ConfigError(
                f"batch {batch} from {start} on as process {rank} of {world} is no stream; "
                "batch must be at least 1, start at least 0, and rank below world."
            )
        if missing := sorted(set(fields) - set(self.fields)):
            raise ConfigError(f"the data hold no {', '.join(missing)}; they hold {', '.join(self.fields)}.")
        place = torch.device(device)

        def make(step: int) -> Batch:
            rows = self.rows(self.picks(step, batch, seed, rank, world), fields)
            return {name: _moved(value, place, self.ahead > 0) for name, value in rows.items()}

        return self._ahead(make, start) if self.ahead else map(make, count(start))

    def _ahead(self, make: Any, start: int) -> Iterator[Batch]:
        """`make(start)`, `make(start + 1)`, ...: the next ones are being made while the last one is used."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            steps = count(start)
            waiting = deque(pool.submit(make, next(steps)) for _ in range(self.ahead))
            try:
                while True:
                    waiting.append(pool.submit(make, next(steps)))
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


class MemorySet(Samples):
    """Samples that lie in tensors, on a GPU for instance; nothing is copied but what a batch needs.

    Args:
        tensors: by field, with equal first sizes.
        empty: text fields of the empty prompt.

    Raises:
        ConfigError: the tensors do not have one number of samples, or none.
    """

    def __init__(self, tensors: Mapping[str, Tensor], empty: Mapping[str, Tensor] | None = None) -> None:
        sizes = {len(value) for value in tensors.values()}
        if len(sizes) != 1 or not min(sizes):
            told = ", ".join(f"{name} {len(value)}" for name, value in tensors.items()) or "no fields"
            raise ConfigError(f"every field needs the same number of samples, at least one; got {told}.")
        self.tensors, self.empty = dict(tensors), dict(empty or {})

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(sorted(self.tensors))

    @property
    def hash(self) -> str:
        named = [*self.tensors.items(), *((f"empty.{name}", value) for name, value in self.empty.items())]
        return tensors_digest(named).hex()[:16]

    def rows(self, index: Sequence[int] | np.ndarray, fields: Sequence[str] = ()) -> Batch:
        where = torch.as_tensor(np.asarray(index, dtype=np.int64))
        return {
            name: self.tensors[name].index_select(0, where.to(self.tensors[name].device))
            for name in fields or self.fields
        }


def _moved(value: Tensor, device: torch.device, pin: bool) -> Tensor:
    if pin and device.type == "cuda":
        # From pinned memory the copy runs beside the work of the GPU.
        value = value.pin_memory()
    return value.to(device, non_blocking=True)
