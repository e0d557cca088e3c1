"""The optimizer side of a distillation: turns of the roles, averaged weights, several processes, exact state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vivace.core.errors import WeightsError
from vivace.tiny.train.common import AveragedWeights, Processes, warm_cosine
from vivace.training.chance import Chance
from vivace.training.data.samples import Batch, Samples
from vivace.training.distillation.recipe import Recipe, Turn
from vivace.training.distillation.sharding import (
    clip,
    cut,
    kept,
    load_optimizer,
    local,
    put,
    sharded,
    whole_optimizer,
)
from vivace.training.distillation.team import Team
from vivace.training.distillation.weights import merged_state

CLIP = 1.0
"""Largest norm of a gradient. Distribution matching gives small ones; the others are held at the start."""
BETAS = (0.0, 0.99)
"""Of AdamW: objectives that chase each other want no momentum (DMD2's code, and GANs before it)."""
STEADY_BETAS = (0.9, 0.99)
"""Where there is no critic."""
FLOOR = 0.1
"""Share of the learning rate at the end."""


class DistillationTrainer:
    """A team that learns by a recipe; `update` is one update. Its place in the data is the number of the update.

    Args:
        processes: this process among how many; gradients are averaged, by FSDP where weights are spread.
        team, recipe: who learns what.
        data: samples with the recipe's fields.
        batch: clips of an update, in this process.
        seed: of data and noise.
    """

    def __init__(
        self, processes: Processes, team: Team, recipe: Recipe, data: Samples, *, batch: int, seed: int = 0
    ) -> None:
        self.processes, self.team, self.recipe = processes, team, recipe
        self.data, self.batch, self.seed = data, batch, seed
        learners = team.learners()
        betas = STEADY_BETAS if "critic" not in learners else BETAS
        rates = {"student": recipe.rate, "critic": recipe.critic_rate}
        self.optimizers: dict[str, torch.optim.AdamW] = {}
        self.sharded = sharded(team.student.module)
        for role, modules in learners.items():
            for module in modules:
                if not sharded(module):
                    processes.same_weights(module)
            self.optimizers[role] = torch.optim.AdamW(
                parameters_of(modules), lr=rates[role], betas=betas, weight_decay=0.0,
                fused=processes.device.type == "cuda",
            )  # fmt: skip
        self.learners = learners
        self.average = AveragedWeights(Trained(team.student.module), recipe.decay)
        self.told: dict[str, Tensor] = {}
        self._stream: Iterator[Batch] | None = None
        self._place = 0

    def batches(self, update: int) -> Batch:
        """Batch number `update` - 1, on the device."""
        if self._stream is None or self._place != update - 1:
            self._stream = self.data.stream(
                self.batch,
                self.seed,
                self.processes.rank,
                self.processes.world,
                start=update - 1,
                device=self.processes.device,
                fields=self.recipe.fields,
            )
        self._place = update
        return next(self._stream)

    def update(self, update: int, progress: float) -> Tensor:
        """Update number `update`, from 1 on; returns the loss of the last role whose turn it was, on the device."""
        batch = self.batches(update)
        loss = torch.zeros((), device=self.processes.device)
        for role in self.recipe.turns(update):
            chance = Chance(
                self.processes.device, self.seed, update, role,
                rank=self.processes.rank, world=self.processes.world,
            )  # fmt: skip
            turn = Turn(self.team, batch, chance, update, progress)
            optimizer = self.optimizers[role]
            loss, told = getattr(self.recipe, role)(turn)
            # Whoever judged in another role's turn has gradients that are nobody's.
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for module in self.learners[role]:
                if not sharded(module):  # else FSDP has averaged them
                    self.processes.average_gradients(parameters_of([module]))
            norm = clip(parameters_of(self.learners[role]), CLIP)
            base = self.recipe.rate if role == "student" else self.recipe.critic_rate
            for group in optimizer.param_groups:
                group["lr"] = base * warm_cosine(progress, floor=FLOOR)
            optimizer.step()
            self.told |= {f"{role}.{name}": value for name, value in told.items()}
            self.told |= {f"{role}.loss": loss.detach(), f"{role}.gradient": norm}
            if role == "student":
                self.average.update()
        return loss.detach()

    def diagnostics(self) -> dict[str, float]:
        """The last values that the objectives told of themselves."""
        return {name: float(value) for name, value in self.told.items()}

    @contextmanager
    def averages(self) -> Iterator[None]:
        """The student has its averaged weights while the block lasts, and is then as it was, bit for bit."""
        trained = list(Trained(self.team.student.module).parameters())
        before = [p.clone() for p in trained]
        self.average.store()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(trained, before, strict=True):
                    parameter.copy_(value)

    def averaged(self) -> dict[str, Tensor]:
        """The student's state dict with averaged weights, LoRA layers added in, on the CPU.

        All processes must ask; where weights are spread, only the leader gets them.
        """
        with self.averages():
            return merged_state(self.team.student.module)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the data and what a recipe is made of, in whole tensors; all processes must ask.

        Where weights are spread, only the leader gets them.
        """
        trained = parameters_of([self.team.student.module])
        average = self.average.state_dict()
        return {
            "modules": {r: [trainable(m) for m in modules] for r, modules in self.learners.items()},
            "optimizers": {role: whole_optimizer(o) for role, o in self.optimizers.items()},
            "average": average
            | {"values": [kept(v, p) for v, p in zip(average["values"], trained, strict=True)]},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Weights are written in place, so that whoever shares them has them too.

        Raises:
            WeightsError: it is of other networks.
        """
        for role, modules in self.learners.items():
            for module, values in zip(modules, state["modules"][role], strict=True):
                own = {name: p for name, p in module.named_parameters() if p.requires_grad}
                if wrong := sorted(set(own) ^ set(values)):
                    raise WeightsError(f"the checkpoint is of another {role}; they differ in {wrong[0]}.")
                for name, parameter in own.items():
                    put(parameter, values[name])
        for role, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][role])
        trained, average = parameters_of([self.team.student.module]), state["average"]
        values = [local(cut(v, p)) for v, p in zip(average["values"], trained, strict=True)]
        self.average.load_state_dict(average | {"values": values})


class Trained(nn.Module):
    """The parameters of a module that learn; where they are spread, this process's parts, which share their memory."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.own = [local(p) for p in module.parameters() if p.requires_grad]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What is averaged."""
        return iter(self.own)  # pyright: ignore[reportReturnType]


def parameters_of(modules: list[nn.Module]) -> list[nn.Parameter]:
    """Parameters of modules that learn."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """The learning part of a state dict, in whole tensors."""
    return {name: kept(p) for name, p in module.named_parameters() if p.requires_grad}
