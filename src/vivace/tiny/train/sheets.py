"""Contact sheets: pairs of film strips with a caption, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

CAPTION_HEIGHT = 14


def contact_sheet(
    path: Path, truth: Tensor, output: Tensor, captions: Sequence[str], columns: int = 8, gap: int = 6
) -> None:
    """Write pairs (B, T, H, W, 3) uint8, truth above output, `columns` frames spread evenly over the clip."""
    pairs, frames, height, width = truth.shape[:4]
    shown = np.linspace(0, frames - 1, min(columns, frames)).round().astype(int)
    block = CAPTION_HEIGHT + 2 * height + gap
    sheet = Image.new("RGB", (len(shown) * width, pairs * block), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(pairs):
        top = row * block
        draw.text((3, top + 1), captions[row], fill="black")
        for line, clip in enumerate((truth, output)):
            strip = np.concatenate(list(clip[row].cpu().numpy()[shown]), axis=1)
            sheet.paste(Image.fromarray(strip), (0, top + CAPTION_HEIGHT + line * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
