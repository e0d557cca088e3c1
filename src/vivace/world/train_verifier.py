"""Train the verifier on scenes rendered on the fly: `python -m vivace.world.train_verifier --minutes 3 --out DIR`."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.world.degrade import degrade
from vivace.world.render import render
from vivace.world.scene import Scene, sample_scenes
from vivace.world.splits import TEST, VALIDATION, train_seeds
from vivace.world.verifier import (
    ATTRIBUTES,
    GRID_FRAMES,
    GRID_SIDE,
    Verifier,
    loss,
    resample,
    targets,
    to_places,
)


@dataclass(frozen=True)
class VerifierTraining:
    """Everything that decides a run besides the wall time it is given."""

    seed: int = 0
    batch: int = 128
    frames: int = GRID_FRAMES
    side: int = GRID_SIDE
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup: int = 60
    ema: float = 0.995
    reuse: int = 2
    """Steps taken on each rendered batch, damaged anew each time."""
    steps: int | None = None
    """Train for this many steps instead of for a wall time (then the run is reproducible)."""
    workers: int = 6
    """Processes that sample scenes ahead; 0 samples in line. The scenes are the same."""
    held_out: int = 2048
    """Clips in the final measurement."""
    held_out_frames: int = 29
    held_out_side: int = 128
    checkpoint_seconds: float = 45.0

    @classmethod
    def tiny(cls, **changes: Any) -> VerifierTraining:
        """Small enough for a smoke test on one CPU core."""
        small: dict[str, Any] = {"batch": 8, "frames": 12, "side": 48, "workers": 0, "held_out": 16}
        small |= {"held_out_frames": 12, "held_out_side": 48, "reuse": 1, "warmup": 5, "ema": 0.9}
        return cls(**(small | changes))


def _scene_batches(config: VerifierTraining, first: int) -> Generator[list[Scene], None, None]:
    """Training batches from number `first` on, sampled ahead by other processes where the config asks for them."""

    def seeds(number: int) -> Sequence[int]:
        return train_seeds(number * config.batch, config.batch, stream=config.seed)

    number = first
    if config.workers == 0:
        while True:
            yield sample_scenes(seeds(number))
            number += 1
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        ahead: deque[Future[list[Scene]]] = deque()
        try:
            while True:
                while len(ahead) < 3 * config.workers:
                    ahead.append(pool.submit(sample_scenes, seeds(number)))
                    number += 1
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


@torch.no_grad()
def measure(
    model: Verifier, seeds: Sequence[int], frames: int, side: int, batch: int = 64
) -> dict[str, float]:
    """Share of clips whose attribute is read right, for each of `ATTRIBUTES`, and their mean."""
    model.eval()
    right: dict[str, int] = dict.fromkeys(ATTRIBUTES, 0)
    for start in range(0, len(seeds), batch):
        scenes = sample_scenes(seeds[start : start + batch])
        clip = render(scenes, frames=frames, height=side, width=side, device=model.device, with_mask=False)
        for scene, prediction in zip(scenes, model.verify(clip.video), strict=True):
            for name, correct in prediction.matches(scene.attributes).items():
                right[name] += correct
    shares = {name: value / max(len(seeds), 1) for name, value in right.items()}
    return shares | {"mean": sum(shares.values()) / len(shares)}


def _show(
    scenes: list[Scene], config: VerifierTraining, device: torch.device
) -> tuple[list[Scene], Tensor, Tensor]:
    """Scenes with their clips (B, 3, T, H, W) in [-1, 1], and which object each pixel shows (B, T, H, W)."""
    clip = render(scenes, frames=config.frames, height=config.side, width=config.side, device=device)
    assert clip.index is not None
    return scenes, resample(clip.video, config.frames, config.side), clip.index


class _Run:
    """The state of a training run, saved whole so that a killed run goes on where it was."""

    def __init__(self, config: VerifierTraining, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.model = Verifier(config.frames, config.side).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.98),
        )
        self.step, self.elapsed = 0, 0.0
        self.curve: list[dict[str, float]] = []

    def save(self, path: Path) -> None:
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
            "curve": self.curve,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["config"] != asdict(self.config):
            raise ConfigError(
                f"{path} belongs to a run with another config: use another folder or resume=False"
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed, self.curve = state["step"], state["elapsed"], state["curve"]

    def update(self, scenes: Sequence[Scene], x: Tensor, index: Tensor, progress: float) -> dict[str, float]:
        """One step of AdamW at the learning rate that belongs to `progress` (0 to 1) of the run."""
        config = self.config
        warm = min(1.0, (self.step + 1) / max(config.warmup, 1))
        rate = config.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        half = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        x, index = degrade(x, index, seed=config.seed * 1_000_003 + self.step)
        with half:
            logits = self.model(x)
        truth = [scene.attributes for scene in scenes]
        total, parts = loss(logits, targets(truth, to_places(index, logits["places"])))
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(config.ema, (1.0 + self.step) / (10.0 + self.step))
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
                slow.lerp_(fast, 1.0 - decay)
        self.step += 1
        values = torch.stack([total.detach(), *parts.values()]).tolist()
        return {"step": float(self.step), "rate": rate, **dict(zip(("loss", *parts), values, strict=True))}


def train(
    config: VerifierTraining,
    *,
    device: str | torch.device,
    minutes: float,
    out: str | os.PathLike[str],
    resume: bool = True,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train for `minutes` of wall time in all (or for `config.steps`); write weights and record to `out`, and return
    the record.

    With `resume` a checkpoint in `out` is continued, and its time counts. `stop_after` ends this call after that many
    steps, as a kill would: nothing but the checkpoint is written. Raises `ConfigError` if the checkpoint is of another
    config.
    """
    folder, device = Path(out), torch.device(device)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    run = _Run(config, device)
    if resume and checkpoint.is_file():
        run.restore(checkpoint)
    began, before, saved, first = time.monotonic(), run.elapsed, time.monotonic(), run.step
    batches = _scene_batches(config, run.step // config.reuse)
    batch: tuple[list[Scene], Tensor, Tensor] | None = None
    try:
        while (progress := run.step / config.steps if config.steps else run.elapsed / (60.0 * minutes)) < 1.0:
            if batch is None or run.step % config.reuse == 0:
                batch = _show(next(batches), config, device)
            point = run.update(*batch, progress)
            run.elapsed = before + time.monotonic() - began
            if run.step % 20 == 0 or run.step == 1:
                run.curve.append({**point, "seconds": round(run.elapsed, 2)})
            if run.step % 100 == 0:
                print(f"step {run.step}  {run.elapsed:.0f} s  loss {point['loss']:.3f}", flush=True)
            if time.monotonic() - saved > config.checkpoint_seconds:
                run.save(checkpoint)
                saved = time.monotonic()
            if stop_after is not None and run.step - first >= stop_after:
                break
    finally:
        batches.close()
    run.save(checkpoint)
    if stop_after is not None and run.step - first >= stop_after:
        return {"steps": run.step}
    return _finish(run, folder)


def _finish(run: _Run, folder: Path) -> dict[str, Any]:
    """Save the averaged weights, measure the file that was saved, and write the record."""
    config = run.config
    weights = run.average.save(folder / "verifier.safetensors")
    model = Verifier.load(weights, run.device)
    cuda = run.device.type == "cuda"
    frames, side = config.held_out_frames, config.held_out_side
    record = {
        "what": "verifier",
        "config": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": run.step,
        "clips": math.ceil(run.step / config.reuse) * config.batch,
        "seconds": round(run.elapsed, 1),
        "device": torch.cuda.get_device_name(run.device)
        if cuda
        else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "held_out": {
            "frames": frames,
            "side": side,
            "clips": config.held_out,
            "validation_seeds_from": VALIDATION.start,
            "test_seeds_from": TEST.start,
            "validation": measure(model, VALIDATION[: config.held_out // 4], frames, side),
            "test": measure(model, TEST[: config.held_out], frames, side),
        },
        "curve": run.curve,
    }
    partial = folder / "verifier.json.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, folder / "verifier.json")
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description="Train the world's verifier on scenes rendered on the fly.")
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="wall time of training in all, resumed parts included"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, weights and record")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--steps", type=int, default=None, help="train for this many steps instead of a wall time"
    )
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a smoke test: few, small clips")
    parser.add_argument("--fresh", action="store_true", help="ignore a checkpoint in the folder")
    options = parser.parse_args(arguments)
    changes: dict[str, Any] = {"seed": options.seed, "steps": options.steps}
    if options.batch is not None:
        changes["batch"] = options.batch
    config = VerifierTraining.tiny(**changes) if options.tiny else VerifierTraining(**changes)
    record = train(
        config, device=options.device, minutes=options.minutes, out=options.out, resume=not options.fresh
    )
    print(json.dumps({key: record[key] for key in ("steps", "seconds", "device", "held_out")}, indent=1))


if __name__ == "__main__":
    main()
