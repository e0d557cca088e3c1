"""Repair a pruned transformer by short distillation from the whole one.

The student must give the teacher's prediction with text and without, the guided prediction made of both, and, after
each of its blocks, the hidden states that the teacher has where the next kept block begins: a block learns to do the
work of those that were taken out behind it. Times and object weights are those of the model's own training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vivace.models.pruning import Anatomy, Kept
from vivace.tiny.train.common import (
    AveragedWeights,
    Budget,
    Processes,
    load_checkpoint,
    save_checkpoint,
    warm_linear,
)
from vivace.tiny.train.muon import SplitOptimizer, split_parameters
from vivace.tiny.train.text_to_video import NOT_MATRICES, FlowLoss
from vivace.training.loop import train
from vivace.training.pruning_data import NoisyBatch, Pool, noisy


@dataclass(frozen=True, kw_only=True)
class RepairLoss:
    """Weights of the terms beside the prediction's error; every term is relative to the size of its target."""

    hidden: float = 0.3
    guided: float = 0.5
    truth: float = 0.0
    guidance: float = 4.0

    def __call__(
        self, batch: NoisyBatch, got: Tensor, want: Tensor, inner: list[Tensor], outer: list[Tensor]
    ) -> Tensor:
        """Of predictions (B, z, n, h, w) and hidden states (B, S, C) of student and teacher."""
        error = got.float() - want.float()
        size = want.float().square().mean()
        loss = (batch.weight * error.square()).mean() / (batch.weight.mean() * size)
        if self.guided and batch.pairs:
            g, n = self.guidance, batch.pairs
            # Independent errors of the two branches would make this term as large as the first.
            both = (g * error[:n] - (g - 1.0) * error[-n:]).square() / (g * g + (g - 1.0) ** 2)
            weight = batch.weight[:n]
            loss = loss + self.guided * (weight * both).mean() / (weight.mean() * size)
        if self.hidden and inner:
            parts = [
                (a.float() - b.float()).square().mean() / b.float().var().clamp_min(1e-12)
                for a, b in zip(inner, outer, strict=True)
            ]
            loss = loss + self.hidden * torch.stack(parts).mean()
        if self.truth:
            far = (got.float() - batch.truth).square()
            loss = loss + self.truth * (batch.weight * far).mean() / (batch.weight.mean() * size)
        return loss


class Tap(nn.Module):
    """A block that leaves its output behind; it stands in the block list while training."""

    def __init__(self, block: nn.Module, seen: list[Tensor]) -> None:
        super().__init__()
        self.block, self.seen = block, seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's."""
        out = self.block(*args, **kwargs)
        self.seen.append(out[0] if isinstance(out, tuple) else out)
        return out


@contextmanager
def tapped(module: Any, lists: list[str], wanted: list[int] | None = None) -> Iterator[list[Tensor]]:
    """Hidden states after the blocks numbered `wanted` in running order (all by default), while the block lasts.

    The list is filled by every call; empty it before one.
    """
    seen: list[Tensor] = []
    before = {name: getattr(module, name) for name in lists}
    number = 0
    for name, blocks in before.items():
        new = []
        for block in blocks:
            new.append(Tap(block, seen) if wanted is None or number in wanted else block)
            number += 1
        module._modules[name] = nn.ModuleList(new)
    try:
        yield seen
    finally:
        for name, blocks in before.items():
            module._modules[name] = blocks


def counterparts(whole: Anatomy, kept: Kept) -> list[int]:
    """For each kept block, the number of the whole model's block whose output it should give."""
    places = [whole.blocks.index(b) for b in kept.blocks]
    ends = {whole.blocks.index(paths[-1]) for paths in whole.lists.values()}
    out = []
    for i, place in enumerate(places):
        last = min(e for e in ends if e >= place)
        following = places[i + 1] - 1 if i + 1 < len(places) else last
        out.append(min(following, last))
    return out


class Repairer:
    """Teacher, student, averages and optimizer of one run; `step` is one update."""

    def __init__(
        self,
        processes: Processes,
        whole: Anatomy,
        student: nn.Module,
        kept: Kept,
        *,
        seed: int = 0,
        muon_lr: float = 1e-3,
        adam_lr: float = 4e-4,
        decay: float = 0.998,
        drop: float = 0.25,
        shift: float = 3.0,
        loss: RepairLoss | None = None,
    ) -> None:
        self.processes, self.whole, self.kept, self.drop = processes, whole, kept, drop
        self.teacher: Any = whole.expert.module.to(processes.device).eval().requires_grad_(False)
        self.student: Any = student.to(processes.device).train()
        processes.same_weights(self.student)
        matrices, others = split_parameters(self.student, NOT_MATRICES)
        if muon_lr == 0.0:
            matrices, others = [], matrices + others
        self.optimizer = SplitOptimizer(matrices, others, muon_lr=muon_lr, adam_lr=adam_lr)
        self.average = AveragedWeights(self.student, decay)
        self.flow, self.loss = FlowLoss(shift=shift), loss or RepairLoss()
        self.lists = list(whole.lists)
        self.wanted = counterparts(whole, kept)
        torch.manual_seed(seed + 1 + processes.rank)

    def compile(self, pool: Pool, batch: int, say: Callable[[str], None]) -> None:
        """Compile the blocks and try a loss with its gradients; where that fails, run eagerly and say so."""
        random = torch.get_rng_state(), _cuda_state(self.processes.device)
        torch._dynamo.config.recompile_limit = 64
        started = time.perf_counter()
        self.teacher.compile_repeated_blocks(fullgraph=True, dynamic=False)
        self.student.compile_repeated_blocks(fullgraph=True, dynamic=False)
        try:
            self._loss(pool, batch).backward()
            say(f"compiled in {time.perf_counter() - started:.0f} s")
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            self.run_eagerly()
            say(f"compilation failed ({type(error).__name__}: {str(error)[:200]}); running eagerly")
        for parameter in self.student.parameters():
            parameter.grad = None
        torch.set_rng_state(random[0])
        if random[1] is not None:
            torch.cuda.set_rng_state(random[1], self.processes.device)

    def run_eagerly(self) -> None:
        """Forget compiled blocks: other batch sizes would be compiled anew."""
        for module in (*self.teacher.modules(), *self.student.modules()):
            module._compiled_call_impl = None

    def _loss(self, pool: Pool, count: int) -> Tensor:
        batch = noisy(pool, self.flow, count, self.drop)
        with self.processes.autocast():
            with torch.no_grad(), tapped(self.teacher, self.lists, self.wanted) as outer:
                want = batch.call(self.teacher)
            with tapped(self.student, self.lists) as inner:
                got = batch.call(self.student)
        return self.loss(batch, got, want, list(inner), list(outer))

    def step(self, pool: Pool, count: int, progress: float) -> Tensor:
        """One update on `count` rows; returns the loss, on the device."""
        loss = self._loss(pool, count)
        loss.backward()
        parameters = list(self.student.parameters())
        self.processes.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step(warm_linear(progress))
        self.average.update()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "model": self.student.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.student.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def _cuda_state(device: torch.device) -> Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def clips_of(checkpoint: Path) -> int | None:
    """How many clips an interrupted run trained on; None when there was none."""
    if not checkpoint.exists():
        return None
    state = load_checkpoint(checkpoint, Processes(1, 1, torch.device("cpu")))
    return None if state is None else int(state["clips"])


def fit(
    trainer: Repairer,
    pool: Pool,
    budget: Budget,
    checkpoint: Path,
    *,
    batch: int,
    save_every: float = 60.0,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train until the budget is spent, taking up an earlier run of the same checkpoint; returns the curve.

    Args:
        batch: rows of an update.
        save_every: seconds between checkpoints.
        stop_after: updates after which to stop as an interruption would, with a checkpoint (for tests).
    """
    processes = trainer.processes
    state = load_checkpoint(checkpoint, processes)
    if state is not None:
        trainer.load_state_dict(state["trainer"])

    def save(kept: dict[str, Any]) -> None:
        save_checkpoint(checkpoint, kept | {"trainer": trainer.state_dict(), "clips": len(pool)})

    done = train(
        lambda _, progress: trainer.step(pool, batch, progress),
        save,
        budget,
        processes,
        state,
        save_every=save_every,
        stop_after=stop_after,
    )
    return done | {"batch": batch * processes.world, "clips": len(pool) * processes.world}


@torch.no_grad()
def measure(
    student: nn.Module,
    teacher: nn.Module,
    batches: list[NoisyBatch],
    processes: Processes,
    guidance: float = 4.0,
) -> dict[str, float]:
    """Held-out errors: of the prediction and of the guided one, squared and relative to the teacher's size.

    `flow` and `flow_whole` are the flow-matching losses of student and teacher against the true target.
    """
    student.eval()
    sums = dict.fromkeys(("prediction", "guided", "flow", "flow_whole"), 0.0)
    for batch in batches:
        with processes.autocast():
            got, want = batch.call(student).float(), batch.call(teacher).float()
        n, error = batch.pairs, got - want
        both = guidance * error[:n] - (guidance - 1.0) * error[-n:]
        aim = guidance * want[:n] - (guidance - 1.0) * want[-n:]
        sums["prediction"] += float(error.square().sum() / want.square().sum())
        sums["guided"] += float(both.square().sum() / aim.square().sum())
        sums["flow"] += float((got - batch.truth)[:n].square().mean())
        sums["flow_whole"] += float((want - batch.truth)[:n].square().mean())
    return {k: round(v / len(batches), 6) for k, v in sums.items()}
