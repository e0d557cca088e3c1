"""k-means of tokens and the permutation that follows: Triton against plain torch, right first, then timed in turns.

    python benchmarks/kernels/cluster.py --out benchmarks/results/DATE/cluster.json

Inputs are (1, S, H, D) tensors as models give them, seen as (1, H, S, D): Wan2.1-1.3B at 480p with the numbers of
clusters that `svg2` asks for, one and two iterations from warm centres. A kernel's labels may differ from the
reference's only where two centres are equally near within `NEAR`; its centres must be the means of its own labels and
its order the stable one, checked exactly. What is wrong is not timed. The reference multiplies in float32; `bf16
products` is the same in bfloat16, as plain torch would be written for speed, and writes all distances too.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Clock, Record, Size, clear, outlier_inputs, summary

from vivace.kernels.api import select, timed
from vivace.kernels.cluster_tokens.spec import OP, start

SIZES = {
    s.name: s
    for s in (Size("wan1.3b", 32_760, 12, 128), Size("wan14b", 75_600, 40, 128), Size("toy", 500, 2, 32))
}
CLUSTERS = {"wan1.3b": (100, 300, 500, 1000), "wan14b": (300, 1000), "toy": (5, 20)}
NEAR = 1e-3
"""Difference of squared distances, as a share of the token's squared length, that counts as equal."""


def check(x: torch.Tensor, first: torch.Tensor, made: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """How far one iteration's (labels, order, centres) are from what they must be; `wrong` is empty if all is well."""
    labels, order, centres = made
    index, k = labels.long(), first.shape[2]
    rounded = first.to(x.dtype).float()
    away, taken = [], []
    for rows in torch.arange(x.shape[2], device=x.device).split(4096):
        here = x[:, :, rows].float()
        apart = torch.cdist(here, rounded, compute_mode="donot_use_mm_for_euclid_dist").square()
        off = apart.gather(-1, index[:, :, rows, None])[..., 0] - apart.amin(-1)
        away.append((off / here.square().sum(-1).clamp(min=1e-6)).amax())
        taken.append((index[:, :, rows] != apart.argmin(-1)).float().mean())
    sums = torch.zeros_like(centres, dtype=torch.float64)
    sums.scatter_add_(2, index[..., None].expand_as(x), x.double())
    counts = torch.zeros(*centres.shape[:3], dtype=torch.float64, device=x.device)
    counts.scatter_add_(2, index, torch.ones_like(index, dtype=torch.float64))
    mean = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], first.double())
    found = {
        "farther_by": float(torch.stack(away).max()),
        "other_labels": float(torch.stack(taken).mean()),
        "centres": float((centres - mean).abs().max() / mean.abs().max()),
        "empty": int((counts == 0).sum()),
        "largest": int(counts.max()),
    }
    stable = torch.equal(order.long(), torch.argsort(labels, dim=-1, stable=True))
    in_range = bool(((labels >= 0) & (labels < k)).all())
    good = found["farther_by"] < NEAR and found["centres"] < 1e-5 and stable and in_range
    return found | {
        "wrong": "" if good else f"order {'right' if stable else 'wrong'}, labels in range: {in_range}"
    }


def bf16_products(x: torch.Tensor, centres: torch.Tensor, iterations: int, gone: torch.Tensor) -> Any:
    """Plain torch without float32 products: a matrix of distances, and one of memberships."""
    numbers = torch.arange(centres.shape[2], device=x.device)
    labels = x.new_zeros(0)
    for _ in range(iterations):
        bias = centres.square().sum(-1)[:, :, None] / 2
        labels = ((x @ centres.to(x.dtype).transpose(-1, -2)).float() - bias).argmax(-1)
        member = (labels[..., None] == numbers).to(x.dtype)
        counts = member.sum(-2, dtype=torch.float32)[..., None]
        centres = torch.where(
            counts > 0, (member.transpose(-1, -2) @ x).float() / counts.clamp(min=1), centres
        )
    return labels, torch.argsort(labels, dim=-1, stable=True), centres


def one(size: Size, clusters: int, device: str, repeats: int, clock: Clock, record: Record) -> None:
    """Check and time k-means of one size."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = outlier_inputs(size, dtype, device)[1].transpose(1, 2)
    gone = torch.zeros(size.tokens, dtype=torch.bool, device=device)
    context = {"device": device, "head_dim": size.dim, "dtype": str(dtype).removeprefix("torch.")}
    names = ("triton", "reference") if device == "cuda" else ("reference",)
    kernels = {name: select(OP, name, **context).run() for name in names}
    # Warm centres: those of two iterations.
    first = kernels[names[0]].cluster(x, start(x, clusters, size.tokens), 2, gone)[2]
    checks, runs = {}, {}
    for name, kernel in kernels.items():
        checks[name] = check(x, first, kernel.cluster(x, first, 1, gone))
        again = kernel.cluster(x, first, 1, gone)
        checks[name]["deterministic"] = all(
            torch.equal(a, b) for a, b in zip(again, kernel.cluster(x, first, 1, gone), strict=True)
        )
        order = again[1]
        restored = kernel.put(kernel.take(x, order), order)
        if checks[name]["wrong"] or not torch.equal(restored, x):
            record.leave_out(f"{name}, {clusters} clusters", f"wrong: {checks[name]}")
            continue
        for iterations in (1, 2):
            runs[f"{name} x{iterations}"] = functools.partial(kernel.cluster, x, first, iterations, gone)
        runs[f"{name} take"] = functools.partial(kernel.take, x, order)
        runs[f"{name} put"] = functools.partial(kernel.put, x, order)
    for iterations in (1, 2):
        runs[f"bf16 products x{iterations}"] = functools.partial(bf16_products, x, first, iterations, gone)
    runs["copy"] = x.contiguous if not x.is_contiguous() else x.clone
    failed: dict[str, str] = {}
    timed(runs, device, 2, failed, max(clock.left, 1.0))
    ready: dict[str, Callable[[], Any]] = {n: r for n, r in runs.items() if n not in failed}
    times = timed(ready, device, repeats, failed, max(clock.left, 1.0))
    rows = {name: summary(found) for name, found in times.items()}
    for name, why in failed.items():
        record.leave_out(f"{name}, {clusters} clusters", why)
    print(f"\n{size}, {clusters} clusters")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["seconds"]):
        print(f"  {name:20s} {row['seconds'] * 1e3:9.3f} ms")
    for name, found in checks.items():
        print(f"  {name}: {found}", flush=True)
    record.add({"size": str(size), "clusters": clusters, "checks": checks, "times": rows})


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=["wan1.3b"] if device == "cuda" else ["toy"]
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which no size is begun")
    parser.add_argument("--out", type=Path, help="the JSON record")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    clock, record = Clock(args.budget), Record(args.out, device, vars(args))
    record.data["benchmark"] = "k-means of tokens"
    for name in args.sizes:
        for clusters in CLUSTERS[name]:
            if clock.over:
                record.leave_out(f"{name}, {clusters} clusters", "the budget was spent")
                continue
            with torch.no_grad():
                one(SIZES[name], clusters, device, args.repeats, clock, record)
            clear(device)


if __name__ == "__main__":
    main()
