"""The optimizer side of a distillation: turns of the roles, averaged weights, several processes, exact state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vivace.tiny.train.common import AveragedWeights, Processes, warm_cosine
from vivace.training.chance import Chance
from vivace.training.data.samples import Batch, Samples
from vivace.training.distillation.recipe import Recipe, Turn
from vivace.training.distillation.team import Team, merged_state

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
        processes: this process among how many; gradients are averaged.
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
        for role, modules in learners.items():
            for module in modules:
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
            self.processes.average_gradients(parameters_of(self.learners[role]))
            norm = nn.utils.clip_grad_norm_(parameters_of(self.learners[role]), CLIP)
            base = self.recipe.rate if role == "student" else self.recipe.critic_rate
            for group in optimizer.param_groups:
                group["lr"] = base * warm_cosine(progress, floor=FLOOR)
            optimizer.step()
            self.told |= {f"{role}.{name}": value for name, value in told.items()}
            self.told |= {f"{role}.loss": loss.detach(), f"{role}.gradient": norm.detach()}
            if role == "student":
                self.average.update()
        return loss.detach()

    def diagnostics(self) -> dict[str, float]:
        """The last values that the objectives told of themselves."""
        return {name: float(value) for name, value in self.told.items()}

    def averaged(self) -> dict[str, Tensor]:
        """The student's state dict with averaged weights, LoRA layers added in, on the CPU."""
        module = self.team.student.module
        trained = list(Trained(module).parameters())
        kept = [p.detach().clone() for p in trained]
        self.average.store()
        try:
            return {k: v.detach().cpu().clone() for k, v in merged_state(module).items()}
        finally:
            with torch.no_grad():
                for parameter, value in zip(trained, kept, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the data and what a recipe is made of."""
        return {
            "modules": {r: [trainable(m) for m in modules] for r, modules in self.learners.items()},
            "optimizers": {role: o.state_dict() for role, o in self.optimizers.items()},
            "average": self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for role, modules in self.learners.items():
            for module, values in zip(modules, state["modules"][role], strict=True):
                module.load_state_dict(values, strict=False)
        for role, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][role])
        self.average.load_state_dict(state["average"])


class Trained(nn.Module):
    """The parameters of a module that learn."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.own = nn.ParameterList([p for p in module.parameters() if p.requires_grad])


def parameters_of(modules: list[nn.Module]) -> list[nn.Parameter]:
    """Parameters of modules that learn."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """The learning part of a state dict."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
