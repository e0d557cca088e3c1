"""What is kept and looked at while a distillation runs: its curve, validations, checkpoints, and when it is enough."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vivace.core.errors import ConfigError
from vivace.tiny.train.common import Processes, save_checkpoint
from vivace.training.distillation.recipe import Recipe
from vivace.training.distillation.trainer import DistillationTrainer
from vivace.training.distillation.validation import Validation

if TYPE_CHECKING:
    from vivace.training.distillation.run import Choices

CURVE_EVERY = 5.0
"""Seconds between the lines of the curve."""
LOOK_EVERY = 5
"""Updates after which several processes agree on what is due; to agree is to wait for the device."""


class Watch:
    """Curve on disk, validation and checkpoints while a run goes on; stops it early where it no longer gets better.

    What needs all processes (validation, checkpoints of spread weights) is decided by the leader's clock for all.

    Args:
        choices, recipe, trainer, validation, processes: of the run.
        about: what a checkpoint says beside the state: its settings and data.
        state: of the checkpoint that is taken up.
    """

    def __init__(
        self,
        choices: Choices,
        recipe: Recipe,
        trainer: DistillationTrainer,
        validation: Validation | None,
        processes: Processes,
        about: dict[str, Any],
        state: dict[str, Any] | None,
        *,
        stop_after: int | None = None,
    ) -> None:
        self.choices, self.recipe, self.trainer = choices, recipe, trainer
        self.validation, self.processes, self.about = validation, processes, about
        self.stop_after = stop_after
        self.history: list[dict[str, float]] = list(state["watch"]["history"]) if state else []
        self.curve = choices.out.with_suffix(".curve.jsonl")
        self.seen = self.saved = time.perf_counter()
        self.line = -math.inf  # the first update has a line
        self.gathered: dict[str, Any] | None = None
        self.writer = None
        if processes.leads:
            step = state["step"] if state else 0
            shorten(self.curve, step)
            self.writer = board(choices.out.with_suffix(".board"), step)

    @property
    def checkpoint(self) -> Path:
        """Where the run's state is kept."""
        return self.choices.out.with_suffix(".ckpt")

    def update(self, update: int, progress: float) -> torch.Tensor:
        """An update, and what is due after it.

        Raises:
            ConfigError: what is learned is no longer a number.
        """
        loss = self.trainer.update(update, progress)
        now = time.perf_counter()
        if self.processes.leads and now - self.line > CURVE_EVERY:
            self._write(update, self._finite())
            self.line = now
        look = self.processes.world == 1 or update % LOOK_EVERY == 0
        every = self.choices.validate_every
        if every and look and self.processes.agree(now - self.seen) > every:
            self._validate(update)
            self.seen = time.perf_counter()
        self.gathered = None
        if self.trainer.sharded:
            late = look and self.processes.agree(now - self.saved) > self.choices.save_every
            if late or update == self.stop_after:
                self.gathered = self.trainer.state_dict()
                self.saved = time.perf_counter()
        return loss

    def save(self, loop: dict[str, Any]) -> None:
        """Keep a checkpoint, in the leading process; spread weights were gathered by `update` where it is time.

        Raises:
            ConfigError: what is learned is no longer a number; the checkpoint before stays.
        """
        self._finite()
        state = self.gathered if self.trainer.sharded else self.trainer.state_dict()
        if state is not None:
            more = self.about | {"trainer": state, "watch": {"history": self.history}}
            save_checkpoint(self.checkpoint, loop | more)

    def enough(self) -> bool:
        """Whether accuracy has not risen for as many validations as `patience` says."""
        if not self.choices.patience or not self.history:
            return False
        best = max(range(len(self.history)), key=lambda i: self.history[i]["accuracy"])
        return len(self.history) - 1 - best >= self.choices.patience

    def _validate(self, update: int) -> None:
        assert self.validation is not None
        sheet = self.choices.out.with_suffix(f".{update}.png") if self.processes.leads else None
        with self.trainer.averages():
            found = self.validation(self.trainer.team, self.recipe, sheet)
        # Devices may differ in a rounding, and whether it is enough must not.
        found = {name: self.processes.agree(value) for name, value in found.items()}
        self.history.append({"update": update} | found)
        self._write(update, {f"validation.{k}": v for k, v in found.items()})
        self.processes.say(f"update {update}: accuracy {found['accuracy']:.4f}")

    def _finite(self) -> dict[str, float]:
        told = self.trainer.diagnostics()
        if lost := sorted(name for name, value in told.items() if not math.isfinite(value)):
            raise ConfigError(
                f"{lost[0]} is not finite any more; start afresh with a lower rate than {self.recipe.rate:g}, or give "
                "the same command again to go on from the last checkpoint."
            )
        return told

    def _write(self, update: int, values: dict[str, float]) -> None:
        if not self.processes.leads:
            return
        with self.curve.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"update": update} | {k: round(v, 6) for k, v in values.items()}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name.replace(".", "/"), value, update)
            self.writer.flush()


def shorten(curve: Path, step: int) -> None:
    """Make room for a curve, and take off what comes after the update of a checkpoint: it will be written again."""
    curve.parent.mkdir(parents=True, exist_ok=True)
    if not curve.exists():
        return
    kept = []
    for line in curve.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["update"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break  # cut off as it was written
    curve.write_text("".join(kept), encoding="utf-8")


def board(folder: Path, step: int = 0) -> Any:
    """TensorBoard's writer where it is installed, else None; the curve is in a JSON-lines file in either case.

    Args:
        step: the update that is taken up; what was written after it is forgotten.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # pyright: ignore[reportPrivateImportUsage]
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
