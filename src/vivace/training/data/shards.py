"""Samples on disk: a folder of safetensors shards, and `dataset.json`, which says what they are.

    dataset.json               kind, model, hashes, fields, settings, sha256 of every file
    empty.safetensors          text fields (L, D) of the empty prompt
    shard-00000.safetensors    the first samples, every field (n, ...)

Shards are mapped into memory: a batch reads its own rows and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vivace.core.errors import ConfigError, WeightsError
from vivace.models.loading import safetensors_header
from vivace.training.data.encoding import identity_of
from vivace.training.data.samples import Batch, MemorySet, Samples

FORMAT, VERSION = "vivace-latents", 1
HEAD, EMPTY = "dataset.json", "empty.safetensors"
COMMAND = "vivace encode"
THOROUGH_BYTES = 2**30
"""Data up to this size are hashed when they are opened, larger ones only where asked."""
TEACHER = "teacher"
"""The kind whose samples a model made: they depend on the weights of its transformer."""


def shard_name(index: int) -> str:
    """The file of one shard."""
    return f"shard-{index:05d}.safetensors"


@dataclass(frozen=True)
class File:
    """One file of the folder."""

    name: str
    samples: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, samples: int) -> Self:
        """What is said of a file that has just been written."""
        return cls(path.name, samples, path.stat().st_size, sha256(path))


@dataclass(frozen=True, kw_only=True)
class Head:
    """What `dataset.json` holds. `hashes` are `transformer`, `vae`, `text`; `fields` name -> {dtype, shape of one}."""

    kind: str
    model: str
    hashes: Mapping[str, str]
    clip: Mapping[str, int]
    settings: Mapping[str, Any]
    per_shard: int
    samples: int
    complete: bool = False
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: tuple[File, ...] = ()

    def key(self) -> dict[str, Any]:
        """What must be equal for samples to be added; the number of samples may differ."""
        parts = ("kind", "hashes", "clip", "settings", "per_shard")
        return json.loads(json.dumps({name: getattr(self, name) for name in parts}))

    def difference(self, other: Head) -> str:
        """A phrase that names the first thing in which two heads differ; empty where they agree."""
        mine, theirs = _flat(self.key()), _flat(other.key())
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                return f"{name.replace('.', ' ')} {mine.get(name)} and not {theirs.get(name)}"
        return ""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The head of a folder.

        Raises:
            ConfigError: there is no such folder, or it holds something else.
            WeightsError: the head is damaged.
        """
        path = folder / HEAD
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder} with training data; make it with `{COMMAND}`.")
        if not path.is_file():
            raise ConfigError(
                f"{folder} holds no training data: there is no {HEAD}; make it with `{COMMAND}`."
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            form, version = found.pop("format"), found.pop("version")
            if (form, version) == (FORMAT, VERSION):
                return cls(**found | {"files": tuple(File(**f) for f in found["files"])})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise WeightsError(
                f"{path} is damaged ({error}); delete {folder} and make it again with `{COMMAND}`."
            ) from None
        raise ConfigError(
            f"{path} is {form} {version} and this Vivace reads {FORMAT} {VERSION}; "
            f"make the data again with `{COMMAND}`."
        )

    def write(self, folder: Path) -> None:
        """Replace the head of a folder, at once."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"
        with partial(folder / HEAD) as path:
            path.write_text(text, encoding="utf-8")


class LatentShards(Samples):
    """Samples in a folder; make one with `LatentShards.open`."""

    ahead = 2

    def __init__(self, folder: Path, head: Head) -> None:
        self.folder, self.head = folder, head
        self.files = [f for f in head.files if f.name != EMPTY]
        self._starts = np.cumsum([0, *(f.samples for f in self.files)])
        self._maps: dict[int, Any] = {}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        pipeline: Any = None,
        *,
        thorough: bool | None = None,
        any_teacher: bool = False,
    ) -> Self:
        """Check a folder and open it.

        Args:
            folder: made by `vivace encode` or a `ShardWriter`.
            pipeline: the pipeline that is to be trained. Its VAE and text encoders must be those of the data; for
                samples of a teacher its transformer as well.
            thorough: compare the sha256 of every file; by default for data of up to 1 GiB. Size and header of every
                file are always looked at.
            any_teacher: take samples of another transformer too (a larger teacher in the same latent space).

        Raises:
            ConfigError: there are no data, they are not complete, or they were made for another model.
            WeightsError: a file is missing or damaged; the sentence names it.
        """
        folder = Path(folder)
        head = Head.read(folder)
        out = cls(folder, head)
        if not head.complete:
            raise ConfigError(
                f"the data in {folder} are not complete ({out._starts[-1]} of {head.samples} samples); "
                f"give the same `{COMMAND}` command again to go on."
            )
        if pipeline is not None:
            _check_model(head, identity_of(pipeline), folder, any_teacher)
        if thorough is None:
            thorough = out.bytes <= THOROUGH_BYTES
        for file in head.files:
            _check_file(folder, file, head, thorough)
        if out._starts[-1] != head.samples:
            raise WeightsError(f"{folder / HEAD} is damaged: its shards hold {out._starts[-1]} samples.")
        return out

    def __len__(self) -> int:
        return self.head.samples

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(sorted(self.head.fields))

    @property
    def bytes(self) -> int:
        """Of all files but the head."""
        return sum(f.bytes for f in self.head.files)

    @property
    def hash(self) -> str:
        """Sixteen hex digits of the sha256 of all files; nothing is read."""
        return hashlib.sha256(" ".join(f.sha256 for f in self.head.files).encode()).hexdigest()[:16]

    @cached_property
    def empty(self) -> Mapping[str, Tensor]:  # pyright: ignore[reportIncompatibleVariableOverride]
        path = self.folder / EMPTY
        return load_file(path) if path.is_file() else {}

    def rows(self, index: Sequence[int] | np.ndarray, fields: Sequence[str] = ()) -> Batch:
        where = np.asarray(index, dtype=np.int64)
        shard = np.searchsorted(self._starts, where, side="right") - 1
        out: Batch = {}
        for name in fields or self.fields:
            about = self.head.fields[name]
            value = torch.empty((len(where), *about["shape"]), dtype=getattr(torch, about["dtype"]))
            for s in np.unique(shard):
                at = np.flatnonzero(shard == s)
                source = self._field(int(s), name)
                for row, local in zip(at.tolist(), (where[at] - self._starts[s]).tolist(), strict=True):
                    value[row] = source[local]
            out[name] = value
        return out

    def load(self, device: str | torch.device = "cpu", fields: Sequence[str] = ()) -> MemorySet:
        """All samples in the memory of a device; the same stream, without reading."""
        parts = [
            {name: self._field(s, name).to(device) for name in fields or self.fields}
            for s in range(len(self.files))
        ]
        return MemorySet(
            {name: torch.cat([part[name] for part in parts]) for name in parts[0]},
            {name: value.to(device) for name, value in self.empty.items()},
        )

    def _field(self, shard: int, name: str) -> Tensor:
        """One field of a shard (n, ...), mapped: pages are read when they are touched."""
        if shard not in self._maps:
            path = self.folder / self.files[shard].name
            try:
                with safe_open(path, "pt") as reader:
                    self._maps[shard] = {key: reader.get_tensor(key) for key in self.head.fields}
            except (OSError, SafetensorError) as error:
                raise WeightsError(f"{path} cannot be read ({error}); it was changed while in use.") from None
        return self._maps[shard][name]


@contextlib.contextmanager
def partial(target: Path) -> Iterator[Path]:
    """A name beside `target`, which takes its place when the block ends well and is removed otherwise."""
    path = target.with_name(target.name + ".partial")
    try:
        yield path
        path.replace(target)
    finally:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_model(head: Head, hashes: Mapping[str, str], folder: Path, any_teacher: bool) -> None:
    what = {"vae": "VAE", "text": "text encoder"}
    if head.kind == TEACHER and not any_teacher:
        what["transformer"] = "transformer"
    for part, word in what.items():
        if head.hashes.get(part) != hashes[part]:
            raise ConfigError(
                f"the data in {folder} were made with another {word} (of '{head.model}', {head.hashes.get(part)} "
                f"and not {hashes[part]}); make data for this model with `{COMMAND}`."
            )


def _check_file(folder: Path, file: File, head: Head, thorough: bool) -> None:
    path = folder / file.name
    again = f"delete it and {HEAD}, and give the same `{COMMAND}` command again"
    if not path.is_file():
        raise WeightsError(f"{path} is missing; copy it again, or {again}.")
    if (size := path.stat().st_size) != file.bytes:
        raise WeightsError(f"{path} is damaged ({size} bytes instead of {file.bytes}); {again}.")
    if file.name != EMPTY:
        header = safetensors_header(path)
        for name, about in head.fields.items():
            if header.get(name, {}).get("shape") != [file.samples, *about["shape"]]:
                raise WeightsError(f"{path} is damaged (its {name} have another shape); {again}.")
    if thorough and sha256(path) != file.sha256:
        raise WeightsError(f"{path} is damaged (its checksum differs); {again}.")


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, v in value.items():
        out |= _flat(v, f"{prefix}{name}.") if isinstance(v, dict) else {prefix + name: v}
    return out
