"""Fitted solvers of the embedded model: where their steps lie and what their weights are, found on development prompts.

    python benchmarks/solver_search.py --steps 10 15 22 --seconds 45 --out OUT

1. The exact run of the fit's prompts leaves its latents at every step (`vivace.plans.solver_fitting`).
2. For every number of steps a local search on the first batch moves one step at a time over the exact run's grid; each
   candidate is fitted and run in closed loop. The weights are then fitted on all batches, and Gauss-Newton steps act on
   the error of the final latent.
3. Every solver is run as the technique `fitted_solver` on the test's prompts (development too, but others): PSNR, LPIPS
   and accuracy beside the exact clips. Solver files and one record are written.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan_quality import make, prompt_of, psnr, score

from vivace.core.env import environment
from vivace.models.describe import remember
from vivace.plans.plan import Plan
from vivace.plans.solver_fitting import fit, record, search
from vivace.techniques.compression.whole_clip_decode import WholeClipDecode
from vivace.techniques.trajectory.fitted_solver import FittedSolver
from vivace.tiny.defaults import DEFAULTS
from vivace.tiny.load import WEIGHTS, fast_dtype
from vivace.tiny.train.evaluate import load_check
from vivace.tiny.train.export import read_pipeline
from vivace.tiny.train.seeds import held_out
from vivace.world import sample_scenes

STARTS = {
    8: (0, 2, 3, 6, 9, 17, 28, 44),
    10: (0, 2, 3, 5, 6, 11, 16, 26, 39, 47),
    12: (0, 1, 2, 3, 5, 7, 10, 14, 20, 28, 37, 46),
    15: (0, 1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 34, 41, 47),
    18: (0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 18, 22, 27, 32, 37, 43, 48),
    22: (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 23, 27, 31, 35, 39, 43, 46, 49),
    27: (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 22, 25, 28, 31, 34, 37, 40, 43, 45, 47, 49),
    33: (*range(17), 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42, 44, 46, 47, 48)[:33],
}
"""Starts on a grid of 50: ends of earlier searches for few steps, dense beginnings for more (docs/LOG.md says why)."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 15])
    parser.add_argument("--seconds", type=float, default=45.0, help="of search for each number of steps")
    parser.add_argument("--rounds", type=int, default=2, help="Gauss-Newton steps")
    parser.add_argument("--refine", type=int, default=22, help="for solvers of at most so many steps")
    parser.add_argument("--together", type=int, default=4, help="weight directions that run side by side")
    parser.add_argument(
        "--search", type=int, default=2, help="batches of the fit's prompts that the search sees"
    )
    parser.add_argument("--basis", choices=("guided", "pair"), default="pair")
    parser.add_argument("--fit", type=int, default=96)
    parser.add_argument("--test", type=int, default=48)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--grid", type=int, default=50)
    parser.add_argument("--frames", type=int, default=DEFAULTS["num_frames"])
    parser.add_argument("--size", type=int, default=DEFAULTS["height"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = read_pipeline(WEIGHTS, torch.bfloat16 if device.type == "cuda" else fast_dtype()).to(device)
    shape = {
        "num_frames": args.frames,
        "height": args.size,
        "width": args.size,
        "num_inference_steps": args.grid,
    }
    remember(pipe, "tiny", dict(DEFAULTS) | shape)
    scenes = sample_scenes(held_out("dev", args.fit + args.test))
    first, others = scenes[: args.fit], scenes[args.fit :]
    guidance = DEFAULTS["guidance_scale"]
    check = load_check(None, device)
    out: dict[str, Any] = {
        "benchmark": "solver_search", "split": "development", "fit": args.fit, "test": args.test,
        "batch": args.batch, "guidance": guidance, "grid": args.grid, "seconds": args.seconds,
        "basis": args.basis, "rounds": args.rounds, "search": args.search,
        "environment": environment(device), "runs": [],
    }  # fmt: skip
    clips: dict[str, torch.Tensor] = {}

    def measure(label: str, plan: Plan, **more: Any) -> None:
        begun = time.perf_counter()
        made, receipts = make(pipe, plan, others, args.batch, guidance)
        clips.setdefault("exact", made)
        found = psnr(made, clips["exact"])
        table = {k: statistics.fmean(v) for k, v in score(check, made, others, device).items()}
        row = {
            "label": label, "nfe": receipts[0].nfe, "psnr_median": statistics.median(found),
            "psnr_mean": statistics.fmean(min(f, 100.0) for f in found),
            "lpips": statistics.fmean(seen := perceptual(made, clips["exact"], device)),
            "lpips_p95": float(np.percentile(seen, 95)), "accuracy": statistics.fmean(table.values()),
            "seconds": time.perf_counter() - begun, **more,
        }  # fmt: skip
        out["runs"].append(row)
        (args.out / "solver-search.json").write_text(json.dumps(out, indent=1) + "\n")
        print(
            f"{label:12s} NFE {row['nfe']} PSNR {row['psnr_median']:.2f} LPIPS {row['lpips']:.5f} "
            f"p95 {row['lpips_p95']:.4f} accuracy {row['accuracy']:.4f} {row['seconds']:.1f} s", flush=True,
        )  # fmt: skip

    measure("exact", Plan([WholeClipDecode()]))
    begun = time.perf_counter()
    exact = record(
        pipe, [prompt_of(s) for s in first], seeds=[s.seed for s in first], batch=args.batch, **shape
    )
    print(f"recorded {len(first)} clips in {time.perf_counter() - begun:.1f} s", flush=True)
    compiled = device.type == "cuda" and not args.no_compile
    for steps in args.steps:
        if compiled:
            pipe.transformer.compile(dynamic=False)
        nodes = STARTS.get(steps) if args.grid == 50 else None
        small = exact.part(args.search)
        if nodes is None:
            from vivace.plans.solver_fitting import place

            nodes = place(steps, args.grid)
        if args.seconds > 0:
            nodes = search(small, nodes, args.seconds, args.basis, watch)
        rounds = args.rounds if steps <= args.refine else 0
        file, _ = fit(
            exact, steps, nodes=nodes, basis=args.basis, rounds=rounds, together=args.together, watch=watch
        )
        saved = file.save(args.out / f"tiny-{steps}.json")
        # The technique is measured on the plain transformer.
        pipe.transformer._compiled_call_impl = None
        measure(
            f"{steps} steps",
            Plan([FittedSolver(file=str(saved)), WholeClipDecode()]),
            steps=steps, nodes=nodes, fit_error=file.error,
        )  # fmt: skip


def watch(text: str) -> None:
    print(f"  {text}", flush=True)


def perceptual(clips: torch.Tensor, goal: torch.Tensor, device: torch.device) -> list[float]:
    """LPIPS of every clip to the exact one; NaN where its weights are not there."""
    from vivace.evaluation.frames import unit_clips
    from vivace.evaluation.metrics.lpips import Lpips

    lpips = Lpips(device)
    if lpips.missing():
        return [math.nan] * len(clips)
    values: list[float] = []
    for i in range(0, len(clips), 8):
        a, b = (unit_clips(c[i : i + 8], device=device) for c in (goal, clips))
        values += list(map(float, next(iter(lpips.pair(a, b).values()))))
    return values


if __name__ == "__main__":
    main()
