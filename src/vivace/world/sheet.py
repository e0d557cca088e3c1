"""Contact sheets: a few frames of each clip in a row, written as PNG with the standard library alone."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vivace.core.errors import ShapeError


def contact_sheet(video: Tensor, columns: int = 8, scale: int = 1, gap: int = 2) -> Tensor:
    """Lay clips (B, T, H, W, 3) uint8 out as one picture (H, W, 3): a row for each clip, `columns` of its frames."""
    if video.ndim != 5 or video.dtype != torch.uint8:
        raise ShapeError(
            f"a contact sheet needs uint8 clips (B, T, H, W, 3), not {video.dtype} {tuple(video.shape)}"
        )
    chosen = torch.linspace(0, video.shape[1] - 1, min(columns, video.shape[1])).round().long()
    cells = video[:, chosen.to(video.device)].repeat_interleave(scale, 2).repeat_interleave(scale, 3).cpu()
    padded = torch.full(
        (*cells.shape[:2], cells.shape[2] + gap, cells.shape[3] + gap, 3), 255, dtype=torch.uint8
    )
    padded[:, :, : cells.shape[2], : cells.shape[3]] = cells
    rows, across, height, width, _ = padded.shape
    return padded.permute(0, 2, 1, 3, 4).reshape(rows * height, across * width, 3)


def write_png(picture: Tensor | np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Write an RGB picture (H, W, 3) uint8 to `path` (PNG specification, ISO/IEC 15948) and return the path."""
    pixels = np.ascontiguousarray(np.asarray(picture, dtype=np.uint8))
    height, width, _ = pixels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 6)) + chunk(b"IEND", b"")
    target = Path(path)
    target.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return target
