"""Selecting key blocks: scores of (block of queries, block of keys) to the lists of `vivace.kernels.block_attention`.

    select_blocks(scores, top=0, mass=0.0, forced=None, text=0, softmax=True, also=None) -> (index, count)

* scores (B, H, NQ, NK) float32, of the video's blocks; -inf marks a block that must not be taken.
* A row takes its `top` best blocks; then as many more as it needs for the sum of its probabilities (the softmax of the
  row, or the scores themselves with `softmax=False`) to reach `mass`. Of equal scores the lower number goes first.
* `forced`, None or bool (NQ, NK): blocks that are taken in any case; they count towards `top` and `mass`.
* `also`, None or bool (B or 1, H or 1, NQ, NK): blocks that are taken besides; they count towards nothing.
* Scores may be bool: a selection that is made already, of which only the lists are wanted (`top` and `mass` stay 0).
* `text` blocks of joint attention stand behind the video's: every row lists them, and as many rows of their own follow
  that list everything.
* index int32 (B, H, NQ + text, NK + text), rising within a row, `count` int32 (B, H, NQ + text) of them valid.

No synchronisation, and one custom operation of torch (`vivace::select_blocks`) with a fake implementation.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from vivace.kernels.api import Candidate, register
from vivace.kernels.block_attention.spec import avoid_interpreted

OP = "block_select"
MOST = 4096
"""Key blocks of a row that the Triton kernel holds at once."""


def _load(name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        return importlib.import_module(f"vivace.kernels.{OP}.op").runner(name)

    return load


def _refuse_triton(context: Mapping[str, Any]) -> str | None:
    import os

    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not str(context.get("device", "cpu")).startswith("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a GPU (or TRITON_INTERPRET=1, for tests)"
    if context.get("blocks", 1) > MOST:
        return f"it holds at most {MOST} key blocks of a row"
    return None


def _never(context: Mapping[str, Any]) -> str | None:
    return None


register(OP, Candidate("triton", _refuse_triton, _load("triton"), avoid_interpreted))
register(OP, Candidate("reference", _never, _load("reference")))
