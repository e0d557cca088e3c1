"""A board made by hand: 19 contenders on two tasks and two machines, a second model, and real little clips.

The values are drawn, with a fixed seed, so that they behave as measured ones do: a prompt is hard for everybody, more
skipped work costs more quality, and intervals come from the prompts. The clips are renders of the embedded world.
"""

from __future__ import annotations

import functools
import hashlib
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vivace.evaluation.video import write_mp4

PROMPTS, PER_PROMPT = 40, 2
GPU, CPU = "a1f0c3d57e21", "3f9a0c1d22ab"
QUALITY, WALL, SPEED = "world-short@1", "world-smoke@1", "speed-wan1.3b-480p@1"
DENSE = 4.51e13
"""FLOPs of the exact run."""
MODEL = {
    "name": "tiny",
    "pipeline": "WanPipeline",
    "family": "wan",
    "weights": "trained",
    "sha256": "5be1" * 16,
}
MODEL |= {"dtype": "float32"}
WAN = MODEL | {"name": "wan2.1-1.3b", "weights": "random", "sha256": "77ac" * 16, "dtype": "bfloat16"}

SERIES: dict[str, tuple[str, str, str, str, float | None, str]] = {
    # name: title, unit, better, group, margin, what it is
    "attributes": ("Attribute accuracy", "", "higher", "absolute", 0.02, "Share of stated attributes shown."),
    "dynamic_degree": ("Dynamic degree", "", "same", "absolute", 0.03, "Share of clips that move enough."),
    "flicker": ("Luminance flicker", "", "lower", "absolute", None, "Mean second difference of luminance."),
    "frame_mmd": ("Frame MMD", "", "lower", "distribution", None, "Unbiased squared MMD on frame features."),
    "jod": (
        "ColorVideoVDP",
        "JOD",
        "higher",
        "fidelity",
        0.5,
        "Just-objectionable differences, 10 is equal.",
    ),
    "lpips_alex": (
        "LPIPS (AlexNet)",
        "",
        "lower",
        "fidelity",
        0.05,
        "Perceptual distance to the exact clip.",
    ),
    "psnr": (
        "PSNR",
        "dB",
        "higher",
        "fidelity",
        None,
        "Pooled peak signal-to-noise ratio to the exact clip.",
    ),
}


@dataclass(frozen=True)
class Spec:
    """A contender: its share of the exact run's FLOPs, and how much it harms, from 0 to 1."""

    name: str
    kind: str
    share: float
    damage: float
    family: str = ""

    @property
    def base(self) -> str:
        return "exact, fewer steps" if self.kind in ("exact", "steps") else self.name.partition("@")[0]

    @property
    def knob(self) -> str:
        return self.name if self.kind == "steps" else self.name.partition("@")[2]

    @property
    def library(self) -> str:
        return self.name.partition(".")[0] if self.kind == "peer" else ""


def _cache(name: str, share: float, damage: float) -> Spec:
    return Spec(name, "peer", share, damage, "feature caching")


CONTENDERS = (
    Spec("exact", "exact", 1.0, 0.0),
    Spec("steps=18", "steps", 0.36, 0.25, "trajectory"),
    Spec("steps=8", "steps", 0.16, 0.55, "trajectory"),
    Spec("near-exact", "plan", 0.352, 0.14, "trajectory"),
    Spec("fast", "plan", 0.152, 0.36, "composite"),
    _cache("diffusers.first_block_cache@threshold=0.05", 0.71, 0.2),
    _cache("diffusers.first_block_cache@threshold=0.12", 0.44, 0.5),
    _cache("diffusers.mag_cache@threshold=0.06", 0.6, 0.18),
    _cache("diffusers.mag_cache@threshold=0.24", 0.34, 0.45),
    _cache("diffusers.taylorseer@interval=3", 0.4, 0.3),
    _cache("diffusers.taylorseer@interval=5", 0.27, 0.62),
    _cache("diffusers.pab@spatial=2", 0.78, 0.4),
    _cache("diffusers.pab@spatial=4", 0.66, 0.72),
    _cache("cache_dit.dbcache@threshold=0.05", 0.58, 0.16),
    _cache("cache_dit.dbcache@threshold=0.12", 0.37, 0.38),
    Spec("torchao.int8_dynamic", "peer", 1.0, 0.12, "model compression"),
    Spec("fastvideo.vsa@keep=0.25", "peer", 0.87, 0.33, "efficient attention"),
    Spec("floor", "floor", 1.0, 0.01),
    Spec("seed", "seed", 1.0, 0.0),
)
RIVALS = sum(spec.kind in ("plan", "peer", "steps") for spec in CONTENDERS)
CLIPPED = {"exact": 0.0, "fast": 1.0, "near-exact": 0.35, "diffusers.taylorseer@interval=5": 2.0}
"""Contenders that keep clips, and how far their clips depart."""
VERSIONS = {"diffusers": "0.42.1", "cache_dit": "1.3.0", "torchao": "0.15.0", "fastvideo": "0.2.1"}
SHOWN = (
    "a small purple cube slides left over a grey floor",
    "a white cylinder stands on a checkered floor <b>& more</b>",
    "an orange sphere and a large yellow sphere roll over grass",
)
"""Prompts of the clips; the second must not be taken for markup."""


def prompts(count: int = PROMPTS) -> list[str]:
    """Short sentences of the embedded world."""
    colours = ("red", "blue", "green", "yellow", "purple", "orange")
    bodies = ("sphere", "cube", "cylinder", "cone", "torus")
    moves = ("rolls left", "slides right", "bounces", "spins in place", "rises slowly", "falls")
    floors = ("a checkered floor", "sand", "a wooden floor", "grass")
    made = [
        f"a {('large', 'small')[i % 2]} {colours[i % 6]} {bodies[i % 5]} {moves[(i * 5) % 6]} over {floors[i % 4]}"
        for i in range(count)
    ]
    return [*SHOWN, *made[3:]]


def value(numbers: np.ndarray, **more: Any) -> dict[str, Any]:
    """A mean with its normal interval over prompt means."""
    half = 1.96 * numbers.std(ddof=1) / math.sqrt(len(numbers))
    mean = float(numbers.mean())
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(numbers), **more}


def counted(number: float) -> dict[str, Any]:
    """A counted quantity has no interval."""
    return {"value": number, "low": None, "high": None, "n": 1}


def _samples(spec: Spec, hard: np.ndarray, shared: np.ndarray) -> dict[str, np.ndarray]:
    """Columns by series, one entry a sample; `hard` is common to all contenders, `shared` to equal seeds."""
    name, damage = spec.name, spec.damage
    rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    noise = rng.normal(size=(4, len(shared)))
    other = rng.normal(size=len(shared)) if name == "seed" else shared
    level = 0.95 - 0.05 * hard + 0.03 * other - 0.05 * damage + 0.06 * damage**2 * noise[0]
    moves = 0.8 + 0.3 * other - 0.3 * damage + 0.2 * damage * noise[1]
    columns = {
        "attributes": np.clip(np.round(level * 7) / 7, 0, 1),
        "dynamic_degree": (moves > 0.4).astype(float),
        "flicker": np.exp(0.3 + 0.25 * other + 0.5 * damage + 0.1 * damage * noise[2]),
    }
    if name == "exact":
        return columns
    far = 1.6 if name == "seed" else damage
    columns["psnr"] = 46.0 - 30 * min(far, 1.0) ** 0.5 - 1.5 * hard + 1.2 * noise[3]
    columns["lpips_alex"] = np.clip(0.004 + 0.3 * min(far, 1.4) * (1 + 0.3 * hard + 0.2 * noise[3]), 0, 1)
    columns["jod"] = 10 - 3.2 * min(far, 1.5) * (1 + 0.25 * hard + 0.1 * noise[3])
    if name == "floor":
        columns["psnr"][0] = math.inf
    return columns


def _verdict(low: float, high: float, better: str, margin: float | None) -> str:
    if better == "lower":
        low, high = -high, -low
    if margin is None:
        return "no margin" if low <= 0 <= high else "better" if low > 0 else "worse"
    if better == "same":
        return "equivalent" if -margin < low and high < margin else "undecided"
    if low > 0:
        return "better"
    if low > -margin:
        return "non-inferior"
    return "inferior" if high < -margin else "worse" if high < 0 else "undecided"


def _paired(mine: np.ndarray, other: np.ndarray, series: str) -> dict[str, Any]:
    """The paired difference over prompts with its verdict."""
    _, _, better, _, margin, _ = SERIES[series]
    found = value(mine - other)
    spread = (found["high"] - found["low"]) / 3.92 or 1e-9
    p = math.erfc(abs(found["value"]) / spread / math.sqrt(2))
    verdict = _verdict(found["low"], found["high"], better, margin)
    return {
        "difference": found,
        "verdict": verdict,
        "margin": margin,
        "p": p,
        "p_holm": min(1.0, 3 * p),
        "test": "t on prompt means",
        "needed": 120 if verdict == "undecided" else None,
    }


def _by_prompt(column: np.ndarray) -> np.ndarray:
    return column.reshape(PROMPTS, PER_PROMPT).mean(axis=1)


def _finite(numbers: np.ndarray) -> dict[str, Any]:
    means = _by_prompt(numbers)
    kept = means[np.isfinite(means)]
    return value(
        kept,
        p=None,
        median=float(np.median(kept)),
        worst=float(kept.min()),
        left_out=len(means) - len(kept),
    )


def _cost(total: float, share: float, spread: float) -> dict[str, Any]:
    """Seconds by stage; the decoder and the text encoder cost the same for everybody."""
    fixed = 0.07 * total / (0.93 * share + 0.07)
    parts = {"text": 0.06 * fixed, "vae": 0.86 * fixed, "other": 0.08 * fixed, "denoise": total - fixed}
    return {
        name: {
            "value": took,
            "low": took * (1 - spread),
            "high": took * (1 + spread),
            "n": 12,
            "q1": took * (1 - 0.6 * spread),
            "q3": took * (1 + 0.6 * spread),
        }
        for name, took in {"total": total, **parts}.items()
    }


def _notes(spec: Spec) -> list[str]:
    if spec.base == "diffusers.pab":
        return [
            "Its cache is shared by both guidance branches, so attention of the conditional branch is reused for the "
            "unconditional one; measured as it is."
        ]
    return (
        [f"The knob {spec.knob.partition('=')[0]} was swept on other prompts."]
        if spec.library and spec.knob
        else []
    )


def _contender(spec: Spec, steps: int) -> dict[str, Any]:
    ours: dict[str, Any] = {}
    if spec.kind == "plan":
        techniques = [
            {"technique": "few_steps", "steps": steps},
            {"technique": "guidance_interval", "high": 0.5},
        ]
        ours = {"vivace_plan": 1, "name": spec.name, "techniques": techniques}
    key, _, number = spec.knob.partition("=")
    return {
        "name": spec.name,
        "kind": spec.kind,
        "label": "",
        "family": spec.family,
        "settings": ours or ({key: float(number)} if key else {}),
        "group": spec.base,
        "knob": spec.knob,
        "package": spec.library,
        "package_version": VERSIONS.get(spec.library, ""),
        "techniques": [t["technique"] for t in ours.get("techniques", ())],
        "notes": _notes(spec),
    }


def _measured(spec: Spec, env: str, task: str) -> dict[str, Any]:
    """Time, memory, energy and speed-up of a contender that was timed."""
    base = {GPU: 1.9, CPU: 39.6}[env] if task != SPEED else 94.0
    slow = (1.12 if spec.kind == "peer" else 1.0) * (
        0.62 if spec.library == "torchao" and env == GPU else 1.0
    )
    total = base * (0.93 * spec.share * slow + 0.07)
    speed = base / total
    peak = int(2.1e9 + 4e8 * (spec.kind == "peer"))
    joules = {
        "joules": 690 * total / base,
        "net": 520 * total / base,
        "idle_watts": 71.0,
        "window_seconds": 12.0,
    }
    return {
        "cost": _cost(total, spec.share, 0.004 if env == GPU else 0.025),
        "timing": {
            "batch": 1,
            "warmups": 3,
            "clock": "cuda events" if env == GPU else "wall",
            "cold": total * 1.4,
            "compile_seconds": None,
            "shortfall": "" if env == GPU else "8 timed runs instead of 10, the CPU is slow",
            "interleaved_with": ["exact", "fast", "near-exact"],
        },
        "memory": {
            "peak_allocated": peak if env == GPU else None,
            "peak_reserved": None,
            "resident": None if env == GPU else int(3.2e9),
            "weights": int(2.6e8),
            "cache": 0,
        },
        "energy": joules if env == GPU else None,
        "speed_up": None
        if spec.kind == "exact"
        else {"value": speed, "low": speed * 0.985, "high": speed * 1.016, "n": 12},
    }


def _row(spec: Spec, task: str, env: str, model: dict[str, Any]) -> dict[str, Any]:
    """A row without quality."""
    steps = {"steps=18": 18, "steps=8": 8, "near-exact": 20, "fast": 10}.get(spec.name, 50)
    nfe = {"near-exact": 36, "fast": 15}.get(spec.name, 2 * steps)
    prefix = {"peer": "peer:", "plan": "plan:"}.get(spec.kind, "")
    coupled = "the batch of 50 was cut to 1, because its decisions couple the batch"
    idle: dict[str, Any] = {"cost": {}, "timing": None, "memory": None, "energy": None, "speed_up": None}
    return {
        "id": hashlib.sha256(f"{spec.name}{task}{env}".encode()).hexdigest()[:16],
        "task": task,
        "environment": env,
        "contender": _contender(spec, steps),
        "model": model,
        "counts": {
            "nfe": nfe,
            "nfe_requested": nfe,
            "blocks_run": round(nfe * 12 * spec.share),
            "blocks_total": nfe * 12,
            "flops": DENSE * spec.share,
            "flops_dense": DENSE,
            "cache_hits": round(100 * (1 - spec.share)) if spec.kind == "peer" else 0,
            "full_equivalents": 100 * spec.share,
        },
        "work_share": counted(spec.share),
        **(idle if spec.kind in ("floor", "seed") else _measured(spec, env, task)),
        "quality": {},
        "paired": {},
        "normalised": {},
        "matched": None,
        "skipped": {"fvd": "FVD needs the I3D weights; give their folder with --weights."},
        "warnings": [coupled] if "first_block" in spec.name else [],
        "command": f"vivace bench {task} --contender {prefix}{spec.name} --out results",
        "clips": {},
        "samples": None,
    }


def _add_quality(spec: Spec, row: dict[str, Any], values: dict[str, dict[str, np.ndarray]]) -> None:
    """What was measured on the clips of a contender."""
    mine, texts = values[spec.name], prompts()
    row["quality"] = {name: _finite(column) for name, column in mine.items()}
    mmd = 0.0004 + 0.012 * spec.damage**2
    row["quality"]["frame_mmd"] = {
        "value": mmd,
        "low": mmd - 0.0006,
        "high": mmd + 0.0008,
        "n": PROMPTS,
        "p": 0.04,
    }
    if spec.kind != "exact":
        names = ("attributes", "dynamic_degree", "flicker")
        row["paired"] = {n: _paired(_by_prompt(mine[n]), _by_prompt(values["exact"][n]), n) for n in names}
        for name in ("psnr", "lpips_alex", "jod"):
            ends = [_finite(values[anchor][name])["value"] for anchor in ("floor", "seed")]
            score = (row["quality"][name]["value"] - ends[1]) / (ends[0] - ends[1])
            row["normalised"][name] = counted(score) | {"n": PROMPTS}
    if spec.kind in ("plan", "peer") and spec.share < 0.8:
        control = "steps=18" if spec.share > 0.25 else "steps=8"
        names = ("attributes", "psnr", "jod", "lpips_alex", "flicker")
        found = {n: _paired(_by_prompt(mine[n]), _by_prompt(values[control][n]), n) for n in names}
        row["matched"] = {
            "contender": control,
            "by": "flops",
            "note": f"{control} costs as much",
            "paired": found,
        }
        if spec.share > 0.6:
            row["matched"]["contender"] = "steps=18 .. exact"
    row["samples"] = {
        "ids": [f"{i}.{k}" for i in range(PROMPTS) for k in range(PER_PROMPT)],
        "prompts": [texts[i] for i in range(PROMPTS) for _ in range(PER_PROMPT)],
        "columns": {
            name: ["inf" if math.isinf(v) else round(float(v), 6) for v in column]
            for name, column in mine.items()
        },
    }
    if spec.name in CLIPPED:
        row["clips"] = {f"{i}.0": clip_path(spec.name, i) for i in range(len(SHOWN))}


@functools.cache
def board() -> dict[str, Any]:
    """The board; do not change it in place."""
    rng = np.random.default_rng(3)
    hard = np.repeat(rng.normal(size=PROMPTS), PER_PROMPT)
    shared = rng.normal(size=PROMPTS * PER_PROMPT)
    values = {spec.name: _samples(spec, hard, shared) for spec in CONTENDERS}
    measured = [_row(spec, QUALITY, GPU, MODEL) for spec in CONTENDERS]
    for spec, row in zip(CONTENDERS, measured, strict=True):
        _add_quality(spec, row, values)
    rows = [_row(spec, WALL, CPU, MODEL) for spec in CONTENDERS if spec.kind not in ("floor", "seed")]
    speed = [_row(spec, SPEED, GPU, WAN) for spec in CONTENDERS if spec.name in ("exact", "steps=18", "fast")]
    ends = {anchor: {n: _finite(c) for n, c in values[anchor].items()} for anchor in ("floor", "seed")}
    return {
        "vivace_board": 1,
        "title": "Acceleration of the embedded model",
        "created": "2026-11-24T15:02:11Z",
        "command": "vivace report results --title 'Acceleration of the embedded model'",
        "series": {name: _series(name) for name in SERIES},
        "environments": _environments(),
        "tasks": _tasks(),
        "rows": measured + rows + speed,
        "anchors": [{"task": QUALITY, "environment": GPU, "model": "tiny", **ends}],
        "fronts": [_front(measured)],
        "problems": ["record 0f3a9c77d1e2b405 of diffusers.faster_cache names no samples and was left out"],
    }


def _series(name: str) -> dict[str, Any]:
    title, unit, better, group, margin, about = SERIES[name]
    return {
        "metric": name.partition("_")[0],
        "version": 1,
        "title": title,
        "unit": unit,
        "better": better,
        "about": about,
        "group": group,
        "margin": margin,
        "low": None if unit else 0.0,
        "high": 1.0 if name in ("attributes", "dynamic_degree") else None,
        "binary": name == "dynamic_degree",
        "blind_to": ["freeze"] if name == "flicker" else [],
        "backbone": "alexnet" if name == "lpips_alex" else "",
    }


def _environments() -> list[dict[str, Any]]:
    gpu = {"gpu": "Example GPU 80GB", "gpu_bytes": 85_000_000_000, "cuda": "13.0", "device": "cuda:0"}
    cpu = {"cpu": "Example CPU", "cores": 2, "threads": 2, "device": "cpu"}
    return [
        {
            "fingerprint": GPU,
            "label": "Example GPU 80GB, torch 2.11",
            "details": gpu | {"versions": {"python": "3.12.3", "torch": "2.11.0", "diffusers": "0.42.1"}},
        },
        {
            "fingerprint": CPU,
            "label": "2-core Example CPU, torch 2.13",
            "details": cpu | {"versions": {"python": "3.11.9", "torch": "2.13.0"}},
        },
    ]


def _tasks() -> list[dict[str, Any]]:
    clip = {"steps": 50, "guidance": 4.0, "frames": 29, "height": 128, "width": 128, "fps": 8}
    large = {"steps": 50, "guidance": 5.0, "frames": 81, "height": 480, "width": 832, "fps": 16}
    return [
        {
            "name": QUALITY,
            "title": "World, short clips",
            "sha256": "50a7" * 16,
            "about": "Held-out prompts of the embedded world; a verifier checks every attribute that a prompt states.",
            "kind": "quality",
            "model": "tiny",
            "prompts": PROMPTS,
            "per_prompt": PER_PROMPT,
            **clip,
        },
        {
            "name": WALL,
            "title": "World, smoke",
            "sha256": "c773" * 16,
            "about": "Sixteen held-out prompts, for wall time on a CPU; too few for claims.",
            "kind": "quality",
            "model": "tiny",
            "prompts": 16,
            "per_prompt": 1,
            **clip,
        },
        {
            "name": SPEED,
            "title": "Speed, 81 frames of 480x832",
            "sha256": "9d02" * 16,
            "about": "The real shape with random weights: says how fast, never how good.",
            "kind": "speed",
            "model": "wan2.1-1.3b",
            "prompts": None,
            "per_prompt": 1,
            **large,
        },
    ]


def _front(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """FLOPs against PSNR: which rows nobody beats in both."""
    kept = [r for r in rows if "psnr" in r["quality"] and r["contender"]["kind"] not in ("seed", "floor")]
    spots = [(row["counts"]["flops"], row["quality"]["psnr"]["value"]) for row in kept]
    points = []
    for row, (x, y) in zip(kept, spots, strict=True):
        beaten = any((a <= x and b > y) or (a < x and b >= y) for a, b in spots)
        points.append({"row": row["id"], "x": counted(x), "y": row["quality"]["psnr"], "front": not beaten})
    area = {"a": "diffusers.mag_cache", "b": "steps", "value": -1.9, "low": -2.6, "high": -1.1}
    return {
        "task": QUALITY,
        "environment": GPU,
        "model": "tiny",
        "cost": "flops",
        "series": "psnr",
        "points": points,
        "curves": [],
        "areas": [area | {"note": "mean over the common range of log FLOPs"}],
    }


def clip_path(name: str, prompt: int) -> str:
    """Where a store keeps a clip."""
    return f"clips/{hashlib.sha256(f'{name}{prompt}'.encode()).hexdigest()[:16]}.mp4"


@functools.cache
def clips() -> dict[str, bytes]:
    """H.264 clips of three prompts: renders, the later, bluer and softer the further a contender departs."""
    from vivace.world import render, sample_scenes

    made = render(sample_scenes([11, 23, 47]), frames=29, height=128, width=128, device="cpu").video.numpy()
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, damage in CLIPPED.items():
            for prompt, exact in enumerate(made):
                late = [max(0, round(t - 0.12 * damage * t)) for t in range(len(exact))]
                clip = exact[late].astype(np.float32)
                for _ in range(round(2 * damage)):
                    clip = (clip + np.roll(clip, 1, 1) + np.roll(clip, 1, 2)) / 3
                clip[..., 2] += 9 * damage
                frames = clip.clip(0, 255).round().astype(np.uint8)
                out[clip_path(name, prompt)] = write_mp4(
                    Path(folder) / "c.mp4", frames, 8, crf=23
                ).read_bytes()
    return out
