"""The store: a folder of records that only grows. A file's name is the hash of what it holds.

`DIR/records/<id>.json`, `DIR/samples/<sha256>.json.gz` (named by the record) and `DIR/clips/<hash>.mp4`. Nothing is
rewritten and nothing is deleted, so two machines' stores are joined by copying files. A store that will not grow any
more can be packed, `python -m vivace.evaluation.store DIR`: its records then lie in `DIR/records.jsonl.xz`, a
twentieth of the size, and are read from there like any other. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import zlib
from pathlib import Path

from pydantic import ValidationError

from vivace.core.errors import ConfigError, OutputError, VivaceError
from vivace.core.packed import read_packed, write_packed
from vivace.evaluation.record import Record, Samples

PACKED = "records.jsonl.xz"

Key = tuple[str, str, str, str, str, str, str]
"""Task name and hash, contender, environment fingerprint, model name, hash and dtype."""


class StoreError(VivaceError, ValueError):
    """A store, a record or a sample file is missing or damaged; the message names the file."""


class Store:
    """Records, their samples and their clips below one folder. The folder is made by the first `add`.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._loaded: dict[Path, tuple[tuple[int, int], Record]] = {}
        self._unpacked: tuple[tuple[int, int] | None, dict[str, Record]] = (None, {})

    @classmethod
    def existing(cls, path: str | Path) -> Store:
        """A store that is there and holds a record.

        Raises:
            StoreError: no such folder, or no record in it.
        """
        store = cls(path)
        if not store.path.is_dir():
            raise StoreError(f"there is no folder {path}; give the folder that `vivace bench --out` wrote.")
        if not store._files() and not store._packed():
            raise StoreError(f"the folder {path} holds no records; run `vivace bench --out {path}` first.")
        return store

    def add(self, record: Record, samples: Samples | None = None) -> str:
        """Keep a record, and its samples when given; the same content twice is kept once.

        Returns:
            The record's id. With samples the record's `samples` field is set to their hash first.

        Raises:
            StoreError: the record already names other samples, or names samples that are nowhere.
            OutputError: the folder cannot be written.
        """
        if samples is not None:
            _check(samples, "the samples")
            data = samples.to_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if record.samples not in ("", digest):
                raise StoreError(
                    f"the record of {record.contender.name} names samples {record.samples[:12]} and is given others; "
                    "leave its field `samples` empty."
                )
            record = record.model_copy(update={"samples": digest})
            self._write(self._sample_file(digest), data)
        elif record.samples and not self._sample_file(record.samples).is_file():
            raise StoreError(
                f"the record of {record.contender.name} names samples that this store does not hold; give them too."
            )
        # Through JSON and back, because settings may hold keys or types that JSON changes, and the name is a hash.
        record = Record.from_dict(json.loads(record.to_json()))
        self._write(self._record_file(record.id), record.to_json().encode())
        return record.id

    def add_clip(self, data: bytes, suffix: str = ".mp4") -> str:
        """Keep an encoded clip; returns its path relative to the store, for `Record.clips`.

        Raises:
            OutputError: the folder cannot be written.
        """
        name = f"clips/{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
        self._write(self.path / name, data)
        return name

    @property
    def clips(self) -> Path:
        """The folder of the clips, made when it is not there."""
        folder = self.path / "clips"
        _make(folder)
        return folder

    def ids(self) -> list[str]:
        """Ids of all records, sorted."""
        return sorted({file.stem for file in self._files()} | set(self._packed()))

    def pack(self) -> Path:
        """Move all records into one small file. Samples and clips stay where they are.

        Returns:
            The packed file.

        Raises:
            StoreError: a record is damaged; nothing was changed.
            OutputError: the file cannot be written; nothing was changed.
        """
        file = self.path / PACKED
        write_packed(file, {record.id: record.to_dict() for record in self.records()})
        self._unpacked = (None, {})
        kept = self._packed()
        for loose in self._files():
            if loose.stem in kept:
                loose.unlink()
        with contextlib.suppress(OSError):
            (self.path / "records").rmdir()
        return file

    def records(self) -> list[Record]:
        """All records, oldest first.

        Raises:
            StoreError: a file is damaged.
        """
        found = dict(self._packed())
        found |= {file.stem: self._load(file) for file in self._files()}
        return sorted(found.values(), key=_age)

    def scan(self) -> tuple[list[Record], list[str]]:
        """All records that can be read, oldest first, and a sentence for each file that cannot."""
        found: dict[str, Record] = {}
        problems = []
        try:
            found |= self._packed()
        except VivaceError as error:
            problems.append(str(error))
        for file in self._files():
            try:
                found[file.stem] = self._load(file)
            except VivaceError as error:
                problems.append(str(error))
        return sorted(found.values(), key=_age), problems

    def record(self, name: str) -> Record:
        """The record of an id, or of the only id that starts so (at least 4 digits).

        Raises:
            StoreError: no such record, several, or its file is damaged.
        """
        file = self._record_file(name)
        if not file.is_file():
            near = [i for i in self.ids() if i.startswith(name)] if len(name) >= 4 else []
            if len(near) != 1:
                what = f"{len(near)} records that start with" if near else "no record"
                raise StoreError(
                    f"{self.path} holds {what} '{name}'; give one of the ids in {self.path}/records."
                )
            if near[0] in self._packed():
                return self._packed()[near[0]]
            file = self._record_file(near[0])
        return self._load(file)

    def __contains__(self, name: str) -> bool:
        """Whether there is a record of this whole id."""
        return self._record_file(name).is_file() or name in self._packed()

    def samples(self, record: Record) -> Samples:
        """The values of a record's single samples.

        Raises:
            StoreError: the record has none, or the file is missing or damaged.
        """
        if not record.samples:
            raise StoreError(f"record {record.id} has no samples; compare records that `vivace bench` wrote.")
        file = self._sample_file(record.samples)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise StoreError(
                f"cannot read the samples {file}; copy the folder `samples` beside the records."
            ) from error
        if hashlib.sha256(data).hexdigest() != record.samples:
            raise StoreError(
                f"the samples {file} are damaged: their hash is not their name; copy them again."
            )
        try:
            found = Samples.from_bytes(data)
        except (ValueError, OSError, EOFError, zlib.error, ValidationError) as error:
            raise StoreError(f"the file {file} holds no samples; copy it again.") from error
        _check(found, f"the samples {file}")
        return found

    def find(
        self,
        *,
        task: str | None = None,
        contender: str | None = None,
        environment: str | None = None,
        model: str | None = None,
        kind: str | None = None,
    ) -> list[Record]:
        """Records that match everything given (names; the environment by fingerprint), oldest first.

        Raises:
            StoreError: a file is damaged.
        """
        return [
            r
            for r in self.records()
            if (task is None or r.task.name == task)
            and (contender is None or r.contender.name == contender)
            and (environment is None or r.environment.get("fingerprint", "") == environment)
            and (model is None or r.model.name == model)
            and (kind is None or r.contender.kind == kind)
        ]

    def newest(self, **wanted: str | None) -> list[Record]:
        """As `find`, but only the newest record for each task, contender, environment and model."""
        return newest(self.find(**wanted))

    def _files(self) -> list[Path]:
        return sorted((self.path / "records").glob("[!.]*.json"))

    def _packed(self) -> dict[str, Record]:
        """Records of the packed file by id, each checked against its name."""
        file = self.path / PACKED
        try:
            stat = file.stat()
        except OSError:
            return {}
        stamp = (stat.st_mtime_ns, stat.st_size)
        if self._unpacked[0] != stamp:
            try:
                found = {name: Record.from_dict(data) for name, data in read_packed(file).items()}
            except ConfigError as error:
                raise StoreError(str(error)) from error
            for name, record in found.items():
                if record.id != name:
                    raise StoreError(
                        f"a record in {file} was changed: its content belongs to the name {record.id}, not {name}; "
                        "copy the file again."
                    )
            self._unpacked = (stamp, found)
        return self._unpacked[1]

    def _record_file(self, name: str) -> Path:
        return self.path / "records" / f"{name}.json"

    def _sample_file(self, digest: str) -> Path:
        return self.path / "samples" / f"{digest}.json.gz"

    def _load(self, file: Path) -> Record:
        try:
            stat = file.stat()
        except OSError as error:
            raise StoreError(f"cannot read the record {file}; check the path.") from error
        stamp = (stat.st_mtime_ns, stat.st_size)
        known = self._loaded.get(file)
        if known is not None and known[0] == stamp:
            return known[1]
        record = load_record(file)
        self._loaded[file] = (stamp, record)
        return record

    def _write(self, file: Path, data: bytes) -> None:
        """Whole or not at all: a reader never sees half a file, and a killed writer leaves only a hidden one."""
        with contextlib.suppress(OSError):
            if file.read_bytes() == data:
                return
        hidden = file.with_name(f".{file.name}.{os.getpid()}.part")
        _make(file.parent)
        try:
            with hidden.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(hidden, file)
        except OSError as error:
            with contextlib.suppress(OSError):
                hidden.unlink()
            raise OutputError(
                f"cannot write {file}: {error.strerror or error}; choose another folder."
            ) from error


def load_record(file: Path) -> Record:
    """A record whose file name is checked against its content.

    Raises:
        StoreError: the file cannot be read, is no record, or was changed after it was written.
    """
    try:
        record = Record.load(file)
    except (ConfigError, UnicodeDecodeError) as error:
        raise StoreError(
            f"the record {file} is damaged ({str(error).rstrip('.')}); copy it again."
        ) from error
    if record.id != file.stem:
        raise StoreError(
            f"the record {file} was changed: its content belongs to the name {record.id}; copy it again."
        )
    return record


def key(record: Record) -> Key:
    """What two records share when one is a repetition of the other."""
    m = record.model
    environment = str(record.environment.get("fingerprint", ""))
    return (
        record.task.name,
        record.task.sha256,
        record.contender.name,
        environment,
        m.name,
        m.sha256,
        m.dtype,
    )


def newest(records: list[Record]) -> list[Record]:
    """The newest record of each `key`, oldest first."""
    latest: dict[Key, Record] = {}
    for record in sorted(records, key=_age):
        latest[key(record)] = record
    return sorted(latest.values(), key=_age)


def _age(record: Record) -> tuple[str, str]:
    return record.created, record.id


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror}; choose another folder.") from error


def _check(samples: Samples, what: str) -> None:
    n = len(samples.ids)
    lengths = {"prompt": len(samples.prompt), "k": len(samples.k), "seed": len(samples.seed)}
    lengths |= {name: len(column) for name, column in samples.columns.items()}
    if samples.hashes:
        lengths["hashes"] = len(samples.hashes)
    for name, length in lengths.items():
        if length != n:
            raise StoreError(
                f"{what} have {n} ids and {length} values of {name}; give one value for each id."
            )
    if len(set(samples.ids)) != n:
        raise StoreError(f"{what} have an id twice; give every sample its own.")


def main() -> None:
    """Pack the stores that are named on the command line."""
    for name in sys.argv[1:]:
        try:
            file = Store.existing(name).pack()
        except VivaceError as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from None
        print(f"{file}: {len(Store(name).ids())} records in {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()


__all__ = ["Store", "StoreError", "key", "load_record", "newest"]
