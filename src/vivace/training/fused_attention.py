"""Which of torch's fused attention kernels trains fastest on this GPU: measured, since it depends on GPU and shape."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from vivace.tiny.train.common import Processes

ROUNDS = 3
MOST = 2**31
"""Bytes of one operand beyond which fewer rows are timed."""


def choose_fastest(processes: Processes, rows: int, heads: int, tokens: int, dim: int) -> str:
    """Leave the faster of `cudnn` and torch's own choice (`auto`) switched on, and return its name.

    Forwards and backwards of bf16 attention (rows, heads, tokens, dim), the same in every process; on a processor there
    is nothing to choose. A kernel that fails at the shape is not chosen.
    """
    if processes.device.type != "cuda":
        return "auto"
    rows = max(1, min(rows, MOST // (2 * heads * tokens * dim)))
    shape = (rows, tokens, heads, dim)
    q, k, v, back = (
        torch.randn(shape, device=processes.device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(4)
    )
    spent: dict[str, float] = {}
    for name in ("auto", "cudnn"):
        processes.choose_attention(name)
        try:
            for turn in range(ROUNDS + 1):
                if turn == 1:
                    torch.cuda.synchronize()
                    spent[name] = -time.perf_counter()
                torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), back.detach())
            torch.cuda.synchronize()
            spent[name] += time.perf_counter()
        except RuntimeError:
            spent.pop(name, None)
    faster = spent.get("cudnn", float("inf")) < spent.get("auto", float("inf"))
    name = "cudnn" if processes.agree(float(faster)) else "auto"
    processes.choose_attention(name)
    told = ", ".join(f"{k} {1e3 * s / ROUNDS:.2f} ms" for k, s in spent.items())
    processes.say(f"attention {(rows, heads, tokens, dim)}, forwards and backwards: {told}; {name} is used")
    return name
