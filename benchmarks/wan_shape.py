"""Speed at the shape of Wan2.1-1.3B (81 frames of 480x832, random weights): plain diffusers against Vivace plans.

    python benchmarks/wan_shape.py --out benchmarks/results/wan1.3b-480p.json

Contenders run interleaved (A B A B ...) in one process; times are of the denoising loop from CUDA events around the
whole call, medians over the repeats. Weights are random: the figures say how fast, never how good.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from vivace.core.env import environment
from vivace.models.known import KNOWN
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate


def build(name: str, device: str, dtype: torch.dtype, layers: int | None) -> Any:
    """A pipeline of a published configuration with random weights and no text encoder."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    known = KNOWN[name]
    torch.manual_seed(0)
    with torch.device(device):
        depth = {} if layers is None else {"num_layers": layers}
        transformer = keep_fp32(WanTransformer3DModel(**{**known.transformer, **depth}), dtype).eval()
        # The library's constructor wants lists where the published configuration has them.
        vae_config = {k: list(v) if isinstance(v, tuple) else v for k, v in known.vae.items()}
        vae = AutoencoderKLWan(**vae_config).to(dtype).eval()
    scheduler = UniPCMultistepScheduler(**known.scheduler)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def keep_fp32(module: Any, dtype: torch.dtype) -> Any:
    """Cast as `from_pretrained(dtype=...)` does: the modules that the class lists stay in fp32."""
    kept = tuple(module._keep_in_fp32_modules)
    for name, parameter in module.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return module


def timed(run: Any, device: str) -> float:
    """Seconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan2.1-1.3b")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--steps", type=int, default=6, help="steps of a repeat in the overhead comparison")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plan", action="append", help="plans to run once at their own number of steps")
    parser.add_argument("--layers", type=int, help="another depth, for a trial on a small machine")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dtype = torch.bfloat16
    pipe = build(args.model, args.device, dtype, args.layers)
    width = pipe.transformer.config.text_dim
    texts = [torch.randn(1, 512, width, device=args.device, dtype=dtype) for _ in range(2)]
    shape = {"num_frames": args.frames, "height": args.height, "width": args.width}
    call = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "output_type": "latent"} | shape

    def plain(steps: int, **extra: Any) -> Any:
        generator = torch.Generator("cpu").manual_seed(0)
        return pipe(num_inference_steps=steps, generator=generator, **call | extra).frames

    want = plain(2)
    plain_seconds, empty_seconds = [], []
    for repeat in range(args.repeats + 1):
        a = timed(lambda: plain(args.steps), args.device)
        with accelerate(pipe, Plan()) as fast:
            b = timed(lambda: fast(num_inference_steps=args.steps, **call), args.device)
            same = torch.equal(fast(num_inference_steps=2, **call).raw.frames, want)
        if repeat:  # the first pair warms up
            plain_seconds.append(a)
            empty_seconds.append(b)
        print(f"repeat {repeat}: plain {a:.3f} s, empty plan {b:.3f} s, same latents {same}", flush=True)
    per_pair = [b / a - 1.0 for a, b in zip(plain_seconds, empty_seconds, strict=True)]
    record: dict[str, Any] = {
        "benchmark": "wan_shape",
        "model": args.model,
        "weights": "random",
        "layers": pipe.transformer.config.num_layers,
        "shape": shape,
        "dtype": "bfloat16",
        "environment": environment(torch.device(args.device)),
        "overhead": {
            "steps": args.steps,
            "repeats": args.repeats,
            "plain_seconds": plain_seconds,
            "empty_plan_seconds": empty_seconds,
            "median_overhead": statistics.median(per_pair),
            "ratio_of_medians": statistics.median(empty_seconds) / statistics.median(plain_seconds) - 1.0,
            "same_latents": same,
        },
        "plans": {},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.plan or []:
        with accelerate(pipe, name) as fast:
            fast(num_inference_steps=3, **call)
            fast(output_type="np", **{k: v for k, v in call.items() if k != "output_type"})
            receipt = fast.receipt()
        keep = receipt.to_dict()
        steps = keep["steps"]
        record["plans"][name] = keep | {"steps": steps[:2] + steps[-1:], "steps_made": len(steps)}
        stages = ", ".join(f"{k} {v:.2f} s" for k, v in receipt.stages.items())
        print(
            f"plan {name}: NFE {receipt.nfe}, compute {receipt.compute_share:.3f} of dense, {stages}",
            flush=True,
        )
        args.out.write_text(json.dumps(record, indent=1))
    args.out.write_text(json.dumps(record, indent=1))
    print(json.dumps(record["overhead"], indent=1))


if __name__ == "__main__":
    main()
