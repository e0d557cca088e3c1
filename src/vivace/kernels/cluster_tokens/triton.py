"""k-means in Triton: distances stay in registers, and tokens are sorted by label by counting, without atomic additions.

An iteration is five kernels:

    _assign    a tile of tokens against all centres, running best; how often each label stands in the tile
    (torch)    those counts summed over tiles and labels: where each label's tokens begin in the sorted order
    _place     every token to its place, equal labels in the order in which they stood
    _sum       a stretch of at most `PART` sorted tokens of one centre, gathered and summed
    _centre    the stretches of a centre together, divided by their number

Sums always run in the same order, so the result is the same at every run.
"""

# Triton's library annotates reductions as one value or two.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vivace.kernels.launch import launch

TILE = 128
"""Tokens of a program."""
PART = 512
"""Tokens that one program sums: a centre with more is divided among several."""
ROWS = 32
"""Tokens that it gathers at a time."""


@triton.jit
def _assign(
    x_ptr, centres_ptr, bias_ptr, gone_ptr, labels_ptr, found_ptr, x_b, x_h, x_s, heads, slots, clusters,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    b, h, wide = (row // heads).to(tl.int64), (row % heads).to(tl.int64), row.to(tl.int64)
    mine, dims, columns = tile * M + tl.arange(0, M), tl.arange(0, D), tl.arange(0, N)
    inside = mine < slots
    x = tl.load(
        x_ptr + b * x_b + h * x_h + mine[:, None].to(tl.int64) * x_s + dims[None, :],
        mask=inside[:, None],
        other=0.0,
    )
    centres_ptr += wide * clusters * D
    bias_ptr += wide * clusters
    best = tl.full([M, N], float("-inf"), tl.float32)
    which = tl.zeros([M, N], tl.int32)
    for start in range(0, clusters, N):
        number = start + columns
        real = number < clusters
        ct = tl.load(centres_ptr + number[None, :] * D + dims[:, None], mask=real[None, :], other=0.0)
        bias = tl.load(bias_ptr + number, mask=real, other=float("inf"))
        s = tl.dot(x, ct, input_precision="ieee") - bias[None, :]
        better = s > best  # never true of what is no number
        best = tl.where(better, s, best)
        which = tl.where(better, start, which)
    # Within a column the first of equal ones is kept; among columns it is the lowest number.
    top = tl.max(best, 1)
    label = tl.min(tl.where(best == top[:, None], which + columns[None, :], clusters), 1)
    # Where nothing was nearer than infinitely far, the first centre.
    label = tl.where(top == float("-inf"), 0, label)
    label = tl.where(tl.load(gone_ptr + mine, mask=inside, other=1) != 0, clusters, label)
    tl.store(labels_ptr + wide * slots + mine, label, mask=inside)
    _count(label, inside, found_ptr + (wide * tl.num_programs(0) + tile) * (clusters + 1), M)


@triton.jit
def _count(label, inside, found_ptr, M: tl.constexpr):
    """How often each label stands among these: written by the first token that has it."""
    spot = tl.arange(0, M)
    label = tl.where(inside, label, -1)
    same = label[:, None] == label[None, :]
    earlier = tl.sum((same & (spot[None, :] < spot[:, None])).to(tl.int32), 1)
    tl.store(found_ptr + label, tl.sum(same.to(tl.int32), 1), mask=inside & (earlier == 0))


@triton.jit
def _place(labels_ptr, upto_ptr, begin_ptr, order_ptr, slots, clusters, M: tl.constexpr):
    tile, wide = tl.program_id(0), tl.program_id(1).to(tl.int64)
    spot = tl.arange(0, M)
    mine = tile * M + spot
    inside = mine < slots
    label = tl.load(labels_ptr + wide * slots + mine, mask=inside, other=-1)
    same = label[:, None] == label[None, :]
    earlier = tl.sum((same & (spot[None, :] < spot[:, None])).to(tl.int32), 1)
    upto = tl.load(
        upto_ptr + (wide * tl.num_programs(0) + tile) * (clusters + 1) + label, mask=inside, other=0
    )
    begin = tl.load(begin_ptr + wide * (clusters + 1) + label, mask=inside, other=0)
    place = begin + upto - tl.sum(same.to(tl.int32), 1) + earlier
    tl.store(order_ptr + wide * slots + place, mine, mask=inside)


@triton.jit
def _sum(
    x_ptr, order_ptr, begin_ptr, total_ptr, sums_ptr, x_b, x_h, x_s, total_bh, heads, slots, clusters,
    D: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    task, row = tl.program_id(0), tl.program_id(1)
    b, h, wide = (row // heads).to(tl.int64), (row % heads).to(tl.int64), row.to(tl.int64)
    total_ptr += wide * total_bh
    centre, part = task, 0
    if task >= clusters:
        # Parts behind the first, of all centres one after the other.
        numbers = tl.arange(0, K)
        members = tl.load(total_ptr + numbers, mask=numbers < clusters, other=0)
        more = tl.maximum(members - 1, 0) // P
        behind = tl.cumsum(more, 0) <= task - clusters
        centre = tl.sum(behind.to(tl.int32), 0)
        part = task - clusters - tl.sum(tl.where(behind, more, 0), 0) + 1
    if centre < clusters:
        first = tl.load(begin_ptr + wide * (clusters + 1) + centre) + part * P
        number = tl.minimum(tl.load(total_ptr + centre) - part * P, P)
        x_ptr += b * x_b + h * x_h
        order_ptr += wide * slots + first
        lanes, dims = tl.arange(0, R), tl.arange(0, D)
        acc = tl.zeros([R, D], tl.float32)
        for start in range(0, number, R):
            here = start + lanes < number
            rows = tl.load(order_ptr + start + lanes, mask=here, other=0).to(tl.int64)
            x = tl.load(x_ptr + rows[:, None] * x_s + dims[None, :], mask=here[:, None], other=0.0)
            acc += x.to(tl.float32)
        tl.store(sums_ptr + (wide * tl.num_programs(0) + task) * D + dims, tl.sum(acc, 0))


@triton.jit
def _centre(
    sums_ptr, total_ptr, centres_ptr, rounded_ptr, bias_ptr, total_bh, tasks, clusters,
    D: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    centre, wide = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total_ptr += wide * total_bh
    sums_ptr += wide * tasks * D
    dims = tl.arange(0, D)
    place = (wide * clusters + centre) * D + dims
    members = tl.load(total_ptr + centre)
    if members > 0:
        found = tl.load(sums_ptr + centre.to(tl.int64) * D + dims)
        if members > P:
            numbers = tl.arange(0, K)
            others = tl.load(total_ptr + numbers, mask=numbers < centre, other=0)
            task = clusters + tl.sum(tl.maximum(others - 1, 0) // P, 0)
            for _ in range((members - 1) // P):
                found += tl.load(sums_ptr + task.to(tl.int64) * D + dims)
                task += 1
        found = found / members
        tl.store(centres_ptr + place, found)
        # As the next iteration multiplies it.
        rounded = found.to(rounded_ptr.dtype.element_ty)
        tl.store(rounded_ptr + place, rounded)
        rounded = rounded.to(tl.float32)
        tl.store(bias_ptr + wide * clusters + centre, tl.sum(rounded * rounded, 0) / 2)


@triton.jit
def _permute(
    x_ptr, order_ptr, out_ptr, x_b, x_h, x_s, heads, slots, moved,
    D: tl.constexpr, R: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    b, h, wide = (row // heads).to(tl.int64), (row % heads).to(tl.int64), row.to(tl.int64)
    mine, dims = tile * R + tl.arange(0, R), tl.arange(0, D)
    inside, sorted_ones = mine < slots, mine < moved
    other = tl.where(sorted_ones, tl.load(order_ptr + wide * moved + mine, mask=sorted_ones, other=0), mine)
    source, goal = (mine, other) if BACK else (other, mine)
    x_ptr += b * x_b + h * x_h
    x = tl.load(x_ptr + source[:, None].to(tl.int64) * x_s + dims[None, :], mask=inside[:, None])
    tl.store(out_ptr + (wide * slots + goal[:, None]) * D + dims[None, :], x, mask=inside[:, None])


def tuning(row: int) -> tuple[int, int, int]:
    """(tokens of a program, centres at a time, warps) for rows of so many bytes: what registers and memory hold."""
    if row <= 256:
        return TILE, 64, 8
    return (64, 32, 4) if row <= 512 else (32, 32, 4)


def cluster(
    x: torch.Tensor, centres: torch.Tensor, iterations: int, gone: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `spec`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (b, h, s, d), k, device = x.shape, centres.shape[2], x.device
    tile, step, warps = tuning(d * x.element_size())
    tiles, tasks = triton.cdiv(s, tile), k + s // PART
    centres = centres.float().clone(memory_format=torch.contiguous_format)
    rounded = centres.to(x.dtype, copy=True)
    bias = rounded.float().square().sum(-1) / 2
    gone = gone.to(torch.uint8)
    labels, order = (torch.empty(b, h, s, dtype=torch.int32, device=device) for _ in range(2))
    sums = torch.empty(b * h, tasks, d, dtype=torch.float32, device=device)
    wide = triton.next_power_of_2(k)
    for _ in range(iterations):
        found = torch.zeros(b * h, tiles, k + 1, dtype=torch.int32, device=device)
        launch(
            _assign, (tiles, b * h), x, rounded, bias, gone, labels, found, *x.stride()[:3], h, s, k,
            D=d, M=tile, N=step, num_warps=warps, num_stages=3 if tile == TILE else 2,
        )  # fmt: skip
        upto = found.cumsum(1, dtype=torch.int32)
        total = upto[:, -1]
        begin = total.cumsum(-1, dtype=torch.int32) - total
        launch(_place, (tiles, b * h), labels, upto, begin, order, s, k, M=tile, num_warps=warps)
        launch(
            _sum, (tasks, b * h), x, order, begin, total, sums, *x.stride()[:3], total.stride(0), h, s, k,
            D=d, R=ROWS, P=PART, K=wide, num_warps=4,
        )  # fmt: skip
        launch(
            _centre, (k, b * h), sums, total, centres, rounded, bias, total.stride(0), tasks, k,
            D=d, P=PART, K=wide, num_warps=1,
        )  # fmt: skip
    return labels, order, centres


def permute(x: torch.Tensor, order: torch.Tensor, back: bool) -> torch.Tensor:
    """See `take` and `put` of `spec`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    b, h, s, d = x.shape
    out = torch.empty(b, h, s, d, dtype=x.dtype, device=x.device)
    launch(
        _permute, (triton.cdiv(s, TILE), b * h), x, order.to(torch.int32).contiguous(), out, *x.stride()[:3],
        h, s, order.shape[2], D=d, R=TILE, BACK=back, num_warps=8,
    )  # fmt: skip
    return out
