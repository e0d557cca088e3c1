"""Time what training will do, at a few settings, and print one table: choose batch sizes and kernels from it.

Everything is guarded by a deadline: what does not fit is skipped and said so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from vivace.tiny.build import build_pipeline
from vivace.tiny.train.clips import ClipBank, ClipShape
from vivace.tiny.train.common import Processes
from vivace.tiny.train.latents import LatentSet, make_encoder
from vivace.tiny.train.text_to_video import FlowTrainer
from vivace.tiny.train.vae import STAGES, Stage, VaeTrainer
from vivace.tiny.whole_clip import Conv


class Table:
    """Rows of (setting, seconds until ready, rate, unit), printed as they come, until the deadline."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.started, self.deadline, self.device = time.perf_counter(), seconds, device
        print(f"{'setting':44s} {'first s':>8s} {'rate':>10s}  unit", flush=True)

    def left(self) -> float:
        return self.deadline - (time.perf_counter() - self.started)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, name: str, run: Callable[[], object], amount: float, unit: str, need: float) -> None:
        """Time `run` for about a second after its first call; skipped when less than `need` seconds are left."""
        if self.left() < need:
            print(f"{name:44s}  skipped: no time left", flush=True)
            return
        try:
            started = time.perf_counter()
            run()
            self.sync()
            first = time.perf_counter() - started
            run()
            self.sync()
            started, count = time.perf_counter(), 0
            while count < 3 or (time.perf_counter() - started < 1.0 and count < 60):
                run()
                count += 1
                if count % 3 == 0:
                    self.sync()
            self.sync()
            rate = amount * count / (time.perf_counter() - started)
            memory = ""
            if self.device.type == "cuda":
                memory = f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
                torch.cuda.reset_peak_memory_stats()
            print(f"{name:44s} {first:8.1f} {rate:10.2f}  {unit}{memory}", flush=True)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            print(f"{name:44s}  out of memory", flush=True)


class VaeSettings:
    """Steps of the VAE's training, one trainer for each way to run it."""

    def __init__(self, table: Table, processes: Processes, bank: ClipBank) -> None:
        self.table, self.processes, self.bank = table, processes, bank

    def measure(self, conv: Conv, compile: bool, stages: list[Stage], need: float) -> None:
        trainer = VaeTrainer(self.processes, self.bank, conv=conv, compile=compile)
        for stage in stages:
            name = f"vae {'compiled' if compile else 'eager'} {conv} {stage}"
            self.table.measure(name, lambda stage=stage: trainer.step(stage, 0.5), 1, "steps/s", need)


class FlowSettings:
    """Steps of the transformer's training on latents of noise."""

    def __init__(self, table: Table, processes: Processes, latent: tuple[int, ...], compile: bool) -> None:
        self.table, self.processes, self.compile = table, processes, compile
        pipeline, device = build_pipeline(0), processes.device
        self.pipeline = pipeline
        self.data = LatentSet(
            torch.randn(256, pipeline.transformer.config.in_channels, *latent, device=device).bfloat16(),
            torch.zeros(256, *latent, dtype=torch.uint8, device=device),
            torch.randint(3, len(pipeline.tokenizer), (256, 1, 64), device=device).to(torch.int16),
        )
        self.trainer = FlowTrainer(processes, pipeline, compile=compile)

    def measure(self, batch: int, attention: str, need: float) -> None:
        self.processes.choose_attention(attention)
        name = f"t2v batch {batch} attention {attention}"
        self.table.measure(name, lambda: self.trainer.step(self.data, batch, 0.5), 1, "steps/s", need)
        self.processes.choose_attention("auto")

    def measure_optimizer(self, need: float) -> None:
        muon = self.trainer.optimizer.muon
        if muon is None:
            return
        for group in muon.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        self.table.measure("muon update of the transformer", muon.step, 1, "steps/s", need)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument(
        "--size", type=int, nargs=3, default=(29, 128, 128), metavar=("FRAMES", "HEIGHT", "WIDTH")
    )
    parser.add_argument("--stage", type=Stage.parse, action="append")
    parser.add_argument("--batches", type=int, nargs="+", default=[48, 64])
    parser.add_argument("--bank", type=int, default=128)
    parser.add_argument("--portion", type=int, default=32)
    parser.add_argument("--no-compile", action="store_true")


def main(arguments: argparse.Namespace) -> None:
    processes = Processes.join()
    frames, height, width = arguments.size
    shape, compile = ClipShape(frames=frames, height=height, width=width), not arguments.no_compile
    table = Table(arguments.seconds, processes.device)
    bank = ClipBank(shape, arguments.bank, arguments.portion, 0, processes.device)
    bank.fill()
    table.measure(f"render, {arguments.portion} at a time", bank.refresh, arguments.portion, "clips/s", 3)
    first, *later = arguments.stage or list(STAGES)
    vae = VaeSettings(table, processes, bank)
    flow = FlowSettings(table, processes, ((frames - 1) // 4 + 1, height // 8, width // 8), compile)
    batch = arguments.batches[0]
    # what decides most comes first; `need` is a guess of the seconds that compilation takes
    vae.measure("stack", compile, [first], need=30)
    flow.measure(batch, "auto", need=20)
    flow.measure_optimizer(need=2)
    vae.measure("direct", False, [first], need=15)
    flow.measure(batch, "cudnn", need=20)
    for other in arguments.batches[1:]:
        flow.measure(other, "auto", need=20)
    encode = make_encoder(build_pipeline(0).vae.to(processes.device), processes)
    clips = bank.video[: arguments.portion]
    table.measure(f"encode, {len(clips)} at a time", lambda: encode(clips), len(clips), "clips/s", 12)
    vae.measure("stack", compile, later, need=35)
    vae.measure("direct", compile, [first], need=35)
    print(f"{arguments.seconds - table.left():.0f} s in all", flush=True)
