"""The student of training aware of quantisation, its optimizer and its checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vivace.core.errors import ConfigError
from vivace.kernels.api import select
from vivace.kernels.quant_linear.layer import smoothing
from vivace.kernels.quant_linear.spec import OP, Recipe
from vivace.models.adapter import Expert, LinearSite
from vivace.models.families import for_module
from vivace.models.quantized import TrainedLinears
from vivace.tiny.train.common import (
    AveragedWeights,
    Budget,
    Processes,
    restore_random_state,
    save_checkpoint,
    warm_linear,
)
from vivace.tiny.train.latents import LatentSet, tokenize
from vivace.training.loop import train
from vivace.training.quantization_layers import RankSchedule, StudentLinear
from vivace.training.quantization_loss import DistillationLoss, Pairs, make_pairs, watched

EXPERT = "transformer"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is quantised and how it is trained.

    Attributes:
        recipe, smooth: of every layer (`quantized_linear`).
        roles, skip_blocks: which layers (`quantized_linear`).
        lora: rank of the trained deltas; 0 trains whole weights.
        schedule: of the auxiliary branch.
        rate: learning rate of weights; biases and branches have `branch_rate`.
        decay: of the averaged weights.
    """

    recipe: Recipe
    smooth: float = 0.0
    roles: str = "all"
    skip_blocks: int = 0
    lora: int = 0
    schedule: RankSchedule = field(default_factory=RankSchedule)
    rate: float = 2e-4
    branch_rate: float = 2e-4
    decay: float = 0.998


def sites_of(transformer: Any, roles: str, skip_blocks: int) -> tuple[Expert, list[LinearSite]]:
    """The expert of a transformer and the linears that `quantized_linear` takes with these settings.

    Raises:
        ConfigError: no adapter drives it, or nothing is left.
    """
    adapter = for_module(transformer)
    if adapter is None:
        raise ConfigError(f"{type(transformer).__name__} is of no family that Vivace knows.")
    expert = adapter.expert(EXPERT, transformer)
    depth = len(expert.blocks)

    def taken(site: LinearSite) -> bool:
        feed_forward = site.role.removeprefix("text.").startswith("ffn.")
        right = roles == "all" or (roles == "ffn") == feed_forward
        return site.role != "other" and right and skip_blocks <= site.block < depth - skip_blocks

    sites = [site for site in expert.linears if taken(site)]
    if not sites:
        raise ConfigError(f"roles {roles} and skip_blocks {skip_blocks} leave no layer of {depth} blocks.")
    return expert, sites


class QuantizationTrainer:
    """A student beside the exact transformer of a pipeline; `step` is one update.

    Args:
        pipeline: with the exact transformer, which is frozen, on the device.
        maxima: address of a layer -> largest magnitudes of its inputs, for smoothing.
        compile: compile the blocks of both.
    """

    def __init__(
        self,
        processes: Processes,
        pipeline: Any,
        choices: Choices,
        *,
        loss: DistillationLoss | None = None,
        maxima: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        self.processes, self.pipeline, self.choices = processes, pipeline, choices
        self.loss = loss or DistillationLoss()
        self.exact = pipeline.transformer.eval().requires_grad_(False)
        pipeline.text_encoder.eval().requires_grad_(False)
        self.shift = float(pipeline.scheduler.config.flow_shift)
        self.empty = tokenize(pipeline.tokenizer, [""])[0].to(processes.device)
        torch.manual_seed(seed)
        self.student = copy.deepcopy(self.exact)
        expert, sites = sites_of(self.student, choices.roles, choices.skip_blocks)
        self.layers: dict[str, StudentLinear] = {}
        for site in sites:
            linear: Any = site.module
            seen = maxima[site.site] if maxima is not None else None
            self.layers[site.site] = StudentLinear(
                linear,
                choices.recipe,
                auxiliary=choices.schedule.rank,
                lora=choices.lora,
                smooth=None if seen is None else smoothing(seen, linear.weight, choices.smooth),
            )
            site.parent._modules[site.name] = self.layers[site.site]
        self.parts = nn.ModuleList(self.layers.values())
        processes.same_weights(self.parts)
        exact_expert, _ = sites_of(self.exact, choices.roles, choices.skip_blocks)
        self.blocks: list[tuple[nn.Module, nn.Module]] = [
            (a.module, b.module) for a, b in zip(expert.blocks, exact_expert.blocks, strict=True)
        ]
        if compile:
            for module in (self.student, self.exact):
                module.compile_repeated_blocks(dynamic=False)
        self.average = AveragedWeights(self.parts, choices.decay)
        self.stage = -1
        self.optimizer = self._optimizer()
        torch.manual_seed(seed + 1 + processes.rank)

    def _optimizer(self) -> torch.optim.Optimizer:
        named = [(n, p) for n, p in self.parts.named_parameters() if p.requires_grad]
        weights = [p for n, p in named if n.endswith((".weight", "lora_down", "lora_up"))]
        others = [p for n, p in named if not n.endswith((".weight", "lora_down", "lora_up"))]
        self.trained = weights + others
        groups = [
            {"params": weights, "lr": self.choices.rate, "base": self.choices.rate},
            {"params": others, "lr": self.choices.branch_rate, "base": self.choices.branch_rate},
        ]
        gpu = self.processes.device.type == "cuda"
        return torch.optim.AdamW(
            [g for g in groups if g["params"]], betas=(0.9, 0.95), weight_decay=0.0, fused=gpu
        )

    def pairs(self, data: LatentSet, batch: int) -> Pairs:
        """A batch of random clips, captions, times and noise."""
        clean, mask, ids = data.batch(batch)
        times = self.loss.times(batch, clean.device, self.shift)
        noise = torch.randn_like(clean, dtype=torch.float32)
        return make_pairs(self.pipeline.text_encoder, clean, mask, ids, self.empty, times, noise)

    def loss_of(self, pairs: Pairs) -> Tensor:
        """The loss of a batch."""
        if not self.loss.hidden:
            with torch.no_grad():
                exact = pairs.run(self.exact)
            return self.loss(pairs.run(self.student), exact, pairs.mask)
        with watched([b for _, b in self.blocks]) as wanted, torch.no_grad():
            exact = pairs.run(self.exact)
        with watched([a for a, _ in self.blocks]) as got:
            output = pairs.run(self.student)
        return self.loss(output, exact, pairs.mask) + self.loss.of_blocks(got, wanted)

    def step(self, data: LatentSet, batch: int, progress: float) -> Tensor:
        """One update; returns the loss, on the device."""
        self.anneal(progress)
        with self.processes.autocast():
            loss = self.loss_of(self.pairs(data, batch))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.average_gradients(self.trained)
        nn.utils.clip_grad_norm_([p for p in self.trained if p.grad is not None], 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * warm_linear(progress)
        self.optimizer.step()
        self.average.update()
        return loss.detach()

    def anneal(self, progress: float) -> None:
        """Bring the auxiliary branch to where its schedule is at a progress from 0 to 1."""
        stage, ranks, stay, weight = self.choices.schedule.at(progress)
        if stage != self.stage:
            self.stage = stage
            moved: set[int] = set()
            for layer in self.layers.values():
                layer.sort_branch(ranks)
                for parameter in (layer.up, layer.down):
                    if parameter is not None:
                        # The columns are others now, so what was known of them is not theirs.
                        self.optimizer.state.pop(parameter, None)
                        moved.add(id(parameter))
            self.processes.same_weights(self.parts)
            for value, parameter in zip(self.average.values, self.average.parameters, strict=True):
                if id(parameter) in moved:
                    value.copy_(parameter.detach())
        if ranks:
            for layer in self.layers.values():
                layer.set_gain(ranks, stay, weight)

    def trained_linears(self, model_hash: str, told: Mapping[str, Any]) -> TrainedLinears:
        """The file's content, of the weights as they are in the student."""
        adapter = for_module(self.exact)
        assert adapter is not None
        return TrainedLinears(
            family=adapter.family,
            model_hash=model_hash,
            recipe=self.choices.recipe,
            smooth=self.choices.smooth,
            layers={site: layer.trained() for site, layer in self.layers.items()},
            told=told,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.parts.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.parts.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stage = state["stage"]
        self.anneal_used()

    def anneal_used(self) -> None:
        """Tell the layers how many ranks the stage has, which no tensor holds."""
        ranks = [*self.choices.schedule.ranks, 0]
        for layer in self.layers.values():
            layer.use(ranks[max(self.stage, 0)])


def deployed(
    transformer: Any, choices: Choices, file: TrainedLinears | None, maxima: Mapping[str, Tensor] | None
) -> Any:
    """A copy of a transformer with quantised layers: those of a file, or rounded without training.

    Kernels are those that `quantized_linear` takes on a GPU; on a processor the reference, which has the same numbers.
    """
    new = copy.deepcopy(transformer)
    _, sites = sites_of(new, choices.roles, choices.skip_blocks)
    linears: list[Any] = [site.module for site in sites]
    features = math.gcd(*(n for x in linears for n in (x.in_features, x.out_features)))
    kind = linears[0].weight.device.type
    prefer = "auto" if kind == "cuda" else "reference"
    choice = select(OP, prefer, device=kind, recipe=choices.recipe, features=features)
    for site, linear in zip(sites, linears, strict=True):
        if file is not None:
            layer = file.layer(site.site, linear, choice)
        else:
            seen = None if maxima is None else maxima[site.site]
            smooth = None if seen is None else smoothing(seen, linear.weight, choices.smooth)
            layer = choice.run(linear, choices.recipe, smooth)
        site.parent._modules[site.name] = layer
    return new


@torch.no_grad()
def input_maxima(transformer: Any, calls: list[Pairs], choices: Choices) -> dict[str, Tensor]:
    """Largest magnitudes of every input channel of the layers in some calls, float32 (K,) by address."""
    _, sites = sites_of(transformer, choices.roles, choices.skip_blocks)
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any) -> None:
            top = inputs[0].detach().abs().flatten(0, -2).amax(0).float()
            seen[name] = torch.maximum(seen[name], top) if name in seen else top

        return keep

    handles = [site.module.register_forward_pre_hook(watch(site.site)) for site in sites]
    try:
        for call in calls:
            call.run(transformer)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def fit(
    trainer: QuantizationTrainer,
    data: LatentSet,
    budget: Budget,
    checkpoint: Path,
    *,
    batch: int,
    kept: Mapping[str, Any],
    state: Mapping[str, Any] | None = None,
    save_every: float = 60.0,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train until the budget is spent; returns counts and the curve.

    Args:
        batch: clips of an update, each of which runs with and without its caption.
        kept: what a checkpoint says beside the training state (`clips`, `settings`).
        state: of the checkpoint that is taken up.
        save_every: seconds between checkpoints.
        stop_after: updates after which to stop as an interruption would, with a checkpoint (for tests).
    """
    processes = trainer.processes
    if state is not None:
        trainer.load_state_dict(state["trainer"])
        if processes.leads:
            restore_random_state(state["random"])
        else:
            torch.manual_seed(1000 * state["step"] + processes.rank)

    def save(more: dict[str, Any]) -> None:
        save_checkpoint(checkpoint, {**kept, **more, "trainer": trainer.state_dict()})

    done = train(
        lambda _, progress: trainer.step(data, batch, progress),
        save,
        budget,
        processes,
        state,
        save_every=save_every,
        stop_after=stop_after,
        told={"auxiliary ranks": lambda: _left(trainer)},
    )
    if done["finished"]:
        trainer.anneal(1.0)
    return done | {"batch": batch * processes.world}


def _left(trainer: QuantizationTrainer) -> int:
    return trainer.choices.schedule.ranks[max(trainer.stage, 0)]
