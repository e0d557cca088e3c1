"""Wall time of caches at the shape of Wan2.1-1.3B: does the counted saving turn into seconds, and beside whom?

    python benchmarks/cache_wall.py --steps 20 --out benchmarks/results/DATE/cache-wall.json
    python benchmarks/cache_wall.py --overhead --out benchmarks/results/DATE/cache-overhead.json

Random weights, so the figures say how fast and nothing else. Block bodies are compiled; caches lie outside. All
contenders compute the same share of the steps where their rules allow it; times are CUDA events around whole
denoising loops after a warm-up, medians. `of_counted` is the time saved over the time that the counted
FLOPs say; recompilations are counted after the warm-up.

`--overhead` asks what the bookkeeping costs: every cache has settings under which it measures, decides and remembers,
and skips nothing. All contenders stay open side by side on copies that share their weights, so one compilation serves
all of them and runs alternate; times lie between events at the ends of neighbouring steps, without the first. Exact
runs stand before and after each round: their difference is the noise.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from wan_shape import build, timed

from vivace.core.env import environment
from vivace.plans.plan import Plan
from vivace.plans.session import Session, accelerate
from vivace.techniques.base import Technique
from vivace.techniques.caching.dbcache import DualBlockCache
from vivace.techniques.caching.dicache import DiCache
from vivace.techniques.caching.easycache import EasyCache
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.caching.foca import FoCa
from vivace.techniques.caching.frozen_schedule import FrozenSchedule
from vivace.techniques.caching.hicache import HiCache
from vivace.techniques.caching.magcache import MagCache
from vivace.techniques.caching.optimal_schedule import OptimalSchedule
from vivace.techniques.caching.taylorseer import TaylorSeer
from vivace.techniques.caching.teacache import TeaCache

PEERS = {
    "diffusers.first_block_cache": {"threshold": 10.0},
    "diffusers.taylorseer_lite": {"interval": 3},
    "diffusers.mag_cache": {"threshold": 10.0},
    "cache_dit.steps_mask": {"policy": "fast"},
}
NEVER = 1e-9
"""A threshold that no change stays below."""
BAR = 0.02
"""Largest share of a step that bookkeeping may cost."""


def idle(steps: int) -> dict[str, Technique]:
    """Every cache with settings that compute all of `steps` steps, and none that is an identity."""
    every = tuple(range(steps))
    head = steps - 1
    return {
        "teacache": TeaCache(threshold=NEVER, warmup=1),
        "first_block_cache": FirstBlockCache(threshold=NEVER, warmup=1, tail=0),
        "taylorseer": TaylorSeer(order=1, interval=2, warmup=head, tail=1),
        "optimal_schedule": OptimalSchedule(cond=every, uncond=every, steps=steps),
        "frozen_schedule": FrozenSchedule(computed=every, steps=steps, order=1),
        "magcache": MagCache(threshold=NEVER, retention=0.0, warmup=1, ratios=(0.5,)),
        "easycache": EasyCache(threshold=NEVER, warmup=1, tail=0),
        "dicache": DiCache(threshold=NEVER, retention=0.0, warmup=1, tail=0),
        "dbcache": DualBlockCache(threshold=NEVER, first_blocks=1, warmup=1),
        "hicache": HiCache(order=2, interval=2, warmup=head, tail=1),
        "foca": FoCa(interval=2, warmup=head, tail=1),
    }


USUAL = ("teacache", "first_block_cache", "taylorseer", "optimal_schedule", "frozen_schedule")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan2.1-1.3b")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--steps", type=int, help="20, or 7 with --overhead")
    parser.add_argument("--repeats", type=int, help="2, or 1 with --overhead")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--peers", nargs="*", default=sorted(PEERS))
    parser.add_argument("--overhead", action="store_true", help="time caches that skip nothing")
    parser.add_argument("--caches", nargs="+", default=USUAL, choices=sorted(idle(2)), help="of --overhead")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    pipe = build(args.model, args.device, dtype, args.layers)
    width = pipe.transformer.config.text_dim
    texts = [torch.randn(1, 512, width, device=args.device, dtype=dtype) for _ in range(2)]
    call = {
        "prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "output_type": "latent",
        "num_frames": args.frames, "height": args.height, "width": args.width,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.overhead:
        args.steps, args.repeats = args.steps or 7, args.repeats or 1
        if args.steps < 3:
            parser.error("--overhead needs 3 steps or more: the first one is not timed.")
        record = overhead(pipe, call, args)
        args.out.write_text(json.dumps({"dtype": str(dtype), **record}, indent=1) + "\n")
        return
    args.steps, args.repeats = args.steps or 20, args.repeats or 2
    n = args.steps
    kept = tuple(sorted({0, 1, *range(4, n, 3)}))
    plans = {
        "exact": Plan(),
        "optimal_schedule": Plan([OptimalSchedule(cond=kept, uncond=kept, steps=n)]),
        "frozen_schedule": Plan([FrozenSchedule(computed=kept, steps=n, order=1)]),
        "first_block_cache": Plan([FirstBlockCache(threshold=1.0, warmup=2, tail=0, max_consecutive=2)]),
    }
    record: dict[str, Any] = {
        "benchmark": "cache_wall", "model": args.model, "weights": "random", "steps": n, "computed": kept,
        "dtype": str(dtype), "backend": args.backend, "environment": environment(torch.device(args.device)),
        "contenders": {},
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for name, plan in plans.items():
        with accelerate(pipe, plan, compile_backend=args.backend) as fast:

            def run(steps: int = n, fast: Any = fast) -> Any:
                return fast(num_inference_steps=steps, seed=0, **call)

            run(5)
            before = graphs()
            seconds = [timed(run, args.device) for _ in range(args.repeats)]
            receipt = fast.receipt()
            rows[name] = {
                "seconds": seconds, "recompilations": graphs() - before, "share": receipt.compute_share,
                "nfe": receipt.nfe, "cache_bytes": receipt.cache_bytes, "peak_bytes": receipt.peak_bytes,
                "effects": {t.name: t.effects for t in receipt.techniques},
            }  # fmt: skip
        print(name, rows[name], flush=True)
    exact = statistics.median(rows["exact"]["seconds"])
    for row in rows.values():
        row["median"] = statistics.median(row["seconds"])
        saved = 1.0 - row["share"]
        row["of_counted"] = (1.0 - row["median"] / exact) / saved if saved > 1e-9 else None
    record["contenders"] = rows
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    record["peers"] = {}
    for name in args.peers:
        try:
            record["peers"][name] = row = peer_row(pipe, name, n, call, args)
            row["of_exact"] = row["median"] / exact
            print(name, row, flush=True)
        except Exception as why:
            record["peers"][name] = {"failed": repr(why)}
            print(name, repr(why), flush=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def peer_row(pipe: Any, name: str, steps: int, call: dict[str, Any], args: Any) -> dict[str, Any]:
    """Seconds of a peer on the same pipeline, its blocks compiled as its documentation says."""
    from vivace.evaluation import peers

    peer = peers.get(name)
    installed = peer.install(pipe, steps, **peer.settings(PEERS[name]))
    ran = [0]
    first_last = (pipe.transformer.blocks[1], pipe.transformer.blocks[-2])
    hooks = [b.register_forward_pre_hook(lambda *a: ran.__setitem__(0, ran[0] + 1)) for b in first_last[:1]]
    try:
        with compiled(pipe, args.backend):
            run = lambda n: pipe(  # noqa: E731
                num_inference_steps=n, generator=torch.Generator("cpu").manual_seed(0), **call
            )
            run(steps)
            seconds = []
            for _ in range(args.repeats):
                ran[0] = 0
                before = graphs()
                seconds.append(timed(lambda: run(steps), args.device))
            return {
                "settings": PEERS[name], "seconds": seconds, "median": statistics.median(seconds),
                "second_block_calls": ran[0], "recompilations": graphs() - before,
            }  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
        installed()


@contextlib.contextmanager
def compiled(pipe: Any, backend: str) -> Iterator[None]:
    """Blocks compiled as diffusers' `compile_repeated_blocks` does, and given back."""
    blocks = list(pipe.transformer.blocks)
    for block in blocks:
        block.compile(backend=backend)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def twin(pipe: Any) -> Any:
    """Another pipeline with modules of its own that share the weights: both can be in a session at a time."""
    tensors = [t for m in (pipe.transformer, pipe.vae) for t in (*m.parameters(), *m.buffers())]
    transformer, vae = copy.deepcopy((pipe.transformer, pipe.vae), {id(t): t for t in tensors})
    other = type(pipe)(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=copy.deepcopy(pipe.scheduler),
        transformer=transformer,
    )
    other.set_progress_bar_config(disable=True)
    return other


class Steps:
    """A session whose steps are timed by marks at their ends."""

    def __init__(self, pipe: Any, plan: Plan, args: Any) -> None:
        self.cuda = args.device == "cuda"
        self.marks: list[Any] = []
        self.session: Session = accelerate(pipe, plan, compile_backend=args.backend, on_step=self._mark)

    def _mark(self, *_: Any) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def run(self, steps: int, call: dict[str, Any]) -> list[float]:
        """Milliseconds of the steps of one run, without the first."""
        self.marks.clear()
        self.session(num_inference_steps=steps, seed=0, **call)
        if self.cuda:
            torch.cuda.synchronize()
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        return [a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in pairs]


def overhead(pipe: Any, call: dict[str, Any], args: Any) -> dict[str, Any]:
    """What caches cost that skip nothing: a record with milliseconds a step, and the share that is overhead."""
    n, known = args.steps, idle(args.steps)
    plans = {"exact": Plan()} | {name: Plan([known[name]]) for name in args.caches}
    runs: dict[str, Steps] = {}
    times: dict[str, list[float]] = {name: [] for name in (*plans, "exact_again")}
    rows: dict[str, dict[str, Any]] = {}
    # Copied before any session is open: a copy must not carry another session's wrappers.
    pipes = {name: pipe if name == "exact" else twin(pipe) for name in plans}
    with contextlib.ExitStack() as stack:
        for name, plan in plans.items():
            runs[name] = Steps(pipes[name], plan, args)
            stack.callback(runs[name].session.close)
            runs[name].run(2, call)
            print(f"{name}: warm, {graphs()} graphs", flush=True)
        before = graphs()
        for repeat in range(args.repeats):
            caches = list(args.caches)
            turn = repeat % len(caches)
            for name in ("exact", *caches[turn:], *caches[:turn], "exact_again"):
                times[name] += runs["exact" if name == "exact_again" else name].run(n, call)
        for name in plans:
            receipt = runs[name].session.receipt()
            if len(receipt.steps) != n or receipt.cache_hits or abs(receipt.compute_share - 1.0) > 1e-9:
                raise SystemExit(f"{name} did not compute all {n} steps, so its overhead cannot be told.")
            rows[name] = {
                "nfe": receipt.nfe,
                "cache_bytes": receipt.cache_bytes,
                "plan": plans[name].to_dict(),
            }
        recompilations = graphs() - before
    exact = times["exact"] + times["exact_again"]
    step = statistics.median(exact)
    noise = statistics.median(times["exact_again"]) / statistics.median(times["exact"]) - 1.0
    print(f"exact step {step:.2f} ms; second exact run against the first {noise:+.2%}")
    for name, row in rows.items():
        samples = exact if name == "exact" else times[name]
        row |= {"step_ms": statistics.median(samples), "samples_ms": samples}
        if name == "exact":
            continue
        low, high = interval(samples, exact, lambda a, b: a / b - 1.0)
        share = row["step_ms"] / step - 1.0
        verdict = "below" if high < BAR else "above" if low >= BAR else "undecided at"
        row |= {
            "overhead_ms": row["step_ms"] - step, "overhead": share, "overhead_95": [low, high], "verdict": verdict,
        }  # fmt: skip
        print(
            f"{name:20s} {row['step_ms']:9.2f} ms  {row['overhead_ms']:+8.2f} ms  {share:+7.2%} "
            f"[{low:+.2%}, {high:+.2%}]  {verdict} {BAR:.0%}  holds {row['cache_bytes'] / 2**20:.0f} MiB",
            flush=True,
        )
    return {
        "benchmark": "cache_overhead", "model": args.model, "weights": "random", "steps": n, "repeats": args.repeats,
        "layers": pipe.transformer.config.num_layers,
        "shape": {k: call[k] for k in ("num_frames", "height", "width")}, "backend": args.backend,
        "environment": environment(torch.device(args.device)), "bar": BAR, "noise": noise,
        "recompilations": recompilations, "contenders": rows,
    }  # fmt: skip


def interval(
    a: list[float], b: list[float], of: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """95 % bootstrap of a function of the medians of two samples."""
    rng = np.random.default_rng(0)
    drawn = [np.median(rng.choice(x, (4000, len(x))), axis=1) for x in (np.array(a), np.array(b))]
    low, high = np.quantile(of(*drawn), [0.025, 0.975])
    return float(low), float(high)


def graphs() -> int:
    """Graphs compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    main()
