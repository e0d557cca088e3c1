"""Which launch settings of the block-attention kernels are fastest on this GPU, at the shapes that matter.

    python benchmarks/kernels/tune_attention.py --out benchmarks/results/DATE/kernels/tune-attention.json

For every block size every setting (`vivace.kernels.block_attention.triton.Tuning`; pipeline depths of the Hopper
kernel) is checked against the reference on a small call, then timed on random lists of the asked density: CUDA events,
warm-up, median, all settings in turns. The best ones belong into `tuning()` and `stages()`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vivace.core.env import environment
from vivace.kernels.block_attention import reference, triton
from vivace.kernels.block_attention.spec import TOLERANCE, Routes, refuse_hopper

SHAPES = {"wan-1.3b-480p": (32_760, 12, 128), "wan-14b-720p": (75_600, 40, 128)}
"""Tokens, heads, head dimension."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="wan-1.3b-480p")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--density", type=float, nargs="+", default=[0.1])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--budget", type=float, default=200.0, help="seconds; 0 for no limit")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    started, device = time.perf_counter(), torch.device("cuda")
    tokens, heads, dim = SHAPES[args.shape]
    record: dict[str, Any] = {
        "benchmark": "tune_attention", "shape": args.shape, "tokens": tokens, "heads": heads, "head_dim": dim,
        "dtype": "bfloat16", "environment": environment(device), "rows": [], "left_out": [],
    }  # fmt: skip
    for block, density in itertools.product(args.blocks, args.density):
        if args.budget and time.perf_counter() - started > args.budget:
            record["left_out"].append([block, density])
            continue
        settings = dict(candidates(block))
        good = {
            n: run for n, run in settings.items() if (why := wrong(run, block, dim)) == "" or told(n, why)
        }
        calls = call(tokens, heads, dim, block, density, device)
        flops = 4.0 * dim * calls[3].pairs(torch.full((calls[3].index.shape[2],), block), 1, heads)
        for name, ms in sorted(timed(good, calls, args.repeats).items(), key=lambda f: f[1]):
            row = {"block": block, "density": density, "setting": name, "ms": ms, "tflops": flops / ms / 1e9}
            record["rows"].append(row)
            print(
                f"{block:4d} {density:5.2f} {name:44s} {ms:8.3f} ms {row['tflops']:7.0f} TFLOP/s", flush=True
            )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def candidates(block: int) -> list[tuple[str, Callable[..., Any]]]:
    """Settings by name: forward functions of (q, k, v, routes, scale)."""
    found: list[tuple[str, Callable[..., Any]]] = []
    for warps, stages, keys, tma in itertools.product((4, 8), (2, 3, 4), (64, 128), (False, True)):
        if keys <= block and not (warps == 8 and block == 64):
            tuned = triton.Tuning(warps, stages, keys, tma)
            name = f"triton warps {warps} stages {stages} keys {keys}" + (" tma" if tma else "")
            found.append((name, functools.partial(triton.forward, tuned=tuned)))
    if refuse_hopper({"device": "cuda", "block": block}) is None:
        from vivace.kernels.block_attention import hopper

        depths = range(2, hopper.stages(block, 128) + 1)
        found += [(f"hopper depth {d}", functools.partial(hopper.forward, depth=d)) for d in depths]
    return found


def call(
    tokens: int, heads: int, dim: int, block: int, density: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Routes, float]:
    """q, k, v of random numbers and equally long random lists."""
    make = torch.Generator(device).manual_seed(0)
    blocks = -(-tokens // block)
    q, k, v = (
        torch.randn(1, heads, blocks * block, dim, generator=make, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    length = max(1, round(density * blocks))
    scores = torch.rand(1, heads, blocks, blocks, generator=make, device=device)
    index = scores.topk(length, -1).indices.sort(-1).values.int()
    count = torch.full((1, heads, blocks), length, dtype=torch.int32, device=device)
    return q, k, v, Routes(index, count, None, block), dim**-0.5


def wrong(run: Callable[..., Any], block: int, dim: int) -> str:
    """Why a setting is not to be timed: it does not run here, or its numbers are off."""
    q, k, v, routes, scale = call(6 * block, 2, dim, block, 0.5, torch.device("cuda"))
    want, want_lse = reference.forward(q, k, v, routes, scale)
    try:
        out, lse = run(q, k, v, routes, scale)
        torch.cuda.synchronize()
    except Exception as error:  # compilers fail in many ways; the record says how
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    off = max(float((out.float() - want.float()).abs().max()), float((lse - want_lse).abs().max()))
    return "" if off <= TOLERANCE["bfloat16"] else f"largest error {off:.3g}"


def told(name: str, why: str) -> bool:
    """Say why a setting is left out."""
    print(f"     {name}: {why}", flush=True)
    return False


def timed(settings: dict[str, Callable[..., Any]], calls: tuple[Any, ...], repeats: int) -> dict[str, float]:
    """Median milliseconds of every setting, in turns."""
    for run in settings.values():
        run(*calls)
    torch.cuda.synchronize()
    found: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(repeats):
        for name, run in settings.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run(*calls)
            end.record()
            end.synchronize()
            found[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
