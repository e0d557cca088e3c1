"""For `transformer.py`: sparse methods at a density, what is predicted of them, and the parts of a forward in time."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch

from vivace.core.env import Stopwatch
from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.layout import Layout
from vivace.kernels.block_sparse_attention import listed
from vivace.techniques.attention.block_sparse import SwitchedAttention
from vivace.techniques.attention.draft_attention import DraftAttention
from vivace.techniques.attention.dynamic import DynamicAttention, SparseSite, View
from vivace.techniques.attention.jenga import Jenga
from vivace.techniques.attention.radial import Radial
from vivace.techniques.attention.sliding_tile import SlidingTile
from vivace.techniques.attention.sparge import SpargeAttention
from vivace.techniques.attention.vsa import VideoSparseAttention

WITHIN = 0.9
"""Least share of the predicted speed-up that must be reached."""


@dataclass(frozen=True)
class Shape:
    """A published configuration and a clip; `tiny` are the changes that make it run on a processor."""

    model: str
    frames: int
    height: int
    width: int
    text: int
    tiny: Mapping[str, Any] = field(default_factory=dict)


_SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}
_WAN = _SMALL | {"ffn_dim": 64, "text_dim": 32}
_JOINT = _SMALL | {"text_embed_dim": 32, "pooled_projection_dim": 32, "rope_axes_dim": (4, 6, 6)}
SHAPES = {
    "wan1.3b": Shape("wan2.1-1.3b", 81, 480, 832, 512, _WAN),
    "wan14b": Shape("wan2.1-14b", 81, 720, 1280, 512, _WAN),
    "hunyuan": Shape("hunyuanvideo", 129, 720, 1280, 256, _JOINT | {"num_refiner_layers": 1}),
}


def amdahl(total: float, attention: float, sparse: float) -> float:
    """Speed-up of a whole of `total` seconds when `attention` of them become `sparse`."""
    return total / (total - attention + sparse)


def with_text(density: float, video: int, text: int) -> float:
    """Share of all pairs, when video sees `density` of video and text sees and is seen by all."""
    return 1.0 - (1.0 - density) * (video / (video + text)) ** 2


def kernel_seconds(parts: Mapping[str, float]) -> float:
    """Seconds of the sparse kernel: of the call over lists, or of the whole site where that is one kernel."""
    return parts.get("attend", parts.get("rest of the site", 0.0))


def compare(total: float, attention: float, density: float, sparse: float, took: float) -> dict[str, Any]:
    """Speed-ups: measured, by Amdahl with attention at its density, and with the sparse kernel's own time."""
    speedup, ideal = total / took, amdahl(total, attention, attention * density)
    own = amdahl(total, attention, sparse)
    return {
        "speedup": speedup,
        "attention_share": attention / total,
        "ideal": ideal,
        "of_ideal": speedup / ideal,
        "with_kernel": own,
        "of_kernel": speedup / own,
        "within": speedup / ideal >= WITHIN,
    }


def shortened(depth: Mapping[str, int], layers: int) -> dict[str, int]:
    """So many layers of every kind as `layers` in all leave in proportion, at least one of the first kind."""
    total, left, out = sum(depth.values()), layers, {}
    for key, number in reversed(list(depth.items())):
        out[key] = layers * number // total
        left -= out[key]
    first = next(iter(depth))
    return out | {first: out[first] + left}


def nearest(settings: Iterable[Any], grid: TokenGrid, density: float) -> Any:
    """Of a static pattern's settings the one whose density comes nearest."""
    plain = replace(grid, text=0)
    return min(settings, key=lambda t: abs(t.block_map(plain).density - density))


def techniques(grid: TokenGrid, block: int, density: float) -> dict[str, Any]:
    """Methods that can be told their density, by name. Those without a setting for it are as near as they come."""
    cubes = VideoSparseAttention(block=block)
    top = max(1, math.ceil(density * cubes.layout(grid).video_blocks - 1e-9))
    thinning = [Radial(block=block, decay=n / 4, near=0, sink=sink) for n in range(1, 17) for sink in (0, 1)]
    windows = [SlidingTile(block=block, window=n / 20) for n in range(1, 11)]
    found = {
        "draft_attention": DraftAttention(block=block, sparsity=1.0 - density),
        # Random tokens are not alike; -1 lets every block's mean speak for it.
        "sparge_attention": SpargeAttention(block=block, share=density, similar=-1.0),
        "vsa": VideoSparseAttention(block=block, top=top),
        "vsa int8": VideoSparseAttention(block=block, top=top, precision="int8"),
        "jenga": Jenga(block=block, drop=1.0 - density, mass=0.0, neighbours=False),
        "radial": nearest(thinning, grid, density),
        "sliding_tile": nearest(windows, grid, density),
    }
    return {f"{name}, {block}": technique for name, technique in found.items()}


class Parts:
    """Seconds of labelled calls, each without the labelled calls inside it."""

    def __init__(self, device: str) -> None:
        self.watch = Stopwatch(torch.device(device))
        self.calls: list[tuple[str, Any, Any]] = []
        self.minus: list[tuple[str, Any, Any]] = []
        self.lists: list[Any] = []
        self._open: list[str] = []

    def wrap(self, label: str | Callable[..., str], call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            name = label if isinstance(label, str) else label(*args, **kwargs)
            around = self._open[-1] if self._open else None
            self._open.append(name)
            start = self.watch.mark()
            try:
                return call(*args, **kwargs)
            finally:
                span = (start, self.watch.mark())
                self._open.pop()
                self.calls.append((name, *span))
                if around is not None:
                    self.minus.append((around, *span))

        return timed

    def seconds(self, forwards: int) -> dict[str, float]:
        """By label, for one of so many forwards."""
        total: defaultdict[str, float] = defaultdict(float)
        for sign, spans in ((1.0, self.calls), (-1.0, self.minus)):
            for name, start, stop in spans:
                total[name] += sign * self.watch.seconds(start, stop) / forwards
        return dict(total)

    def built(self, old: Callable[..., Any]) -> Callable[..., Any]:
        """The engine's kernels, timed, and the lists they are called with."""

        def build(*args: Any) -> Any:
            layouts, choose, attend = old(*args)
            timed = self.wrap("attend", attend)

            def noted(q: Any, k: Any, v: Any, routes: Any, *rest: Any, **more: Any) -> Any:
                self.lists.append((routes, layouts[0].counts, q.shape[1]))
                return timed(q, k, v, routes, *rest, **more)

            return layouts, self.wrap("select", choose), noted

        return build

    @contextlib.contextmanager
    def in_force(self, transformer: Any, tokens: int) -> Iterator[None]:
        """Every part of a forward is timed inside."""
        own = sys.modules[type(transformer).__module__]

        def kind(q: Any, k: Any, *rest: Any, **more: Any) -> str:
            return "attend" if q.shape[1] == k.shape[1] == tokens else "other attention"

        places = [
            (own, "dispatch_attention_fn", kind),
            (SparseSite, "__call__", "rest of the site"),
            (SwitchedAttention, "__call__", "rest of the site"),
            (DynamicAttention, "attention", "rest of routing"),
            (Layout, "arrange", "arrange"),
            (Layout, "arrange_pooled", "arrange, with means"),
            (Layout, "restore", "restore"),
            (View, "mean", "means"),
            (View, "alike", "means"),
            (View, "pooled_scores", "scores"),
            (listed, "block_attention", "attend"),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, label in places:
                stack.enter_context(patch.object(owner, name, self.wrap(label, getattr(owner, name))))
            stack.enter_context(patch.object(DynamicAttention, "_built", self.built(DynamicAttention._built)))
            yield


def listed_pairs(lists: list[Any]) -> tuple[float, float]:
    """Query-key pairs of lists, counted one key block after the other, not by what the receipt counts with.

    Returns:
        Pairs of tokens, and pairs of slots: what a kernel that knows whole blocks computes.
    """
    pairs = slots = 0.0
    for routes, real, heads in lists:
        count = routes.count.cpu()
        index = routes.index[..., : max(1, int(count.max()))].cpu()
        full = torch.full((index.shape[2],), routes.block)
        sizes = full if routes.sizes is None else routes.sizes.flatten().cpu()
        keys = torch.zeros(count.shape, dtype=torch.float64)
        for j in range(index.shape[-1]):
            keys += sizes[index[..., j].long().clamp(0, len(sizes) - 1)] * (j < count)
        repeated = heads / index.shape[1]
        pairs += float((keys * real.cpu()).sum()) * repeated
        slots += float(count.double().sum()) * routes.block**2 * repeated
    return pairs, slots
