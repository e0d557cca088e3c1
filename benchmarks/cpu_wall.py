"""Wall time of plans on the embedded model on this machine's CPU, interleaved in one process.

    python benchmarks/cpu_wall.py --plan exact --plan near-exact --plan fast --repeats 2 \\
        --out benchmarks/results/cpu-wall.json

Every round runs each plan once (A B C, A B C ...), so that a slow minute of the machine hits all of them; the first
round is preceded by a short warm-up. Times are the receipts' totals: prompt to frames, without setting up the plan.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import vivace
from vivace.core.env import environment
from vivace.plans.plan import Plan
from vivace.tiny.train.seeds import held_out
from vivace.world import caption, sample_scenes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="append", required=True, help="the first is what speed-ups refer to")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = vivace.load("tiny")
    scenes = sample_scenes(held_out("prompts", args.repeats))
    totals: dict[str, list[dict[str, float]]] = {name: [] for name in args.plan}
    last: dict[str, Any] = {}
    for name in args.plan:
        with vivace.accelerate(pipe, name) as fast:
            fast("warm up", num_inference_steps=2)
    for scene in scenes:
        for name in args.plan:
            with vivace.accelerate(pipe, Plan.load(name)) as fast:
                receipt = fast(caption(scene.attributes, scene.seed), seed=scene.seed).receipt
            totals[name].append(receipt.stages)
            last[name] = receipt
            print(f"{name:12s} {receipt.stages['total']:.2f} s, NFE {receipt.nfe}", flush=True)
    reference = [s["total"] for s in totals[args.plan[0]]]
    record = {
        "benchmark": "cpu_wall",
        "environment": environment(torch.device("cpu")),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "plans": {
            name: {
                "seconds": [round(s["total"], 3) for s in rows],
                "median_seconds": round(statistics.median(s["total"] for s in rows), 3),
                "median_decode_seconds": round(statistics.median(s["vae"] for s in rows), 3),
                "speedup_per_round": [round(a / s["total"], 3) for a, s in zip(reference, rows, strict=True)],
                "nfe": last[name].nfe,
                "compute_share": last[name].flops / last[args.plan[0]].flops,
                "flops": last[name].flops,
                "blocks_run": last[name].blocks_run,
            }
            for name, rows in totals.items()
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, row in record["plans"].items():
        print(f"{name:12s} median {row['median_seconds']:.2f} s, speed-up {row['speedup_per_round']}")


if __name__ == "__main__":
    main()
