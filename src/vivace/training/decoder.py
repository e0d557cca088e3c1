"""Distil a tiny decoder from a VAE's own: python -m vivace.training.decoder --vae embedded --minutes 8 --out F.

Clips of `vivace.world` are rendered while it learns and encoded by the VAE; the VAE's own decoder gives the pictures
that the tiny one must give (Turbo-VAED, arXiv 2508.09136, distils pixels and inner features; here pixels only). The
loss is the absolute error, that of differences between neighbouring pixels at three scales (in the place of a learned
perceptual loss), and that of differences between frames, which keeps things from flickering.

`--minutes` is the time spent on training, whatever the machine; `--steps` makes a run repeatable. Run it again with the
same `--out` to go on after an interruption: optimizer, random state and position in the data come from the checkpoint
beside the file. `torchrun` starts it on several GPUs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.models import tiny_decoder
from vivace.models.tiny_decoder import TinyDecoder
from vivace.tiny.train.clips import ClipShape, to_frames, to_model
from vivace.tiny.train.common import (
    AveragedWeights,
    Budget,
    Processes,
    load_checkpoint,
    machine,
    random_state,
    restore_random_state,
    save_checkpoint,
    warm_cosine,
    write_json,
)
from vivace.tiny.train.seeds import held_out
from vivace.tiny.train.sheets import contact_sheet
from vivace.tiny.train.vae_quality import decibel
from vivace.training.loop import command, train
from vivace.world.splits import train_seeds

STREAM = 300
"""First stream of training scenes; the embedded model's own training draws from others."""


@dataclass(frozen=True, kw_only=True)
class DecoderLoss:
    """Weights of the terms beside the absolute error; values are in [-1, 1]."""

    gradient: float = 1.0
    temporal: float = 0.5
    scales: int = 3

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Of clips (B, 3, T, H, W)."""
        error = output.float() - target.float()
        loss = error.abs().mean()
        if self.temporal and error.shape[2] > 1:
            loss = loss + self.temporal * torch.diff(error, dim=2).abs().mean()
        flat = error.transpose(1, 2).flatten(0, 1)
        for scale in range(self.scales if self.gradient else 0):
            for axis in (2, 3):
                loss = loss + self.gradient / self.scales * torch.diff(flat, dim=axis).abs().mean()
            if scale < self.scales - 1:
                flat = F.avg_pool2d(flat, 2)
        return loss


class Teacher:
    """A frozen VAE: clips to latents, latents to its own pictures.

    Args:
        vae: any diffusers video VAE; `AutoencoderKLWan` is run over whole clips.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.kind, self.config = type(vae).__name__, dict(vae.config)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Posterior means (B, z, n, h, w) of clips (B, 3, T, H, W) in [-1, 1]."""
        video = video.to(self.vae.dtype)
        if self.kind == "AutoencoderKLWan":
            from vivace.tiny.whole_clip import encode_moments

            return encode_moments(self.vae, video).chunk(2, dim=1)[0]
        return self.vae.encode(video).latent_dist.mode()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) in [-1, 1] of latents."""
        latents = latents.to(self.vae.dtype)
        if self.kind == "AutoencoderKLWan":
            from vivace.tiny.whole_clip import decode_latents

            return decode_latents(self.vae, latents)
        return self.vae.decode(latents).sample


class LatentBank:
    """`size` latents with the teacher's pictures; `refresh` replaces the oldest `portion` by new ones.

    Its state is one number: how many clips were made. A resumed run holds the same latents again.

    Args:
        noise: standard deviation of what is added to latents, as a share of each channel's own: those that a
            transformer makes are off too.
    """

    def __init__(
        self,
        teacher: Teacher,
        shape: ClipShape,
        *,
        size: int,
        portion: int,
        stream: int,
        device: torch.device,
        noise: float = 0.05,
    ) -> None:
        if size % portion:
            raise ConfigError(f"a bank of {size} clips cannot be renewed {portion} at a time; use a divisor.")
        self.teacher, self.shape, self.size, self.portion = teacher, shape, size, portion
        self.stream, self.device, self.noise = stream, device, noise
        self.made = 0
        self.latents = self.pictures = torch.empty(0)
        self.seconds_per_portion = 0.0

    def fill(self, made: int = 0) -> None:
        """Make the clips that the bank holds after `made` clips in all."""
        self.made = max(made - self.size, 0)
        self.latents = self.pictures = torch.empty(0)
        started = time.perf_counter()
        for _ in range(self.size // self.portion):
            self.refresh()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds_per_portion = (time.perf_counter() - started) / (self.size // self.portion)

    def refresh(self) -> None:
        latents, pictures = [], []
        video, _ = self.shape.render(train_seeds(self.made, self.portion, self.stream), self.device)
        draw = torch.Generator(self.device).manual_seed(self.made)
        for clip in video.split(8):
            z = self.teacher.encode(to_model(clip)).float()
            spread = z.std(dim=(0, 2, 3, 4), keepdim=True)
            z = z + self.noise * spread * torch.randn(z.shape, generator=draw, device=self.device)
            latents.append(z)
            pictures.append(to_frames(self.teacher.decode(z)))
        new, seen = torch.cat(latents), torch.cat(pictures)
        if not len(self.latents):
            self.latents = new.new_empty(self.size, *new.shape[1:])
            self.pictures = seen.new_empty(self.size, *seen.shape[1:])
        start = self.made % self.size
        self.latents[start : start + self.portion] = new
        self.pictures[start : start + self.portion] = seen
        self.made += self.portion

    def batch(self, count: int, frames: int) -> tuple[Tensor, Tensor]:
        """`count` random clips cut to `frames` latent frames: latents, and pictures (B, 3, T, H, W) in [-1, 1]."""
        pick = torch.randint(self.size, (count,), device=self.device)
        temporal = (self.pictures.shape[1] - 1) // max(self.latents.shape[2] - 1, 1)
        pictures = self.pictures[pick, : temporal * (frames - 1) + 1]
        return self.latents[pick, :, :frames], to_model(pictures)


class DecoderTrainer:
    """Network, averages, optimizer and latents of one run; `step` is one update."""

    def __init__(
        self,
        processes: Processes,
        bank: LatentBank,
        *,
        seed: int = 0,
        rate: float = 2e-3,
        decay: float = 0.998,
        loss: DecoderLoss | None = None,
        **sizes: int,
    ) -> None:
        self.processes, self.bank, self.rate = processes, bank, rate
        torch.manual_seed(seed)
        self.decoder: TinyDecoder = tiny_decoder.build(bank.teacher.kind, bank.teacher.config, **sizes)
        self.decoder.to(processes.device)
        processes.same_weights(self.decoder)
        torch.manual_seed(seed + 1 + processes.rank)
        self.optimizer = torch.optim.AdamW(
            self.decoder.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=1e-4
        )
        self.average = AveragedWeights(self.decoder, decay)
        self.loss = loss or DecoderLoss()

    def step(self, progress: float, batch: int, frames: int) -> Tensor:
        """One update; returns the loss, on the device."""
        latents, pictures = self.bank.batch(batch, frames)
        with self.processes.autocast():
            output = self.decoder(latents)
        loss = self.loss(output, pictures)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.average_gradients(self.decoder.parameters())
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warm_cosine(progress)
        self.optimizer.step()
        self.average.update()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.decoder.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "made": self.bank.made,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decoder.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.bank.fill(state["made"])


def fit(
    trainer: DecoderTrainer,
    budget: Budget,
    checkpoint: Path,
    *,
    batch: int,
    frames: int,
    save_every: float = 60.0,
    renew_every: int = 20,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train until the budget is spent, taking up an earlier run of the same checkpoint; returns the curve.

    Args:
        batch: clips of an update; `frames`: latent frames of each.
        save_every: seconds between checkpoints.
        renew_every: updates after which a portion of the bank is made anew.
        stop_after: updates after which to stop as an interruption would, with a checkpoint (for tests).
    """
    processes, bank = trainer.processes, trainer.bank
    state = load_checkpoint(checkpoint, processes)
    if state is None:
        bank.fill()  # the first bank is not training
    else:
        random = random_state()
        trainer.load_state_dict(state["trainer"])
        restore_random_state(random)
    processes.say(
        f"bank of {bank.size} clips, {bank.portion / max(bank.seconds_per_portion, 1e-9):.1f} clips/s"
    )

    def update(step: int, progress: float) -> Tensor:
        loss = trainer.step(progress, batch, frames)
        if step % renew_every == 0:
            bank.refresh()
        return loss

    def save(kept: dict[str, Any]) -> None:
        save_checkpoint(checkpoint, kept | {"trainer": trainer.state_dict()})

    done = train(
        update, save, budget, processes, state, save_every=save_every, stop_after=stop_after, look_every=10
    )
    return done | {"clips": bank.made * processes.world}


@torch.no_grad()
def measure(decoder: TinyDecoder, teacher: Teacher, video: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """PSNR on clips uint8 (B, T, H, W, 3), of 8-bit frames, with the teacher's and the tiny decoder's frames.

    `to_teacher`: tiny against the teacher's decode; `teacher_to_truth`, `tiny_to_truth`: against the clips.
    """
    decoder.eval()
    want, got = [], []
    for clip in video.split(4):
        latents = teacher.encode(to_model(clip)).float()
        want.append(to_frames(teacher.decode(latents)))
        got.append(to_frames(decoder.decode(latents)))
    wanted, gotten = torch.cat(want), torch.cat(got)

    def psnr(a: Tensor, b: Tensor) -> float:
        error = ((a.float() - b.float()) / 255.0).square().mean(dim=(1, 2, 3, 4))
        return float(decibel(error).mean())

    found = {
        "to_teacher": psnr(gotten, wanted),
        "teacher_to_truth": psnr(wanted, video),
        "tiny_to_truth": psnr(gotten, video),
    }
    return found, wanted, gotten


def seconds_of(function: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Least of some runs after one that warms up."""
    best = float("inf")
    for turn in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn:
            best = min(best, time.perf_counter() - started)
    return best


def load_vae(name: str) -> Any:
    """`embedded`, or a diffusers folder of a video VAE (or of a pipeline with one in `vae/`), in float32.

    Raises:
        ConfigError: there is no such folder.
    """
    if name == "embedded":
        from vivace.tiny.load import load_tiny

        return load_tiny(torch.float32).vae
    from diffusers import AutoModel

    folder = Path(name).expanduser()
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{name} is no folder of a diffusers VAE; give one, or 'embedded'.")
    return AutoModel.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m vivace.training.decoder", description=__doc__)
    out.add_argument("--vae", default="embedded", help="'embedded' or a diffusers folder")
    out.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    out.add_argument("--minutes", type=float, default=8.0, help="training time; evaluation comes on top")
    out.add_argument("--steps", type=int, help="train this many updates instead (repeatable)")
    out.add_argument("--width", type=int, default=64)
    out.add_argument("--depth", type=int, default=2)
    out.add_argument("--patch", type=int, default=4)
    out.add_argument("--batch", type=int, help="clips of an update (16 on a GPU, 2 on a processor)")
    out.add_argument("--latent-frames", type=int, help="of the clips trained on; all by default")
    out.add_argument(
        "--size", type=int, nargs=3, default=(29, 128, 128), metavar=("FRAMES", "HEIGHT", "WIDTH")
    )
    out.add_argument("--bank", type=int, help="clips held at a time (512 on a GPU, 32 on a processor)")
    out.add_argument("--portion", type=int, help="clips renewed at a time (32 on a GPU, 4 on a processor)")
    out.add_argument("--noise", type=float, default=0.05, help="on latents, as a share of their deviation")
    out.add_argument("--rate", type=float, default=2e-3)
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--save-every", type=float, default=60.0, help="seconds between checkpoints")
    out.add_argument("--eval-clips", type=int, default=16)
    return out


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Train, measure on held-out clips, write the weights, a record and a contact sheet; returns the record."""
    words = parser()
    options = words.parse_args(given)
    if (options.minutes if options.steps is None else options.steps) <= 0:
        words.error("nothing to train: give --minutes or --steps above 0.")
    processes = Processes.join()
    device, gpu = processes.device, processes.device.type == "cuda"
    teacher = Teacher(load_vae(options.vae).to(device))
    frames, height, width = options.size
    shape = ClipShape(frames=frames, height=height, width=width)
    bank = LatentBank(
        teacher,
        shape,
        size=options.bank or (512 if gpu else 32),
        portion=options.portion or (32 if gpu else 4),
        stream=STREAM + processes.rank,
        device=device,
        noise=options.noise,
    )
    trainer = DecoderTrainer(
        processes,
        bank,
        seed=options.seed,
        rate=options.rate,
        width=options.width,
        depth=options.depth,
        patch=options.patch,
    )
    config = trainer.decoder.config
    latent_frames = options.latent_frames or (frames - 1) // config.temporal + 1
    fitted = fit(
        trainer,
        Budget(options.minutes, options.steps),
        options.out.with_suffix(".ckpt"),
        batch=options.batch or (16 if gpu else 2),
        frames=latent_frames,
        save_every=options.save_every,
    )
    trainer.average.store()
    if not processes.leads:
        return {}
    tiny_decoder.save(options.out, trainer.decoder, teacher.kind, teacher.config)
    video, _ = shape.render(held_out("vae", options.eval_clips), device)
    quality, wanted, gotten = measure(trainer.decoder, teacher, video)
    few = slice(0, 6)
    names = [f"held-out clip {i}: teacher above, tiny below" for i in range(len(video[few]))]
    contact_sheet(options.out.with_suffix(".png"), wanted[few], gotten[few], names)
    latents = teacher.encode(to_model(video[:1])).float()
    record = {
        "machine": machine() | {"processes": processes.world},
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"},
        "config": asdict(config),
        "psnr": quality,
        "parameters": sum(p.numel() for p in trainer.decoder.parameters()),
        "teacher_parameters": sum(p.numel() for p in teacher.vae.decoder.parameters()),
        "bytes": options.out.stat().st_size,
        "seconds_of_a_clip": {
            "tiny": seconds_of(lambda: trainer.decoder.decode(latents), device),
            "teacher_whole_clip": seconds_of(lambda: teacher.decode(latents), device),
        },
        **fitted,
    }
    write_json(options.out.with_suffix(".json"), record)
    processes.say(
        f"PSNR to the teacher {quality['to_teacher']:.2f} dB; to the clips {quality['tiny_to_truth']:.2f} dB, "
        f"the teacher's {quality['teacher_to_truth']:.2f} dB; wrote {options.out}"
    )
    return record


if __name__ == "__main__":
    command(main)
