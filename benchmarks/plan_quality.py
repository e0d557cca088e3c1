"""Quality of plans on the embedded model: attribute accuracy, and fidelity to the exact run, on held-out prompts.

    python benchmarks/plan_quality.py --plan exact --plan fast --prompts 100 --out benchmarks/results/quality.json

Clips are made in batches (per-sample noise: a clip does not depend on its batch mates) with receipts; the verifier of
`vivace.world` scores what each prompt says. `--split development` is for choosing settings, `--split held-out` for
reporting; they share no scene.  A plan may be a preset, a file, or `fast@key=value,...` to vary a preset's settings.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from vivace.core.env import environment
from vivace.models.describe import remember
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.tiny.defaults import DEFAULTS
from vivace.tiny.load import WEIGHTS, fast_dtype
from vivace.tiny.train.evaluate import load_check
from vivace.tiny.train.export import read_pipeline
from vivace.tiny.train.seeds import held_out
from vivace.world import Scene, caption, parse_prompt, sample_scenes

SPLITS = {"held-out": "prompts", "development": "dev"}


def plan_of(text: str) -> Plan:
    """`fast`, `my.yaml`, or `fast@few_steps.steps=12,first_block_cache.threshold=0.1`."""
    name, _, changes = text.partition("@")
    plan = Plan.load(name)
    if not changes:
        return plan
    items = {t.card.name: t for t in plan.techniques}
    for change in changes.split(","):
        path, _, value = change.partition("=")
        technique, _, field = path.partition(".")
        items[technique] = items[technique].replace(**{field: json.loads(value)})
    return Plan(items.values(), name=text)


def prompt_of(scene: Scene) -> str:
    """The prompt a scene is asked for by."""
    return caption(scene.attributes, scene.seed)


def make(
    pipe: Any, plan: Plan, scenes: list[Scene], batch: int, guidance: float
) -> tuple[torch.Tensor, list[Any]]:
    """Clips uint8 (N, T, H, W, 3) on the CPU, and the receipts of the batches."""
    clips, receipts = [], []
    prompts = [prompt_of(s) for s in scenes]
    with accelerate(pipe, plan) as fast:
        for i in range(0, len(scenes), batch):
            seeds = [s.seed for s in scenes[i : i + batch]]
            out = fast(prompts[i : i + batch], seed=seeds, guidance_scale=guidance)
            clips += [torch.from_numpy(v) for v in out.videos]
            receipts.append(out.receipt)
    return torch.stack(clips), receipts


def psnr(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """PSNR of each clip in dB, infinite for equal clips."""
    error = (a.float() - b.float()).square().flatten(1).mean(1) / 255.0**2
    return [-10.0 * math.log10(e) if e > 0 else math.inf for e in error.tolist()]


def score(
    check: Any, clips: torch.Tensor, scenes: list[Scene], device: torch.device
) -> dict[str, list[float]]:
    """Outcomes of every attribute, 1 right and 0 wrong, over the prompts that say it."""
    outcomes: dict[str, list[float]] = {}
    for i in range(0, len(scenes), 50):
        wanted = [parse_prompt(prompt_of(s)) for s in scenes[i : i + 50]]
        for matches in check(clips[i : i + 50].to(device), wanted):
            for name, right in matches.items():
                outcomes.setdefault(name, []).append(float(right))
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="append", required=True, help="the first is the reference for PSNR")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--split", choices=SPLITS, default="held-out")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--guidance", type=float, help="default: the embedded model's")
    parser.add_argument("--pipeline", type=Path, default=WEIGHTS, help="a diffusers folder")
    parser.add_argument("--verifier", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    pipe = read_pipeline(args.pipeline, torch.bfloat16 if device.type == "cuda" else fast_dtype()).to(device)
    remember(pipe, "tiny", DEFAULTS)
    check = load_check(args.verifier, device)
    guidance = args.guidance if args.guidance is not None else DEFAULTS["guidance_scale"]
    scenes = sample_scenes(held_out(SPLITS[args.split], args.prompts))
    record: dict[str, Any] = {
        "benchmark": "plan_quality",
        "split": args.split,
        "prompts": args.prompts,
        "guidance": guidance,
        "environment": environment(device),
        "plans": {},
    }
    reference = None
    for text in args.plan:
        plan = plan_of(text)
        started = time.perf_counter()
        clips, receipts = make(pipe, plan, scenes, args.batch, guidance)
        seconds = time.perf_counter() - started
        reference = clips if reference is None else reference
        table = {n: statistics.fmean(v) for n, v in sorted(score(check, clips, scenes, device).items())}
        fidelity = psnr(clips, reference)
        first = receipts[0]
        record["plans"][text] = {
            "plan": plan.to_dict(),
            "accuracy": table,
            "accuracy_mean": statistics.fmean(table.values()),
            "psnr_to_first_median": None if text == args.plan[0] else statistics.median(fidelity),
            "nfe": first.nfe,
            "compute_share": statistics.fmean(r.compute_share for r in receipts),
            "flops_per_clip": statistics.fmean(r.flops / r.samples for r in receipts),
            "cache_hits": sum(r.cache_hits for r in receipts),
            "seconds": round(seconds, 2),
            "warnings": first.warnings,
        }
        kept = record["plans"][text]
        print(
            f"{text:60s} accuracy {kept['accuracy_mean']:.4f}  NFE {first.nfe}  "
            f"FLOPs/clip {kept['flops_per_clip']:.3e}  "
            f"PSNR {kept['psnr_to_first_median'] or math.inf:.1f}  {seconds:.1f} s",
            flush=True,
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
