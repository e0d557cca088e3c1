"""Weight files as they come: where they are, what is in them, whether they fit.

Only headers are read here, so that a plan can be refused before anything is loaded. What a file says of its training
and its sampling is in `vivace.models.student_artifact`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vivace.core.errors import WeightsError
from vivace.models.adapter import ExpertDescription
from vivace.models.student_artifact import Artifact, Sampler, architecture

__all__ = [
    "Artifact",
    "Sampler",
    "Shapes",
    "architecture",
    "expected_shapes",
    "meta_transformer",
    "mismatch",
    "opened",
    "shapes_in",
    "shapes_of",
    "weight_files",
]

Shapes = Mapping[str, tuple[int, ...]]


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


def meta_transformer(expert: ExpertDescription) -> Any:
    """A transformer without storage, from its configuration; None for an unknown class."""
    import diffusers
    import torch

    if (cls := getattr(diffusers, expert.class_name, None)) is None:
        return None
    config = {k: v for k, v in expert.config.items() if not k.startswith("_")}
    with torch.device("meta"):
        return cls.from_config(config)


def expected_shapes(expert: ExpertDescription) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a transformer's state, from its configuration; None for an unknown class."""
    return None if (module := meta_transformer(expert)) is None else shapes_of(module)


def shapes_of(module: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a live transformer's state."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def mismatch(found: Shapes, expected: Shapes, *, partial: bool = False) -> str:
    """Why weights do not fit, in words; empty when they do.

    Args:
        partial: what the file lacks is the model's own (a delta file).
    """
    reasons = []
    if not partial and (missing := sorted(set(expected) - set(found))):
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
