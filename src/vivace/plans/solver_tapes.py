"""What a fit of a solver needs of the exact runs, recorded from a live pipeline and kept on disk until the fit is done.

A recorder keeps the latents of a run and the arguments of the first transformer call of every branch and expert: with
another sample and timestep in their places they can be asked again (`vivace.plans.solver_fitting.Network`).
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.models.adapter import Expert, Need, RootCall
from vivace.techniques.base import Card, Cite, Paradigm, Stage, Target, Technique, reads

if TYPE_CHECKING:
    import torch

NAME = "solver_recorder"
Lane = tuple[str, str]
"""(expert, branch)"""


@dataclass
class Tape:
    """What was seen of one call of the pipeline, a batch of B samples."""

    samples: list[torch.Tensor] = field(default_factory=list)
    """(B, C, ...) float32 latents, the noise first."""
    calls: dict[Lane, RootCall] = field(default_factory=dict)
    """The first call of the transformer."""
    first: dict[Lane, torch.Tensor] = field(default_factory=dict)
    """What came out of it."""
    experts: list[str] = field(default_factory=list)
    """Which expert ran each step."""
    timesteps: torch.Tensor | None = None
    """(n,) of the scheduler."""
    sigmas: tuple[float, ...] = ()
    """(n + 1,) its noise levels."""

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        calls = [[*lane, call.values, call.rows, self.first[lane]] for lane, call in self.calls.items()]
        names = ("samples", "experts", "timesteps", "sigmas")
        return {name: getattr(self, name) for name in names} | {"calls": calls}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        calls, first = {}, {}
        for expert, branch, values, rows, out in data.pop("calls"):
            calls[expert, branch], first[expert, branch] = RootCall(values, rows), out
        return cls(**data, calls=calls, first=first)


class Reel:
    """Tapes that are done, in a folder that an interrupted recording leaves behind.

    Args:
        folder: what lies in it counts only if it was written for the same `header`; None keeps nothing.
        header: what is being recorded, as plain data.
        device: where tensors are wanted.
    """

    def __init__(self, folder: Path | None, header: dict[str, Any], device: Any) -> None:
        self._folder, self._device = folder, device
        if folder is None:
            return
        text = json.dumps(header, sort_keys=True)
        file = folder / "header.json"
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            file.write_text(text, encoding="utf-8")

    def load(self, number: int) -> Tape | None:
        """A finished tape; None where there is none, or it was cut off while being written."""
        import torch

        if self._folder is None:
            return None
        try:
            data = torch.load(self._folder / f"{number}.pt", map_location=self._device, weights_only=True)
            return Tape.from_dict(data)
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
            return None

    def save(self, number: int, tape: Tape) -> None:
        """Keep one more; it appears under its name only when it is whole."""
        import torch

        if self._folder is None:
            return
        fresh = self._folder / f"{number}.new"
        torch.save(tape.to_dict(), fresh)
        fresh.replace(self._folder / f"{number}.pt")


@dataclass(frozen=True, kw_only=True)
class SolverRecorder(Technique):
    """Changes nothing; writes on a tape. It is in no registry."""

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.TRAJECTORY,
        summary="Records the exact run.",
        objective="none",
        stage=Stage.TRAJECTORY,
        claims=(reads("sampler.schedule"),),
        needs=(Need.FLOW_SCHEDULER,),
        cite=Cite(title="Vivace", differs="own work"),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tape", Tape())

    @property
    def tape(self) -> Tape:
        """What was recorded."""
        return self._tape  # type: ignore[attr-defined]

    def apply(self, target: Target) -> None:
        target.edit.wrap(target.scheduler, lambda old: _recording(self.tape, target, old), "step")
        for expert in target.experts:
            target.around_expert(expert, _keeper(self.tape, expert, target))


def _recording(tape: Tape, target: Target, old: Callable[..., Any]) -> Callable[..., Any]:
    def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if not tape.samples:
            scheduler = target.scheduler
            tape.samples.append(sample.detach().float())
            tape.timesteps = scheduler.timesteps.clone()
            tape.sigmas = tuple(float(s) for s in scheduler.sigmas)
        out = old(model_output, timestep, sample, *args, **kwargs)
        new = out[0] if isinstance(out, tuple) else out.prev_sample
        tape.samples.append(new.detach().float())
        return out

    return step


def _keeper(tape: Tape, expert: Expert, target: Target) -> Callable[..., Any]:
    def handler(call: RootCall, run: Callable[[RootCall], Any]) -> Any:
        sample = run(call)
        clock = target.clock
        if len(tape.experts) <= clock.step:
            tape.experts.append(expert.name)
        lane = expert.name, clock.branch
        if lane not in tape.calls:
            values = {k: v.detach().clone() if hasattr(v, "detach") else v for k, v in call.values.items()}
            tape.calls[lane], tape.first[lane] = RootCall(values, call.rows), sample.detach().float()
        return sample

    return handler
