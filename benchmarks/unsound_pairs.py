"""Which caches are unsound beside int8 linears (W8A8): does quantisation noise cost more with the cache than without?

    python benchmarks/unsound_pairs.py --out benchmarks/results/DATE/unsound-pairs.json

Every cache, set to about half of the exact run's FLOPs, runs alone and beside `int8_linear` on the embedded model and
development prompts. If both faults were independent, the squared error of the pair would be the sum of the two alone:

    excess = MSE(cache + int8, exact) - MSE(cache, exact) - MSE(int8, exact)
    factor = MSE(cache + int8, exact) / (MSE(cache, exact) + MSE(int8, exact))

Where the cache's own fault is large it hides the noise, so the gain says how much int8 moves a cached run:

    gain = MSE(cache + int8, cache) / MSE(int8, exact)

All are over clips, with 95 % intervals from a bootstrap over clips, of the frames (levels / 255) and of the latents.
A pair is called unsound when the whole interval of the frames' factor lies above `--bar` dB, and sound when it lies
below; a cache that skipped nothing is called idle. A cache that decides by a signal may also skip other steps beside
int8: both shares are printed. Contenders that the `--budget` has no time for are named in the record.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan_quality import prompt_of, psnr, score

from vivace.core.env import environment
from vivace.evaluation.frames import unit_clips
from vivace.evaluation.metrics.lpips import Lpips
from vivace.evaluation.statistics import bootstrap_interval, resampling
from vivace.models.describe import remember
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.base import Technique
from vivace.techniques.caching.dbcache import DualBlockCache
from vivace.techniques.caching.dicache import DiCache
from vivace.techniques.caching.easycache import EasyCache
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.caching.foca import FoCa
from vivace.techniques.caching.fora import Fora
from vivace.techniques.caching.frozen_schedule import FrozenSchedule
from vivace.techniques.caching.hicache import HiCache
from vivace.techniques.caching.magcache import MagCache
from vivace.techniques.caching.module_errors import ModuleErrors, curves
from vivace.techniques.caching.optimal_schedule import OptimalSchedule
from vivace.techniques.caching.smoothcache import SmoothCache
from vivace.techniques.caching.speca import SpeCa
from vivace.techniques.caching.taylorseer import TaylorSeer
from vivace.techniques.caching.taylorseer_modules import TaylorSeerModules
from vivace.techniques.caching.teacache import TeaCache
from vivace.techniques.compression.int8_linear import Int8Linear
from vivace.techniques.compression.whole_clip_decode import WholeClipDecode
from vivace.tiny.defaults import DEFAULTS
from vivace.tiny.load import WEIGHTS, fast_dtype
from vivace.tiny.train.evaluate import load_check
from vivace.tiny.train.export import read_pipeline
from vivace.tiny.train.seeds import held_out
from vivace.world import sample_scenes

Contender = tuple[str, tuple[Technique, ...]]
CALIBRATION = 2
"""Prompts from which MagCache's and SmoothCache's curves are taken; none of them is measured."""
OLDEST = 3
"""Largest age in steps of SmoothCache's curves."""
DECODED = 16
"""Clips that go through the VAE at a time, so that each part is decoded in one pass."""


def contenders(ratios: tuple[float, ...], errors: dict[str, tuple[float, ...]]) -> tuple[Contender, ...]:
    """Caches at about half of the FLOPs in 50 steps, those that extrapolate or decide by a signal first."""
    return (
        ("taylorseer order 1", (TaylorSeer(interval=2, warmup=2, order=1),)),
        ("taylorseer order 2", (TaylorSeer(interval=2, warmup=2, order=2),)),
        ("hicache", (HiCache(interval=2, warmup=2),)),
        ("foca", (FoCa(interval=2, warmup=2),)),
        ("optimal_schedule order 0", (OptimalSchedule(share=0.5, order=0, delta_order=0),)),
        ("optimal_schedule order 1", (OptimalSchedule(share=0.5, order=1, delta_order=1),)),
        ("optimal_schedule order 2", (OptimalSchedule(share=0.5, order=2, delta_order=2),)),
        ("frozen_schedule order 1", (FrozenSchedule(share=0.5, order=1),)),
        ("speca", (SpeCa(threshold=0.012),)),
        ("first_block_cache", (FirstBlockCache(threshold=0.07),)),
        ("teacache", (TeaCache(threshold=0.018, warmup=2),)),
        ("easycache", (EasyCache(threshold=0.04, warmup=5),)),
        ("dicache", (DiCache(threshold=0.078, retention=0.1),)),
        ("dbcache", (DualBlockCache(threshold=0.095, first_blocks=2, warmup=2),)),
        ("magcache", (MagCache(threshold=0.09, ratios=ratios),)),
        ("taylorseer_modules order 1", (TaylorSeerModules(interval=2, warmup=2, order=1),)),
        ("taylorseer_modules order 2", (TaylorSeerModules(interval=2, warmup=2, order=2),)),
        ("fora", (Fora(interval=2),)),
        ("smoothcache", (SmoothCache(alpha=0.1, **errors),)),  # type: ignore[arg-type]
    )


@dataclass(frozen=True, kw_only=True)
class Made:
    """What one plan made: frames uint8 (N, T, H, W, 3) and latents float32 (N, C, t, h, w), on the device."""

    frames: torch.Tensor
    latents: torch.Tensor
    share: float
    """Mean executed share of the exact FLOPs."""
    seconds: float

    def errors(self, other: Made) -> dict[str, np.ndarray]:
        """Mean squared error of each clip (N,) against another run, of the frames and of the latents."""
        difference = (self.frames.float() - other.frames.float()) / 255.0
        return {
            "frames": difference.square().flatten(1).mean(1).double().cpu().numpy(),
            "latents": (self.latents - other.latents).square().flatten(1).mean(1).double().cpu().numpy(),
        }


class Bench:
    """The embedded model, its prompts, and what judges the clips."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else fast_dtype()
        self.pipe = read_pipeline(WEIGHTS, dtype).to(self.device)
        remember(self.pipe, "tiny", DEFAULTS)
        scenes = sample_scenes(held_out("dev", args.prompts + CALIBRATION))
        self.scenes, self.calibration = scenes[: args.prompts], scenes[args.prompts :]
        self.check = load_check(None, self.device)
        lpips = Lpips(self.device)
        if why := lpips.missing():
            print("no LPIPS:", why)
        self.lpips = None if why else lpips
        self.call = {
            "num_frames": args.frames, "height": args.size, "width": args.size, "num_inference_steps": args.steps,
            "guidance_scale": DEFAULTS["guidance_scale"], "output_type": "latent",
        }  # fmt: skip

    def run(self, techniques: tuple[Technique, ...]) -> Made:
        """Clips of all prompts."""
        begun, batch = time.perf_counter(), self.args.batch
        latents, shares = [], []
        with accelerate(self.pipe, Plan(techniques)) as fast:
            for i in range(0, len(self.scenes), batch):
                part = self.scenes[i : i + batch]
                out = fast([prompt_of(s) for s in part], seed=[s.seed for s in part], **self.call)
                latents.append(out.raw.frames.float())
                shares += [out.receipt.compute_share] * len(part)
        whole = torch.cat(latents)
        return Made(
            frames=self.decode(whole),
            latents=whole,
            share=statistics.fmean(shares),
            seconds=time.perf_counter() - begun,
        )

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames uint8 (N, T, H, W, 3) of latents, as the pipeline decodes them."""
        vae = self.pipe.vae
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        frames = []
        with torch.no_grad(), accelerate(self.pipe, Plan([WholeClipDecode()])):
            for part in latents.split(DECODED):
                raw = vae.decode((part * std + mean).to(vae.dtype), return_dict=False)[0]
                levels = ((raw.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
                frames.append(levels.permute(0, 2, 3, 4, 1).contiguous())
        return torch.cat(frames)

    def distance(self, made: Made, other: Made) -> float:
        """Mean LPIPS of two runs; NaN without its weights."""
        if self.lpips is None:
            return math.nan
        values: list[float] = []
        for a, b in zip(other.frames.split(DECODED), made.frames.split(DECODED), strict=True):
            pair = self.lpips.pair(unit_clips(a, device=self.device), unit_clips(b, device=self.device))
            values += pair[self.lpips.card.name]
        return statistics.fmean(values)

    def accuracy(self, made: Made) -> float:
        """Mean over the attributes of the share of prompts whose clip shows what they say."""
        table = score(self.check, made.frames, self.scenes, self.device)
        return statistics.fmean(statistics.fmean(v) for v in table.values())

    def fidelity(self, made: Made, other: Made) -> dict[str, float]:
        """Median PSNR and mean LPIPS."""
        return {
            "psnr_median": statistics.median(psnr(made.frames, other.frames)),
            "lpips": self.distance(made, other),
        }

    def curves(self) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]]]:
        """MagCache's ratios, and SmoothCache's error curves as its settings, from exact runs of other prompts."""
        with (
            residuals(self.pipe.transformer) as seen,
            accelerate(
                self.pipe, Plan([ModuleErrors(warmup=0, tail=0, oldest=min(OLDEST, self.args.steps - 1))])
            ) as run,
        ):
            prompts, seeds = [prompt_of(s) for s in self.calibration], [s.seed for s in self.calibration]
            receipt = run(prompts, seed=seeds, **self.call).receipt
        return tuple(seen), curves(receipt)


@contextmanager
def residuals(transformer: Any) -> Iterator[list[float]]:
    """A list that fills with mean |r_t| / |r_(t-1)| over tokens, r the stack's residual of the conditional branch.

    The pipeline calls the conditional branch first and the unconditional one second in every step.
    """
    ratios: list[float] = []
    start: list[torch.Tensor] = []
    before: dict[str, torch.Tensor] = {}
    calls = [0]

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start[:] = [args[0] if args else kwargs["hidden_states"]]

    def leave(module: Any, args: tuple[Any, ...], out: Any) -> None:
        calls[0] += 1
        if calls[0] % 2 == 0:
            return
        size = (out - start.pop()).float().norm(dim=-1)
        old = before.get("size")
        ratios.append(1.0 if old is None else float((size / old.clamp_min(1e-12)).mean()))
        before["size"] = size

    hooks = [
        transformer.blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
        transformer.blocks[-1].register_forward_hook(leave),
    ]
    try:
        yield ratios
    finally:
        for hook in hooks:
            hook.remove()


def interaction(
    pair: np.ndarray, cache: np.ndarray, int8: np.ndarray, moved: np.ndarray, confidence: float = 0.95
) -> dict[str, float]:
    """Excess, factor in dB and gain in dB with their intervals; see the module.

    Args:
        pair, cache, int8: squared errors (N,) against the exact clips.
        moved: squared errors (N,) of the pair against the cache alone.
    """
    excess = bootstrap_interval(pair - cache - int8, confidence)
    out = {"excess": excess.value, "excess_low": excess.low, "excess_high": excess.high}
    for name, above, below in (("factor_db", pair, cache + int8), ("gain_db", moved, int8)):
        value, low, high = quotient(above, below, confidence)
        out |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return out


def quotient(above: np.ndarray, below: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Quotient of two means over the same clips (N,) in dB, and its interval from a bootstrap of both together."""
    weights = resampling(len(above))
    # Runs that changed nothing leave nothing to divide by.
    with np.errstate(divide="ignore", invalid="ignore"):
        value = 10 * np.log10(above.mean() / below.mean())
        drawn = 10 * np.log10((weights @ above) / (weights @ below))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(drawn, tails) if len(above) > 1 else (math.nan, math.nan)
    return float(value), float(low), float(high)


def verdict(found: dict[str, float], share: float, bar: float) -> str:
    """`unsound`, `sound` or `undecided`, by where the interval of the factor lies; `idle` for a share of 1."""
    if share > 1 - 1e-9:
        return "idle"
    if found["factor_db_low"] > bar:
        return "unsound"
    return "sound" if found["factor_db_high"] < bar else "undecided"


def strict(value: Any) -> Any:
    """Plain data for JSON, which has no infinities: they become null, as does what is not a number."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(record: dict[str, Any], out: Path) -> None:
    """The record as a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(strict(record), indent=1) + "\n")


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--frames", type=int, default=DEFAULTS["num_frames"])
    parser.add_argument("--size", type=int, default=DEFAULTS["height"], help="height and width")
    parser.add_argument("--steps", type=int, default=DEFAULTS["num_inference_steps"])
    parser.add_argument("--only", nargs="+", help="labels, or the beginnings of some")
    parser.add_argument("--backend", default="int_mm", help="kernel of int8_linear, or auto")
    parser.add_argument("--bar", type=float, default=1.0, help="dB from which on a pair is unsound")
    parser.add_argument("--budget", type=float, default=140.0, help="seconds; 0 for no limit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    bench = Bench(args)
    chosen = contenders(*bench.curves())
    if args.only:
        chosen = tuple(c for c in chosen if any(c[0].startswith(o) for o in args.only))
        if not chosen:
            parser.error(
                f"--only names no contender; there are {', '.join(c[0] for c in contenders((), {}))}."
            )
    quantised = Int8Linear(backend=args.backend)
    exact, int8 = bench.run(()), bench.run((quantised,))
    noise = int8.errors(exact)
    record: dict[str, Any] = {
        "benchmark": "unsound_pairs", "split": "development", "prompts": args.prompts, "steps": args.steps,
        "shape": [args.frames, args.size, args.size], "guidance": DEFAULTS["guidance_scale"],
        "dtype": str(bench.pipe.transformer.dtype), "bar_db": args.bar, "environment": environment(bench.device),
        "exact": {"accuracy": bench.accuracy(exact), "seconds": exact.seconds},
        "int8": {
            "plan": Plan([quantised]).to_dict(), "accuracy": bench.accuracy(int8), "seconds": int8.seconds,
            **bench.fidelity(int8, exact), "mse": {k: v.tolist() for k, v in noise.items()},
        },
        "pairs": {}, "left_out": [],
    }  # fmt: skip
    print(
        f"ready after {time.perf_counter() - started:.1f} s; exact {exact.seconds:.1f} s, accuracy "
        f"{record['exact']['accuracy']:.4f}; int8 {int8.seconds:.1f} s, PSNR {record['int8']['psnr_median']:.2f}, "
        f"LPIPS {record['int8']['lpips']:.4f}, accuracy {record['int8']['accuracy']:.4f}\n"
        f"{'':26s} {'share':>11s} {'PSNR':>11s} {'to int8':>7s} {'LPIPS':>13s} {'accuracy':>11s}"
        "  excess of MSE x 1e6    factor in dB          gain in dB",
        flush=True,
    )
    longest = 0.0
    for label, techniques in chosen:
        begun = time.perf_counter()
        if args.budget and begun - started + longest > args.budget:
            record["left_out"].append(label)
            continue
        alone, both = bench.run(techniques), bench.run((*techniques, quantised))
        own, pair = alone.errors(exact), both.errors(exact)
        moved = both.errors(alone)
        found = {k: interaction(pair[k], own[k], noise[k], moved[k]) for k in noise}
        row = {
            "plan": Plan([*techniques, quantised]).to_dict(),
            "alone": {
                "share": alone.share, "accuracy": bench.accuracy(alone), "seconds": alone.seconds,
                **bench.fidelity(alone, exact), "mse": {k: v.tolist() for k, v in own.items()},
            },
            "with_int8": {
                "share": both.share, "accuracy": bench.accuracy(both), "seconds": both.seconds,
                **bench.fidelity(both, exact), "to_int8": bench.fidelity(both, int8),
                "mse": {k: v.tolist() for k, v in pair.items()},
                "mse_to_cache": {k: v.tolist() for k, v in moved.items()},
            },
            "interaction": found, "verdict": verdict(found["frames"], alone.share, args.bar),
        }  # fmt: skip
        record["pairs"][label] = row
        longest = max(longest, time.perf_counter() - begun)
        print_row(label, row)
        write(record, args.out)
    record["seconds"] = time.perf_counter() - started
    write(record, args.out)
    if record["left_out"]:
        print(f"no time within {args.budget:.0f} s for: {', '.join(record['left_out'])}")
    print(f"{record['seconds']:.0f} s in all")


def print_row(label: str, row: dict[str, Any]) -> None:
    """One line of the table: the cache alone, then beside int8."""
    a, b, f = row["alone"], row["with_int8"], row["interaction"]["frames"]
    print(
        f"{label:26s} {a['share']:5.3f} {b['share']:5.3f} {a['psnr_median']:5.2f} {b['psnr_median']:5.2f} "
        f"{b['to_int8']['psnr_median']:7.2f} {a['lpips']:6.4f} {b['lpips']:6.4f} "
        f"{a['accuracy']:5.3f} {b['accuracy']:5.3f}  "
        f"{1e6 * f['excess']:+6.0f} [{1e6 * f['excess_low']:+.0f}, {1e6 * f['excess_high']:+.0f}]  "
        f"{f['factor_db']:+.2f} [{f['factor_db_low']:+.2f}, {f['factor_db_high']:+.2f}]  "
        f"{f['gain_db']:+.2f} [{f['gain_db_low']:+.2f}, {f['gain_db_high']:+.2f}]  {row['verdict']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
