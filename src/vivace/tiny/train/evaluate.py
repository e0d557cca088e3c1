"""Attribute accuracy of the finished pipeline on held-out prompts, by the verifier, through the pipeline itself.

The guidance scale is chosen on development prompts, never on the reported ones. Beside the number stands its ceiling:
the verifier's accuracy on real renders of the same scenes, as they are and after a round trip through the VAE.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor

from vivace.tiny.defaults import TEXT_LENGTH
from vivace.tiny.load import WEIGHTS
from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.common import Processes, machine, write_json
from vivace.tiny.train.export import read_pipeline
from vivace.tiny.train.seeds import held_out
from vivace.tiny.train.sheets import contact_sheet
from vivace.tiny.train.vae_quality import reconstruct
from vivace.world import Attributes, Scene, caption, parse_prompt, sample_scenes

Check = Callable[[Tensor, list[Attributes]], list[dict[str, bool]]]
"""(clips uint8 (B, T, H, W, 3), what is wanted of each) -> for each clip, whether each stated attribute was seen."""


def prompts_of(scenes: list[Scene]) -> list[str]:
    return [caption(scene.attributes, scene.seed) for scene in scenes]


def sample_clips(
    pipeline: WanPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    shape: ClipShape,
    steps: int = 50,
    guidance: float = 4.0,
    batch: int = 50,
) -> Tensor:
    """Clips uint8 (B, T, H, W, 3), on the CPU. The noise of a clip depends on its own seed alone, not on the batch."""
    clips = []
    for start in range(0, len(prompts), batch):
        chosen = seeds[start : start + batch]
        made = pipeline(
            prompt=prompts[start : start + batch],
            generator=[torch.Generator().manual_seed(seed) for seed in chosen],
            num_frames=shape.frames,
            height=shape.height,
            width=shape.width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=TEXT_LENGTH,
            output_type="pt",
        )
        frames = cast(WanPipelineOutput, made).frames
        clips.append((frames.float() * 255.0).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu())
    return torch.cat(clips)


def accuracy(
    check: Check, clips: Tensor, prompts: list[str], device: torch.device, batch: int = 50
) -> dict[str, float]:
    """Share of right outcomes for every attribute where the prompt states it, and `mean`, their plain mean."""
    outcomes: dict[str, list[bool]] = {}
    for start in range(0, len(prompts), batch):
        wanted = [parse_prompt(prompt) for prompt in prompts[start : start + batch]]
        for seen in check(clips[start : start + batch].to(device), wanted):
            for name, right in seen.items():
                outcomes.setdefault(name, []).append(right)
    table = {name: sum(parts) / len(parts) for name, parts in outcomes.items()}
    return table | {"mean": sum(table.values()) / len(table)}


def render_scenes(scenes: list[Scene], shape: ClipShape, device: torch.device, batch: int = 50) -> Tensor:
    return torch.cat(
        [shape.draw(scenes[i : i + batch], device)[0].cpu() for i in range(0, len(scenes), batch)]
    )


def round_trip(pipeline: WanPipeline, clips: Tensor, device: torch.device, batch: int = 16) -> Tensor:
    parts = [
        reconstruct(pipeline.vae, clips[i : i + batch].to(device)).cpu() for i in range(0, len(clips), batch)
    ]
    return torch.cat(parts)


def evaluate(
    pipeline: WanPipeline,
    check: Check,
    device: torch.device,
    *,
    shape: ClipShape,
    count: int = 200,
    development: int = 64,
    guidances: tuple[float, ...] = (3.0, 4.0, 5.0, 6.0),
    steps: int = 50,
    batch: int = 50,
    sheets: Path | None = None,
    sheet_rows: int = 12,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The record of an evaluation; writes two contact sheets into `sheets` (the first held-out prompts, in order)."""
    settings: dict[str, Any] = {"shape": shape, "steps": steps, "batch": batch}
    seeds = held_out("dev", development)
    prompts, sweep = prompts_of(sample_scenes(seeds)), {}
    for guidance in guidances:
        clips = sample_clips(pipeline, prompts, seeds, guidance=guidance, **settings)
        sweep[guidance] = accuracy(check, clips, prompts, device)
        say(f"guidance {guidance}: {sweep[guidance]['mean']:.4f} on {development} development prompts")
    chosen = max(guidances, key=lambda g: (sweep[g]["mean"], -g))
    seeds = held_out("prompts", count)
    scenes = sample_scenes(seeds)
    prompts, started = prompts_of(scenes), time.perf_counter()
    clips = sample_clips(pipeline, prompts, seeds, guidance=chosen, **settings)
    seconds = time.perf_counter() - started
    truth = render_scenes(scenes, shape, device)
    result = accuracy(check, clips, prompts, device)
    if sheets is not None:
        for page in range(2):
            rows = slice(page * sheet_rows, (page + 1) * sheet_rows)
            contact_sheet(sheets / f"samples-{page + 1}.png", truth[rows], clips[rows], prompts[rows])
    return {
        "prompts": count,
        "steps": steps,
        "guidance": chosen,
        "accuracy": result,
        "worst": list(min((value, name) for name, value in result.items() if name != "mean")[::-1]),
        "ceiling_render": accuracy(check, truth, prompts, device),
        "ceiling_round_trip": accuracy(check, round_trip(pipeline, truth, device), prompts, device),
        "development": {"prompts": development, "sweep": {str(g): row for g, row in sweep.items()}},
        "seconds_sampling": round(seconds, 1),
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for record and contact sheets")
    parser.add_argument("--pipeline", type=Path, default=WEIGHTS, help="diffusers folder")
    parser.add_argument("--verifier", type=Path, help="weights of the verifier; default: the packaged ones")
    parser.add_argument(
        "--records", type=Path, nargs="*", default=[], help="records to put into the same file"
    )
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--development", type=int, default=64)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 4.0, 5.0, 6.0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument(
        "--size", type=int, nargs=3, default=(29, 128, 128), metavar=("FRAMES", "HEIGHT", "WIDTH")
    )
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")


def main(arguments: argparse.Namespace) -> None:
    device = Processes.join().device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = read_pipeline(arguments.pipeline, dtype)
    pipeline.to(device)
    if arguments.compile:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    frames, height, width = arguments.size
    record = evaluate(
        pipeline,
        load_check(arguments.verifier, device),
        device,
        shape=ClipShape(frames=frames, height=height, width=width),
        count=arguments.prompts,
        development=arguments.development,
        guidances=tuple(arguments.guidance),
        steps=arguments.steps,
        batch=arguments.batch,
        sheets=arguments.out,
    )
    earlier = {path.stem: json.loads(path.read_text()) for path in arguments.records}
    write_json(arguments.out / "evaluation.json", {"machine": machine(), **record, **earlier})
    print(
        json.dumps(
            {key: record[key] for key in ("guidance", "accuracy", "worst", "ceiling_round_trip")}, indent=1
        )
    )


def load_check(path: Path | None, device: torch.device) -> Check:
    """The verifier of the world as a `Check`."""
    from vivace.world.verifier import WEIGHTS, Verifier

    verifier = Verifier.load(path or WEIGHTS, device)

    def check(clips: Tensor, wanted: list[Attributes]) -> list[dict[str, bool]]:
        return [seen.matches(w) for seen, w in zip(verifier.verify(clips), wanted, strict=True)]

    return check
