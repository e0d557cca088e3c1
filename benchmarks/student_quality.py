"""How near to real clips, how lively and how various students are: thousands of clips against renders of the world.

    python benchmarks/student_quality.py --count 2048 --out students.json        (on a GPU)

For every caption there is a render that shows it. Of exact (50 steps with guidance), of the teacher with few steps, of
the preset `turbo` and of every student in `--weights`, those that come with Vivace by default:

- `distance`: unbiased squared kernel distance (KID's kernel) of the verifier's features to those of renders, scaled as
  in the metric `verifier_distance`, tables of `--count` clips each, with a bootstrap interval over clips; `ratio` is
  over that of exact. `floor` is what other renders of as many captions have.
- `attributes` and `motion`: share of captions' attributes, and of their motions, that the verifier sees, with 95 %
  intervals over captions.
- `dynamic`: share of clips in which something moves, by the metric `dynamic_degree`, on the first `--various` clips.
- `diversity`: mean distance of the verifier's features between clips of one caption with different noise, `--seeds`
  clips of each of `--various` captions; over that of exact it is `diversity_ratio`.

Features of the renders are kept in `--cache` and are used again. Rows that `--out` has already, of the same settings
and the same file of weights, are kept too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from students_world import plans

import vivace
from vivace.core.env import environment
from vivace.evaluation.metrics.base import Context
from vivace.evaluation.metrics.dynamic_degree import DynamicDegree
from vivace.evaluation.metrics.verifier_distance import SPREAD
from vivace.evaluation.statistics import mean_interval
from vivace.evaluation.two_sample import mmd2
from vivace.models.student import students_folder
from vivace.plans.plan import Plan
from vivace.tiny.train.clips import ClipShape
from vivace.training.distillation.run import digest
from vivace.world import caption, parse_prompt, sample_scenes
from vivace.world.splits import TEST
from vivace.world.verifier import Verifier

SHAPE = ClipShape(frames=29, height=128, width=128)
FIRST, OTHERS = 200_000, 400_000
"""Where the captions' scenes begin in the test split, behind those of the tasks, and those of the other renders."""
DRAWS = 200
LEFT = ("out", "weights", "cache", "only", "without_exact")
Make = Callable[[list[str], list[int]], torch.Tensor]
"""Captions and seeds to uint8 clips (B, T, H, W, 3)."""


def scenes(count: int, first: int = FIRST) -> list[Any]:
    return list(sample_scenes(list(TEST[first : first + count])))


def rendered(found: list[Any], device: str, batch: int) -> Iterable[torch.Tensor]:
    for start in range(0, len(found), batch):
        yield SHAPE.draw(found[start : start + batch], torch.device(device))[0]


def maker(pipeline: Any, plan: Plan) -> Make:
    """The pipeline under a plan."""

    def make(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        with vivace.accelerate(pipeline, plan) as fast:
            out = fast(prompts, seed=seeds, num_frames=29, height=128, width=128, output_type="pt")
        frames = out.raw.frames if hasattr(out.raw, "frames") else out.raw[0]
        return (frames.float().clamp(0, 1) * 255.0).round().to(torch.uint8).permute(0, 1, 3, 4, 2)

    return make


def examined(
    clips: Iterable[torch.Tensor], prompts: list[str], verifier: Verifier, moving: int
) -> dict[str, Any]:
    """Features (N, 192), and which attributes and motions were seen."""
    features, shares, motion, dynamic = [], [], [], []
    metric, at = DynamicDegree(), 0
    for part in clips:
        features.append(verifier.features(part).cpu().numpy())
        for seen, prompt in zip(verifier.verify(part), prompts[at : at + len(part)], strict=True):
            found = seen.matches(parse_prompt(prompt))
            shares.append(sum(found.values()) / max(1, len(found)))
            if "motion" in found:
                motion.append(found["motion"])
        if at < moving:
            first = part[: moving - at].float() / 255.0
            dynamic += metric.sample(first, Context(fps=8.0))["dynamic_degree"]
        at += len(part)
    table = np.concatenate(features).astype(np.float64) / SPREAD
    return {
        "features": table,
        "attributes": mean_interval(np.array(shares)).to_dict(),
        "motion": mean_interval(np.array(motion, float), binary=True).to_dict() if motion else None,
        "dynamic": float(np.mean(dynamic)) if dynamic else None,
    }


def interval(table: np.ndarray, real: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the distance, over clips of both tables, on a quarter of them for speed."""
    random, count = np.random.default_rng(0), min(512, len(table))
    found = [
        mmd2(table[random.choice(len(table), count)], real[random.choice(len(real), count)])
        for _ in range(DRAWS)
    ]
    # A draw of a quarter spreads twice as much as the whole would.
    middle, spread = mmd2(table, real), float(np.std(found)) * (count / len(table)) ** 0.5
    return [middle - 1.96 * spread, middle + 1.96 * spread]


def various(make: Make, prompts: list[str], seeds: int, verifier: Verifier, batch: int) -> float:
    """Mean distance of features between clips of one caption."""
    wanted = [(p, 50_000 + seeds * i + k) for i, p in enumerate(prompts) for k in range(seeds)]
    rows = []
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        rows.append(verifier.features(make([p for p, _ in part], [s for _, s in part])).cpu())
    table = torch.cat(rows).float().view(len(prompts), seeds, -1) / SPREAD
    distances = torch.cdist(table, table)
    return float(distances.sum() / (len(prompts) * seeds * (seeds - 1)))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--weights", type=Path, help="folder of student files")
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--cache", type=Path, help="features of the renders (.npz)")
    words.add_argument("--count", type=int, default=2048)
    words.add_argument("--various", type=int, default=96)
    words.add_argument("--seeds", type=int, default=4)
    words.add_argument("--batch", type=int, default=64)
    words.add_argument(
        "--only", nargs="+", default=[], help="contenders whose name is one of these, and exact"
    )
    words.add_argument("--without-exact", action="store_true", help="no ratios then")
    words.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = words.parse_args()
    folder = students_folder() if options.weights is None else options.weights
    pipeline = vivace.load("tiny", device=options.device)
    pipeline.set_progress_bar_config(disable=True)
    verifier = Verifier.load(device=options.device)
    shown = scenes(options.count)
    prompts = [caption(s.attributes, s.seed) for s in shown]
    known = plans(options.weights)
    contenders = {"exact": Plan([], "exact"), **known["students"], **known["presets"], **known["naive"]}
    if options.only:
        contenders = {n: p for n, p in contenders.items() if n == "exact" or n in options.only}
    if options.without_exact:
        del contenders["exact"]
    record: dict[str, Any] = {
        "benchmark": "students against renders",
        "options": {k: v for k, v in vars(options).items() if k not in LEFT},
        "environment": environment(options.device),
        "rows": {},
    }
    if options.out.is_file():
        before = json.loads(options.out.read_text())
        if all(before[k] == record[k] for k in ("options", "environment")):
            record["rows"] = before["rows"]
    cached = dict(np.load(options.cache)) if options.cache is not None and options.cache.is_file() else {}

    def kept(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        if name not in cached:
            cached[name] = make().astype(np.float16)
        return cached[name].astype(np.float64)

    def of(found: list[Any]) -> np.ndarray:
        parts = [verifier.features(c).cpu().numpy() for c in rendered(found, options.device, 64)]
        return np.concatenate(parts).astype(np.float64) / SPREAD

    real = kept("real", lambda: of(shown))
    others = kept("others", lambda: of(scenes(options.count, OTHERS)))
    record["floor"] = mmd2(others, real)
    for name, plan in contenders.items():
        weights = digest(folder / f"{name}.safetensors") if name in known["students"] else ""
        if record["rows"].get(name, {}).get("weights") == weights:
            continue
        started, make = time.perf_counter(), maker(pipeline, plan)

        def clips(make: Make = make) -> Iterable[torch.Tensor]:
            for start in range(0, options.count, options.batch):
                rows = slice(start, min(start + options.batch, options.count))
                yield make(prompts[rows], list(range(rows.start, rows.stop)))

        row = examined(clips(), prompts, verifier, options.various)
        table = row.pop("features")
        row |= {
            "weights": weights,
            "distance": mmd2(table, real),
            "distance_interval": interval(table, real),
            "diversity": various(make, prompts[: options.various], options.seeds, verifier, options.batch),
            "seconds": round(time.perf_counter() - started, 1),
        }
        if (exact := row if name == "exact" else record["rows"].get("exact")) is not None:
            row["ratio"] = row["distance"] / exact["distance"]
            row["diversity_ratio"] = row["diversity"] / exact["diversity"]
        record["rows"][name] = row
        print(name, {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    if options.cache is not None:
        np.savez_compressed(options.cache, **cached)


if __name__ == "__main__":
    main()
