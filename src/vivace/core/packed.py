"""Many JSON documents in one small file: one line of `{"id": ..., "document": ...}` each, xz around them.

Records of one benchmark differ in few words, so a hundred of them take as much room together as two or three alone. A
packed file is for keeping and for reading: it is written once, whole, and what is in it is in the order of the ids.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vivace.core.errors import ConfigError, OutputError


def write_packed(file: Path, documents: Mapping[str, Any]) -> None:
    """Keep documents by id in one file, replacing it whole.

    Raises:
        OutputError: the file cannot be written.
    """
    lines = [
        json.dumps({"id": name, "document": documents[name]}, sort_keys=True) for name in sorted(documents)
    ]
    hidden = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        hidden.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME))
        os.replace(hidden, file)
    except OSError as error:
        hidden.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {file}: {error.strerror or error}; choose another folder."
        ) from error


def read_packed(file: Path) -> dict[str, Any]:
    """Documents of a packed file by id; none where there is no such file.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}; check the path.") from error
    try:
        rows = [json.loads(line) for line in lzma.decompress(data).decode().splitlines()]
        return {str(row["id"]): row["document"] for row in rows}
    except (lzma.LZMAError, EOFError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"the packed file {file} is damaged; copy it again.") from error


__all__ = ["read_packed", "write_packed"]
