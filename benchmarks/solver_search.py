"""Fitted solvers of the embedded model: where their steps lie and what their weights are, found on development prompts.

    python benchmarks/solver_search.py --steps 10 15 22 --seconds 45 --out OUT

1. The exact run of the fit's prompts leaves its latents at every step (`vivace.plans.solver_fitting`).
2. For every number of steps several leads (steps computed before the first gap) are fitted on all batches; the one
   whose clips are nearest to the exact ones by mean LPIPS goes on.
3. A local search on the first batches moves one step behind the lead at a time over the exact run's grid; each
   candidate is fitted and run in closed loop. The weights are then fitted on all batches, and for few steps
   Gauss-Newton steps act on the error of the final latent.
4. Every solver is run as the technique `fitted_solver` on the test's prompts (development too, but others): PSNR, LPIPS
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
from vivace.plans.solver_fitting import fit, leading, place, record, search, tail_error
from vivace.techniques.compression.whole_clip_decode import WholeClipDecode
from vivace.techniques.trajectory.fitted_solver import FittedSolver
from vivace.tiny.defaults import DEFAULTS
from vivace.tiny.load import WEIGHTS, fast_dtype
from vivace.tiny.train.evaluate import load_check
from vivace.tiny.train.export import read_pipeline
from vivace.tiny.train.seeds import held_out
from vivace.tiny.whole_clip import decode_latents
from vivace.world import sample_scenes

LEADS = {
    8: (3, 4),
    10: (4, 5),
    12: (4, 5, 6),
    14: (5, 6, 7, 8),
    17: (6, 8, 10),
    19: (7, 9, 11),
    22: (8, 10, 12),
    25: (10, 12, 16),
    29: (10, 14, 18),
    33: (12, 16, 20),
}
"""Leads that are tried for a number of steps on a grid of 50."""
STARTS = {
    8: (0, 2, 3, 6, 9, 17, 28, 44),
    10: (0, 2, 3, 5, 6, 11, 16, 26, 39, 47),
    12: (0, 1, 2, 3, 5, 7, 10, 14, 20, 28, 37, 46),
}
"""Ends of earlier searches, which are tried too."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 17])
    parser.add_argument("--seconds", type=float, default=45.0, help="of search for each number of steps")
    parser.add_argument("--rounds", type=int, default=1, help="Gauss-Newton steps")
    parser.add_argument("--leads", type=int, nargs="+", help="in the place of those tried for each number")
    parser.add_argument("--refine", type=int, default=14, help="for solvers of at most so many steps")
    parser.add_argument("--together", type=int, default=4, help="weight directions that run side by side")
    parser.add_argument(
        "--search", type=int, default=1, help="batches of the fit's prompts that the search sees"
    )
    parser.add_argument("--basis", choices=("guided", "pair"), default="pair")
    parser.add_argument("--fit", type=int, default=96)
    parser.add_argument("--test", type=int, default=96)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--grid", type=int, default=50)
    parser.add_argument("--frames", type=int, default=DEFAULTS["num_frames"])
    parser.add_argument("--size", type=int, default=DEFAULTS["height"])
    parser.add_argument(
        "--compile",
        action="store_true",
        help="faster, and no longer bit by bit the network that was recorded",
    )
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
        "basis": args.basis, "rounds": args.rounds, "search": args.search, "placements": [],
        "environment": environment(device), "runs": [],
    }  # fmt: skip
    clips: dict[str, torch.Tensor] = {}

    def measure(label: str, plan: Plan, **more: Any) -> None:
        begun = time.perf_counter()
        made, receipts = make(pipe, plan, others, args.batch, guidance)
        clips.setdefault("exact", made)
        found, seen = psnr(made, clips["exact"]), perceptual(made, clips["exact"], device)
        table = {k: statistics.fmean(v) for k, v in score(check, made, others, device).items()}
        row = {
            "label": label, "nfe": receipts[0].nfe, "psnr_median": statistics.median(found),
            "psnr_mean": statistics.fmean(min(f, 100.0) for f in found), "lpips": statistics.fmean(seen),
            "lpips_p95": float(np.percentile(seen, 95)), "lpips_worst": max(seen),
            "accuracy": statistics.fmean(table.values()), "seconds": time.perf_counter() - begun, **more,
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
    small, goal = exact.part(args.search), decoded(pipe, exact.states[-1])
    for steps in args.steps:
        if args.compile:
            pipe.transformer.compile(dynamic=False)
        nodes, nearest = (), math.inf
        for start in starts(steps, args.grid, args.leads):
            found, end = fit(exact, steps, nodes=start, basis=args.basis)
            made = decoded(pipe, end)
            seen = perceptual(made, goal, device)
            row = {
                "steps": steps, "nodes": start, "lead": leading(start), "error": found.error,
                "tail_error": tail_error(exact, end), "psnr_median": statistics.median(psnr(made, goal)),
                "lpips": statistics.fmean(seen), "lpips_p95": float(np.percentile(seen, 95)),
                "lpips_worst": max(seen),
            }  # fmt: skip
            out["placements"].append(row)
            print(
                f"  {steps} lead {row['lead']:2d} PSNR {row['psnr_median']:.2f} LPIPS {row['lpips']:.5f} "
                f"worst {row['lpips_worst']:.3f} tail {row['tail_error']:.4f} {start}", flush=True,
            )  # fmt: skip
            # Without the weights of LPIPS the latents decide.
            value = row["tail_error"] if math.isnan(row["lpips"]) else row["lpips"]
            if value < nearest:
                nodes, nearest = start, value
        if args.seconds > 0:
            nodes = search(small, nodes, args.seconds, args.basis, watch, leading(nodes))
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


def starts(steps: int, grid: int, leads: list[int] | None) -> list[tuple[int, ...]]:
    """Placements that are compared before the search."""
    tried = leads or (LEADS.get(steps) if grid == 50 else None)
    found = [place(steps, grid, lead=lead) for lead in tried] if tried else [place(steps, grid)]
    if grid == 50 and steps in STARTS and not leads:
        found.append(STARTS[steps])
    return found


def decoded(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Clips uint8 (N, T, H, W, 3) on the CPU; the embedded model's latents need no scaling."""
    clips = []
    with torch.no_grad():
        for part in latents.split(16):
            raw = decode_latents(pipe.vae, part.to(pipe.vae.dtype)).float()
            levels = ((raw / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            clips.append(levels.permute(0, 2, 3, 4, 1).cpu())
    return torch.cat(clips)


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
