"""What every block-sparse attention kernel must satisfy, for ours and for a third party's.

    failures = check_kernel(MyKernel)            # a class or function `make(block_map, device)`
    assert not failures, "\\n".join(failures)

Each check returns sentences about what is wrong; none means it holds. The oracle is dense float64 attention under the
token mask, written here on its own so that it shares no code with what it judges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vivace.kernels.block_sparse_attention.spec import TOLERANCE, BlockMap, Kernel

Make = Callable[[BlockMap, Any], Kernel]


@dataclass(frozen=True, slots=True)
class Case:
    """One pattern: tokens, block size, share of blocks kept, and head groups."""

    name: str
    tokens: int
    block: int
    density: float = 0.5
    maps: int = 1
    shuffled: bool = False

    def block_map(self, seed: int = 0) -> BlockMap:
        """A random map in which every block sees itself; tokens in order, or dealt out at random with gaps."""
        rng = np.random.default_rng(seed)
        blocks = -(-self.tokens // self.block)
        keep = rng.random((self.maps, blocks, blocks)) < self.density
        keep |= np.eye(blocks, dtype=bool)
        if not self.shuffled:
            return BlockMap.contiguous(keep, self.block, self.tokens)
        slots = np.full(blocks * self.block, -1, dtype=np.int64)
        slots[rng.permutation(slots.size)[: self.tokens]] = rng.permutation(self.tokens)
        slots = slots.reshape(blocks, self.block)
        # A block that got no token is nobody's key, so that its row and column may stay.
        return BlockMap(np.take_along_axis(slots, np.argsort(slots < 0, -1, kind="stable"), -1), keep)


HEADS, DIM = 4, 16
CASES = (
    Case("even blocks", 64, 16),
    Case("odd length", 45, 16),
    Case("length below one block", 7, 16),
    Case("single block", 16, 16),
    Case("blocks of one token", 12, 1),
    Case("unequal rows", 96, 16, 0.2),
    Case("a map per head", 50, 16, 0.4, maps=HEADS),
    Case("shuffled tokens with gaps", 70, 16, 0.4, shuffled=True),
    Case("everything kept", 40, 16, 1.0),
)


def oracle(
    block_map: BlockMap, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Dense float64 attention, head by head and row by row; zeros for a query that sees nothing."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    q, k, v = (x.detach().cpu().double() for x in (q, k, v))
    allowed = torch.from_numpy(block_map.token_mask())
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            seen = allowed[h % len(allowed)].clone()
            if mask is not None:
                seen &= mask.cpu()[b % mask.shape[0], 0]
            for i in range(q.shape[1]):
                if seen[i].any():
                    keys = seen[i].nonzero()[:, 0]
                    weights = torch.softmax(k[b, keys, h] @ q[b, i, h] / q.shape[-1] ** 0.5, 0)
                    out[b, i, h] = weights @ v[b, keys, h]
    return out


def _inputs(
    tokens: int, dtype: torch.dtype, device: Any, batch: int = 2, scale: float = 1.0
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    shape = (batch, tokens, HEADS, DIM)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return tuple(x.to(dtype).to(device) for x in (q * scale, k, v))


def _compare(
    what: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, limit: float | None = None
) -> list[str]:
    if got.dtype != dtype:
        return [f"{what}: returns {got.dtype} for {dtype} inputs"]
    if got.shape != want.shape:
        return [f"{what}: returns shape {tuple(got.shape)} instead of {tuple(want.shape)}"]
    error = (got.detach().cpu().double() - want).abs().max().item()
    limit = TOLERANCE[str(dtype).removeprefix("torch.")] if limit is None else limit
    return [] if error <= limit else [f"{what}: largest error {error:.3g}, allowed {limit:.3g}"]


def check_values(make: Make, device: Any, case: Case) -> list[str]:
    """Equal to the oracle in float32 and bfloat16."""
    block_map = case.block_map()
    kernel, found = make(block_map, device), []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = _inputs(case.tokens, dtype, device)
        found += _compare(f"{case.name}, {dtype}", kernel(q, k, v), oracle(block_map, q, k, v), dtype)
    return found


def check_key_mask(make: Make, device: Any, case: Case) -> list[str]:
    """Bool and additive key masks agree with the oracle; a row with no key left gives zeros."""
    block_map = case.block_map()
    kernel = make(block_map, device)
    q, k, v = _inputs(case.tokens, torch.float32, device)
    mask = torch.ones(2, 1, 1, case.tokens, dtype=torch.bool, device=device)
    mask[0, ..., case.tokens // 2 :] = False
    mask[1] = False
    want = oracle(block_map, q, k, v, mask)
    additive = torch.zeros(mask.shape, device=device).masked_fill(~mask, float("-inf"))
    return [
        *_compare(f"{case.name}, bool key mask", kernel(q, k, v, mask), want, q.dtype),
        *_compare(f"{case.name}, additive key mask", kernel(q, k, v, additive), want, q.dtype),
    ]


def check_huge_logits(make: Make, device: Any, case: Case) -> list[str]:
    """Logits of thousands neither overflow nor lose the largest one."""
    block_map = case.block_map()
    q, k, v = _inputs(case.tokens, torch.float32, device, scale=1e3)
    got = make(block_map, device)(q, k, v)
    # Float32 rounds a logit of several thousand by some 1e-4, and the softmax passes that on.
    return _compare(f"{case.name}, huge logits", got, oracle(block_map, q, k, v), q.dtype, limit=5e-3)


def check_unseen_keys(make: Make, device: Any, case: Case) -> list[str]:
    """Keys and values outside a query's blocks have no influence at all: changing them changes no bit."""
    block_map = case.block_map()
    first = block_map.token_mask()[:, 0]
    unseen = np.flatnonzero(~first.any(0))
    if not unseen.size:
        return []
    kernel = make(block_map, device)
    q, k, v = _inputs(case.tokens, torch.float32, device)
    before = kernel(q, k, v)[:, 0].clone()
    index = torch.from_numpy(unseen).to(device)
    k, v = k.index_fill(1, index, 1e4), v.index_fill(1, index, -1e4)
    same = torch.equal(kernel(q, k, v)[:, 0], before)
    return [] if same else [f"{case.name}: keys outside the map change the result"]


def check_padding(make: Make, device: Any, case: Case) -> list[str]:
    """What lies in memory behind the last token is never read: inputs are views into poisoned buffers."""
    block_map = case.block_map()
    views = []
    for x in _inputs(case.tokens, torch.float32, device):
        poisoned = torch.full((2, case.tokens + 2 * case.block, HEADS, DIM), float("nan"), device=device)
        poisoned[:, case.block : case.block + case.tokens] = x
        views.append(poisoned[:, case.block : case.block + case.tokens])
    return _compare(
        f"{case.name}, poisoned surroundings",
        make(block_map, device)(*views),
        oracle(block_map, *views),
        torch.float32,
    )


def check_strides(make: Make, device: Any, case: Case) -> list[str]:
    """Any strides give the same values, and the inputs are left as they were."""
    kernel = make(case.block_map(), device)
    plain = _inputs(case.tokens, torch.float32, device)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    copies = [x.clone() for x in views]
    found = []
    if (kernel(*views) - kernel(*plain)).abs().max() > TOLERANCE["float32"]:
        found.append(f"{case.name}: the result depends on the strides of the inputs")
    if not all(torch.equal(x, y) for x, y in zip(views, copies, strict=True)):
        found.append(f"{case.name}: the kernel writes to its inputs")
    return found


def check_batch(make: Make, device: Any, case: Case) -> list[str]:
    """A row's result does not depend on the other rows, and two calls agree bit for bit."""
    kernel = make(case.block_map(), device)
    q, k, v = _inputs(case.tokens, torch.float32, device)
    together = kernel(q, k, v)
    found = []
    if (together[:1] - kernel(q[:1], k[:1], v[:1])).abs().max() > TOLERANCE["float32"]:
        found.append(f"{case.name}: a row's result depends on its batch")
    if not torch.equal(together, kernel(q, k, v)):
        found.append(f"{case.name}: two calls differ")
    return found


def check_pairs(make: Make, device: Any, case: Case) -> list[str]:
    """`pairs` counts the element pairs of the visited blocks (or all pairs, for a kernel that visits all)."""
    block_map = case.block_map()
    counted = make(block_map, device).pairs(3, HEADS, case.tokens, case.tokens)
    visited = 3 * int(block_map.token_mask().sum()) * HEADS // case.maps
    everything = 3 * HEADS * case.tokens**2
    return (
        []
        if counted in (visited, everything)
        else [f"{case.name}: counts {counted:.0f} pairs instead of {visited}"]
    )


def check_refusals(make: Make, device: Any, case: Case) -> list[str]:
    """Calls that do not fit are refused with a ValueError, not answered wrongly."""
    kernel = make(case.block_map(), device)
    n = case.tokens
    q, k, v = _inputs(n, torch.float32, device)
    longer = _inputs(n + 1, torch.float32, device)
    full = torch.ones(2, 1, n, n, dtype=torch.bool, device=device)
    calls: dict[str, tuple[Any, ...]] = {"another length": longer}
    if n > 1:
        calls["a full mask"] = (q, k, v, full)
    if case.maps > 1:
        calls["another number of heads"] = (q[:, :, :1], k[:, :, :1], v[:, :, :1])
    found = []
    for what, arguments in calls.items():
        try:
            kernel(*arguments)
        except ValueError:
            continue
        found.append(f"{case.name}: {what} is accepted")
    return found


CHECKS: dict[str, Callable[[Make, Any, Case], list[str]]] = {
    "values": check_values,
    "key mask": check_key_mask,
    "huge logits": check_huge_logits,
    "unseen keys": check_unseen_keys,
    "padding": check_padding,
    "strides": check_strides,
    "batch": check_batch,
    "pairs": check_pairs,
    "refusals": check_refusals,
}


def check_kernel(
    make: Make, *, device: Any = "cpu", cases: Iterable[Case] = CASES, checks: Iterable[str] = tuple(CHECKS)
) -> list[str]:
    """Put a block-sparse attention kernel through all checks.

    Args:
        make: `make(block_map, device)` gives a kernel; see `vivace.kernels.block_sparse_attention.spec`.
        device: where to run it.
        cases: patterns to try.
        checks: names from `CHECKS`.

    Returns:
        One sentence for every failure; empty when the kernel is right.
    """
    chosen = list(cases)
    return [
        f"{name}: {sentence}"
        for name in checks
        for case in chosen
        for sentence in CHECKS[name](make, device, case)
    ]
