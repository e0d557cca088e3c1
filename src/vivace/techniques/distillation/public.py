"""Students by name: those that come with the package, and public ones whose facts are in the catalogue's data.

A public student is looked for in the local Hugging Face cache only. What is not there is not downloaded: the sentence
says what to type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from vivace.core.errors import ConfigError, UnknownNameError, WeightsError
from vivace.models.student_artifact import Artifact, Sampler

CHECKPOINT, LORA = "checkpoint", "lora"
_READABLE = ("diffusers", "original")
"""Formats that the techniques open: diffusers' tensor names, or (LoRA only) the original's. The others are pickles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicStudent:
    """A published student: where it lies, what it belongs to, how it is sampled, and how we know.

    Attributes:
        name: what `path` takes.
        title: for people.
        base: repository of the pipeline that it belongs to, in diffusers' layout.
        kind: `checkpoint` or `lora`.
        repo, file: where it lies; a file that ends with / is a folder of shards.
        format: `diffusers`, `original` (the tensor names of the authors' own code) or `pickle`.
        steps, sigmas, shift, guidance, solver: see `Sampler`.
        expert: the transformer that it is for.
        attention: the attention that it was trained with; empty for dense.
        ignore: parts of names of tensors that only the original's own attention uses; they are left out.
        license, source: as the source says.
        confidence: `checked` when the sampler was read at the source, else `unverified`.
        note: what else a user must know.
    """

    name: str
    title: str
    base: str
    kind: str
    repo: str
    file: str
    format: str
    steps: int
    sigmas: tuple[float, ...] | None = None
    shift: float | None = None
    guidance: float = 1.0
    solver: str = "flow"
    expert: str = "transformer"
    attention: str = ""
    ignore: tuple[str, ...] = ()
    license: str = "unknown"
    source: str = ""
    confidence: str = "unverified"
    note: str = ""

    @property
    def artifact(self) -> Artifact:
        """The facts in the form that a student file has them."""
        sampler = Sampler(self.steps, self.sigmas, self.shift, self.guidance, self.solver)
        said = {
            "repo": self.repo,
            "license": self.license,
            "source": self.source,
            "confidence": self.confidence,
        }
        return Artifact(recipe=self.name, sampler=sampler, provenance=said)

    @property
    def download(self) -> str:
        """The command that puts it into the local cache."""
        what = f"--include '{self.file}*'" if self.file.endswith("/") else self.file
        return f"hf download {self.repo} {what}"


@cache
def public_students() -> Mapping[str, PublicStudent]:
    """All public students that we have facts about, by name.

    Raises:
        ConfigError: the data are inconsistent; the sentence names the student.
    """
    import yaml

    text = (files("vivace") / "catalogue" / "data" / "students.yaml").read_text(encoding="utf-8")
    found: dict[str, PublicStudent] = {}
    for item in yaml.safe_load(text):
        found[item["name"]] = _student(item)
    return found


def _student(item: dict[str, Any]) -> PublicStudent:
    try:
        for key in ("sigmas", "ignore"):
            if item.get(key) is not None:
                item[key] = tuple(item[key])
        student = PublicStudent(**item)
        sampler = student.artifact.sampler
        Sampler.from_dict({"sigmas": sampler.sigmas, "solver": sampler.solver})
        if len(sampler.levels() or ()) != student.steps:
            raise ValueError("there are not as many sigmas as steps")
        if student.kind not in (CHECKPOINT, LORA) or student.confidence not in ("checked", "unverified"):
            raise ValueError("kind is checkpoint or lora, confidence checked or unverified")
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the public student {item.get('name', '?')} is wrong: {error}; mend catalogue/data/students.yaml."
        ) from None
    return student


def public(path: str) -> PublicStudent | None:
    """The public student that a `path` names; None for a file, a folder, or a student of the package."""
    from vivace.models.student import shipped_students

    if not _is_name(path) or path in shipped_students():
        return None
    return public_students().get(path)


def place_of(path: str, what: str, kind: str) -> str:
    """A path as it is, or the file or folder of the student that it names.

    Args:
        what: the word for it in sentences.
        kind: `checkpoint` or `lora`.

    Raises:
        WeightsError: nobody is called so, it is of the other kind, or it is not on this machine; the sentence helps.
    """
    from vivace.models.student import shipped_students

    if not _is_name(path):
        return path
    shipped = shipped_students() if kind == CHECKPOINT else {}
    if path in shipped:
        return str(shipped[path])
    known = public_students()
    if path not in known:
        names = [*shipped, *(n for n, s in known.items() if s.kind == kind)]
        hint = "A file or folder is given with its path."
        raise WeightsError(str(UnknownNameError(what, path, names, hint)))
    student = known[path]
    if student.kind != kind:
        other = "lora" if student.kind == LORA else "student_checkpoint"
        raise WeightsError(f"{path} is a {student.kind}; give it to {other}(path={path!r}).")
    if student.format not in _READABLE or (student.format == "original" and kind == CHECKPOINT):
        raise WeightsError(
            f"{path} is published as {student.file} in the form of its authors' code, which Vivace does not open; "
            "convert it to safetensors in diffusers' naming and give that file."
        )
    return str(_cached(student))


def _is_name(path: str) -> bool:
    """Whether a path can only be a name: no separator, no ending, and no such file or folder."""
    plain = bool(path) and "/" not in path and "\\" not in path and not path.endswith(".safetensors")
    return plain and not path.startswith(("~", ".")) and not Path(path).exists()


def _cached(student: PublicStudent) -> Path:
    """The file or folder in the local Hugging Face cache.

    Raises:
        WeightsError: it is not there, or not all of it.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    missing = WeightsError(f"{student.name} is not on this machine; download it with `{student.download}`.")
    if not student.file.endswith("/"):
        found = try_to_load_from_cache(student.repo, student.file)
        if not isinstance(found, str):
            raise missing
        return Path(found)
    try:
        folder = Path(snapshot_download(student.repo, local_files_only=True)) / student.file.rstrip("/")
    except (OSError, ValueError):
        raise missing from None
    there = {f.name for f in folder.glob("*.safetensors")}
    wanted = {n for index in folder.glob("*.safetensors.index.json") for n in _shards(index)}
    if not there or wanted - there:
        raise missing
    return folder


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        raise WeightsError(f"{index} is damaged; download it again.") from None
