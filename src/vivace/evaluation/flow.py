"""Optical flow between the frames of clips, by dense inverse search (Kroeger et al., ECCV 2016, arXiv:1603.03590).

OpenCV's DIS at its medium preset needs no weights. Its result does not depend on the number of threads, so a value here
is the value anywhere. Metrics that look at one batch in turn share the flow through a small cache.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vivace.core.errors import UnavailableError
from vivace.evaluation.frames import FrameError, unit_clips

if TYPE_CHECKING:
    import torch

LEAST = 16
"""Shortest side, in pixels, that leaves a patch at the finest level of the search."""
CACHE_BYTES = 2**28
_LUMA = (299, 587, 114)
"""Weights of R, G and B in thousandths (ITU-R BT.601)."""
_cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
_lock = threading.Lock()


def missing() -> str:
    """Why there is no flow here, in a sentence that says what to do; empty when there is."""
    if importlib.util.find_spec("cv2") is None:
        return "optical flow needs OpenCV; pip install 'vivace[eval]' or opencv-python-headless."
    return ""


def luma(clips: Any) -> np.ndarray:
    """Luma as uint8 `(B, T, H, W)` of clips `(B, T, H, W, 3)`.

    In whole numbers, so that uint8 clips and the same levels as floats give the same bytes on every device.

    Raises:
        FrameError: shape, type or range is wrong.
    """
    levels = (unit_clips(clips) * 255.0).round().int()
    red, green, blue = levels.unbind(-1)
    total = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]
    return ((total + 500) // 1000).byte().numpy()


def optical_flow(clips: Any, workers: int | None = None) -> np.ndarray:
    """Flow from each frame to the next: float32 `(B, T - 1, H, W, 2)`, x to the right and y down, in pixels.

    Pixel p of frame t is found at p + flow[t, p] in frame t + 1. May be called from several threads.

    Args:
        clips: `(B, T, H, W, 3)`, numpy or torch, uint8 or float in [0, 1]; T of 1 gives an empty axis.
        workers: threads (OpenCV lets go of the interpreter while it searches); None: as many as torch uses.

    Raises:
        UnavailableError: OpenCV is absent.
        FrameError: shape, type or range is wrong, or a side is shorter than `LEAST`.
    """
    if why := missing():
        raise UnavailableError(why)
    gray = luma(clips)
    height, width = gray.shape[2:]
    if min(height, width) < LEAST:
        raise FrameError(
            f"optical flow needs frames of at least {LEAST}x{LEAST} pixels, got {height}x{width}; make larger clips"
        )
    return np.stack([_clip_flow(frames, workers or _cores()) for frames in gray])


def warp(frames: torch.Tensor, flow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up `frames` (N, H, W, C) at p + flow[p], bilinear: the warped frames, and where p + flow lies inside.

    Args:
        frames: float.
        flow: (N, H, W, 2), x and y in pixels.

    Returns: (N, H, W, C), and bool (N, H, W). Outside, the nearest border pixel is taken.
    """
    import torch
    from torch.nn import functional as F

    height, width = flow.shape[1:3]
    ys, xs = torch.meshgrid(
        torch.arange(height, device=flow.device), torch.arange(width, device=flow.device), indexing="ij"
    )
    x, y = xs + flow[..., 0], ys + flow[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    grid = torch.stack((2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1), dim=-1)
    out = F.grid_sample(
        frames.movedim(-1, 1), grid.to(frames.dtype), padding_mode="border", align_corners=True
    )
    return out.movedim(1, -1), inside


def _cores() -> int:
    """Torch's number of threads: a bench of several processes gives each its share of the cores there."""
    import torch

    return min(16, torch.get_num_threads())


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that stay, because each holds a searcher with its buffers."""
    return ThreadPoolExecutor(workers, thread_name_prefix="flow")


_users: list[int] = []
"""OpenCV's number of threads before the first of the callers under way; empty when there is none."""


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """OpenCV's own threads off while anybody searches: times ours, and times several processes, they would crowd out
    each other."""
    import cv2

    with _lock:
        _users.append(_users[0] if _users else cv2.getNumThreads())
        cv2.setNumThreads(1)
    try:
        yield
    finally:
        with _lock:
            before = _users.pop()
            if not _users:
                cv2.setNumThreads(before)


def _clip_flow(frames: np.ndarray, workers: int) -> np.ndarray:
    """Flow `(T - 1, H, W, 2)` of luma frames `(T, H, W)`, from the cache where it is there."""
    key = hashlib.sha256(repr(frames.shape).encode() + frames.tobytes()).digest()
    with _lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    flow = np.zeros((len(frames) - 1, *frames.shape[1:], 2), np.float32)
    pairs = list(itertools.pairwise(frames))
    with _one_thread_each():
        if workers > 1 and len(pairs) > 1:
            found = list(_pool(workers).map(_pair, pairs))
        else:
            found = [_pair(pair) for pair in pairs]
    for t, value in enumerate(found):
        flow[t] = value
    flow.setflags(write=False)
    with _lock:
        _cache[key] = flow
        while sum(f.nbytes for f in _cache.values()) > CACHE_BYTES:
            _cache.popitem(last=False)
    return flow


_own: Any = threading.local()
"""A searcher holds buffers, so every thread has its own."""


def _pair(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    import cv2

    searchers = _own.__dict__.setdefault("searchers", {})
    shape = pair[0].shape
    if shape not in searchers:
        # One for each size: after small frames a searcher starts at a finer level for large ones too (OpenCV 5.0).
        searchers[shape] = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    # No flow to start from: one left over would make the value depend on the pair before.
    return cast(Any, searchers[shape]).calc(pair[0], pair[1], None)


__all__ = ["LEAST", "luma", "missing", "optical_flow", "warp"]
