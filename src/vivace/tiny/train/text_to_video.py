"""Train transformer and text encoder together by flow matching on the latents of rendered clips.

Flow matching on straight paths (arXiv:2210.02747, 2209.03003): x_s = (1 - s) x0 + s n, the target is n - x0 and the
model is given 1000 s, as the pipeline does. Times are logit-normal (arXiv:2403.03206) with Wan's shift of 3, spread
evenly over each batch; a share of them is uniform, so that the first steps of sampling are learnt too. A tenth of the
captions is replaced by the tokens of the empty prompt for classifier-free guidance (arXiv:2207.12598).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor

from vivace.tiny.build import TinyConfig, build_pipeline
from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.common import (
    AveragedWeights,
    Budget,
    Processes,
    load_checkpoint,
    machine,
    save_checkpoint,
    warm_linear,
    write_json,
)
from vivace.tiny.train.export import write_pipeline
from vivace.tiny.train.latents import LatentSet, embed_text, encode_clips, tokenize
from vivace.tiny.train.muon import SplitOptimizer, split_parameters
from vivace.tiny.train.seeds import training_stream

NOT_MATRICES = (
    "patch_embedding", "condition_embedder", "proj_out", "scale_shift_table", "shared", "embed_tokens", "relative"
)  # fmt: skip
"""Inputs, outputs and tables: AdamW serves them better than an orthogonal step."""


@dataclass(frozen=True, kw_only=True)
class FlowLoss:
    """Flow-matching error. `object_weight` moves where the network spends its effort, not the optimum."""

    shift: float = 3.0
    uniform: float = 0.15
    drop_text: float = 0.1
    object_weight: float = 3.0

    def times(self, count: int, device: torch.device) -> Tensor:
        """`count` times in (0, 1): one from each quantile of the distribution, in random order."""
        quantile = (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
        quantile = quantile.clamp(1e-4, 1.0 - 1e-4)
        logit_normal = torch.special.ndtri(quantile).sigmoid()
        u = torch.where(torch.rand(count, device=device) < self.uniform, quantile, logit_normal)
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)

    def __call__(
        self, pipeline: WanPipeline, clean: Tensor, mask: Tensor, ids: Tensor, empty: Tensor
    ) -> Tensor:
        """The loss of a batch: latents (B, z, n, h, w), mask (B, n, h, w), ids (B, L), ids of "" (L,)."""
        clean, count = clean.float(), len(clean)
        ids = torch.where(torch.rand(count, 1, device=clean.device) < self.drop_text, empty, ids)
        text = embed_text(pipeline.text_encoder, ids)
        s = self.times(count, clean.device)
        noise, at = torch.randn_like(clean), s.view(-1, 1, 1, 1, 1)
        predicted = pipeline.transformer(
            hidden_states=torch.lerp(clean, noise, at),
            timestep=1000.0 * s,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
        weight = 1.0 + self.object_weight * mask[:, None].float()
        return (weight * (predicted.float() - (noise - clean)).square()).mean() / weight.mean()


class FlowTrainer:
    """Transformer and text encoder of a pipeline, their averages and their optimizer; `step` is one update."""

    def __init__(
        self,
        processes: Processes,
        pipeline: WanPipeline,
        *,
        seed: int = 0,
        muon_lr: float = 2e-3,
        adam_lr: float = 8e-4,
        compile: bool = True,
        decay: float = 0.9995,
    ) -> None:
        self.processes, self.pipeline = processes, pipeline
        with torch.no_grad():
            pipeline.transformer.proj_out.weight.zero_()  # start from the prediction 0
        self.parts = (
            torch.nn.ModuleList([pipeline.transformer, pipeline.text_encoder]).to(processes.device).train()
        )
        processes.same_weights(self.parts)
        if compile:
            pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        matrices, others = split_parameters(self.parts, NOT_MATRICES)
        if muon_lr == 0.0:
            matrices, others = [], matrices + others
        self.optimizer = SplitOptimizer(matrices, others, muon_lr=muon_lr, adam_lr=adam_lr, weight_decay=0.01)
        self.average = AveragedWeights(self.parts, decay)
        self.loss = FlowLoss(shift=pipeline.scheduler.config.flow_shift)
        self.empty = tokenize(pipeline.tokenizer, [""])[0].to(processes.device)
        torch.manual_seed(seed + 1 + processes.rank)

    def step(self, data: LatentSet, batch: int, progress: float) -> Tensor:
        """One update; returns the loss, on the device."""
        with self.processes.autocast():
            loss = self.loss(self.pipeline, *data.batch(batch), self.empty)
        loss.backward()
        parameters = list(self.parts.parameters())
        self.processes.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step(warm_linear(progress))
        self.average.update()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.parts.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parts.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def fit(
    trainer: FlowTrainer, data: LatentSet, batch: int, budget: Budget, checkpoint: Path, save_every: float
) -> dict[str, Any]:
    """Train until the budget is spent; returns curves and counts for the record."""
    processes = trainer.processes
    state = load_checkpoint(checkpoint, processes)
    step, curve = 0, []
    if state is not None:
        trainer.load_state_dict(state["trainer"])
        step, curve, budget.spent = state["step"], state["curve"], state["seconds"]
        processes.say(f"resumed at step {step} after {budget.spent:.0f} s")
    budget.started = time.perf_counter()
    progress, saved = processes.agree(budget.progress(step)), time.perf_counter()
    total, since = torch.zeros((), device=processes.device), 0
    while progress < 1.0:
        total, since, step = total + trainer.step(data, batch, progress), since + 1, step + 1
        if budget.steps is not None:
            progress = budget.progress(step)
        elif step % 10 == 0:
            if processes.device.type == "cuda":
                torch.cuda.synchronize()  # keeps the clock honest
            progress = processes.agree(budget.progress(step))
        if step % 100 == 0 or progress >= 1.0:
            curve.append([step, round(budget.seconds(), 1), float(total) / since])
            processes.say(
                f"step {step} {budget.seconds():.0f} s {100 * progress:.0f} %: loss {curve[-1][2]:.4f}"
            )
            total, since = torch.zeros_like(total), 0
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
        "batch": batch * processes.world,
        "curve_columns": ["step", "seconds", "loss"],
        "curve": curve,
    }


def gather_latents(
    pipeline: WanPipeline, processes: Processes, shape: ClipShape, arguments: argparse.Namespace
) -> LatentSet:
    """This process's share of the clips, encoded now or read from `--out` when an earlier run left them there."""
    cache = arguments.out / f"latents-{processes.rank}.pt"
    if cache.exists():
        return LatentSet.load(cache, processes.device)
    started = time.perf_counter()
    data = encode_clips(
        pipeline.vae.to(processes.device),
        pipeline.tokenizer,
        processes,
        shape,
        count=arguments.clips // processes.world,
        stream=training_stream("text_to_video", processes.rank),
        captions=arguments.captions,
        portion=arguments.portion,
        seconds=60.0 * arguments.encode_minutes,
    )
    processes.say(f"{len(data)} clips encoded in {time.perf_counter() - started:.0f} s")
    if not arguments.no_cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        data.save(cache)
    return data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoint, latents, weights and record"
    )
    parser.add_argument("--vae", type=Path, required=True, help="folder `vae/` that the VAE training wrote")
    parser.add_argument("--minutes", type=float, default=8.0, help="training time after encoding")
    parser.add_argument("--steps", type=int, help="train this many steps instead (repeatable)")
    parser.add_argument("--clips", type=int, default=24576, help="clips to encode, over all processes")
    parser.add_argument("--captions", type=int, default=3, help="captions of each clip")
    parser.add_argument("--encode-minutes", type=float, default=2.0, help="stop encoding after this time")
    parser.add_argument("--portion", type=int, default=64, help="clips rendered and encoded at a time")
    parser.add_argument("--batch", type=int, default=48, help="clips of one step and process")
    parser.add_argument("--muon-lr", type=float, default=2e-3, help="0 trains everything with AdamW")
    parser.add_argument("--adam-lr", type=float, default=8e-4)
    parser.add_argument(
        "--size", type=int, nargs=3, default=(29, 128, 128), metavar=("FRAMES", "HEIGHT", "WIDTH")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=90.0, help="seconds between checkpoints")
    parser.add_argument("--attention", choices=("auto", "cudnn"), default="auto", help="see the probe")
    parser.add_argument("--encode-only", action="store_true", help="stop when the latents are written")
    parser.add_argument("--no-cache", action="store_true", help="do not write the latents")
    parser.add_argument("--no-compile", action="store_true")


def main(
    arguments: argparse.Namespace, config: TinyConfig | None = None, words: Iterable[str] | None = None
) -> None:
    processes = Processes.join()
    frames, height, width = arguments.size
    pipeline = build_pipeline(arguments.seed, config, words)
    vae = AutoencoderKLWan.from_pretrained(arguments.vae).float().eval()
    pipeline.register_modules(vae=vae)
    data = gather_latents(
        pipeline, processes, ClipShape(frames=frames, height=height, width=width), arguments
    )
    if arguments.encode_only:
        return
    processes.choose_attention(arguments.attention)
    spread = data.latents[:512].float().std(dim=(0, 2, 3, 4))
    trainer = FlowTrainer(
        processes,
        pipeline,
        seed=arguments.seed,
        muon_lr=arguments.muon_lr,
        adam_lr=arguments.adam_lr,
        compile=not arguments.no_compile,
    )
    budget = Budget(arguments.minutes, arguments.steps)
    checkpoint = arguments.out / "text_to_video.ckpt"
    fitted = fit(trainer, data, arguments.batch, budget, checkpoint, arguments.save_every)
    if not processes.leads:
        return
    trainer.average.store()
    for name in ("transformer", "text_encoder"):
        getattr(pipeline, name).eval()
    pipeline.to("cpu")
    write_pipeline(pipeline, arguments.out / "pipeline")
    record = {
        "machine": machine() | {"processes": processes.world},
        "seed": arguments.seed,
        "clips": len(data) * processes.world,
        "captions_per_clip": data.ids.shape[1],
        "latent_deviation": [round(float(v), 4) for v in spread],
        "learning_rates": {"muon": arguments.muon_lr, "adam": arguments.adam_lr},
        **fitted,
    }
    write_json(arguments.out / "text_to_video.json", record)
