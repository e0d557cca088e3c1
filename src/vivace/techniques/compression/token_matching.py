"""Bipartite soft matching of video tokens in local windows of the token grid (ToMe, arXiv 2210.09461, 2303.17604).

The grid (frames, height, width) is cut into windows. In every window the tokens on a regular stride are destinations
and the rest are sources; each source finds the destination of its own window that it resembles most (cosine). Of all
sources of a sample the `count` with the highest resemblance go. Every row of a batch is matched by itself.

Shapes: B rows, S video tokens, W windows, D destinations and R sources of a window (padded), K = S - count tokens kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.core.shapes import TokenGrid

if TYPE_CHECKING:
    import torch

STRIDES = ("1x2x2", "2x2x2", "2x1x1", "4x1x1", "1x4x4", "4x4x4")
"""Destinations are one token of so many frames x rows x columns."""


def parsed(stride: str) -> tuple[int, int, int]:
    """(frames, height, width) of a stride such as `2x2x2`."""
    frames, height, width = (int(n) for n in stride.split("x"))
    return frames, height, width


class Windows:
    """The windows of a grid, as tables of token numbers.

    Args:
        grid: of the video; text is left out.
        window: most frames, rows and columns of a window; every axis is cut into equal pieces.
        stride: of destinations inside a window, on the same axes.
        device: of the tables; None makes the counts alone.

    Attributes:
        destinations: int64 (W, D), padded with 0 where `real` is False.
        real: bool (W, D).
        sources: int64 (W, R), padded with S (no token).
        available: number of sources in the whole grid.
    """

    def __init__(
        self, grid: TokenGrid, window: Sequence[int], stride: Sequence[int], device: Any = None
    ) -> None:
        sides = (grid.frames, grid.height, grid.width)
        cuts = [_pieces(n, size) for n, size in zip(sides, window, strict=True)]
        tables: list[tuple[list[int], list[int]]] = []
        for corner in itertools.product(*cuts):
            near: tuple[list[int], list[int]] = ([], [])
            for place in itertools.product(*corner):
                inside = (p - part.start for p, part in zip(place, corner, strict=True))
                is_source = any(i % step for i, step in zip(inside, stride, strict=True))
                near[is_source].append((place[0] * grid.height + place[1]) * grid.width + place[2])
            tables.append(near)
        self.tokens = grid.video
        self.count = len(tables)
        self.width = max(len(d) for d, _ in tables)
        self.depth = max(len(r) for _, r in tables)
        self.available = sum(len(r) for _, r in tables)
        if device is None:
            return
        import torch

        def table(part: int, size: int, padding: int) -> torch.Tensor:
            rows = [near[part] + [padding] * (size - len(near[part])) for near in tables]
            return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), size)

        found = table(0, self.width, -1)
        real = found >= 0
        self.real = real.to(device)
        self.destinations = found.clamp_min(0).to(device)
        self.sources = table(1, self.depth, self.tokens).to(device)
        # The slot (window, place in it) of every token that is a destination, W * D for the others.
        slots = torch.full((self.tokens,), self.count * self.width, dtype=torch.int64)
        numbers = torch.arange(self.count * self.width).view_as(found)
        # Made in main memory, so that a device without numbers (meta) gets its tables too.
        slots[found[real]] = numbers[real]
        self.slots = slots.to(device)

    def flops(self, channels: int) -> float:
        """Of one product between sources and destinations for one row: similarity, or the sum of what is merged."""
        return 2.0 * channels * self.count * self.width * self.depth


def _pieces(length: int, most: int) -> list[range]:
    """An axis in the fewest pieces of at most `most`, which differ by one at most."""
    number = -(-length // most)
    edges = [i * length // number for i in range(number + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


@dataclass(slots=True, eq=False)
class Match:
    """Which tokens go and who stands for them, for every row.

    Attributes:
        keep: int64 (B, K), tokens that stay, in their order.
        place: int64 (B, S), where in `keep` the token that stands for each token is.
        joined: int64 (B, W, R), the destination in its window of each source that goes, -1 for those that stay.
        number: float32 (B, K), how many tokens each kept one stands for, itself included.
    """

    keep: torch.Tensor
    place: torch.Tensor
    joined: torch.Tensor
    number: torch.Tensor

    def row(self, index: int) -> Match:
        """One row, in memory of its own."""
        return Match(*(x[index : index + 1].clone() for x in self.parts))

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        return self.keep, self.place, self.joined, self.number

    @classmethod
    def stacked(cls, rows: Sequence[Match]) -> Match:
        """Rows as one batch."""
        import torch

        if len(rows) == 1:
            return rows[0]
        return cls(*(torch.cat(parts) for parts in zip(*(r.parts for r in rows), strict=True)))


def match(x: torch.Tensor, windows: Windows, count: int) -> Match:
    """Match the tokens of every row of `x` (B, S, C); `count` of them go.

    Raises:
        ValueError: `count` is more than there are sources.
    """
    import torch

    if count > windows.available:
        raise ValueError(f"{count} tokens cannot go: only {windows.available} are sources.")
    rows, tokens = x.shape[:2]
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    unit = torch.cat([unit, unit.new_zeros(rows, 1, x.shape[2])], dim=1)
    near, far = unit[:, windows.destinations], unit[:, windows.sources]
    alike = far @ near.transpose(-1, -2)
    alike = alike.masked_fill(~windows.real[:, None], float("-inf"))
    best, who = alike.max(dim=-1)
    best = best.masked_fill(windows.sources == tokens, float("-inf")).flatten(1)
    gone = best.topk(count, dim=1).indices
    goes = torch.zeros_like(best, dtype=torch.bool).scatter_(1, gone, True)
    joined = torch.where(goes.view_as(who), who, -1)

    sources = windows.sources.flatten()
    stays = torch.ones(rows, tokens + 1, dtype=torch.bool, device=x.device)
    stays.scatter_(1, sources[gone], False)
    stays = stays[:, :tokens]
    order = stays.cumsum(1) - 1
    kept = tokens - count
    numbers = torch.arange(tokens, device=x.device).expand(rows, -1)
    # Those that go are all written to one place past the end, which is cut off.
    keep = torch.zeros(rows, kept + 1, dtype=torch.int64, device=x.device)
    keep = keep.scatter_(1, torch.where(stays, order, kept), numbers)[:, :kept]
    heirs = windows.destinations.flatten()[_slot(who, windows).flatten(1).gather(1, gone)]
    place = order.scatter(1, sources[gone], order.gather(1, heirs))
    number = 1.0 + _at_kept(_members(joined, windows).sum(-1).flatten(1)[..., None], keep, windows)
    return Match(keep, place, joined, number[..., 0])


def merged(x: torch.Tensor, found: Match, windows: Windows) -> torch.Tensor:
    """Means of the tokens (B, S, C) that each kept one stands for: (B, K, C), in `x`'s dtype.

    Sums are products with a matrix of zeros and ones, so that no order of additions is left to chance.
    """
    import torch

    padded = torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1)
    sums = _members(found.joined, windows).to(x.dtype) @ padded[:, windows.sources]
    total = kept_tokens(x, found) + _at_kept(sums.flatten(1, 2), found.keep, windows)
    return (total / found.number[..., None].to(torch.float32)).to(x.dtype)


def kept_tokens(x: torch.Tensor, found: Match) -> torch.Tensor:
    """The tokens of (B, S, C) that stay: (B, K, C)."""
    return x.gather(1, found.keep[..., None].expand(-1, -1, x.shape[2]))


def restored(x: torch.Tensor, found: Match) -> torch.Tensor:
    """Every token gets what the one that stands for it got: (B, K, C) to (B, S, C)."""
    return x.gather(1, found.place[..., None].expand(-1, -1, x.shape[2]))


def _members(joined: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Which sources go into which destination: float32 (B, W, D, R) of zeros and ones."""
    import torch

    numbers = torch.arange(windows.width, device=joined.device)
    return (joined[:, :, None] == numbers[:, None]).float()


def _slot(who: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Places inside windows (B, W, R) as numbers of slots."""
    import torch

    return who + (torch.arange(windows.count, device=who.device) * windows.width)[:, None]


def _at_kept(values: torch.Tensor, keep: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Values of destinations (B, W * D, C) at the kept tokens (B, K, C); zero for those that are no destination."""
    import torch

    padded = torch.cat([values, values.new_zeros(values.shape[0], 1, values.shape[2])], dim=1)
    return padded.gather(1, windows.slots[keep][..., None].expand(-1, -1, values.shape[2]))
