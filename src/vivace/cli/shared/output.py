"""Output files: checked before the long run, shown all at once when they are complete, removed otherwise."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from vivace.core.errors import OutputError
from vivace.report.units import size


class Outputs:
    """The files of one command: all of them, complete, or none.

    Every file is written under a hidden name beside its target (`.partial-...`) and renamed when the `with` block ends
    well. After an error, an interrupt or a polite kill the hidden files and the folders made for them are removed;
    after a hard kill their name says what they are.

    Args:
        need: bytes that the files will take together, at most.
    """

    def __init__(self, need: int = 0) -> None:
        self._need = need
        self._hidden: dict[Path, Path] = {}
        self._made: list[Path] = []
        self._id = uuid.uuid4().hex[:8]

    def reserve(self, target: Path) -> Path:
        """The hidden path to write to instead of `target`.

        Raises:
            OutputError: the target is a folder, its folder cannot be written, or the space does not suffice.
        """
        if target.is_dir():
            raise OutputError(f"the output {target} is a folder; name a file in it.")
        hidden = target.with_name(f".partial-{self._id}-{target.name}")
        try:
            self._make(target.parent)
            free = shutil.disk_usage(target.parent).free
            hidden.touch()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OutputError(
                f"cannot write {target}: {reason}; choose another folder or change its permissions."
            ) from None
        self._hidden[target] = hidden
        if free < self._need:
            raise OutputError(
                f"only {size(free)} are free in {target.parent} and up to {size(self._need)} are needed; "
                "free some space or choose another folder."
            )
        return hidden

    def _make(self, folder: Path) -> None:
        missing = [p for p in (folder, *folder.parents) if not p.exists()]
        for path in reversed(missing):
            path.mkdir()
            self._made.append(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for target, hidden in self._hidden.items():
                os.replace(hidden, target)
            return
        for hidden in self._hidden.values():
            hidden.unlink(missing_ok=True)
        for folder in reversed(self._made):
            if not any(folder.iterdir()):
                folder.rmdir()
