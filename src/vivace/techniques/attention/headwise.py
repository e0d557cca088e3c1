"""Static patterns that differ from layer to layer and from head to head, in one kernel call a layer.

A subclass gives all maps that a head may have (`maps`) and which of them each head of a layer has (`assigned`). The
maps are uploaded once for a grid and shared by all layers; a layer keeps small index tensors. So all layers run the
same code on tensors of the same shapes, and a compiled block body serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vivace.core.shapes import TokenGrid, Workload
from vivace.kernels.api import select
from vivace.kernels.block_attention.spec import BLOCKS, Routes
from vivace.kernels.block_attention.spec import OP as ATTEND
from vivace.kernels.block_sparse_attention.spec import BlockMap, check_call
from vivace.models.adapter import AttentionSite, ExpertDescription, ModelDescription
from vivace.techniques.attention.block_sparse import BlockSparseAttention
from vivace.techniques.base import Estimate, Target

if TYPE_CHECKING:
    import torch

    from vivace.kernels.block_sparse_attention.spec import Kernel


class MapBank:
    """Maps of one grid on one device, for any number of layers.

    Args:
        maps: of one head group and one number of blocks each, slots of one width; orders of tokens may differ.
        device: of the tensors.

    Raises:
        ValueError: the maps differ in size, or are for more than one head.
    """

    def __init__(self, maps: Sequence[BlockMap], device: torch.device | str = "cpu") -> None:
        import torch

        if len({m.slots.shape for m in maps}) != 1 or any(len(m.keep) != 1 for m in maps):
            raise ValueError("maps of one kernel must have one head group and slots of one shape.")
        width = maps[0].slots.shape[1]
        if torch.device(device).type == "cuda":
            # The GPU's kernel is made for these block sizes; what is added is padding.
            width = next((size for size in BLOCKS if size >= width), width)
        orders: dict[bytes, int] = {}
        order_of = [orders.setdefault(m.slots.tobytes(), len(orders)) for m in maps]
        slots = [np.frombuffer(o, dtype=maps[0].slots.dtype).reshape(maps[0].slots.shape) for o in orders]
        flat = np.stack([_widened(s, width).reshape(-1) for s in slots])
        counts = np.stack([(s >= 0).sum(1) for s in slots])
        keep = np.stack([m.keep[0] for m in maps])
        # Blocks without a token are never listed.
        keep = keep & (counts[order_of] > 0)[:, None]
        longest = int(keep.sum(-1).max())
        listed = np.argsort(~keep, axis=-1, kind="stable")[..., :longest]

        def put(x: np.ndarray, dtype: Any = np.int64) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(x.astype(dtype))).to(device)

        self.block, self.tokens = width, maps[0].tokens
        self.pairs = [m.pairs(1, 1) for m in maps]
        self.order_of = order_of
        # Padding repeats token 0: it is never read as a key, and nobody asks for its output.
        self.order, self.back = put(np.maximum(flat, 0)), put(np.stack([_back(f) for f in flat]))
        self.index, self.count = put(listed, np.int32), put(keep.sum(-1), np.int32)
        self.sizes = put(counts, np.int32) if (counts < width).any() else None


class HeadwiseAttention:
    """The kernel of one layer; see `vivace.kernels.block_sparse_attention.spec` for what an instance does.

    Args:
        bank: the maps.
        which: number of its map, for every head.
        attend: `vivace.kernels.block_attention` on a backend.
    """

    def __init__(self, bank: MapBank, which: Sequence[int], attend: Callable[..., Any]) -> None:
        import torch

        device = bank.order.device
        self.bank, self.attend = bank, attend
        self.which = torch.tensor(list(which), device=device)
        self.order_of = torch.tensor([bank.order_of[i] for i in which], device=device)
        self.heads = torch.arange(len(which), device=device)
        self._pairs = sum(bank.pairs[i] for i in which)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        bank, (b, s, h, d) = self.bank, q.shape
        check_call(bank.tokens, len(self.heads), q, mask)
        order = bank.order.index_select(0, self.order_of)  # (H, N * C)
        # Where every head's tokens stand in (S * H), and where every (token, head) goes in (H * N * C).
        there = (order * h + self.heads[:, None]).flatten()
        slots = order.shape[1]
        back = bank.back.index_select(0, self.order_of) + self.heads[:, None] * slots
        qa, ka, va = (x.reshape(b, s * h, d).index_select(1, there).view(b, h, slots, d) for x in (q, k, v))
        index, count = (x.index_select(0, self.which) for x in (bank.index, bank.count))
        sizes = None if bank.sizes is None else bank.sizes.index_select(0, self.order_of)
        if mask is None:
            out, _ = self.attend(qa, ka, va, _routes(index, count, sizes, bank.block), d**-0.5, None)
        else:
            # Heads have other orders, so other key slots are masked: every head becomes a batch row.
            qa, ka, va = (x.reshape(b * h, 1, slots, d) for x in (qa, ka, va))
            rows = [None if x is None else _per_row(x, b) for x in (index, count, sizes)]
            bias = _bias(mask, b)[:, order].flatten(0, 1)
            routes = Routes(rows[0], rows[1], rows[2], bank.block)  # type: ignore[arg-type]
            out, _ = self.attend(qa, ka, va, routes, d**-0.5, bias)
        out = out.reshape(b, h * slots, d).index_select(1, back.T.flatten())
        return out.view(b, s, h, d)

    def pairs(self, batch: int, heads: int, queries: int, keys: int) -> float:
        """The maps' pairs; what the padding of blocks adds is not work asked for and not counted."""
        return float(batch) * self._pairs


def _routes(index: torch.Tensor, count: torch.Tensor, sizes: torch.Tensor | None, block: int) -> Routes:
    return Routes(index[None], count[None], None if sizes is None else sizes[None], block)


def _per_row(x: torch.Tensor, batch: int) -> torch.Tensor:
    """(H, ...) to (B * H, 1, ...)."""
    return x.expand(batch, *x.shape).flatten(0, 1)[:, None]


def _bias(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """A key mask (B or 1, 1, 1, S), bool or additive, as what is added to scores: float32 (B, S)."""
    import torch

    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask[:, 0, 0].float().expand(batch, -1)


def _widened(slots: np.ndarray, width: int) -> np.ndarray:
    """Slots (N, C) with each block's tokens first, padded to `width`."""
    packed = np.take_along_axis(slots, np.argsort(slots < 0, axis=1, kind="stable"), 1)
    return np.pad(packed, ((0, 0), (0, width - slots.shape[1])), constant_values=-1)


def _back(flat: np.ndarray) -> np.ndarray:
    """The slot of every token (S,) in flattened slots."""
    filled = flat >= 0
    return np.flatnonzero(filled)[np.argsort(flat[filled])]


@dataclass(frozen=True, kw_only=True)
class HeadwiseSparse(BlockSparseAttention):
    """Base of the static methods whose heads have patterns of their own."""

    abstract: ClassVar[bool] = True

    def maps(self, grid: TokenGrid) -> tuple[BlockMap, ...]:
        """All maps that a head may have on a grid, of one shape; empty where the grid is left dense."""
        raise TypeError(f"{type(self).__name__} does not say which maps there are")

    def assigned(self, expert: str, layer: int, heads: int) -> tuple[int, ...]:
        """The number of its map, for every head of a layer of an expert (`transformer`)."""
        raise TypeError(f"{type(self).__name__} does not say which head has which map")

    @property
    def per_site(self) -> bool:
        return True

    @property
    def operation(self) -> str:
        return ATTEND if self.per_site else super().operation

    def visited_share(self, model: ModelDescription, grid: TokenGrid) -> float:
        if not self.per_site:
            return super().visited_share(model, grid)
        maps = self.maps(grid)
        layers = [(e, i) for e in model.experts for i in self._layers(model, e)]
        if not maps or not layers:
            return 1.0
        shares = [m.density for m in maps]
        each = [shares[n] for e, i in layers for n in self.assigned(e.name, i, e.heads)]
        return float(np.mean(each))

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact where the experts save alike, as who runs which step is not known here; bounds otherwise."""
        if not self.per_site:
            return super().estimate(model, workload, base)
        grid = model.grid(workload)
        maps = self.maps(replace(grid, text=0)) if grid is not None else ()
        if grid is None or not maps:
            return base
        skipped = [grid.video**2 - m.pairs(1, 1) for m in maps]
        evaluations = base.nfe[0] * workload.batch * max(0.0, 1.0 - self.dense_steps / workload.steps)
        saved = [
            evaluations * sum(skipped[n] for i in self._layers(model, e) for n in self.assigned(e.name, i, e.heads))
            for e in model.experts
        ]  # fmt: skip
        (low, high), cost = (min(saved), max(saved)), 4.0 * model.experts[0].head_dim
        return Estimate(
            base.nfe,
            base.blocks_run,
            (base.attention_pairs[0] - high, base.attention_pairs[1] - low),
            (base.flops[0] - cost * high, base.flops[1] - cost * low),
        )

    def _layers(self, model: ModelDescription, expert: ExpertDescription) -> list[int]:
        """The layer of every sparse site of an expert."""
        sites = set(self._described(model, expert))
        return [
            i for i, block in enumerate(expert.block_sites) for site in sites if site.startswith(f"{block}.")
        ]

    def _build(
        self, target: Target, sites: Sequence[AttentionSite], grid: TokenGrid, device: Any, dtype: str
    ) -> Sequence[Kernel | None]:
        if not self.per_site:
            return super()._build(target, sites, grid, device, dtype)
        maps = self.maps(grid)
        chosen = [self.assigned(s.site.partition(".")[0], s.index, s.heads) for s in sites] if maps else []
        if all(maps[n].keep.all() for each in chosen for n in each):
            return [None] * len(sites)
        used = sorted({n for each in chosen for n in each})
        bank = MapBank([maps[n] for n in used], device)
        context = {"device": device.type, "block": bank.block, "head_dim": sites[0].head_dim, "dtype": dtype}
        choice = select(ATTEND, self.backend, **context)
        target.chosen(choice)
        place = {n: i for i, n in enumerate(used)}
        return [
            None
            if all(maps[n].keep.all() for n in each)
            else HeadwiseAttention(bank, [place[n] for n in each], choice.run)
            for each in chosen
        ]
