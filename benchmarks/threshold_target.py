"""Does a threshold that was solved on a calibration give the speed-up asked for, on prompts it has not seen?

    python benchmarks/threshold_target.py --out benchmarks/results/threshold_target.json

For every shape and number of steps the embedded model is calibrated once, on a few prompts of the development split.
Every technique is solved for `--speedup` on that file and run as it is, without correction, on other prompts: of the
same split, and of the held-out split. The table has the speed-up asked for, predicted and counted (1 / share of the
FLOPs, from the receipts), PSNR to the exact clips (median), and the latents' error: relative L2, and in the units in
which it was predicted (root mean square length of a network output). Small trial on a CPU:

    python benchmarks/threshold_target.py --shape 9x64x64 --steps 16 --calibrate 1 --prompts 1 --out trial.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from plan_quality import prompt_of, psnr

from vivace.core.env import environment
from vivace.core.errors import ConfigError
from vivace.models.describe import remember
from vivace.plans.calibrating import calibrate
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.plans.solving import (
    ONLINE,
    SCHEDULE,
    Simulator,
    as_technique,
    schedule_for,
    solved,
    technique_for,
)
from vivace.techniques.base import Technique
from vivace.techniques.compression.whole_clip_decode import WholeClipDecode
from vivace.tiny.defaults import DEFAULTS
from vivace.tiny.load import WEIGHTS, fast_dtype
from vivace.tiny.train.export import read_pipeline
from vivace.tiny.train.seeds import held_out
from vivace.world import Scene, sample_scenes

SETS = {"development": "dev", "held-out": "prompts"}


def shape_of(text: str) -> dict[str, int]:
    """`29x128x128` (frames, height, width) as call arguments."""
    frames, height, width = map(int, text.split("x"))
    return {"num_frames": frames, "height": height, "width": width}


def settings(name: str, steps: int) -> str:
    """A technique as `vivace calibrate --technique` takes it: long warm-ups are cut to a sixth of the steps."""
    warmup = {"teacache": 5, "easycache": 10}.get(name)
    return name if warmup is None else f"{name}@warmup={max(1, min(warmup, steps // 6))}"


def run(
    pipe: Any, techniques: list[Technique], scenes: list[Scene], batch: int, call: dict[str, Any], units: bool
) -> dict[str, Any]:
    """Clips uint8 (N, T, H, W, 3) and latents (N, ...) on the CPU, share of FLOPs, seconds.

    `units` also gives each clip's root mean square length of the conditional outputs.
    """
    clips, latents, lengths, shares, masks = [], [], [], [], []
    seen: list[torch.Tensor] = []
    started = time.perf_counter()

    def keep(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == call["num_inference_steps"] - 1:
            latents.append(values["latents"].float().cpu())
        return {}

    hook = None
    if units:
        hook = pipe.transformer.register_forward_hook(
            lambda module, args, out: seen.append(out[0].float().flatten(1).norm(dim=1))
        )
    try:
        with accelerate(pipe, Plan([*techniques, WholeClipDecode()])) as fast:
            for i in range(0, len(scenes), batch):
                part = scenes[i : i + batch]
                seen.clear()
                out = fast(
                    [prompt_of(s) for s in part],
                    seed=[s.seed for s in part],
                    callback_on_step_end=keep,
                    callback_on_step_end_tensor_inputs=["latents"],
                    **call,
                )
                clips += [torch.from_numpy(v) for v in out.videos]
                shares += [out.receipt.compute_share] * len(part)
                masks.append([round(b.blocks_run, 3) for s in out.receipt.steps for b in s.branches[:1]])
                if units:
                    lengths.append(torch.stack(seen[0::2]).square().mean(0).sqrt().cpu())
    finally:
        if hook is not None:
            hook.remove()
    return {
        "clips": torch.stack(clips),
        "latents": torch.cat(latents),
        "units": torch.cat(lengths) if lengths else None,
        "share": statistics.fmean(shares),
        "blocks_by_step": masks,
        "seconds": time.perf_counter() - started,
    }


def compared(made: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """A run beside the exact run of the same prompts."""
    moved = (made["latents"] - exact["latents"]).flatten(1).norm(dim=1)
    return {
        "counted_speedup": 1.0 / made["share"],
        "psnr_median": statistics.median(min(p, 100.0) for p in psnr(made["clips"], exact["clips"])),
        "latent_error_relative": statistics.fmean((moved / exact["latents"].flatten(1).norm(dim=1)).tolist()),
        "latent_error": statistics.fmean((moved / exact["units"]).tolist()),
        "blocks_by_step": made["blocks_by_step"],
        "seconds": round(made["seconds"], 2),
    }


def study(pipe: Any, shape: str, steps: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One calibration and every technique on it."""
    call: dict[str, Any] = shape_of(shape) | {"num_inference_steps": steps}
    scenes = sample_scenes(held_out("dev", args.calibrate + args.prompts))
    sets = {
        "development": scenes[args.calibrate :],
        "held-out": sample_scenes(held_out("prompts", args.prompts)),
    }
    started = time.perf_counter()
    made = calibrate(pipe, [prompt_of(s) for s in scenes[: args.calibrate]], seed=args.seed, **call)
    path = made.save(folder / f"{shape}-{steps}.json")
    out: dict[str, Any] = {
        "shape": shape,
        "steps": steps,
        "calibration_seconds": round(time.perf_counter() - started, 2),
        "techniques": {},
    }
    exact = {name: run(pipe, [], part, args.batch, call, True) for name, part in sets.items()}
    out["exact_seconds"] = {name: round(e["seconds"], 2) for name, e in exact.items()}
    for name in args.technique:
        started = time.perf_counter()
        text = settings(name, steps)
        row: dict[str, Any] = {"technique": text, "asked_speedup": args.speedup}
        out["techniques"][name] = row
        try:
            if name == SCHEDULE:
                found = schedule_for(made, "speedup", args.speedup, args.order)
                technique: Technique = as_technique(made, found, args.order)
                total = 2 * steps if made.guided else steps
                row |= {"predicted_speedup": total / found.nfe, "predicted_error": found.error("end")}
                row["predicted_masks"] = [[s not in found.cond for s in range(steps)]]
            else:
                simulator = Simulator(made, technique_for(text, path))
                told = solved(simulator, "speedup", args.speedup)
                technique = simulator.technique.replace(threshold=told.threshold)
                row |= {"predicted_speedup": told.speedup, "predicted_error": told.error}
                row |= {"threshold": told.threshold, "predicted_masks": simulator.masks(told.threshold)}
        except ConfigError as why:
            row["refused"] = str(why)
            print(f"{shape:>11s} {steps:3d} {name:18s} {why}", flush=True)
            continue
        row["solve_seconds"] = round(time.perf_counter() - started, 2)
        row["sets"] = {
            s: compared(run(pipe, [technique], part, args.batch, call, False), exact[s])
            for s, part in sets.items()
        }
        print(line(shape, steps, name, row), flush=True)
    return out


def line(shape: str, steps: int, name: str, row: dict[str, Any]) -> str:
    """One row of the table."""
    dev, other = (row["sets"][s] for s in SETS)
    both = "  ".join(
        f"{s['counted_speedup']:5.2f} {s['psnr_median']:6.2f} {s['latent_error']:7.4f}" for s in (dev, other)
    )
    return (
        f"{shape:>11s} {steps:3d} {name:18s} {row.get('threshold', math.nan):9.4g} {row['asked_speedup']:5.2f} "
        f"{row['predicted_speedup']:5.2f} {row['predicted_error']:7.4f}  {both}"
    )


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """By technique: how far the counted speed-up is from the one asked for, and how the two sets agree."""
    out: dict[str, Any] = {}
    for case in record["cases"]:
        for name, row in case["techniques"].items():
            kept = out.setdefault(
                name, {"cases": 0, "refused": 0, "within_5_percent": dict.fromkeys(SETS, 0), "worst": 0.0}
            )
            kept["cases"] += 1
            if "refused" in row:
                kept["refused"] += 1
                continue
            off = {s: abs(row["sets"][s]["counted_speedup"] / row["asked_speedup"] - 1.0) for s in SETS}
            for s, value in off.items():
                kept["within_5_percent"][s] += value <= 0.05
            kept["worst"] = max(kept["worst"], *off.values())
            ratio = row["sets"]["held-out"]["counted_speedup"] / row["sets"]["development"]["counted_speedup"]
            kept.setdefault("held_out_over_development", []).append(ratio)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=["29x128x128", "29x96x160", "13x128x128"])
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 50])
    parser.add_argument(
        "--technique", nargs="+", default=[*ONLINE, SCHEDULE], choices=[*ONLINE, SCHEDULE], metavar="NAME"
    )
    parser.add_argument("--calibrate", type=int, default=2, help="prompts of the development split")
    parser.add_argument("--prompts", type=int, default=4, help="other prompts, of each split")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--order", type=int, default=0, help="degree of the schedule's forecast")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration's noise")
    parser.add_argument("--pipeline", type=Path, default=WEIGHTS, help="a diffusers folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    started = time.perf_counter()
    device = torch.device(args.device)
    pipe = read_pipeline(args.pipeline, torch.bfloat16 if device.type == "cuda" else fast_dtype()).to(device)
    pipe.set_progress_bar_config(disable=True)
    remember(pipe, "tiny", DEFAULTS)
    record: dict[str, Any] = {
        "benchmark": "threshold_target",
        "asked_speedup": args.speedup,
        "calibration_prompts": args.calibrate,
        "prompts_of_each_set": args.prompts,
        "sets": SETS,
        "guidance": DEFAULTS["guidance_scale"],
        "environment": environment(device),
        "cases": [],
    }
    print(
        f"{'shape':>11s} {'n':>3s} {'technique':18s} {'threshold':>9s} {'asked':>5s} {'told':>5s} {'error':>7s}  "
        f"{'development: counted, PSNR, error':23s}  held-out: the same"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shape:
            for steps in args.steps:
                record["cases"].append(study(pipe, shape, steps, args, Path(folder)))
                record["summary"] = summary(record)
                record["seconds"] = round(time.perf_counter() - started, 1)
                args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, kept in record["summary"].items():
        inside = ", ".join(f"{s} {n} of {kept['cases']}" for s, n in kept["within_5_percent"].items())
        print(f"{name:18s} within 5 % of the target: {inside}; worst {kept['worst']:.1%}")
    print(f"{record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
