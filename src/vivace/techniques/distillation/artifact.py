"""Weight files as they come: where they are, what is in them, what they were made for.

Only headers are read here, so that a plan can be refused before anything is loaded. The optional `artifact.json`
beside the weights says how they were trained and how they must be sampled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vivace.core.errors import WeightsError
from vivace.models.adapter import ExpertDescription

FILE = "artifact.json"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Sampler:
    """How a student must be sampled. None means that it does not matter."""

    steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    shift: float | None = None
    guidance: float | None = None


@dataclass(frozen=True, slots=True)
class Artifact:
    """What `artifact.json` says: the recipe, the architecture it belongs to (`architecture()`), the sampler."""

    recipe: str = ""
    base: str = ""
    sampler: Sampler = field(default_factory=Sampler)

    @classmethod
    def beside(cls, path: Path) -> Artifact | None:
        """The artefact that lies beside a weight file or in its folder; None when there is none.

        Raises:
            WeightsError: the file is damaged; the sentence names it.
        """
        file = (path if path.is_dir() else path.parent) / FILE
        if not file.is_file():
            return None
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            sampler = dict(data.get("sampler") or {})
            if sampler.get("sigmas") is not None:
                sampler["sigmas"] = tuple(float(s) for s in sampler["sigmas"])
            return cls(str(data.get("recipe", "")), str(data.get("base", "")), Sampler(**sampler))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{file} is not a valid artefact ({error}); mend it or take it away."
            ) from None

    def write(self, folder: Path) -> Path:
        """Write `artifact.json` into a folder."""
        file = folder / FILE
        file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return file


def architecture(config: Mapping[str, Any]) -> str:
    """SHA-256 of a transformer's configuration without names and versions: equal for equal architectures."""
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def weight_files(path: str, what: str) -> list[Path]:
    """The safetensors files at a path: the file itself, or all those in the folder (the shards of one model).

    Raises:
        WeightsError: nothing is there; the sentence names the path.
    """
    if not path:
        raise WeightsError(f"give the {what}'s file or folder: path=...")
    place = Path(path).expanduser()
    if place.is_dir():
        if not (files := sorted(place.glob("*.safetensors"))):
            raise WeightsError(f"the folder {place} holds no .safetensors file; give the {what}'s folder.")
        return files
    if not place.is_file():
        raise WeightsError(f"{place} is missing; give the {what}'s .safetensors file or its folder.")
    return [place]


@contextmanager
def opened(file: Path, device: str = "cpu") -> Iterator[Any]:
    """A safetensors file for reading.

    Raises:
        WeightsError: the file is damaged or no safetensors file; the sentence names it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(str(file), framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file} cannot be read as safetensors ({error}); copy or download it again."
        ) from None
    with handle as reader:
        yield reader


def shapes_in(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes from the files' headers; no tensor is read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with opened(file) as reader:
            shapes |= {key: tuple(reader.get_slice(key).get_shape()) for key in reader.keys()}  # noqa: SIM118
    return shapes


def tensors_in(files: list[Path]) -> Iterator[tuple[str, Any]]:
    """Names and tensors, one at a time."""
    for file in files:
        with opened(file) as reader:
            for key in reader.keys():  # noqa: SIM118
                yield key, reader.get_tensor(key)


def expected_shapes(expert: ExpertDescription) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a transformer's state, from its configuration on the meta device; None for an unknown class."""
    import diffusers
    import torch

    if (cls := getattr(diffusers, expert.class_name, None)) is None:
        return None
    config = {k: v for k, v in expert.config.items() if not k.startswith("_")}
    with torch.device("meta"):
        return shapes_of(cls.from_config(config))


def shapes_of(module: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a live transformer's state."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def mismatch(found: Shapes, expected: Shapes) -> str:
    """Why a full set of weights does not fit, in words; empty when it does."""
    reasons = []
    if missing := sorted(set(expected) - set(found)):
        reasons.append(f"{_count(missing)} missing")
    if extra := sorted(set(found) - set(expected)):
        reasons.append(f"{_count(extra)} unknown to the model")
    if wrong := sorted(k for k in set(found) & set(expected) if found[k] != expected[k]):
        key = wrong[0]
        reasons.append(f"{_count(wrong)} of another shape ({_size(found[key])} for {_size(expected[key])})")
    return ", ".join(reasons)


def _count(names: list[str]) -> str:
    return f"{len(names)} tensors (e.g. {names[0]})" if len(names) > 1 else names[0]


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
