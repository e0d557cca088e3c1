"""What a student file says of itself: how it was trained, whose weights it belongs to, how it must be sampled.

It is written as `artifact.json` beside the weights, and as one entry of the safetensors' own metadata, so that one file
ships alone. Nothing here reads a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from vivace.core.errors import WeightsError

FILE = "artifact.json"
KEY = "vivace_artifact"
"""The entry of a safetensors file's metadata that holds the same JSON."""
SOLVERS = ("flow", "consistency", "flow_map")
SPARSE = "sparse_attention."
"""In a student file, what the names of trained tensors of sparse attention begin with: the address of a site follows,
then the tensor's own name, e.g. `sparse_attention.transformer.blocks.3.attn1.gate`. They are kept as they are."""


def noise_levels(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """Levels s of `steps` evaluations, without the final 0: even from 1 on, bent to shift e / (1 + (shift - 1) e)."""
    even = (1.0 - i / steps for i in range(steps))
    return tuple(shift * e / (1.0 + (shift - 1.0) * e) for e in even)


@dataclass(frozen=True, slots=True)
class Sampler:
    """How a student must be sampled. None means that it does not matter.

    Attributes:
        steps: evaluations of the network.
        sigmas: noise levels s of the evaluations in falling order, shift included, with or without the final 0.
        shift: flow shift; it bends even levels where `sigmas` is None.
        guidance: scale of classifier-free guidance; 1 for none.
        solver: `flow` (Euler on the ODE), `consistency` (x0 = x - s v, then fresh noise to the next level), or
            `flow_map` (Euler with the mean velocity from s to the next level).
    """

    steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    shift: float | None = None
    guidance: float | None = None
    solver: str | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sampler:
        """Inverse of `asdict`.

        Raises:
            TypeError: an entry that a sampler does not have.
            ValueError: an unknown solver, or levels that do not fall from at most 1.
        """
        sampler = cls(**data)
        if sampler.solver not in (None, *SOLVERS):
            raise ValueError(f"the solver is one of {', '.join(SOLVERS)}, not {sampler.solver!r}")
        if sampler.sigmas is None:
            return sampler
        levels = tuple(float(s) for s in sampler.sigmas)
        if not levels or levels[0] > 1.0 or levels[-1] < 0.0 or any(a <= b for a, b in pairwise(levels)):
            raise ValueError("sigmas must fall from at most 1 to at least 0")
        return cls(sampler.steps, levels, sampler.shift, sampler.guidance, sampler.solver)

    def levels(self) -> tuple[float, ...] | None:
        """Noise levels of the evaluations without the final 0; None where they are not said."""
        if self.sigmas is not None:
            return tuple(s for s in self.sigmas if s > 0.0)
        return None if self.steps is None else noise_levels(self.steps, self.shift or 1.0)


@dataclass(frozen=True, slots=True)
class Artifact:
    """What a student file says of itself. Everything may be left out.

    Attributes:
        recipe: name of the training recipe; `settings` are its own.
        base: hash of the architecture that it belongs to (`architecture`).
        sampler: the contract of its sampling.
        teacher: hash of the weights that it was distilled from (`vivace.calibration.artifact.model_hash`), of the
            whole pipeline or of its one transformer.
        data: hash of what it was trained on.
        provenance: for people: who, when, with which code, on what, under which licence.
        attention: sparse attention that it was trained with: `method`, `density` and `block`, for people; `technique`
            and `settings`, which run it; `trained`, whether the file holds tensors of it (`SPARSE`). Empty for dense.
        linears: rounded linear layers that it was trained with: `method`, `technique` and `settings`. Empty for exact.
    """

    recipe: str = ""
    base: str = ""
    sampler: Sampler = field(default_factory=Sampler)
    settings: Mapping[str, Any] = field(default_factory=dict)
    teacher: str = ""
    data: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    attention: Mapping[str, Any] = field(default_factory=dict)
    linears: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Artifact | None:
        """What a weight file or a folder of them says; None when it says nothing.

        A file's own metadata come before an `artifact.json` beside it, which may be about another file.

        Raises:
            WeightsError: it is damaged; the sentence names the file.
        """
        if path.is_file():
            return cls.inside(path) or cls.beside(path)
        if (found := cls.beside(path)) is not None or not path.is_dir():
            return found
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("transformer*/*.safetensors"))
        return cls.inside(files[0]) if files else None

    @classmethod
    def beside(cls, path: Path) -> Artifact | None:
        """`artifact.json` beside a weight file or in its folder; None when there is none. Raises as `of`."""
        file = (path if path.is_dir() else path.parent) / FILE
        if not file.is_file():
            return None
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{file} is not a valid artefact ({error}); mend it or take it away."
            ) from None

    @classmethod
    def inside(cls, file: Path) -> Artifact | None:
        """What a safetensors file's metadata hold; None when that is nothing. Raises as `of`."""
        text = metadata(file).get(KEY)
        if text is None:
            return None
        try:
            return cls.from_json(text)
        except (ValueError, TypeError, AttributeError) as error:
            raise WeightsError(f"{file} holds a damaged artefact ({error}); get the file again.") from None

    @classmethod
    def from_json(cls, text: str) -> Artifact:
        """Inverse of `to_json`.

        Raises:
            ValueError, TypeError, AttributeError: it is no artefact.
        """
        data = json.loads(text)
        return cls(
            recipe=str(data.get("recipe", "")),
            base=str(data.get("base", "")),
            sampler=Sampler.from_dict(dict(data.get("sampler") or {})),
            settings=dict(data.get("settings") or {}),
            teacher=str(data.get("teacher", "")),
            data=str(data.get("data", "")),
            provenance=dict(data.get("provenance") or {}),
            attention=dict(data.get("attention") or {}),
            linears=dict(data.get("linears") or {}),
        )

    def to_json(self, indent: int | None = None) -> str:
        """The artefact as JSON text."""
        return json.dumps(asdict(self), indent=indent, default=str)

    def write(self, folder: Path) -> Path:
        """Write `artifact.json` into a folder."""
        file = folder / FILE
        file.write_text(self.to_json(indent=2) + "\n", encoding="utf-8")
        return file


def metadata(file: Path) -> dict[str, str]:
    """Metadata of a safetensors file; no tensor is read.

    Raises:
        WeightsError: the file is damaged or no safetensors file; the sentence names it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as reader:
            return reader.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file} cannot be read as safetensors ({error}); copy or download it again."
        ) from None


def architecture(config: Mapping[str, Any]) -> str:
    """SHA-256 of a transformer's configuration without names and versions: equal for equal architectures."""
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()
