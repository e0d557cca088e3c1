"""Mask files of the embedded model, for the attention methods whose heads have patterns of their own.

    python benchmarks/attention_masks.py --clips 4 --steps 20

Exact runs of development prompts (never the held-out ones) are watched by `vivace.plans.mask_searching`: what each
pattern costs each head (`sparse_vdit`, `sliding_tile`, `efficient_vdit`; one file serves every density), and the axis
order and mask of each head (`paro`, a file for each density). `vivace.plans.mask_searching` says what is measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import vivace
from vivace.evaluation.task import Task
from vivace.plans.mask_searching import search_masks, search_orders
from vivace.techniques.attention import efficient_vdit, sliding_tile, sparse_vdit

FOLDER = Path(__file__).parent / "plans" / "masks"
PATTERNS = {
    "sparse-vdit": sparse_vdit.PATTERNS,
    "sliding-tile": sliding_tile.PATTERNS,
    "efficient-vdit": efficient_vdit.PATTERNS,
}
PARO = (0.2, 0.3, 0.45)
"""Densities of the masks of `paro`."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=4, help="development prompts, one clip each")
    parser.add_argument("--steps", type=int, default=20, help="of the watched runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[*PATTERNS, "paro"], help="default: all")
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    prompts = Task.load("world-dev@1").prompt_texts()
    if not 1 <= args.clips <= len(prompts) or args.steps < 2:
        parser.error(f"give from 1 to {len(prompts)} clips and at least 2 steps.")
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = vivace.load("tiny", device=args.device)
    call = {"num_inference_steps": args.steps}
    for name in args.only or [*PATTERNS, "paro"]:
        if name in PATTERNS:
            found = search_masks(pipe, prompts[: args.clips], PATTERNS[name], **call)
            print(found.save(args.out / f"{name}.json"), flush=True)
            continue
        for density in PARO:
            orders = search_orders(pipe, prompts[: args.clips], density=density, **call)
            print(orders.save(args.out / f"paro-{density:g}.json"), f"mass {orders.mass}", flush=True)


if __name__ == "__main__":
    main()
