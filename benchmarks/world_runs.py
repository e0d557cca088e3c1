"""Running many contenders of the embedded model under one protocol: what the scripts `*_world.py` share."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import vivace.evaluation.video
from vivace.core.errors import VivaceError
from vivace.evaluation.bench import Bench, Options
from vivace.evaluation.task import Task

NO_VIDEOS = "--no-videos"
if NO_VIDEOS in sys.argv:
    # At the top, since worker processes import this module and get the same arguments.
    vivace.evaluation.video.write_mp4 = lambda *args, **kwargs: None  # type: ignore[assignment]

METRICS = ("psnr", "ssim", "lpips_alex", "attributes", "dynamic_degree", "latent_error", "flicker")


def parser(doc: str | None, parts: Sequence[str]) -> argparse.ArgumentParser:
    """The command line; `parts` are the groups of contenders."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--out", type=Path, required=True, help="the store; several runs may share one")
    out.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    out.add_argument("--only", nargs="+", default=[], help="contenders whose name holds one of these texts")
    out.add_argument("--task", default="world-short@1")
    out.add_argument("--device", default="cuda")
    out.add_argument("--limit", type=int, default=50, help="prompts, of two clips each; 0: all")
    out.add_argument(
        "--jobs",
        type=int,
        default=2 * max(1, torch.cuda.device_count()),
        help="processes, dealt out over all visible GPUs; more than two a GPU take turns and are slower together",
    )
    out.add_argument("--threads", type=int, default=2, help="of each process")
    out.add_argument("--metrics", nargs="+", default=METRICS)
    out.add_argument(NO_VIDEOS, action="store_true", help="keep no clips for the eye")
    out.add_argument("--list", action="store_true", help="show the contenders and stop")
    return out


def run(
    found: argparse.ArgumentParser,
    specs: Callable[[argparse.Namespace], list[str]],
    save: Callable[[Path], None],
) -> int:
    """Bench the contenders that `specs` takes from the arguments; `save` writes the plans that they name."""
    args = found.parse_args()
    if args.limit < 0 or args.jobs < 1:
        found.error("--limit is 0 or more, and --jobs at least 1.")
    chosen = specs(args)
    if not chosen:
        what = (
            f"no contender's name holds {' or '.join(args.only)}" if args.only else "there are no contenders"
        )
        found.error(f"{what} in {' and '.join(args.part)}; see --list.")
    if args.list:
        print(*chosen, sep="\n")
        return 0
    if any(str(args.out) in spec for spec in chosen):
        save(args)
    started = time.perf_counter()

    def watch(name: str, done: int, total: int) -> None:
        if done > 0:
            print(f"{time.perf_counter() - started:6.1f} s  {done}/{total}  {name}", flush=True)

    options = Options(
        device=args.device,
        timing=False,
        memory=False,
        limit=args.limit,
        metrics=tuple(args.metrics),
        jobs=args.jobs,
        threads=args.threads,
        command=shlex.join(["python", *sys.argv]),
    )
    try:
        outcome = Bench(Task.load(args.task), chosen, args.out, options, watch).run()
    except VivaceError as error:
        found.error(str(error))
    for what, reasons in (("refused", outcome.refused), ("failed", outcome.failed)):
        for name, why in reasons.items():
            print(f"{what}: {name}: {why}")
    print(f"{len(outcome.records)} records in {args.out}, {time.perf_counter() - started:.0f} s")
    return 1 if outcome.failed else 0
