"""Fitted solvers of the embedded model: where their steps lie and what their weights are, found on development prompts.

    python benchmarks/solver_search.py --steps 10 15 22 --seconds 60 --out OUT

1. The exact run of the fit's and of the test's prompts (both development, apart) leaves its latents at every step.
2. For every number of steps a local search moves one step at a time over the exact run's grid; each candidate is run
   in closed loop, and its weights are fitted on the way (`vivace.calibration.fitting`).
3. Every solver is run on the test's prompts: latent error, PSNR and LPIPS to the exact clips.
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

from vivace.calibration.fitting import Basis, fit_along, refine
from vivace.core.env import environment
from vivace.models.describe import remember
from vivace.tiny.defaults import DEFAULTS
from vivace.tiny.load import WEIGHTS, fast_dtype
from vivace.tiny.train.export import read_pipeline
from vivace.tiny.train.seeds import held_out
from vivace.world import sample_scenes

STARTS = {
    8: (0, 2, 5, 9, 14, 20, 28, 39),
    10: (0, 2, 4, 8, 13, 18, 25, 30, 38, 46),
    12: (0, 1, 3, 6, 9, 13, 17, 22, 27, 33, 39, 46),
    15: (0, 2, 3, 5, 6, 9, 12, 16, 19, 23, 27, 32, 37, 42, 46),
}


def start_of(steps: int, n: int) -> tuple[int, ...]:
    """A first placement: the one of an earlier search, or n u^1.4 made distinct."""
    if steps in STARTS and n == 50:
        return STARTS[steps]
    out: list[int] = []
    for k in range(steps):
        at = round((n - 2) * (k / (steps - 1)) ** 1.4)
        out.append(max(at, out[-1] + 1 if out else 0))
    for k in range(steps - 1, 0, -1):
        out[k] = min(out[k], n - steps + k)
    return tuple(out)


class Model:
    """The network of the embedded model on one set of prompts: (sample, step of the grid) to both outputs."""

    def __init__(self, pipe: Any, scenes: list[Any], batch: int, compiled: Any) -> None:
        from plan_quality import prompt_of

        self.pipe, self.scenes, self.batch = pipe, scenes, batch
        self.network = pipe.transformer if compiled is None else compiled
        prompts = [prompt_of(s) for s in scenes]
        self.text, self.none = pipe.encode_prompt(
            prompts, "", True, max_sequence_length=DEFAULTS["max_sequence_length"], device=pipe.device
        )
        self.calls = 0

    def pair(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cond, uncond), float32, at a sample (B, C, T, H, W)."""
        out, size = [], min(self.batch, len(self.text))
        copies = len(x) // len(self.text)  # several runs of the same prompts, one behind the other
        texts, nones = self.text.repeat(copies, 1, 1), self.none.repeat(copies, 1, 1)
        self.calls += 1
        with torch.no_grad():
            for i in range(0, len(x), size):
                part = x[i : i + size].to(self.pipe.transformer.dtype)
                both = torch.cat([part, part])
                text = torch.cat([texts[i : i + size], nones[i : i + size]])
                out.append(self.network(both, t.expand(len(both)), text, return_dict=False)[0].float())
        halves = [o.chunk(2) for o in out]
        return torch.cat([h[0] for h in halves]), torch.cat([h[1] for h in halves])


def exact(model: Model, shape: dict[str, int], guidance: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents (n + 1, B, C, T, H, W) of the exact run, its timesteps and noise levels."""
    from vivace.core.seeding import generators

    pipe = model.pipe
    seeds = [s.seed for s in model.scenes]
    noise = pipe.prepare_latents(
        len(seeds), pipe.transformer.config.in_channels, shape["height"], shape["width"], shape["frames"],
        torch.float32, pipe.device, generators(seeds, len(seeds)),
    )  # fmt: skip
    scheduler = pipe.scheduler
    scheduler.set_timesteps(shape["steps"], device=pipe.device)
    x = noise.to(pipe.device, torch.float32)
    states = [x]
    for t in scheduler.timesteps:
        c, u = model.pair(x, t)
        x = scheduler.step(u + guidance * (c - u), t, x, return_dict=False)[0].float()
        states.append(x)
    return torch.stack(states), scheduler.timesteps, scheduler.sigmas


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 15])
    parser.add_argument("--seconds", type=float, default=60.0, help="of search for each number of steps")
    parser.add_argument("--fit", type=int, default=64, help="prompts of the final fit")
    parser.add_argument("--search", type=int, default=24, help="prompts of the search, the first of the fit's")
    parser.add_argument("--test", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--grid", type=int, default=50)
    parser.add_argument("--frames", type=int, default=DEFAULTS["num_frames"])
    parser.add_argument("--size", type=int, default=DEFAULTS["height"])
    parser.add_argument("--refine", type=int, default=15, help="refine solvers of at most so many steps")
    parser.add_argument("--together", type=int, default=4, help="weight directions run side by side")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = read_pipeline(WEIGHTS, torch.bfloat16 if device.type == "cuda" else fast_dtype()).to(device)
    remember(pipe, "tiny", DEFAULTS)
    guidance = DEFAULTS["guidance_scale"]
    compiled = None
    if device.type == "cuda" and not args.no_compile:
        compiled = torch.compile(pipe.transformer, dynamic=False)
    shape = {"frames": args.frames, "height": args.size, "width": args.size, "steps": args.grid}
    scenes = sample_scenes(held_out("dev", args.fit + args.test))
    whole = Model(pipe, scenes, args.batch, compiled)
    begun = time.perf_counter()
    states, times, sigmas = exact(whole, shape, guidance)
    print(f"exact: {len(scenes)} clips in {time.perf_counter() - begun:.1f} s", flush=True)
    record: dict[str, Any] = {
        "benchmark": "solver_search", "split": "development", "fit": args.fit, "test": args.test,
        "search": args.search, "guidance": guidance, "grid": args.grid, "sigmas": sigmas.tolist(),
        "timesteps": times.tolist(), "environment": environment(device), "solvers": [],
    }  # fmt: skip
    n = args.grid

    def model_of(part: slice) -> Model:
        out = object.__new__(Model)
        out.__dict__.update(whole.__dict__, text=whole.text[part], none=whole.none[part])
        return out

    fit_part, test_part = slice(0, args.fit), slice(args.fit, None)
    small = slice(0, args.search)
    model_small, model_fit, model_test = (model_of(p) for p in (small, fit_part, test_part))
    goal_clips = decode(pipe, states[-1][test_part], args.batch)

    def error(x: torch.Tensor, goal: torch.Tensor) -> float:
        e = (x - goal).flatten(1).norm(dim=1) / goal.flatten(1).norm(dim=1)
        return float(e.log().mean().exp())

    for steps in args.steps:
        cache: dict[Any, Any] = {}
        basis = Basis("guided")

        def loss(nodes: tuple[int, ...], cache: dict[Any, Any] = cache, basis: Basis = basis) -> float:
            run = fit_along(model_small.pair, states[:, small], times, nodes, guidance, basis, cache=cache)
            return error(run.end, states[-1][small])

        nodes = start_of(steps, n)
        now, tried, end = loss(nodes), 1, time.perf_counter() + args.seconds
        first = now
        improved = True
        while improved and time.perf_counter() < end:
            improved = False
            # From the back: the start of the run is then shared by all candidates.
            for i in range(steps - 1, 0, -1):
                for d in (1, -1, 2, -2, 3, -3):
                    at = nodes[i] + d
                    if not nodes[i - 1] < at < (nodes[i + 1] if i + 1 < steps else n):
                        continue
                    if time.perf_counter() > end:
                        break
                    move = (*nodes[:i], at, *nodes[i + 1 :])
                    found, tried = loss(move), tried + 1
                    if found < now * (1 - 1e-4):
                        nodes, now, improved = move, found, True
        print(f"{steps} steps: latent error {first:.5f} -> {now:.5f} in {tried} runs: {nodes}", flush=True)
        cache.clear()
        kinds = ["guided", "guided-channel", "pair", "pair-channel"]
        kinds += [k for k in ("guided refined", "pair refined") if steps <= args.refine]
        made_of: dict[str, Any] = {}
        for kind in kinds:
            begun = time.perf_counter()
            if kind.endswith("refined"):
                before = made_of[kind.split()[0]]
                fitted, old, new = refine(
                    model_small.pair, states[:, small], times, before, guidance, together=args.together
                )
                print(f"  refined {old:.5f} -> {new:.5f}", flush=True)
            else:
                fit = fit_along(model_fit.pair, states[:, fit_part], times, nodes, guidance, Basis(kind))
                fitted = fit.fitted
            made_of[kind] = fitted
            made = fitted.run(model_test.pair, states[0][test_part], times, guidance)
            row = {
                "steps": steps, "nodes": nodes, "basis": kind, "tried": tried, "search_error": now,
                "start_error": first, "latent_error": error(made, states[-1][test_part]),
                **compare(decode(pipe, made, args.batch), goal_clips, device),
            }  # fmt: skip
            record["solvers"].append(row | {"weights": fitted.to_lists()})
            (args.out / "solver-search.json").write_text(json.dumps(record) + "\n")
            print(
                f"  {kind:16s} latent {row['latent_error']:.5f} PSNR {row['psnr_median']:.2f} "
                f"LPIPS {row['lpips']:.5f} {time.perf_counter() - begun:.1f} s", flush=True,
            )  # fmt: skip


def decode(pipe: Any, latents: torch.Tensor, batch: int) -> torch.Tensor:
    """Clips uint8 (N, T, H, W, 3) of normalised latents, as the pipeline decodes them."""
    vae = pipe.vae
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latents)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latents)
    out = []
    with torch.no_grad():
        for i in range(0, len(latents), batch):
            raw = vae.decode((latents[i : i + batch] * std + mean).to(vae.dtype), return_dict=False)[0]
            levels = ((raw.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            out.append(levels.permute(0, 2, 3, 4, 1).cpu())
    return torch.cat(out)


def compare(clips: torch.Tensor, goal: torch.Tensor, device: torch.device) -> dict[str, float]:
    """PSNR (median, mean) and LPIPS to the exact clips."""
    from plan_quality import psnr

    from vivace.evaluation.frames import unit_clips
    from vivace.evaluation.metrics.lpips import Lpips

    found = psnr(clips, goal)
    out = {
        "psnr_median": statistics.median(found),
        "psnr_mean": statistics.fmean(min(f, 100.0) for f in found),
        "lpips": math.nan,
    }
    lpips = Lpips(device)
    if not lpips.missing():
        values: list[float] = []
        for i in range(0, len(clips), 8):
            a, b = (unit_clips(c[i : i + 8], device=device) for c in (goal, clips))
            values += list(map(float, next(iter(lpips.pair(a, b).values()))))
        out["lpips"] = float(np.mean(values))
    return out


if __name__ == "__main__":
    main()
