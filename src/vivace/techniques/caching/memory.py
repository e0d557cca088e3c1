"""What a cache remembers: per batch row a short history of values with their place on the trajectory.

A row is one sample of one guidance branch. Values are tuples of tensors without a batch axis, one for each stream
(video, text) or one for a whole network output; None stands for a stream that does not exist. How they lie in memory is
the cache's setting `storage`, or the plan's `cache_format`, which holds for all caches (`Form`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vivace.core.context import StateStore
    from vivace.kernels.cache_codec.spec import Packed

    Value = tuple[torch.Tensor | None, ...]

STORAGES = ("same", "bf16", "fp8")
RowName = tuple[str, int]
AXES = ("token", "channel")
LATENT = 3
"""Last axes of a network's output (frames, rows, columns): one axis of positions when scales are shared."""


@dataclass(frozen=True, slots=True)
class Form:
    """How all caches of a plan keep tensors in few bits (`vivace.kernels.cache_codec`).

    Attributes:
        name: `int8`, `fp8`, `int4` or `int2`.
        group: numbers that share a scale; 0 for the whole axis.
        axis: `token`: channels of a token share scales; `channel`: tokens of a channel. Positions of latents, which
            have few channels, share scales either way.
        residual: newest values of every history that stay as they are.
        report: report(effect, amount) adds to the receipt.
    """

    name: str
    group: int
    axis: str
    residual: int
    report: Callable[[str, float], None]

    def pack(self, x: torch.Tensor) -> Packed:
        """A tensor (..., S, C) of tokens, or (..., C, T, H, W) of latents, in few bits."""
        from vivace.kernels.cache_codec.reference import pack

        x, axis = x.detach(), -1
        if x.ndim > LATENT:
            x = x.flatten(-LATENT)
        elif self.axis == "channel" and x.ndim > 1:
            axis = -2
        return pack(x, self.name, self.group, axis)

    def hold(self, new: int, full: int) -> None:
        """Tell the receipt of more (or fewer) bytes that are held, and of what they would be as they were."""
        self.report("bytes_held", new)
        self.report("bytes_without", full)


@dataclass(slots=True, eq=False)
class Stored:
    """A tensor as it lies in the cache: as it was, as bf16, as fp8 (e4m3) with one scale, or packed; on any device.

    `full` are the bytes of the tensor as it was.
    """

    data: torch.Tensor | Packed
    scale: torch.Tensor | None
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    offload: bool = False

    @classmethod
    def of(
        cls, tensor: torch.Tensor, storage: str = "same", offload: bool = False, form: Form | None = None
    ) -> Stored:
        """Store `tensor`, packed where there is a `form`. No synchronisation with the device: scales stay on it."""
        import torch

        shape = tuple(tensor.shape)
        if form is not None:
            packed = form.pack(tensor).moved(lambda t: _away(t, offload))
            return cls(packed, None, tensor.dtype, tensor.device, shape, offload)
        data, scale = tensor, None
        if storage == "bf16":
            data = tensor.to(torch.bfloat16)
        elif storage == "fp8":
            top = torch.finfo(torch.float8_e4m3fn).max
            scale = (tensor.abs().amax().float() / top).clamp_min(1e-12)
            data = (tensor.float() / scale).to(torch.float8_e4m3fn)
        return cls(_away(data, offload), scale, tensor.dtype, tensor.device, shape, offload)

    def get(self) -> torch.Tensor:
        """The tensor, on its device and in its dtype."""
        import torch

        if not isinstance(self.data, torch.Tensor):
            from vivace.kernels.cache_codec.reference import unpack

            packed = self.data.moved(lambda t: t.to(self.device, non_blocking=True))
            return unpack(packed).view(self.shape)
        data = self.data.to(self.device, non_blocking=True)
        if self.scale is not None:
            return (data.float() * self.scale).to(self.dtype)
        return data.to(self.dtype)

    def packed(self, form: Form) -> Stored:
        """The same value packed; itself where it is already."""
        import torch

        if not isinstance(self.data, torch.Tensor):
            return self
        return Stored.of(self.get(), offload=self.offload, form=form)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def full(self) -> int:
        """Bytes of the tensor as it was."""
        import math

        return math.prod(self.shape) * self.dtype.itemsize


def _away(tensor: torch.Tensor, offload: bool) -> torch.Tensor:
    """On the host where it is to wait there."""
    if not offload or tensor.device.type == "cpu":
        return tensor
    import torch

    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


@dataclass(slots=True, eq=False)
class Entry:
    """One remembered value and its coordinate (step index or noise level)."""

    at: float
    values: tuple[Stored | None, ...]


@dataclass(slots=True, eq=False)
class History:
    """Values of the last computed steps, newest first."""

    entries: list[Entry] = field(default_factory=list)

    def push(
        self,
        at: float,
        values: Value,
        depth: int,
        storage: str,
        offload: bool,
        form: Form | None = None,
    ) -> None:
        """Remember a computed value; at most `depth` are kept. With a `form` all but the newest ones are packed."""
        before, held = self.entries, _bytes(self.entries)
        now = form if form is not None and form.residual == 0 else None
        kept = tuple(None if v is None else Stored.of(v, storage, offload, now) for v in values)
        self.entries = [Entry(at, kept), *before[: depth - 1]]
        if form is None:
            return
        for i in range(form.residual, len(self.entries)):
            entry = self.entries[i]
            old = tuple(None if v is None else v.packed(form) for v in entry.values)
            self.entries[i] = Entry(entry.at, old)
        form.hold(*(a - b for a, b in zip(_bytes(self.entries), held, strict=True)))

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


def _bytes(entries: Sequence[Entry]) -> tuple[int, int]:
    """Bytes that entries hold, and of their tensors as they were."""
    found = [v for e in entries for v in e.values if v is not None]
    return sum(v.nbytes for v in found), sum(v.full for v in found)


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
    form: Form | None = None
    """How tensors are kept, in place of the cache's own `storage`."""

    @classmethod
    def of(cls, store: StateStore, technique: str, site: Hashable) -> Memory:
        """The memory of a site in this generation, made on first use."""
        return store.shared(technique, site, lambda: cls(form=store.form))

    def keep(
        self, value: torch.Tensor, storage: str, offload: bool, instead_of: Stored | None = None
    ) -> Stored:
        """A tensor that is kept outside of a history, in the place of an older one."""
        kept = Stored.of(value, storage, offload, self.form)
        if self.form is not None:
            gone = (0, 0) if instead_of is None else (instead_of.nbytes, instead_of.full)
            self.form.hold(kept.nbytes - gone[0], kept.full - gone[1])
        return kept

    def row(self, name: RowName) -> Row:
        """The row, made on first use."""
        return self.rows.setdefault(name, Row())

    def ballot(self, key: Hashable) -> Ballot:
        """The sample's ballot, made on first use."""
        return self.ballots.setdefault(key, Ballot())
