"""From which density on block-sparse attention stops paying, measured on the device at hand.

Density is the share of all query-key pairs that is visited, 0 to 1. Below the break-even density the sparse kernel is
faster than the fastest dense vendor (`vivace.kernels.dense_attention`), above it a mask slows things down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.kernels.api import Choice, device_name, measured, select, timed
from vivace.kernels.dense_attention.spec import OP as DENSE
from vivace.kernels.dense_attention.spec import dtype_name, on_gpu

if TYPE_CHECKING:
    import torch

SPARSE = ("block_attention", "block_sparse_attention")
DENSITIES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
CPU_BREAK_EVEN = 0.6
"""On a CPU, for kernels that gather keys (the figure of `techniques.attention.block_sparse`, from 2,048 tokens)."""
SEEN_ON_CPU = "gathering keys on a processor, measured at 2,048 tokens"


@dataclass(frozen=True, slots=True)
class Shape:
    """What is timed: one row of `heads` heads of `head_dim` dimensions over `tokens` tokens, in blocks of `block`."""

    tokens: int
    heads: int
    head_dim: int
    block: int = 64
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens x {self.heads} heads x {self.head_dim}, {self.dtype}, blocks of {self.block}"


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Times of one sparse kernel at several densities beside the dense one, and where they meet. Seconds are medians.

    Attributes:
        points: (density, seconds), densities rising.
        device: name of the processor or GPU.
    """

    op: str
    device: str
    shape: Shape
    dense: Choice
    dense_seconds: float
    sparse: Choice
    points: tuple[tuple[float, float], ...]

    @property
    def density(self) -> float:
        """Where the sparse kernel stops paying: 0 where it never pays, the last density where it always did."""
        return crossing(self.points, self.dense_seconds)

    def seconds(self, density: float) -> float:
        """Time of the sparse kernel at a density, straight lines between the points; the ends continue theirs."""
        points = self.points
        if len(points) == 1:
            return points[0][1]
        after = next((i for i in range(1, len(points)) if points[i][0] >= density), len(points) - 1)
        (d0, t0), (d1, t1) = points[after - 1], points[after]
        return max(0.0, t0 + (t1 - t0) * (density - d0) / (d1 - d0))


def crossing(points: Sequence[tuple[float, float]], dense: float) -> float:
    """The density at which times (density, seconds) first reach `dense` seconds, by straight lines between them."""
    before: tuple[float, float] | None = None
    for density, seconds in points:
        if seconds >= dense:
            if before is None:
                return 0.0
            return before[0] + (density - before[0]) * (dense - before[1]) / (seconds - before[1])
        before = density, seconds
    return points[-1][0] if points else 0.0


_table: dict[tuple[str, str, Shape], BreakEven] = {}


def break_even(
    op: str,
    shape: Shape,
    device: str = "cpu",
    *,
    backend: str = "auto",
    densities: Sequence[float] = DENSITIES,
    repeats: int = 5,
    budget: float = 20.0,
) -> BreakEven:
    """Time dense attention and a sparse kernel on random tensors, in turns, and remember the result for `pays`.

    Args:
        op: `block_attention` or `block_sparse_attention`.
        shape: tokens are rounded up to whole blocks.
        device: "cpu" or "cuda".
        backend: the sparse kernel by name, or "auto".
        densities: shares of the blocks that every block of queries sees; at least one block.
        repeats: timed runs of each.
        budget: seconds after which no further round is begun; one is always timed.

    Raises:
        ConfigError: no kernel can run here; the sentence gives the reasons.
        ValueError: the operation is not one of the two.
    """
    import statistics

    import torch

    if op not in SPARSE:
        raise ValueError(f"{op} is not a block-sparse attention; those are {', '.join(SPARSE)}.")
    blocks = max(2, math.ceil(shape.tokens / shape.block))
    tokens = blocks * shape.block
    context = {"device": device, "dtype": shape.dtype, "head_dim": shape.head_dim}
    random = torch.Generator(device).manual_seed(0)
    size = (1, tokens, shape.heads, shape.head_dim)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    q, k, v = (torch.randn(size, generator=random, device=device).to(dtype) for _ in range(3))
    dense_context = context | {"scores": tokens**2 * shape.heads, "mask": False}
    vendors = measured(DENSE, [(q, k, v)], dense_context, repeats=repeats, budget=budget)
    dense = select(DENSE, measured=vendors, **dense_context)
    sparse = select(op, backend, block=shape.block, **context)

    runs: dict[str, Callable[[], Any]] = {"dense": lambda: dense.run(q, k, v)}
    shares: dict[str, float] = {}
    for density in sorted(densities):
        kept = min(blocks, max(1, round(density * blocks)))
        name = str(kept)
        shares[name] = kept / blocks
        runs[name] = _sparse_run(op, sparse, (q, k, v), some_blocks(blocks, kept), shape.block, device)
    with torch.no_grad():
        timed(runs, device, 1)
        times = timed(runs, device, repeats, budget=budget)
    seconds = {name: statistics.median(t) for name, t in times.items()}
    points = tuple((shares[name], seconds[name]) for name in shares)
    found = BreakEven(op, device_name(context), shape, dense, seconds["dense"], sparse, points)
    _table[op, found.device, shape] = found
    return found


def some_blocks(blocks: int, kept: int) -> torch.Tensor:
    """Bool (blocks, blocks) on the CPU with `kept` in every row: the diagonal, the rest drawn with a fixed seed."""
    import torch

    draw = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0))
    draw.fill_diagonal_(2.0)
    keep = torch.zeros(blocks, blocks, dtype=torch.bool)
    return keep.scatter_(1, draw.topk(kept, dim=1).indices, True)


def _sparse_run(
    op: str,
    choice: Choice,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    keep: torch.Tensor,
    block: int,
    device: str,
) -> Callable[[], Any]:
    """A call of a sparse kernel as a technique makes it, everything that is made once left out."""
    if op == "block_sparse_attention":
        from vivace.kernels.block_sparse_attention.spec import BlockMap

        kernel = choice.run(BlockMap.contiguous(keep[None].numpy(), block, qkv[0].shape[1]), device)
        return lambda: kernel(*qkv)
    from vivace.kernels.block_attention.spec import Routes

    routes = Routes.of_mask(keep[None, None].to(device), None, block)
    rows = tuple(x.transpose(1, 2) for x in qkv)
    return lambda: choice.run(*rows, routes)


def pays(op: str, density: float, context: Mapping[str, Any]) -> str:
    """Why a mask of this density would slow things down, with the numbers; empty when it pays.

    What was measured for the very shape decides. Else, on a CPU, the stored `CPU_BREAK_EVEN`; on a GPU the shape is
    measured now, once, where the context tells it. Where nothing is known, nothing is refused.

    Args:
        op: `block_attention` or `block_sparse_attention`.
        density: share of all pairs that is visited, 0 to 1.
        context: `device`; for a measured answer also `tokens`, `heads`, `head_dim`, and optionally `dtype`, `block`.
    """
    shape = _shape(context)
    found = None if shape is None else _table.get((op, device_name(context), shape))
    if found is None and not on_gpu(context):
        if density <= CPU_BREAK_EVEN:
            return ""
        return (
            f"visits {density:.0%} of the pairs, and above {CPU_BREAK_EVEN:.0%} the sparse kernel costs what it saves "
            f"({SEEN_ON_CPU})"
        )
    if found is None and shape is not None:
        found = break_even(op, shape, str(context["device"]))
    if found is None or density < found.density:
        return ""
    return (
        f"visits {density:.0%} of the pairs: {found.sparse.name} would take "
        f"{found.seconds(density) * 1e3:.3g} ms where {found.dense.name} takes {found.dense_seconds * 1e3:.3g} ms for "
        f"all of them ({found.shape} on {found.device}); it pays below {found.density:.0%}"
    )


def _shape(context: Mapping[str, Any]) -> Shape | None:
    if any(context.get(name) is None for name in ("tokens", "heads", "head_dim")):
        return None
    dtype = dtype_name(context) or ("bfloat16" if on_gpu(context) else "float32")
    return Shape(context["tokens"], context["heads"], context["head_dim"], context.get("block", 64), dtype)


def forget() -> None:
    """Drop what was measured."""
    _table.clear()
