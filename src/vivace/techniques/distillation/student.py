"""Student checkpoint: the weights of a distilled few-step student in the place of the teacher's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.errors import WeightsError
from vivace.models.adapter import EXPERTS, ModelDescription
from vivace.techniques.base import Card, Cite, Paradigm, Problem, Stage, Target, Technique, exclusive, knob
from vivace.techniques.distillation.artifact import (
    Artifact,
    architecture,
    expected_shapes,
    mismatch,
    shapes_in,
    shapes_of,
    tensors_in,
    weight_files,
)

NAME = "student_checkpoint"


@dataclass(frozen=True, kw_only=True)
class StudentCheckpoint(Technique):
    """Load a full set of transformer weights, in diffusers' naming, from safetensors.

    A folder with `transformer/` and `transformer_2/` in it brings weights for both experts of a pipeline. The
    teacher's weights wait in main memory and come back bit for bit. An `artifact.json` beside the weights may name
    the architecture they belong to and the sampler they were trained for; both are checked.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.DISTILLATION,
        summary="Runs a distilled student that needs a handful of steps and no guidance.",
        objective="fewer network evaluations",
        stage=Stage.CHECKPOINT,
        claims=(exclusive("weights.checkpoint"),),
        training="required",
        cite=Cite(
            title="Improved Distribution Matching Distillation for Fast Image Synthesis",
            arxiv="2405.14867",
            code="https://github.com/tianweiy/DMD2",
            differs="consumes any student with the teacher's architecture, however it was trained",
        ),
    )

    path: str = ""
    """A .safetensors file, a folder of its shards, or a folder with one such folder for each expert."""
    expert: str = knob("transformer", choices=EXPERTS)
    """The transformer that weights without an expert's folder belong to."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        import torch
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(0)
        state = {
            k: v + 0.05 * torch.randn(v.shape, generator=generator).to(v)
            if v.is_floating_point()
            else v.clone()
            for k, v in pipeline.transformer.state_dict().items()
        }
        save_file({k: v.contiguous() for k, v in state.items()}, workdir / "student.safetensors")
        return (cls(path=str(workdir / "student.safetensors")),)

    def files(self) -> dict[str, list[Path]]:
        """Weight files by expert.

        Raises:
            WeightsError: nothing is there; the sentence names the path.
        """
        place = Path(self.path).expanduser()
        nested = {e: place / e for e in EXPERTS if self.path and (place / e).is_dir()}
        if nested:
            return {e: weight_files(str(folder), "student") for e, folder in nested.items()}
        return {self.expert: weight_files(self.path, "student")}

    def check(self, model: ModelDescription) -> list[Problem]:
        problems = []
        try:
            artifact = Artifact.beside(Path(self.path).expanduser()) if self.path else None
            for name, files in self.files().items():
                problems += self._check_expert(model, name, files, artifact)
        except WeightsError as error:
            problems.append(self.problem("file", str(error)))
        return problems

    def _check_expert(
        self, model: ModelDescription, name: str, files: list[Path], artifact: Artifact | None
    ) -> Iterator[Problem]:
        expert = next((e for e in model.experts if e.name == name), None)
        where = files[0] if len(files) == 1 else files[0].parent
        if expert is None:
            yield self.problem("expert", f"{where} is for {name}, and {model.name} has none.")
            return
        if artifact is not None and artifact.base and artifact.base != architecture(expert.config):
            yield self.problem(
                "base",
                f"{where} was made for another architecture than {model.name} (see its artifact.json).",
            )
            return
        expected = expected_shapes(expert)
        if expected is not None and (reason := mismatch(shapes_in(files), expected)):
            yield self.problem("shapes", f"{where} does not fit {model.name}: {reason}.")

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        """Warnings where the plan does not sample the student as it was trained."""
        try:
            artifact = Artifact.beside(Path(self.path).expanduser()) if self.path else None
        except WeightsError:
            return []  # told by `check`
        if artifact is None:
            return []
        wants, out = artifact.sampler, []
        planned = (getattr(t, "steps", None) for t in others)
        steps = next((s for s in planned if s), model.defaults.get("num_inference_steps", 50))
        if wants.steps is not None and steps != wants.steps:
            message = f"the student was trained for {wants.steps} steps and the plan makes {steps}; "
            out.append(self.problem("steps", message + f"add few_steps(steps={wants.steps})", "warning"))
        shifts = [s for t in others if (s := getattr(t, "shift", None)) is not None]
        has = shifts[0] if shifts else model.scheduler.get("flow_shift", model.scheduler.get("shift"))
        if wants.shift is not None and has != wants.shift:
            message = f"the student was trained with shift {wants.shift:g} and the plan has {has}; "
            out.append(self.problem("shift", message + f"add few_steps(shift={wants.shift:g})", "warning"))
        shift = 1.0 if has is None else has
        if wants.sigmas is not None and not _same_levels(wants.sigmas, shift):
            levels = ", ".join(f"{s:g}" for s in wants.sigmas)
            message = (
                f"the student was trained at the noise levels {levels}, which no shift of the plan makes"
            )
            out.append(self.problem("sigmas", message, "warning"))
        guides = model.workload().guidance > 1.0
        owned = any(c.resource == "guidance.branches" for t in others for c in t.claims(model))
        if wants.guidance is not None and wants.guidance <= 1.0 and guides and not owned:
            message = "the student needs no guidance; call it with guidance_scale=1 or add guidance_interval(high=0)"
            out.append(self.problem("guidance", message, "warning"))
        return out

    def apply(self, target: Target) -> None:
        modules = {e.name: e.module for e in target.experts}
        for name, files in self.files().items():
            module = modules[name]
            if reason := mismatch(shapes_in(files), shapes_of(module)):
                raise WeightsError(f"{files[0]} does not fit {name}: {reason}.")
            for key, tensor in tensors_in(files):
                _put(target, module, key, tensor)


def _same_levels(sigmas: tuple[float, ...], shift: float) -> bool:
    """Whether noise levels (with or without a final 0) are the uniform ones under a shift, to one part in 1000."""
    levels = [s for s in sigmas if s > 0.0]
    even = [1.0 - i / len(levels) for i in range(len(levels))]
    return all(
        abs(shift * e / (1.0 + (shift - 1.0) * e) - s) < 2e-3 for e, s in zip(even, levels, strict=True)
    )


def _put(target: Target, module: Any, key: str, tensor: Any) -> None:
    """Put one tensor of a state dict in force."""
    path, _, leaf = key.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    tensor = tensor.to(device=old.device, dtype=old.dtype)
    if leaf in owner._parameters:
        target.edit.weight(owner, leaf, tensor, keep="host")
    else:
        target.edit.set(owner, leaf, tensor)
