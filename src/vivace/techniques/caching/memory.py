"""What a cache remembers: per batch row a short history of values with their place on the trajectory.

A row is one sample of one guidance branch. Values are tuples of tensors without a batch axis, one for each stream
(video, text) or one for a whole network output; None stands for a stream that does not exist.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Value = tuple[torch.Tensor | None, ...]

STORAGES = ("same", "bf16", "fp8")
RowName = tuple[str, int]


@dataclass(slots=True, eq=False)
class Stored:
    """A tensor as it lies in the cache: as it was, as bf16, or as fp8 (e4m3) with one scale; perhaps on the host."""

    data: torch.Tensor
    scale: torch.Tensor | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor, storage: str = "same", offload: bool = False) -> Stored:
        """Store `tensor`. No synchronisation with the device: the scale stays on it."""
        import torch

        data, scale = tensor, None
        if storage == "bf16":
            data = tensor.to(torch.bfloat16)
        elif storage == "fp8":
            top = torch.finfo(torch.float8_e4m3fn).max
            scale = (tensor.abs().amax().float() / top).clamp_min(1e-12)
            data = (tensor.float() / scale).to(torch.float8_e4m3fn)
        if offload and data.device.type != "cpu":
            host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
            host.copy_(data, non_blocking=True)
            data = host
        return cls(data, scale, tensor.dtype, tensor.device)

    def get(self) -> torch.Tensor:
        """The tensor, on its device and in its dtype."""
        data = self.data.to(self.device, non_blocking=True)
        if self.scale is not None:
            return (data.float() * self.scale).to(self.dtype)
        return data.to(self.dtype)


@dataclass(slots=True, eq=False)
class Entry:
    """One remembered value and its coordinate (step index or noise level)."""

    at: float
    values: tuple[Stored | None, ...]


@dataclass(slots=True, eq=False)
class History:
    """Values of the last computed steps, newest first."""

    entries: list[Entry] = field(default_factory=list)

    def push(self, at: float, values: Value, depth: int, storage: str, offload: bool) -> None:
        """Remember a computed value; at most `depth` are kept."""
        kept = tuple(None if v is None else Stored.of(v, storage, offload) for v in values)
        self.entries = [Entry(at, kept), *self.entries[: depth - 1]]

    @property
    def nodes(self) -> tuple[float, ...]:
        """Coordinates of what is remembered, newest first."""
        return tuple(e.at for e in self.entries)

    def combine(self, weights: Sequence[float | torch.Tensor]) -> Value:
        """Weighted sum over the entries, stream by stream."""
        out: list[Any] = []
        for stream in range(len(self.entries[0].values)):
            if self.entries[0].values[stream] is None:
                out.append(None)
                continue
            total = None
            for w, e in zip(weights, self.entries, strict=False):
                if isinstance(w, float) and w == 0.0:
                    continue
                value = e.values[stream].get()  # type: ignore[union-attr]
                if total is None:
                    total = value if isinstance(w, float) and w == 1.0 else value * w
                else:
                    total = total + value * w
            out.append(total)
        return tuple(out)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(slots=True, eq=False)
class Row:
    """Memory of one (branch, sample)."""

    history: History = field(default_factory=History)
    marks: dict[str, Any] = field(default_factory=dict)
    """What the signal remembers (references to compare with)."""


@dataclass(slots=True, eq=False)
class Ballot:
    """What decides for one sample: the policy's accumulators. All branches of the sample follow one vote."""

    total: float = 0.0
    skips: int = 0
    due: int = 0
    value: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)
    step: int = -1
    """Step of the last decision."""
    reuse: bool = False


@dataclass(slots=True, eq=False)
class Memory:
    """All of one site, expert and chunk in one generation."""

    rows: dict[RowName, Row] = field(default_factory=dict)
    ballots: dict[Hashable, Ballot] = field(default_factory=dict)
    now: Any = None
    """The evaluation under way, between the first and the last block of a span."""
    drift: list[torch.Tensor] = field(default_factory=list)
    """Relative L1 errors (scalars on the device) of what would have been predicted at computed steps."""

    def row(self, name: RowName) -> Row:
        """The row, made on first use."""
        return self.rows.setdefault(name, Row())

    def ballot(self, key: Hashable) -> Ballot:
        """The sample's ballot, made on first use."""
        return self.ballots.setdefault(key, Ballot())
