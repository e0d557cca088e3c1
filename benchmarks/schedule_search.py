"""Search of evaluation schedules for the embedded model, and what they cost in quality.

    python benchmarks/schedule_search.py --clips 48 --out DIR [--climb 90]

1. The exact run of development prompts is recorded once: outputs of both guidance branches at every step, as one Gram
   matrix. 2. Schedules are searched on the Gram matrix, without the network; steps weigh as much as a forecast of that
   step alone was seen to change the end. 3. The best of every budget are run and compared with the exact clips (PSNR,
   LPIPS, accuracy of the verifier), beside fewer exact steps. 4. For the budgets of `--refine`, real runs refine the
   schedule by moving one step at a time (latent error).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vivace.calibration.gram import coordinates, error_rows, mask
from vivace.techniques.caching.schedules import power_law


class Problem:
    """Predicted error of a schedule from the Gram matrix (2n, 2n) of [c_0.., d_0..]."""

    def __init__(
        self, gram: np.ndarray, sigmas: np.ndarray, guidance: float, mix: float = 0.3, gain: Any = 1.0
    ) -> None:
        self.n = len(sigmas) - 1
        self.sigmas, self.guidance, self.mix = sigmas, guidance, mix
        values, vectors = np.linalg.eigh(gram)
        self.root = (vectors * np.sqrt(np.clip(values, 0, None))).T  # root.T @ root = gram
        self.steps = np.diff(sigmas) * gain

    def error(self, cond: list[int], uncond: list[int], order: int, delta_order: int) -> float:
        x = coordinates(self.sigmas)
        rows = np.concatenate(
            [
                error_rows(mask(cond, self.n), x, order),
                (self.guidance - 1) * error_rows(mask(uncond, self.n), x, delta_order),
            ],
            axis=1,
        )
        seen = (rows * self.steps[:, None]) @ self.root.T
        end = float(np.linalg.norm(seen.sum(0)))
        return end + self.mix * float(np.linalg.norm(seen, axis=1).sum())

    def search(self, n_cond: int, n_uncond: int, order: int, delta_order: int, seed: int = 0) -> tuple:
        best: tuple = (math.inf, [], [])
        for power in (1.0, 1.3, 1.7):
            cond = sorted(power_law(self.n, n_cond, self.n - 1, power))
            uncond = [cond[round(i * (n_cond - 1) / max(1, n_uncond - 1))] for i in range(n_uncond)]
            uncond = sorted(set(uncond))
            found = self.descend(cond, uncond, order, delta_order)
            best = min(best, found, key=lambda f: f[0])
        return best

    def descend(self, cond: list[int], uncond: list[int], order: int, delta_order: int) -> tuple:
        now = self.error(cond, uncond, order, delta_order)
        improved = True
        while improved:
            improved = False
            for c, u in moves(cond, uncond, self.n):
                e = self.error(c, u, order, delta_order)
                if e < now * (1 - 1e-4):
                    cond, uncond, now, improved = c, u, e, True
                    break
        return now, cond, uncond


def moves(cond: list[int], uncond: list[int], n: int) -> list[tuple[list[int], list[int]]]:
    """Neighbours: one computed step moved; the guidance step on it moves along, or to another computed step."""
    out = []
    for i in cond[1:]:
        for d in (-1, 1, -2, 2, -4, 4):
            j = i + d
            if 0 < j < n and j not in cond:
                c = sorted({*cond, j} - {i})
                u = sorted({*uncond, j} - {i}) if i in uncond else uncond
                out.append((c, u))
    for i in uncond[1:]:
        k = cond.index(i)
        for d in (-1, 1, -2, 2):
            if 0 < k + d < len(cond) and cond[k + d] not in uncond:
                out.append((cond, sorted({*uncond, cond[k + d]} - {i})))  # noqa: PERF401
    random.Random(len(out)).shuffle(out)
    return out


def solve(job: tuple) -> dict[str, Any]:
    gram, sigmas, guidance, share, ratio, order, delta_order, mix, gain = job
    n = len(sigmas) - 1
    budget = round(share * 2 * n)
    n_cond = min(n, round(budget / (1 + ratio)))
    n_uncond = max(2, budget - n_cond)
    if n_uncond > n_cond:
        n_uncond = n_cond
    error, cond, uncond = Problem(gram, sigmas, guidance, mix, gain).search(
        n_cond, n_uncond, order, delta_order
    )
    return {
        "share": share, "ratio": ratio, "order": order, "delta_order": delta_order, "mix": mix,
        "predicted": error, "cond": cond, "uncond": uncond,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.55])
    parser.add_argument("--keep", type=int, default=5, help="candidates run for each budget")
    parser.add_argument("--refine", type=float, nargs="*", default=[])
    parser.add_argument(
        "--climb", type=float, default=60.0, help="seconds of real runs for each budget to refine"
    )
    parser.add_argument("--few", type=int, default=16, help="clips of the runs that measure latent errors")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument(
        "--plan", action="append", default=[], help="further plans to run, as in plan_quality.py"
    )
    parser.add_argument("--gram", type=Path, help="a gram.npz of an earlier run")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import torch
    from plan_quality import make, plan_of, prompt_of, psnr, score

    from vivace.core.env import environment
    from vivace.models.describe import remember
    from vivace.plans.plan import Plan
    from vivace.plans.session import accelerate
    from vivace.techniques.caching.frozen_schedule import FrozenSchedule
    from vivace.techniques.caching.optimal_schedule import OptimalSchedule
    from vivace.techniques.compression.whole_clip_decode import WholeClipDecode
    from vivace.techniques.trajectory.few_steps import FewSteps
    from vivace.tiny.defaults import DEFAULTS
    from vivace.tiny.load import WEIGHTS, fast_dtype
    from vivace.tiny.train.evaluate import load_check
    from vivace.tiny.train.export import read_pipeline
    from vivace.tiny.train.seeds import held_out
    from vivace.world import sample_scenes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = read_pipeline(WEIGHTS, torch.bfloat16 if device.type == "cuda" else fast_dtype()).to(device)
    remember(pipe, "tiny", DEFAULTS)
    check = load_check(None, device)
    guidance = DEFAULTS["guidance_scale"]
    scenes = sample_scenes(held_out("dev", args.clips))
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        from vivace.evaluation.frames import unit_clips
        from vivace.evaluation.metrics.lpips import Lpips

        lpips: Any = Lpips(device)
    except Exception as why:
        print("no LPIPS:", why)
        lpips = None
    record: dict[str, Any] = {
        "benchmark": "schedule_search", "split": "development", "clips": args.clips, "guidance": guidance,
        "environment": environment(device), "runs": [],
    }  # fmt: skip

    # 1. record
    sigmas, grams, outputs = None, [], []
    hook = pipe.transformer.register_forward_hook(lambda m, a, out: outputs.append(out[0].float()))
    clips: list[Any] = []
    started = time.perf_counter()
    with accelerate(pipe, Plan([WholeClipDecode()])) as run:
        for i in range(0, len(scenes), args.batch):
            part = scenes[i : i + args.batch]
            outputs.clear()
            out = run([prompt_of(s) for s in part], seed=[s.seed for s in part], guidance_scale=guidance)
            clips += [torch.from_numpy(v) for v in out.videos]
            sigmas = np.array(run.clock.sigmas)
            values = torch.stack(outputs)  # (2n, B, ...), cond and uncond in turns
            cond, uncond = values[0::2], values[1::2]
            both = torch.cat([cond, cond - uncond]).flatten(2).transpose(0, 1)
            gram = (
                both.double() @ both.double().transpose(1, 2)
                if device.type == "cpu"
                else (both @ both.transpose(1, 2)).double()
            )
            gram = gram / gram.diagonal(dim1=1, dim2=2)[:, : len(cond)].mean(1)[:, None, None]
            grams.append(gram.cpu())
    hook.remove()
    outputs.clear()
    exact = torch.stack(clips)
    gram = torch.cat(grams).mean(0).numpy()
    np.savez(args.out / "gram.npz", gram=gram, sigmas=sigmas)
    print(f"exact: {len(scenes)} clips in {time.perf_counter() - started:.1f} s", flush=True)

    def run_plan(label: str, plan: Plan, **more: Any) -> dict[str, Any]:
        begun = time.perf_counter()
        made, receipts = make(pipe, plan, scenes, args.batch, guidance)
        table = {k: statistics.fmean(v) for k, v in score(check, made, scenes, device).items()}
        found = psnr(made, exact)
        row = {
            "label": label, "share": statistics.fmean(r.compute_share for r in receipts), "nfe": receipts[0].nfe,
            "psnr_median": statistics.median(found), "psnr_mean": statistics.fmean(min(f, 100.0) for f in found),
            "accuracy": statistics.fmean(table.values()),
            "drift": [e.effects.get("drift") for e in receipts[0].techniques if "drift" in e.effects],
            "seconds": time.perf_counter() - begun, "plan": plan.to_dict(), **more,
        }  # fmt: skip
        if lpips is not None:
            try:
                values = [
                    next(
                        iter(
                            lpips.pair(
                                unit_clips(a[None], device=device), unit_clips(b[None], device=device)
                            ).values()
                        )
                    )[0]
                    for a, b in zip(exact, made, strict=True)
                ]
                row["lpips"] = statistics.fmean(values)
            except Exception as why:
                row["lpips_error"] = repr(why)
        record["runs"].append(row)
        (args.out / "search.json").write_text(json.dumps(record, indent=1) + "\n")
        print(
            f"{label:58s} share {row['share']:.3f} PSNR {row['psnr_median']:.2f} "
            f"LPIPS {row.get('lpips', math.nan):.4f} "
            f"acc {row['accuracy']:.4f} {row['seconds']:.1f}s {more.get('predicted', '')}", flush=True,
        )  # fmt: skip
        return row

    run_plan("exact", Plan([WholeClipDecode()]))
    for steps in (30, 25, 20, 15, 10):
        run_plan(f"steps {steps}", Plan([FewSteps(steps=steps), WholeClipDecode()]))
    for text in args.plan:
        run_plan(text, plan_of(text))

    # 2a. sensitivity: one step forecast in an otherwise exact run, against its predicted error
    few = scenes[: min(args.few, len(scenes))]
    prompts, seeds = [prompt_of(s) for s in few], [s.seed for s in few]

    def latents_of(plan: Plan) -> torch.Tensor:
        with accelerate(pipe, plan) as fast:
            return fast(prompts, seed=seeds, guidance_scale=guidance, output_type="latent").raw.frames.float()

    goal = latents_of(Plan([]))

    def latent_error(plan: Plan) -> float:
        made = latents_of(plan)
        error = (made - goal).flatten(1).norm(dim=1) / goal.flatten(1).norm(dim=1)
        return float(error.log().mean().exp())

    n = len(sigmas) - 1
    gain = np.ones(n)
    unit = Problem(gram, sigmas, guidance, 0.0)
    measured = []
    everything = list(range(n))
    for j in range(1, n):
        steps = tuple(i for i in everything if i != j)
        e = latent_error(Plan([OptimalSchedule(cond=steps, uncond=steps, steps=n, order=1, delta_order=0)]))
        local = unit.error(list(steps), list(steps), 1, 0)
        gain[j] = e / max(local, 1e-9)
        measured.append({"step": j, "end_error": e, "predicted": local})
    record["sensitivity"] = measured
    gain[0] = gain[1]
    gain /= np.median(gain)
    # Single points are noisy (bf16): neighbours are averaged on a log scale.
    smooth = np.exp(np.convolve(np.pad(np.log(gain), 2, mode="edge"), np.ones(5) / 5, mode="valid"))
    gain = smooth
    print("gain", [round(float(g), 2) for g in gain], flush=True)

    # 2. search
    jobs = [
        (gram, sigmas, guidance, share, ratio, order, delta, mix, gain)
        for share, ratio, (order, delta), mix in itertools.product(
            args.shares, (1.0, 0.7, 0.5, 0.35), ((1, 0), (1, 1), (2, 1), (2, 0), (2, 2), (3, 1)), (0.3, 1.0)
        )
    ]
    started = time.perf_counter()
    with ProcessPoolExecutor(args.workers) as pool:
        found = list(pool.map(solve, jobs, chunksize=1))
    print(f"{len(jobs)} searches in {time.perf_counter() - started:.1f} s", flush=True)
    (args.out / "candidates.json").write_text(json.dumps(found) + "\n")

    def plan_for(f: dict[str, Any]) -> Plan:
        return Plan([
            OptimalSchedule(cond=tuple(f["cond"]), uncond=tuple(f["uncond"]), steps=len(sigmas) - 1,
                            order=f["order"], delta_order=f["delta_order"]),
            WholeClipDecode(),
        ])  # fmt: skip

    # 3. run the best of each budget: half by each mix
    best: dict[float, dict[str, Any]] = {}
    for share in args.shares:
        chosen = []
        for mix in (0.3, 1.0):
            group = sorted(
                (f for f in found if f["share"] == share and f["mix"] == mix), key=lambda f: f["predicted"]
            )
            chosen += group[: max(1, args.keep // 2)]
        for f in chosen:
            label = f"{share} ratio {f['ratio']} order {f['order']}/{f['delta_order']} mix {f['mix']}"
            row = run_plan(label, plan_for(f), predicted=f["predicted"])
            if share not in best or row["psnr_mean"] > best[share]["psnr_mean"]:
                best[share] = f | {"psnr_mean": row["psnr_mean"]}

    # 3b. the same steps at other levels
    for share, f in best.items():
        for order in (0, 1, 2):
            plan = Plan([FrozenSchedule(computed=tuple(f["cond"]), steps=n, order=order), WholeClipDecode()])
            run_plan(f"{share} stack order {order}", plan)

    # 4. refine by real runs
    for share in args.refine:

        def loss(f: dict[str, Any]) -> float:
            return latent_error(plan_for(f))

        now, f, end, tried = loss(best[share]), dict(best[share]), time.perf_counter() + args.climb, 0
        before = now
        while time.perf_counter() < end:
            improved = False
            for c, u in moves(f["cond"], f["uncond"], len(sigmas) - 1):
                if time.perf_counter() > end:
                    break
                candidate = f | {"cond": c, "uncond": u}
                e, tried = loss(candidate), tried + 1
                if e < now:
                    now, f, improved = e, candidate, True
            if not improved:
                break
        print(f"refine {share}: latent error {before:.4f} -> {now:.4f} in {tried} runs", flush=True)
        run_plan(f"{share} refined", plan_for(f), tried=tried, latent_error=now)


if __name__ == "__main__":
    main()
