"""Student checkpoint: the weights of a distilled few-step student in the place of the teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.errors import ConfigError, UnknownNameError, WeightsError
from vivace.models.adapter import EXPERTS, Expert, ModelDescription
from vivace.models.student_artifact import SPARSE, Artifact, Sampler, architecture
from vivace.techniques.base import (
    Card,
    Cite,
    Paradigm,
    Problem,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
    registry,
)
from vivace.techniques.distillation.artifact import (
    meta_transformer,
    mismatch,
    shapes_of,
    weight_files,
)
from vivace.techniques.distillation.contract import unmet
from vivace.techniques.distillation.lora import Lora
from vivace.techniques.distillation.public import CHECKPOINT, LORA, place_of, public
from vivace.techniques.distillation.student_sampler import StudentSampler

NAME = "student_checkpoint"
_SECOND = "second_time."


@dataclass(frozen=True, kw_only=True)
class StudentCheckpoint(Technique):
    """Load a student's transformer weights, in diffusers' naming, from safetensors.

    The file holds all weights, or what the student adds to this very base, as `vivace.models.student` writes them. A
    folder with `transformer/` and `transformer_2/` in it brings weights for both experts of a pipeline. The teacher's
    weights wait in main memory and come back bit for bit. The artefact in the file, or `artifact.json` beside it, may
    name the architecture, the teacher's weights and the sampler that they were trained for; all are checked. A flow
    map's second time embedding is laid over the transformer's own.
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
    """A .safetensors file, a folder of its shards, a folder with one such folder for each expert, or a student's name:
    one that comes with the package or a public one."""
    expert: str = knob("transformer", choices=EXPERTS)
    """The transformer that weights without an expert's folder belong to."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        import torch
        from safetensors.torch import save_file

        from vivace.models.student import save_student

        generator = torch.Generator().manual_seed(0)
        base = pipeline.transformer.state_dict()
        state = {
            k: v + 0.05 * torch.randn(v.shape, generator=generator).to(v)
            if v.is_floating_point()
            else v.clone()
            for k, v in base.items()
        }
        save_file({k: v.contiguous() for k, v in state.items()}, workdir / "student.safetensors")
        delta = save_student(workdir / "delta.safetensors", state, base, Artifact())
        return (cls(path=str(workdir / "student.safetensors")), cls(path=str(delta)))

    # -- what lies at the path ------------------------------------------------------------------------------------

    def files(self) -> dict[str, list[Path]]:
        """Weight files by expert.

        Raises:
            WeightsError: nothing is there; the sentence names the path.
        """
        found = place_of(self.path, "student", CHECKPOINT)
        place = Path(found).expanduser()
        nested = {e: place / e for e in EXPERTS if found and (place / e).is_dir()}
        if nested:
            return {e: weight_files(str(folder), "student") for e, folder in nested.items()}
        return {self.expert: weight_files(found, "student")}

    def artifact(self) -> Artifact | None:
        """What is known of the student; None when that is nothing.

        Raises:
            WeightsError: there is no such student, or what it says is damaged.
        """
        if (student := public(self.path)) is not None:
            return student.artifact
        place = place_of(self.path, "student", CHECKPOINT)
        return Artifact.of(Path(place).expanduser()) if place else None

    def contract(self) -> StudentSampler | None:
        """The technique that samples it as it was trained; None where nothing is said of that.

        Raises:
            WeightsError: as `artifact`, or no sampler can do what it says.
        """
        artifact = self.artifact()
        if artifact is None or artifact.sampler == Sampler():
            return None
        try:
            return StudentSampler.of(artifact.sampler)
        except ConfigError as error:
            raise WeightsError(f"the student asks for a sampler that there cannot be: {error}") from None

    @property
    def brings_second_time(self) -> bool:
        """Whether it is a flow map, with an embedding of how far a step goes."""
        try:
            return any(k.startswith(_SECOND) for files in self.files().values() for k in self._shapes(files))
        except WeightsError:
            return False

    def _shapes(self, files: list[Path]) -> dict[str, tuple[int, ...]]:
        from vivace.models.student import student_shapes

        return {k: v for k, v in student_shapes(files).items() if not self._ignored(k)}

    def _ignored(self, name: str) -> bool:
        """Whether a tensor is none of the transformer's own: of another technique, or of a public student's code."""
        if name.startswith(SPARSE):
            return True
        student = public(self.path)
        return student is not None and any(part in name for part in student.ignore)

    def _misfit(self, files: list[Path], module: Any) -> str:
        """Why weights do not fit a transformer, live or without storage, in words; empty when they do."""
        from vivace.models import second_time
        from vivace.models.student import read_head

        found, expected = self._shapes(files), shapes_of(module)
        if any(k.startswith(_SECOND) for k in found):
            expected |= second_time.shapes(module)
        return mismatch(found, expected, partial=any(read_head(f).is_delta for f in files))

    # -- before anything is loaded --------------------------------------------------------------------------------

    def missing(self, model: ModelDescription) -> str:
        """Why a student that comes with Vivace cannot serve a model; of other files `check` tells."""
        from vivace.models.student import shipped_students

        if self.path not in shipped_students():
            return ""
        artifact = self.artifact()
        own = artifact is None or artifact.base in ("", architecture(model.experts[0].config))
        if own and (artifact is None or not _strange(artifact, model.weights)):
            return ""
        return (
            f"has '{self.path}', a student of the embedded model, and {model.name} is another; train one of it with "
            "`vivace distill`, or give a public student's name."
        )

    def check(self, model: ModelDescription) -> list[Problem]:
        problems = []
        if self.missing(model):
            return []  # told by the plan
        try:
            artifact, _ = self.artifact(), self.contract()
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
                "base", f"{where} was made for another architecture than {model.name} (see its artefact)."
            )
            return
        # A description knows the hash of the whole pipeline alone, which says nothing of one expert of two.
        if artifact is not None and len(model.experts) == 1 and _strange(artifact, model.weights):
            yield self.problem("teacher", _stranger(where, model.name))
        module = meta_transformer(expert)
        if module is not None and (reason := self._misfit(files, module)):
            yield self.problem("shapes", f"{where} does not fit {model.name}: {reason}.")

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        """Warnings where the plan does not sample the student as it was trained."""
        try:
            artifact, contract = self.artifact(), self.contract()
        except WeightsError:
            return []  # told by `check`
        out = []
        if artifact is not None and contract is not None:
            line = contract.line()
            for kind, what in unmet(artifact.sampler, model, others):
                message = f"the student {what}; in the plan: {line}"
                out.append(self.problem(kind, message, "warning"))
        student = public(self.path)
        attention = student.attention if student is not None else ""
        if artifact is not None and artifact.attention:
            attention = str(artifact.attention.get("method", "sparse"))
        owned = {c.resource for t in others for c in t.claims(model)}
        if attention and "attention.kernel" not in owned:
            message = f"the student was trained with {attention} attention, and the plan runs it dense"
            out.append(self.problem("attention", message, "warning"))
        if artifact is not None and artifact.linears and "linear.weight" not in owned:
            message = f"the student was trained with {artifact.linears.get('method', 'rounded')} linear layers, and "
            out.append(self.problem("linears", message + "the plan runs them exactly", "warning"))
        return out

    # -- on a live pipeline ---------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        from vivace.models import second_time
        from vivace.models.student import student_tensors

        experts, artifact = {e.name: e for e in target.experts}, self.artifact()
        for name, files in self.files().items():
            self._check_base(target, experts[name], files, artifact)
        for name, files in self.files().items():
            module = experts[name].module
            if reason := self._misfit(files, module):
                raise WeightsError(f"{files[0]} does not fit {name}: {reason}.")
            extra = {}
            for key, tensor in student_tensors(files, lambda key, m=module: _tensor(m, key)):
                if key.startswith(_SECOND):
                    extra[key.removeprefix(_SECOND)] = tensor
                elif not self._ignored(key):
                    _put(target, module, key, tensor)
            if extra:
                second_time.install(target.edit, module, extra)

    def _check_base(
        self, target: Target, expert: Expert, files: list[Path], artifact: Artifact | None
    ) -> None:
        """Refuse weights that were made from others than the model's, where those can be known.

        Raises:
            WeightsError: they were.
        """
        from vivace.calibration.artifact import model_hash
        from vivace.models.pruned_file import base_hash
        from vivace.models.student import read_head, weights_hash

        bases = {head.base for f in files if (head := read_head(f)).is_delta}
        known = not any(p.is_meta for p in expert.module.parameters())
        if bases and not known:
            raise WeightsError(
                f"{files[0]} holds what a student adds to its base, whose weights are not in memory (offloaded?)."
            )
        if bases and bases != {weights_hash(expert.module.state_dict())}:
            raise WeightsError(_stranger(files[0], target.model.name))
        teacher = "" if artifact is None else artifact.teacher
        if teacher and known and teacher != base_hash(expert.module):
            modules = (e.module for e in target.experts)
            whole = target.model_hash
            if not whole and not any(p.is_meta for m in modules for p in m.parameters()):
                whole = model_hash(target.pipeline)
            if whole and teacher != whole:
                raise WeightsError(_stranger(files[0], target.model.name))


def plan_of(path: str) -> list[Technique]:
    """A student ready for a plan, with all that its artefact asks for: sampler, sparse attention, rounded linears.

    Args:
        path: as `StudentCheckpoint.path`, or the name of a public LoRA.

    Raises:
        WeightsError: what the student says is damaged.
    """
    student = public(path)
    if student is not None and student.kind == LORA:
        return [Lora(path=path, expert=student.expert), StudentSampler.of(student.artifact.sampler)]
    checkpoint = StudentCheckpoint(path=path, expert=student.expert if student else EXPERTS[0])
    contract, artifact = checkpoint.contract(), checkpoint.artifact()
    plan: list[Technique] = [checkpoint] if contract is None else [checkpoint, contract]
    forms = (artifact.attention, artifact.linears) if artifact is not None else ()
    return plan + [_trained_with(form, path) for form in forms if form]


def _trained_with(form: Mapping[str, Any], path: str) -> Technique:
    """The technique that an artefact names; tensors of its own come from the student file.

    Raises:
        WeightsError: there is no such technique, or it has no such settings.
    """
    try:
        own = {"file": path} if form.get("trained") else {}
        return registry[form["technique"]].from_dict({**form.get("settings", {}), **own})
    except (ConfigError, UnknownNameError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} asks for a technique that there cannot be: {error}") from None


def _strange(artifact: Artifact, weights: str) -> bool:
    return bool(artifact.teacher and weights) and artifact.teacher != weights


def _stranger(where: Path, model: str) -> str:
    return f"{where} was trained from other weights than those of {model}; load the base that it names, or train one."


def _tensor(module: Any, key: str) -> Any:
    """One tensor of a module's state dict."""
    path, _, leaf = key.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


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
