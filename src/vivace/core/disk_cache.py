"""A folder of files named by the hash of what they stand for: several processes may read and write it at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_ENDING, _UNFINISHED = ".bin", ".part"
_STALE = 3600.0
"""Seconds after which an unfinished file is one that its writer left behind."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a look into the cache gave. `damaged` says what is wrong with a file that is there and was removed."""

    path: Path
    data: bytes | None = None
    damaged: str = ""


class DiskCache:
    """Bytes by key, at most `limit` bytes of them; the least recently used leave first.

    A file holds the sha256 of its content before the content. It is written under another name in the same folder and
    moved into place, so that a reader sees a whole file or none; two writers of one key write the same.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def path(self, key: str) -> Path:
        """Where the bytes of a key (hexadecimal digits) lie."""
        return self.folder / (key + _ENDING)

    def read(self, key: str) -> Found:
        """The bytes of a key, and a note that they were used. A damaged file is removed."""
        path = self.path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return Found(path)
        except OSError as error:
            return Found(path, damaged=f"cannot be read: {error.strerror or error}")
        seal, data = content[:32], content[32:]
        if hashlib.sha256(data).digest() != seal:
            with contextlib.suppress(OSError):
                path.unlink()
            return Found(path, damaged="its content does not have the hash it was written with")
        with contextlib.suppress(OSError):
            os.utime(path)
        return Found(path, data)

    def write(self, key: str, data: bytes) -> int:
        """Keep the bytes of a key; returns how many other files had to leave.

        What alone is larger than the limit is not kept.

        Raises:
            OSError: the folder cannot be written to.
        """
        if len(data) + 32 > self.limit:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=_UNFINISHED)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
            os.replace(name, self.path(key))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        return self._trim(keep=self.path(key))

    def size(self) -> int:
        """Bytes of all whole files."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of the whole files, least recently used first."""
        found = []
        for path in self.folder.glob("*" + _ENDING):
            with contextlib.suppress(FileNotFoundError):  # another process removed it in between
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
        return sorted(found)

    def _trim(self, keep: Path) -> int:
        files = self._files()
        total, removed = sum(size for _, size, _ in files), 0
        for _, size, path in files:
            if total <= self.limit:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                total, removed = total - size, removed + 1
        for path in self.folder.glob("*" + _UNFINISHED):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()
        return removed
