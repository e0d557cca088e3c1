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

    Every file is written in a hidden folder beside its target (`.partial-...`) and moved when the `with` block ends
    well. After an error, an interrupt or a polite kill the hidden folders and the folders made for them are removed;
    after a hard kill their name says what they are.

    Args:
        need: bytes that the files will take together, at most.
    """

    def __init__(self, need: int = 0) -> None:
        self._need = need
        self._hidden: dict[Path, Path] = {}
        self._made: list[Path] = []
        self._name = f".partial-{uuid.uuid4().hex[:8]}"

    def reserve(self, target: Path) -> Path:
        """The hidden path to write to instead of `target`.

        Raises:
            OutputError: the target is a folder, its folder cannot be written, or the space does not suffice.
        """
        if target.is_dir():
            raise OutputError(f"the output {target} is a folder; name a file in it.")
        home = target.parent / self._name
        try:
            self._make(home)
            free = shutil.disk_usage(home).free
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OutputError(
                f"cannot write {target}: {reason}; choose another folder or change its permissions."
            ) from None
        if free < self._need:
            raise OutputError(
                f"only {size(free)} are free in {target.parent} and up to {size(self._need)} are needed; "
                "free some space or choose another folder."
            )
        self._hidden[target] = home / target.name
        return self._hidden[target]

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
        for folder in reversed(self._made):
            if folder.name == self._name:
                shutil.rmtree(folder)
            elif not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OutputError):
            raise OutputError(self._translated(str(error))) from error

    def _translated(self, sentence: str) -> str:
        """A sentence about a hidden file, told of the file it stands for."""
        for target, hidden in self._hidden.items():
            sentence = sentence.replace(str(hidden), str(target))
        return sentence
