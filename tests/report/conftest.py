"""A realistic comparison made without any model: two shaded clips, real metrics on them, receipts in full form."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vivace.evaluation.metrics import lpips, psnr, ssim
from vivace.evaluation.video import heat_map, write_mp4
from vivace.report.compare_page import AttributeCheck, ComparePage, QualityCurve

FRAMES, SIDE, GAIN = 29, 128, 8.0


def rolling_sphere(lag: float = 0.0, tint: float = 0.0) -> np.ndarray:
    """A shaded red sphere rolls left over a checkered floor; `lag` delays it a little more in every frame."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)
    depth = np.clip((rows - 58) / 70, 0.02, 1)
    checker = (np.floor((columns - 64) / (14 * depth + 2)) + np.floor(5 / depth)) % 2
    sky = np.stack((150 + rows * 0.9, 178 + rows * 0.6, 214 + rows * 0.2), axis=-1)
    floor = np.stack(
        (120 + 70 * checker * depth, 112 + 66 * checker * depth, 104 + 60 * checker * depth), axis=-1
    )
    ground = np.where((rows > 58)[..., None], floor, sky)
    clip = []
    for index in range(FRAMES):
        x, y, radius = 104 - 2.9 * index + lag * index, 82.0, 21.0
        dx, dy = (columns - x) / radius, (rows - y) / radius
        inside = dx**2 + dy**2 < 1
        height = np.sqrt(np.clip(1 - dx**2 - dy**2, 0, 1))
        light = np.clip(0.25 + 0.8 * (-0.5 * dx - 0.6 * dy + 0.62 * height), 0.12, 1.2)
        body = (
            light[..., None] * np.array([214.0, 52.0 + tint, 44.0])
            + 90 * np.clip(light - 0.95, 0, 1)[..., None]
        )
        shadow = 1 - 0.5 * np.exp(-(((columns - x - 8) / 24) ** 2) - ((rows - 103) / 6) ** 2)
        clip.append(np.where(inside[..., None], body, ground * shadow[..., None]))
    return np.stack(clip).round().clip(0, 255).astype(np.uint8)


def receipt(*, fast: bool) -> dict[str, Any]:
    """50 exact steps, or 20 with a block cache and a guidance interval."""
    rng = np.random.default_rng(7)
    count, steps, hits, run, total = (20 if fast else 50), [], 0, 0.0, 0
    for index in range(count):
        sigma = 3 * (1 - index / count) / (1 + 2 * (1 - index / count))
        branches, work = [], 0.0
        for branch in ("cond", "uncond"):
            outside = fast and branch == "uncond" and index >= 13
            reuse = fast and not outside and index > 3 and index % 3 != 0
            blocks = 0 if outside else 1 if reuse and index % 2 else 3 if reuse else 8
            branches.append(
                {
                    "branch": branch,
                    "expert": "transformer",
                    "action": "skipped" if outside else "reused" if reuse else "computed",
                    "blocks_run": blocks,
                    "blocks_total": 8,
                    "by": "guidance_interval" if outside else "first_block_cache" if reuse else "",
                }
            )
            hits, run, total, work = hits + reuse, run + blocks, total + 8, work + blocks / 8
        took = 0.02 + 0.5 * work * float(rng.normal(1, 0.03))
        steps.append(
            {"index": index, "timestep": 1000 * sigma, "sigma": sigma, "seconds": took, "branches": branches}
        )
    denoise = sum(step["seconds"] for step in steps)
    stages = {"text": 0.021, "denoise": denoise, "vae": 1.84, "other": 0.06}
    nfe = sum(b["action"] != "skipped" for step in steps for b in step["branches"])
    data: dict[str, Any] = {
        "nfe": nfe,
        "blocks_run": run,
        "blocks_total": total,
        "attention_pairs": run * 4 * 2048**2,
        "attention_pairs_dense": total * 4 * 2048**2,
        "attention_pairs_in_run_blocks": run * 4 * 2048**2,
        "flops": run * 1.03e10,
        "flops_dense": total * 1.03e10,
        "cache_hits": hits,
        "cache_bytes": 4 * 2048 * 256 * 4 if fast else 0,
        "peak_bytes": None,
        "stages": stages | {"total": sum(stages.values())},
        "steps": steps,
        "techniques": [],
        "kernels": [
            {"op": "attention.dense", "choice": "sdpa", "why": "default of the pipeline", "calls": nfe * 8}
        ],
        "environment": {
            "cpu": "Example CPU",
            "cores": 2,
            "threads": 2,
            "device": "cpu",
            "versions": {"python": "3.11.9", "torch": "2.13.0", "diffusers": "0.42.1"},
            "fingerprint": "3f9a0c1d22ab",
        },
        "plan": {"vivace_plan": 1, "name": "exact", "techniques": []},
        "warnings": [],
    }
    if fast:
        data["plan"] = {
            "vivace_plan": 1,
            "name": "fast",
            "techniques": [
                {"technique": "first_block_cache", "threshold": 0.08},
                {"technique": "guidance_interval", "stop": 0.65},
                {"technique": "unipc_steps", "steps": 20},
            ],
        }
        data["techniques"] = [
            {
                "name": "first_block_cache",
                "paradigm": "caching",
                "settings": {"threshold": 0.08, "warmup": 4},
                "effects": {"hits": hits, "blocks_saved": total - run},
                "cite": "Timestep Embedding Tells: It's Time to Cache (arXiv 2411.19108)",
            },
            {
                "name": "guidance_interval",
                "paradigm": "trajectory",
                "settings": {"start": 0.0, "stop": 0.65},
                "effects": {"branches_skipped": 7},
                "cite": "Applying Guidance in a Limited Interval (arXiv 2404.07724)",
            },
            {
                "name": "unipc_steps",
                "paradigm": "trajectory",
                "settings": {"steps": 20},
                "effects": {"steps_saved": 30},
                "cite": "UniPC (arXiv 2302.04867)",
            },
        ]
        data["kernels"].append(
            {
                "op": "norm.rms",
                "choice": "reference",
                "why": "no GPU: the fused kernel needs CUDA",
                "calls": 912,
            }
        )
        data["warnings"] = ["the cache threshold was calibrated at 50 steps and runs at 20"]
    return data


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> ComparePage:
    """The comparison of `rolling_sphere` with a slightly late, slightly orange copy of itself."""
    folder: Path = tmp_path_factory.mktemp("clips")
    exact, fast = rolling_sphere(), rolling_sphere(lag=0.07, tint=12)
    clips = {"exact": exact, "fast": fast, "difference": heat_map(exact, fast, gain=GAIN)}
    data = {name: write_mp4(folder / f"{name}.mp4", clip, 16).read_bytes() for name, clip in clips.items()}
    with pytest.MonkeyPatch.context() as patch:
        # Whatever this machine has fetched, the page under test shows a metric that was skipped.
        patch.setenv("VIVACE_CACHE", "no-such-folder")
        metrics = [psnr(exact, fast), ssim(exact, fast), lpips(exact, fast)]
    return ComparePage(
        prompt="a small shiny red sphere rolls left over a checkered floor, the camera is still",
        seed=7,
        model="tiny",
        plan="fast",
        fps=16,
        frames=FRAMES,
        height=SIDE,
        width=SIDE,
        exact_video=data["exact"],
        fast_video=data["fast"],
        difference_video=data["difference"],
        difference_gain=GAIN,
        exact_receipt=receipt(fast=False),
        fast_receipt=receipt(fast=True),
        quality=[QualityCurve(**dataclasses.asdict(metric)) for metric in metrics],
        attributes=[
            AttributeCheck(name="object", wanted="sphere", exact="sphere", fast="sphere"),
            AttributeCheck(name="colour", wanted="red", exact="red", fast="orange"),
            AttributeCheck(name="size", wanted="small", exact="small", fast="small"),
            AttributeCheck(name="motion", wanted="roll left", exact="roll left", fast="roll left"),
            AttributeCheck(name="count", wanted=None, exact="1", fast="1"),
            AttributeCheck(name="floor", wanted="checkered", exact="checkered", fast="checkered"),
            AttributeCheck(name="camera", wanted="still", exact="still", fast="still"),
        ],
        command='vivace compare "a small shiny red sphere rolls left over a checkered floor" --plan fast --seed 7',
    )
