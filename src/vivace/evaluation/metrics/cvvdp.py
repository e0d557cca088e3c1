"""ColorVideoVDP: visible differences of two clips on a stated display (Mantiuk et al., ACM ToG 43(4), 2024).

It models contrast sensitivity in space and time, so it sees flicker that frame metrics average away. The code is that
of the package `cvvdp`; its parameters lie inside the package and nothing is fetched.

The package imports torchvision, imageio and ffmpeg, and all its variants, for things that this metric never does. They
are left out: the metric's modules are loaded without the package's front, the one class it needs of torchvision is
given here, and afterwards the interpreter's module table and path are as before. So nothing depends on the torchvision
that may or may not fit this torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.core.errors import UnavailableError
from vivace.evaluation.frames import FrameError
from vivace.evaluation.metrics.base import Better, Group, MetricCard, PairMetric, Scope, Series

if TYPE_CHECKING:
    import torch

DISPLAY = "standard_4k"
FPS = 24.0
LEAST = 16
"""Shortest side, in pixels: below it the pyramid has no band."""
VERSION = "0.5.7"
"""Of the package. Its version is that of the calibration, so another version is another metric."""
PIXELS = 2**23
"""Pixels of all frames in one call: about 3 GB on an accelerator."""
_LOCK = threading.Lock()


class Cvvdp(PairMetric):
    """ColorVideoVDP in just-objectionable differences (JOD): 10 is equal, one JOD is seen by three viewers in four."""

    card: ClassVar[MetricCard] = MetricCard(
        name="cvvdp",
        version=1,
        title="ColorVideoVDP",
        scope=Scope.PAIR,
        group=Group.FIDELITY,
        series=(
            Series(
                name="jod",
                better=Better.HIGHER,
                unit="JOD",
                high=10.0,
                margin=0.5,
                about="Visible difference to the reference clip; 10 is none.",
            ),
        ),
        convention=f"cvvdp {VERSION}, display {DISPLAY} (30 inches, 200 cd/m2, 250 lux, 75.4 pixels per degree), "
        f"shown at {FPS:g} frames per second whatever the task says, first frame repeated "
        "before the clip, sRGB as decoded.",
        sees=(
            "freeze",
            "stutter",
            "shuffle",
            "reverse",
            "there_and_back",
            "wrong_motion",
            "wrong_clip",
            "flicker",
            "blur",
            "noise",
            "colour_shift",
            "colour_drift",
            "wrong_colour",
            "warp_jitter",
        ),
        blind_to=("quality of a clip that departs from the reference",),
        packages=("pycvvdp",),
        cite="doi:10.1145/3658144",
        symmetric=False,
    )
    _measure: Any = None

    def missing(self) -> str:
        if importlib.util.find_spec("pycvvdp") is None:
            return (
                "cvvdp needs its package; pip install --no-deps cvvdp==0.5.7 (its torchvision is not used)."
            )
        found = importlib.metadata.version("cvvdp")
        if found != VERSION:
            return f"cvvdp {found} is another calibration; pip install --no-deps cvvdp=={VERSION}."
        return ""

    def pair(self, reference: torch.Tensor, clips: torch.Tensor) -> dict[str, list[float]]:
        import torch

        _, frames, height, width, _ = clips.shape
        if min(height, width) < LEAST:
            raise FrameError(
                f"cvvdp needs frames of at least {LEAST}x{LEAST} pixels, got {height}x{width}; use psnr instead"
            )
        if self._measure is None:
            self._measure = _build(torch.device(self.device))
        size = max(1, PIXELS // (frames * height * width)) if clips.device.type == "cuda" else 1
        values: list[float] = []
        with torch.inference_mode():
            for first, second in zip(reference.split(size), clips.split(size), strict=True):
                values += self._measure(second, first)
        return {"jod": values}


def _build(device: torch.device) -> Any:
    """A function of candidate and reference clips `(B, T, H, W, 3)`, float32 in [0, 1], that gives B values."""
    with _LOCK:
        code = _code()
        metric = code.cvvdp(display_name=DISPLAY, quiet=True, device=device, gpu_mem=PIXELS * 400 / 1e9 + 2)

    class Source(code.video_source_array):
        # The package warns through the root logger when a clip is nearly black; ours are in range by now.
        def check_if_valid(self, frame: Any, target_colorspace: str) -> None:
            return

    def measure(clips: torch.Tensor, reference: torch.Tensor) -> list[float]:
        pair = (x.permute(0, 4, 1, 2, 3) for x in (clips, reference))
        source = Source(*pair, FPS, display_photometry=metric.display_photometry)
        value, _ = metric.predict_video_source(source)
        return value.reshape(-1).tolist()

    return measure


@functools.cache
def _code() -> ModuleType:
    """The module of the metric, loaded without the rest of its package.

    Raises:
        UnavailableError: the package is absent or differs from what is known.
    """
    found = importlib.util.find_spec("pycvvdp")
    if found is None or not found.submodule_search_locations:
        raise UnavailableError(f"cvvdp needs its package; pip install --no-deps cvvdp=={VERSION}.")
    front = ModuleType("pycvvdp")
    front.__path__ = list(found.submodule_search_locations)
    stand_ins = {
        "pycvvdp": front,
        "torchvision": ModuleType("torchvision"),
        "torchvision.transforms": _module("torchvision.transforms", GaussianBlur=_GaussianBlur),
        # Not used, and it would load the compiler's set-up tools, which replace parts of the standard library.
        "torch.utils.benchmark": ModuleType("torch.utils.benchmark"),
        # Pictures and videos of intermediate results, never asked for here.
        "pycvvdp.dump_channels": _module("pycvvdp.dump_channels", DumpChannels=None),
        "pycvvdp.visualize_diff_map": _module("pycvvdp.visualize_diff_map", visualize_diff_map=None),
    }
    with _borrowed(stand_ins):
        try:
            return importlib.import_module("pycvvdp.cvvdp_metric")
        except ImportError as error:
            raise UnavailableError(
                f"cvvdp cannot be imported ({error}); pip install --no-deps cvvdp=={VERSION}, and what it names."
            ) from error


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    return module


@contextmanager
def _borrowed(stand_ins: dict[str, ModuleType]) -> Iterator[None]:
    """Puts modules into the interpreter's table; afterwards takes them out, and what the package put there itself."""
    import warnings

    ours = ("pycvvdp", "torchvision", "interp", "third_party")
    path = list(sys.path)

    def table() -> dict[str, ModuleType]:
        return {n: m for n, m in sys.modules.items() if n in stand_ins or n.partition(".")[0] in ours}

    before = table()
    for name in before:
        del sys.modules[name]
    sys.modules.update(stand_ins)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:] = path
        for name in table():
            del sys.modules[name]
        sys.modules.update(before)


class _GaussianBlur:
    """What the metric uses of torchvision: a Gaussian blur over the last two axes, the borders reflected.

    Args:
        size: odd number of taps.
        sigma: in pixels.
    """

    def __init__(self, size: int, sigma: float) -> None:
        import torch

        offsets = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        taps = torch.exp(-0.5 * (offsets / sigma).square())
        self._taps = taps / taps.sum()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """`(N, 1, H, W)`, both sides longer than half the taps."""
        from torch.nn import functional as F

        taps = self._taps.to(maps.device, maps.dtype)
        half = len(taps) // 2
        padded = F.pad(maps, (half, half, half, half), mode="reflect")
        return F.conv2d(F.conv2d(padded, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
