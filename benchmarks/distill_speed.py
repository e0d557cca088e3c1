"""How fast a distillation trains: share of the GPU's peak, and what an update of DMD2 takes at a real model's shape.

    python benchmarks/distill_speed.py --out speed.json                                (embedded model, batch sizes)
    python benchmarks/distill_speed.py --model wan2.1-1.3b --shape 81x480x832 --lora 32 --checkpointing --out wan.json

`forward-backward` is a student's flow-matching update without its optimizer, `teacher` a guided evaluation without
gradient, `update` a whole one of the recipe, critic and discriminator with it, mean over a cycle of turns. FLOPs are
those of matrix products as torch's own counter sees them, once, in a run without compiled blocks; what gradient
checkpointing computes again is not counted. The peak is a large bf16 matrix product on the same GPU. Published models
have random weights: good for speed and memory, not for quality.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vivace.core.env import environment
from vivace.models import pruning
from vivace.models.families import by_class
from vivace.models.known import KNOWN
from vivace.models.loading import load
from vivace.tiny.train.common import Processes
from vivace.training.data.samples import MemorySet
from vivace.training.distillation.estimate import estimate
from vivace.training.distillation.recipes import find
from vivace.training.distillation.team import assemble
from vivace.training.distillation.trainer import DistillationTrainer
from vivace.training.fused_attention import choose_fastest
from vivace.training.losses.paths import flow_matching_loss


def transformer_of(name: str) -> tuple[Any, Any, float]:
    """(transformer in float32, adapter, guidance): the embedded one, or a published one with random weights."""
    import diffusers

    if name == "tiny":
        module = load("tiny", dtype=torch.float32).transformer
        return module, by_class(type(module).__name__), 4.0
    known = KNOWN[name]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        module = getattr(diffusers, known.transformer_class)(**known.transformer)
    return module.float(), by_class(known.transformer_class), 5.0


def timed(run: Any, repeats: int, device: str) -> float:
    """Median seconds of a call, after one to warm up."""
    run()
    spent = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - before)
    return sorted(spent)[len(spent) // 2]


def peak(device: str) -> float:
    """FLOP/s of a large bf16 (on a processor fp32) matrix product."""
    size, kind = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    return 2.0 * size**3 / timed(lambda: a @ b, 10, device)


def counted(run: Any) -> float:
    """FLOPs of matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def foreseen(options: argparse.Namespace, recipe: Any, batch: int) -> dict[str, float]:
    """FLOPs by what is timed, for a published model; empty for the embedded one, which is counted."""
    if options.model == "tiny":
        return {}
    model = KNOWN[options.model].describe()
    frames, height, width = options.shape
    workload = model.workload(frames=frames, height=height, width=width)
    found = estimate(model, recipe, workload, batch=batch, lora=options.lora)
    forward = found.forward_flops * batch
    # LoRA's frozen weights get no gradient: a backward pass is one product a layer, not two.
    return {
        "forward-backward": (2.0 if options.lora else 3.0) * forward,
        "teacher": 2.0 * forward,
        "update": found.flops,
    }


KINDS = {
    "attention": ("flash", "fmha", "cudnn", "sdpa", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "compiled passes": ("triton",),
    "copies": ("memcpy", "memset", "copy"),
}
"""What of a kernel's name says where it belongs; the rest is other passes."""


def profiled(run: Any) -> dict[str, float]:
    """Milliseconds of GPU time by kind of kernel, and of the call."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    before = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    out: dict[str, float] = {"call": 1e3 * (time.perf_counter() - before)}
    for event in found.key_averages():
        name = event.key.lower()
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "other passes")
        out[kind] = out.get(kind, 0.0) + event.self_device_time_total / 1e3
        out["kernels"] = out.get("kernels", 0.0) + event.count
    return {k: round(v, 3) for k, v in out.items()}


def measure(options: argparse.Namespace, batch: int, roof: float) -> dict[str, Any]:
    """One batch size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformer, adapter, guidance = transformer_of(options.model)
    recipe = find(options.recipe)(steps=4, **({"ratio": options.ratio} if options.ratio else {}))
    frames, height, width = options.shape
    config = transformer.config
    latent = (config.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    length = 64 if options.model == "tiny" else 512
    rows = max(4, 2 * batch)
    data = MemorySet(
        {
            "latents": torch.randn(rows, *latent, device=device, dtype=torch.bfloat16),
            "text": torch.randn(rows, length, config.text_dim, device=device, dtype=torch.bfloat16),
        },
        {"text": torch.zeros(length, config.text_dim)},
    )
    lists = pruning.anatomy(adapter, transformer).lists
    tokens = latent[1] * latent[2] * latent[3] // _patch(config)
    processes, kernel = Processes(0, 1, torch.device(device)), options.attention
    if kernel == "fastest":
        heads, dim = config.num_attention_heads, config.attention_head_dim
        kernel = choose_fastest(processes, batch, heads, tokens, dim)
    else:
        processes.choose_attention(kernel)
    out: dict[str, Any] = {"batch": batch, "tokens": tokens, "attention_kernel": kernel}
    known = foreseen(options, recipe, batch)
    results = {}
    for compiled in (False, True) if options.compile else (False,):
        team = assemble(
            transformer, lists, recipe.roles, empty=data.empty["text"], guidance=guidance, shift=3.0,
            device=torch.device(device), lora=options.lora, checkpointing=options.checkpointing, compiled=compiled,
        )  # fmt: skip
        if options.model != "tiny":
            transformer = transformer.to("cpu") if compiled == options.compile else transformer
        trainer = DistillationTrainer(processes, team, recipe, data, batch=batch)
        found = data.rows(range(batch))
        clean, text = found["latents"].float(), found["text"]
        noise, s = torch.randn_like(clean), torch.rand(batch, device=device)
        guided = team.guided(found)

        def student(team=team, text=text, clean=clean, noise=noise, s=s) -> None:
            flow_matching_loss(team.student.velocity(text), clean, noise, s).backward()

        def teacher(guided=guided, noise=noise, s=s) -> None:
            guided(noise, s)

        cycle = getattr(recipe, "ratio", 1)
        number = [0]

        def update(trainer=trainer, cycle=cycle, number=number) -> None:
            for _ in range(cycle):
                number[0] += 1
                trainer.update(number[0], 0.5)

        row: dict[str, Any] = {}
        for name, run, per in (
            ("forward-backward", student, 1),
            ("teacher", teacher, 1),
            ("update", update, cycle),
        ):
            if not compiled:
                out[f"{name}_flops"] = known[name] if known else counted(run) / per
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = timed(run, options.repeats, device) / per
            row[name] = {"seconds": seconds, "share_of_peak": out[f"{name}_flops"] / seconds / roof}
            if device == "cuda":
                row[name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            print(f"batch {batch} {'compiled' if compiled else 'eager'} {name}: {row[name]}", flush=True)
        if options.profile and compiled == options.compile and device == "cuda":
            out["profile"] = profiled(student)
            print(out["profile"], flush=True)
        results["compiled" if compiled else "eager"] = row
        del team, trainer, guided, student, teacher, update
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return out | results


def _patch(config: Any) -> int:
    t, h, w = config.patch_size
    return t * h * w


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", default="tiny", help="'tiny', or a published configuration")
    words.add_argument("--shape", default="29x128x128", type=lambda t: tuple(int(n) for n in t.split("x")))
    words.add_argument("--recipe", default="dmd2")
    words.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    words.add_argument("--lora", type=int, default=0)
    words.add_argument("--checkpointing", action="store_true")
    words.add_argument("--compile", action="store_true")
    words.add_argument("--profile", action="store_true")
    words.add_argument(
        "--attention", choices=("fastest", "auto", "cudnn"), default="fastest", help="torch's fused kernel"
    )
    words.add_argument("--ratio", type=int, default=0, help="updates of the critic for one of the student")
    words.add_argument("--repeats", type=int, default=5)
    words.add_argument("--out", type=Path, required=True)
    options = words.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    roof = peak(device)
    print(f"peak {roof / 1e12:.1f} TFLOP/s", flush=True)
    record = {
        "benchmark": "training throughput of a distillation",
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "environment": environment(device),
        "weights": "trained" if options.model == "tiny" else "random",
        "peak_flops": roof,
        "rows": [],
    }
    for batch in options.batch:
        record["rows"].append(measure(options, batch, roof))
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
