"""Writing shards so that an interruption loses one shard at most, and nothing half written is ever seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vivace.core.errors import ConfigError, OutputError
from vivace.training.data.samples import Batch
from vivace.training.data.shards import EMPTY, HEAD, File, Head, LatentShards, partial, sha256, shard_name


@dataclass(frozen=True)
class Span:
    """One shard that is still to be made: samples `start` to `stop`."""

    shard: int
    start: int
    stop: int


class PortionSource(Protocol):
    """What `fill` asks of a source."""

    def portion(self, start: int, stop: int) -> Batch: ...
    def empty(self) -> Mapping[str, Tensor]: ...


class ShardWriter:
    """Makes a folder of shards, or goes on with one that was interrupted or is to become larger.

    Args:
        folder: where to; made when missing.
        head: what is to be made, without `fields` and `files`.

    Raises:
        ConfigError: the folder holds other data, more samples, or files of somebody else.
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, head: Head) -> None:
        self.folder, self.head = Path(folder), head
        found = self._found()
        self._files: dict[str, File] = {f.name: f for f in found.files} if found else {}
        if found:
            self.head = replace(head, fields=found.fields)
            self._drop_unfinished(found.samples)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OutputError(f"cannot make the folder {folder}: {reason}; choose another one.") from None

    @property
    def done(self) -> int:
        """Samples in finished shards."""
        return sum(f.samples for f in self._files.values())

    def todo(self) -> list[Span]:
        """The shards that are not there yet, in order."""
        size, samples = self.head.per_shard, self.head.samples
        spans = [Span(i, a, min(a + size, samples)) for i, a in enumerate(range(0, samples, size))]
        return [s for s in spans if shard_name(s.shard) not in self._files]

    def write(self, span: Span, tensors: Mapping[str, Tensor]) -> None:
        """Keep one shard.

        Args:
            span: of `todo`.
            tensors: by field, (stop - start, ...), on any device.

        Raises:
            ConfigError: the fields are not those of the shards before, or not of this many samples.
            OutputError: there is no room, or the file cannot be written.
        """
        values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        fields = {
            name: {"dtype": str(v.dtype).removeprefix("torch."), "shape": list(v.shape[1:])}
            for name, v in sorted(values.items())
        }
        if self.head.fields and fields != self.head.fields:
            raise ConfigError(f"these samples have fields {fields}; the shards before, {self.head.fields}.")
        if {len(v) for v in values.values()} != {span.stop - span.start}:
            raise ConfigError(f"shard {span.shard} needs {span.stop - span.start} samples in every field.")
        self.head = replace(self.head, fields=fields)
        self._check_room(values, span)
        self._save(shard_name(span.shard), values, span.stop - span.start)

    def finish(self, empty: Mapping[str, Tensor] | None = None) -> LatentShards:
        """Declare the data complete; `empty` are the text fields of the empty prompt.

        Raises:
            ConfigError: shards are missing.
        """
        if missing := self.todo():
            raise ConfigError(f"{len(missing)} shards of {self.folder} are still to be made.")
        if empty and EMPTY not in self._files:
            self._save(EMPTY, {name: v.detach().cpu().contiguous() for name, v in empty.items()}, 0)
        self.head = replace(self.head, complete=True)
        self._write_head()
        return LatentShards(self.folder, self.head)

    def _found(self) -> Head | None:
        """The head of data that can be added to."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is no folder; give another --out.")
        if not (self.folder / HEAD).is_file():
            others = [p for p in self.folder.glob("*") if not p.name.startswith("shard-")]
            if others:
                raise ConfigError(f"{self.folder} holds other files ({others[0].name}); give another --out.")
            return None
        found = Head.read(self.folder)
        if told := found.difference(self.head):
            raise ConfigError(
                f"{self.folder} holds data that were made with {told}; give another --out, or delete it."
            )
        if found.samples > self.head.samples and found.files:
            raise ConfigError(
                f"{self.folder} is for {found.samples} samples and {self.head.samples} are asked for; "
                f"give another --out, or --count {found.samples}."
            )
        return found

    def _drop_unfinished(self, before: int) -> None:
        """Forget files that are gone or cut, and a last shard that is not full when more samples are asked for."""
        last = (before - 1) // self.head.per_shard
        for name, file in list(self._files.items()):
            path = self.folder / name
            whole = path.is_file() and path.stat().st_size == file.bytes and sha256(path) == file.sha256
            short = name == shard_name(last) and file.samples < min(
                self.head.per_shard, self.head.samples - last * self.head.per_shard
            )
            if not whole or short:
                del self._files[name]

    def _check_room(self, values: Mapping[str, Tensor], span: Span) -> None:
        each = sum(v.nbytes for v in values.values()) / (span.stop - span.start)
        need = int(each * sum(s.stop - s.start for s in self.todo()))
        if (free := shutil.disk_usage(self.folder).free) < need:
            raise OutputError(
                f"{need / 1e9:.1f} GB more are needed in {self.folder} and {free / 1e9:.1f} GB are free; "
                "free some space, choose another folder, or ask for fewer samples."
            )

    def _save(self, name: str, values: dict[str, Tensor], samples: int) -> None:
        target = self.folder / name
        try:
            with partial(target) as path:
                path.touch()
                mode = path.stat().st_mode
                save_file(values, path)
                path.chmod(mode)  # safetensors would keep others from reading it, whatever the umask
                made = File.of(path, samples)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"cannot write {target} ({error}); free some space or choose another folder."
            ) from None
        self._files[name] = replace(made, name=name)
        self._write_head()

    def _write_head(self) -> None:
        self.head = replace(self.head, files=tuple(self._files[name] for name in sorted(self._files)))
        self.head.write(self.folder)


def fill(
    writer: ShardWriter, source: PortionSource, batch: int, made: Callable[[int], None] = lambda count: None
) -> LatentShards:
    """Make the shards that are missing, portion by portion, and finish.

    Args:
        writer: of the folder.
        source: `portion(start, stop)` gives samples by their numbers, so that it does not matter when it is asked.
        batch: samples of a portion, at most.
        made: told how many samples every portion had.
    """
    for span in writer.todo():
        parts: list[Batch] = []
        for start in range(span.start, span.stop, batch):
            stop = min(start + batch, span.stop)
            portion = source.portion(start, stop)
            parts.append({name: value.cpu() for name, value in portion.items()})
            made(stop - start)
        writer.write(span, {name: torch.cat([p[name] for p in parts]) for name in parts[0]})
    return writer.finish(source.empty())
