"""Wall time of caches at the shape of Wan2.1-1.3B: does the counted saving turn into seconds, and beside whom?

    python benchmarks/cache_wall.py --steps 20 --out benchmarks/results/DATE/cache-wall.json

Random weights, so the figures say how fast and nothing else. Block bodies are compiled; caches lie outside. All
contenders compute the same share of the steps where their rules allow it; times are CUDA events around whole
denoising loops after a warm-up, medians. `of_counted` is the time saved over the time that the counted
FLOPs say; recompilations are counted after the warm-up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from wan_shape import build, timed

from vivace.core.env import environment
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.caching.frozen_schedule import FrozenSchedule
from vivace.techniques.caching.optimal_schedule import OptimalSchedule

PEERS = {
    "diffusers.first_block_cache": {"threshold": 10.0},
    "diffusers.taylorseer_lite": {"interval": 3},
    "diffusers.mag_cache": {"threshold": 10.0},
    "cache_dit.steps_mask": {"policy": "fast"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan2.1-1.3b")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--peers", nargs="*", default=sorted(PEERS))
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
    args.out.parent.mkdir(parents=True, exist_ok=True)
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


def graphs() -> int:
    """Graphs compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    main()
