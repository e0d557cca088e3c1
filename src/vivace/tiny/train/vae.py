"""Train the VAE: crops first, whole frames last, on clips rendered while it learns; then fold, measure, write.

The schedule follows the clock, not a number of steps: `--minutes` is spent whatever the machine. `--steps` makes a run
repeatable instead. Run it again with the same `--out` to resume.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from vivace.tiny.build import TinyConfig, build_vae
from vivace.tiny.train.clips import ClipBank, ClipShape, to_model
from vivace.tiny.train.common import (
    AveragedWeights,
    Budget,
    Processes,
    compiled,
    load_checkpoint,
    machine,
    round_to_bf16,
    save_checkpoint,
    warm_cosine,
    write_json,
)
from vivace.tiny.train.fold import fold_latents
from vivace.tiny.train.muon import SplitOptimizer, split_parameters
from vivace.tiny.train.seeds import held_out, training_stream
from vivace.tiny.train.sheets import contact_sheet
from vivace.tiny.train.vae_loss import VaeLoss
from vivace.tiny.train.vae_quality import measure_vae, reconstruct
from vivace.tiny.whole_clip import Conv, config_of, encode_moments


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Crops of one shape until the run has made the share `until` of its progress."""

    until: float
    frames: int
    side: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Stage:
        """`0.7:17x64x48` is 17 frames of 64x64 in batches of 48 until 70 % of the run."""
        until, shape = text.split(":")
        frames, side, batch = (int(number) for number in shape.split("x"))
        return cls(until=float(until), frames=frames, side=side, batch=batch)

    def __str__(self) -> str:
        return f"{self.batch} of {self.frames}x{self.side}x{self.side}"


STAGES = (Stage(until=0.7, frames=17, side=64, batch=64), Stage(until=1.0, frames=29, side=128, batch=8))
"""Crops, half of them around objects, then whole clips: the borders and the drift over time need the last part."""


class VaeTrainer:
    """Model, averages, optimizer and clips of one run; `step` is one update."""

    def __init__(
        self,
        processes: Processes,
        bank: ClipBank,
        *,
        seed: int = 0,
        muon_lr: float = 4e-3,
        adam_lr: float = 2e-3,
        conv: Conv = "direct",
        compile: bool = True,
        decay: float = 0.999,
        config: TinyConfig | None = None,
    ) -> None:
        self.processes, self.bank = processes, bank
        torch.manual_seed(seed)
        self.vae = build_vae(config or TinyConfig())
        cast(nn.Module, self.vae).to(processes.device)
        bias = self.vae.quant_conv.bias
        assert bias is not None
        # Start almost without posterior noise: a latent drowned in noise teaches nothing.
        bias.data[config_of(self.vae).z_dim :].fill_(-5.0)
        processes.same_weights(self.vae)
        torch.manual_seed(seed + 1 + processes.rank)
        self.optimizer = SplitOptimizer(*split_parameters(self.vae), muon_lr=muon_lr, adam_lr=adam_lr)
        self.average = AveragedWeights(self.vae, decay)
        self.loss = VaeLoss(conv=conv)
        self.objective = compiled(self._objective, compile, processes.say)

    def _objective(self, video, mask, noise, warm):
        with self.processes.autocast():
            return self.loss(self.vae, video, mask, noise, warm)

    def step(self, stage: Stage, progress: float) -> torch.Tensor:
        """One update; returns (squared error, that on objects, KL per element), on the device."""
        device, vae = self.processes.device, self.vae
        video, mask = self.bank.crops(stage.batch, stage.frames, stage.side)
        config = config_of(vae)
        side = stage.side // config.scale_factor_spatial
        extent = (stage.batch, config.z_dim, (stage.frames - 1) // 4 + 1, side, side)
        noise = torch.randn(extent, device=device)
        warm = torch.tensor(min(1.0, progress / 0.1), device=device)
        loss, statistics = self.objective(video, mask, noise, warm)
        loss.backward()
        self.processes.average_gradients(vae.parameters())
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        self.optimizer.step(warm_cosine(progress))
        self.average.update()
        return statistics

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.vae.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bank": self.bank.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vae.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.bank.load_state_dict(state["bank"])


def choose_conv(trainer: VaeTrainer, stage: Stage, tries: int = 12) -> str:
    """Keep the faster of the ways to run the network, by timing real steps at a learning rate near zero."""
    seconds: dict[Conv, float] = {}
    for conv in ("direct", "fused"):
        trainer.loss = replace(trainer.loss, conv=conv)
        for count in (4, tries):  # the first round compiles and lets the convolutions choose their kernels
            started = time.perf_counter()
            for _ in range(count):
                statistics = trainer.step(stage, 0.0)
            statistics.tolist()  # waits for the device
        seconds[conv] = trainer.processes.agree(time.perf_counter() - started)
    best = min(seconds, key=seconds.__getitem__)
    trainer.loss = replace(trainer.loss, conv=best)
    rates = ", ".join(f"{name} {tries / value:.1f} steps/s" for name, value in seconds.items())
    return f"{rates}: running {best}"


def fit(
    trainer: VaeTrainer,
    stages: list[Stage],
    budget: Budget,
    checkpoint: Path,
    save_every: float,
    choose: bool = False,
) -> dict:
    """Train until the budget is spent; returns curves and counts for the record."""
    processes, bank = trainer.processes, trainer.bank
    state = load_checkpoint(checkpoint, processes)
    step, curve = 0, []
    if state is None:
        bank.fill()
    else:
        trainer.load_state_dict(state["trainer"])
        step, curve, budget.spent = state["step"], state["curve"], state["seconds"]
        budget.started = time.perf_counter()
        processes.say(f"resumed at step {step} after {budget.spent:.0f} s")
    processes.say(
        f"bank of {bank.size} clips, {bank.portion / max(bank.seconds_per_portion, 1e-9):.0f} clips/s"
    )
    if choose:
        processes.say(choose_conv(trainer, stages[0]))
    progress, saved, refreshed = processes.agree(budget.progress(step)), time.perf_counter(), budget.seconds()
    while progress < 1.0:
        stage = next((s for s in stages if progress < s.until), stages[-1])
        statistics = trainer.step(stage, progress)
        step += 1
        if budget.steps is not None:
            progress = budget.progress(step)
            if step % 20 == 0:
                bank.refresh()
        if step % 10 == 0 and budget.steps is None:
            error, on_objects, rate = (
                statistics.tolist()
            )  # waits for the device, which keeps the clock honest
            progress = processes.agree(budget.progress(step))
            if budget.seconds() - refreshed > 10.0 * bank.seconds_per_portion:
                bank.refresh()
                refreshed = budget.seconds()
        if step % 100 == 0 or progress >= 1.0:
            error, on_objects, rate = statistics.tolist()
            curve.append([step, round(budget.seconds(), 1), error, on_objects, rate])
            processes.say(
                f"step {step} {budget.seconds():.0f} s {100 * progress:.0f} % {stage}: error"
                f" {error:.2e} objects {on_objects:.2e} KL {rate:.2f}"
            )
        if processes.leads and (time.perf_counter() - saved > save_every or progress >= 1.0):
            state = {
                "trainer": trainer.state_dict(),
                "step": step,
                "curve": curve,
                "seconds": budget.seconds(),
            }
            save_checkpoint(checkpoint, state)
            saved = time.perf_counter()
    return {
        "steps": step,
        "seconds": round(budget.seconds(), 1),
        "clips_rendered": bank.rendered * processes.world,
        "curve_columns": ["step", "seconds", "squared_error", "squared_error_objects", "kl_per_element"],
        "curve": curve,
    }


@torch.no_grad()
def finish(vae: AutoencoderKLWan, shape: ClipShape, clips: int, power: float, out: Path) -> dict[str, Any]:
    """Fold, round to bf16, measure on held-out clips, write `vae/` and a contact sheet."""
    device = vae.device
    fitting = held_out("vae_statistics", min(clips, 64))
    moments = []
    for start in range(0, len(fitting), 16):
        video, _ = shape.render(fitting[start : start + 16], device)
        moments.append(encode_moments(vae, to_model(video)))
    before = measure_vae(vae, held_out("vae", min(clips, 32)), shape, device)
    spectrum = fold_latents(vae, torch.cat(moments), power)
    round_to_bf16(vae)
    vae.save_pretrained(out / "vae")
    vae.float()  # the numbers are those of the rounded weights
    quality = measure_vae(vae, held_out("vae", clips), shape, device)
    video, _ = shape.render(held_out("vae", min(clips, 8)), device)
    contact_sheet(
        out / "vae.png", video, reconstruct(vae, video), [f"held-out clip {i}" for i in range(len(video))]
    )
    return {"quality": quality, "before_folding": before, "spectrum": spectrum}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoint, weights, record and sheet"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="training time; evaluation comes on top")
    parser.add_argument("--steps", type=int, help="train this many steps instead (repeatable)")
    parser.add_argument(
        "--stage", type=Stage.parse, action="append", help="UNTIL:FRAMESxSIDExBATCH, repeat for more"
    )
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument(
        "--conv", choices=("auto", "direct", "fused", "stack"), default="auto", help="how the network is run"
    )
    parser.add_argument("--bank", type=int, default=1024, help="clips held at a time")
    parser.add_argument("--portion", type=int, default=32, help="clips renewed at a time")
    parser.add_argument("--power", type=float, default=0.4, help="evening out of latent directions, 0 to 0.5")
    parser.add_argument("--eval-clips", type=int, default=128)
    parser.add_argument(
        "--size", type=int, nargs=3, default=(29, 128, 128), metavar=("FRAMES", "HEIGHT", "WIDTH")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=90.0, help="seconds between checkpoints")
    parser.add_argument(
        "--whole", action="store_true", help="compile the whole objective (minutes of compilation)"
    )


def main(arguments: argparse.Namespace) -> None:
    processes = Processes.join()
    frames, height, width = arguments.size
    shape = ClipShape(frames=frames, height=height, width=width)
    stages = arguments.stage or list(STAGES)
    stream = training_stream("vae", processes.rank)
    bank = ClipBank(shape, arguments.bank, arguments.portion, stream, processes.device)
    trainer = VaeTrainer(
        processes,
        bank,
        seed=arguments.seed,
        muon_lr=arguments.muon_lr,
        adam_lr=arguments.adam_lr,
        conv="direct" if arguments.conv == "auto" else arguments.conv,
        compile=arguments.whole,
    )
    budget = Budget(arguments.minutes, arguments.steps)
    checkpoint, choose = (
        arguments.out / "vae.ckpt",
        arguments.conv == "auto" and processes.device.type == "cuda",
    )
    fitted = fit(trainer, stages, budget, checkpoint, arguments.save_every, choose)
    if not processes.leads:
        return
    trainer.average.store()
    found = finish(trainer.vae.eval(), shape, arguments.eval_clips, arguments.power, arguments.out)
    record = {
        "machine": machine() | {"processes": processes.world},
        "seed": arguments.seed,
        "loss": asdict(trainer.loss),
        "stages": [asdict(stage) for stage in stages],
        "learning_rates": {"muon": arguments.muon_lr, "adam": arguments.adam_lr},
        **found,
        **fitted,
    }
    write_json(arguments.out / "vae.json", record)
    quality = found["quality"]
    first, last = quality["psnr_per_frame"][0], quality["psnr_per_frame"][-1]
    processes.say(
        f"PSNR {quality['psnr']:.2f} dB, objects {quality['psnr_objects']:.2f} dB, "
        f"first frame {first:.2f} dB, last frame {last:.2f} dB"
    )
