"""Time of one evaluation of the embedded model in every number format, on this machine's processor.

    python benchmarks/format_times.py --out format-times.json

Seconds of one guided step (two evaluations of one clip, 29 frames of 128 x 128), least of `--repeats` after one to warm
up, over two. `fp32` is how the model runs on a processor, `bf16` the same with all weights in bf16. Formats are those
of `compression_world.py` (`quantized_linear`), and `int8_linear`. Those that a receipt calls emulated say nothing of
speed on hardware that has them, and are marked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from compression_world import FORMATS, Q

import vivace
from vivace.core.env import environment
from vivace.plans.plan import Plan
from vivace.techniques.base import registry

PROMPT = "a large red sphere slides left on a checkered floor"


def seconds(pipeline: Any, techniques: list[Any], repeats: int) -> tuple[float, bool]:
    """(one evaluation, whether the receipt says that layers are emulated)."""
    plan = Plan([registry["few_steps"](steps=1), *techniques], "timed")
    with vivace.accelerate(pipeline, plan) as fast:
        found = [fast(PROMPT, seed=1, output_type="latent") for _ in range(repeats + 1)]
    emulated = any(t.effects.get("linears_emulated", 0) for t in found[-1].receipt.techniques)
    return min(out.receipt.stages["denoise"] for out in found[1:]) / 2.0, emulated


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--threads", type=int, default=2)
    words.add_argument("--repeats", type=int, default=2)
    words.add_argument("--out", type=Path, required=True)
    options = words.parse_args()
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        "benchmark": "formats on a processor",
        "environment": environment("cpu"),
        "rows": {},
    }
    contenders: dict[str, list[Any]] = {"fp32": [], "int8_linear": [registry["int8_linear"]()]}
    contenders |= {
        name: [registry[Q](**settings)] for name, settings in FORMATS.items() if "steps" not in name
    }
    contenders["bf16"] = []
    pipeline = None
    for name, techniques in contenders.items():
        if pipeline is None or name == "bf16":
            pipeline = vivace.load("tiny", dtype=torch.bfloat16 if name == "bf16" else torch.float32)
            pipeline.set_progress_bar_config(disable=True)
        spent, emulated = seconds(pipeline, techniques, options.repeats if name != "bf16" else 1)
        record["rows"][name] = {"seconds": spent, "emulated": emulated}
        print(f"{name:20s} {spent:8.3f} s{'  emulated' if emulated else ''}", flush=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
