"""Learned perceptual image patch similarity (Zhang et al., arXiv:1801.03924), AlexNet or VGG16 backbone.

The networks are written out here, so that neither torchvision nor the `lpips` package is needed; the weights are the
published ones (`vivace.evaluation.weights`). Without weights the metric is *skipped*, with the reason.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from vivace.core.errors import WeightsError
from vivace.evaluation import weights as store
from vivace.evaluation.frames import FrameError, FrameMetric, unit_pair, worst_frame
from vivace.evaluation.metrics.base import Backbone, Better, Group, MetricCard, PairMetric, Scope, Series

if TYPE_CHECKING:
    import torch

Net = Literal["alex", "vgg"]
VERSION = "lpips@1: RGB scaled to [-1, 1], linear heads v0.1, mean over positions, mean over frames"
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Mean and deviation of ImageNet for values in [-1, 1], as the heads were fitted."""
EPSILON = 1e-10
LEAST = {"alex": 31, "vgg": 16}
"""Shortest side, in pixels, that leaves a position in the last layer."""
BATCH = 32
"""Frames of one clip in a forward pass."""

# Convolutions (channels, kernel, stride, padding); "P": max pooling (kernel, stride); "T": a feature map is taken here.
_ALEX = (
    [(64, 11, 4, 2), "T", ("P", 3, 2), (192, 5, 1, 2), "T", ("P", 3, 2)]
    + [(384, 3, 1, 1), "T", (256, 3, 1, 1), "T", (256, 3, 1, 1), "T"]
)  # fmt: skip
_VGG = [
    part
    for block, (channels, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)])
    for part in ([("P", 2, 2)] if block else []) + [(channels, 3, 1, 1)] * count + ["T"]
]
_LAYERS: dict[str, list[Any]] = {"alex": _ALEX, "vgg": _VGG}


class Network:
    """LPIPS as a function of two stacks of frames.

    Args:
        net: backbone.
        state: `features.<layer>.weight`, `features.<layer>.bias` and `heads.<k>`, as `vivace.evaluation.weights.load`
            gives them.
        device: where it runs.

    Raises:
        KeyError: a tensor is absent.
        ValueError: a tensor has the shape of another network.
    """

    def __init__(self, net: Net, state: dict[str, torch.Tensor], device: Any = "cpu") -> None:
        import torch

        self.net = net
        self._steps: list[Any] = []
        layer, channels, widths = 0, 3, []
        for part in _LAYERS[net]:
            if part == "T":
                widths.append(channels)
                self._steps.append("T")
            elif part[0] == "P":
                self._steps.append(part)
                layer += 1
            else:
                width, kernel, stride, padding = part
                weight, bias = state[f"features.{layer}.weight"], state[f"features.{layer}.bias"]
                if tuple(weight.shape) != (width, channels, kernel, kernel) or tuple(bias.shape) != (width,):
                    raise ValueError(f"features.{layer} has the shape of another network")
                self._steps.append((weight.float().to(device), bias.float().to(device), stride, padding))
                layer, channels = layer + 2, width  # a rectifier counts as a layer in the usual numbering
        self._heads = [state[f"heads.{k}"].float().to(device).view(1, -1, 1, 1) for k in range(len(widths))]
        if [head.shape[1] for head in self._heads] != widths:
            raise ValueError("the heads belong to another network")
        self._shift = torch.tensor(SHIFT, device=device).view(1, 3, 1, 1)
        self._scale = torch.tensor(SCALE, device=device).view(1, 3, 1, 1)

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Distances (N,) of frames `(N, H, W, 3)`, float32 in [0, 1]."""
        import torch

        with torch.inference_mode(), _full_precision():
            maps = self._maps(torch.cat((first, second)))
            total = first.new_zeros(len(first))
            for features, head in zip(maps, self._heads, strict=True):
                one, two = (features / (features.square().sum(1, keepdim=True).sqrt() + EPSILON)).chunk(2)
                total = total + ((one - two).square() * head).sum(1).mean(dim=(1, 2))
            return total

    def _maps(self, frames: torch.Tensor) -> list[torch.Tensor]:
        from torch.nn import functional as F

        x = (frames.permute(0, 3, 1, 2) * 2.0 - 1.0 - self._shift) / self._scale
        maps = []
        for step in self._steps:
            if step == "T":
                maps.append(x)
            elif step[0] == "P":
                x = F.max_pool2d(x, step[1], step[2])
            else:
                weight, bias, stride, padding = step
                x = F.relu(F.conv2d(x, weight, bias, stride, padding))
        return maps


def _full_precision() -> contextlib.AbstractContextManager[Any]:
    """TF32 convolutions move the value in the third digit."""
    import torch

    if not torch.backends.cudnn.is_available():
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def _card(net: Net, title: str) -> MetricCard:
    name = f"lpips_{net}"
    known = store.known[name]
    about = "Perceptual distance, mean over the frames."
    return MetricCard(
        name=name,
        version=1,
        title=f"LPIPS ({title})",
        scope=Scope.PAIR,
        group=Group.FIDELITY,
        series=(
            Series(name=name, better=Better.LOWER, low=0.0, about=about),
            Series(name=f"{name}_worst", better=Better.LOWER, low=0.0, about="Of the frame farthest off."),
        ),
        convention="RGB scaled to [-1, 1], whole frames at their own size, linear heads v0.1, unit-normalised "
        "features, mean over positions, sum over layers, float32 without TF32.",
        sees=(
            "freeze",
            "stutter",
            "shuffle",
            "reverse",
            "there_and_back",
            "wrong_motion",
            "wrong_clip",
            "blur",
            "noise",
            "wrong_colour",
            "warp_jitter",
        ),
        blind_to=("flicker", "quality of a clip that departs from the reference"),
        backbone=Backbone(
            name=f"{title}, ImageNet, with LPIPS v0.1 heads",
            sha256=known.sha256,
            licence=known.licence,
            source=known.source,
        ),
        cite="arXiv:1801.03924",
        symmetric=True,
    )


class Lpips(PairMetric):
    """LPIPS with AlexNet: the variant that papers report."""

    net: ClassVar[Net] = "alex"
    card: ClassVar[MetricCard] = _card("alex", "AlexNet")
    _network: Network | None = None

    def missing(self) -> str:
        return store.missing(self.card.name)

    def pair(self, reference: torch.Tensor, clips: torch.Tensor) -> dict[str, list[float]]:
        _check_size(self.net, *clips.shape[2:4])
        if self._network is None:
            self._network = Network(self.net, store.load(self.card.name), self.device)
        mean, worst = [], []
        # Clip by clip, so that a clip's value does not depend on what lies in the batch beside it.
        for first, second in zip(reference, clips, strict=True):
            values = _frames(self._network, first, second, BATCH)
            mean.append(float(np.mean(values)))
            worst.append(max(values))
        return {self.card.name: mean, f"{self.card.name}_worst": worst}


class LpipsVgg(Lpips):
    """LPIPS with VGG16: less forgiving of compression and noise."""

    net: ClassVar[Net] = "vgg"
    card: ClassVar[MetricCard] = _card("vgg", "VGG16")


def lpips(
    reference: Any,
    candidate: Any,
    *,
    weights: str | Path | None = None,
    net: Net = "alex",
    device: str = "cpu",
    batch: int = 8,
) -> FrameMetric:
    """LPIPS distance per frame (0 is equal); the clip's value is the mean over frames.

    Args:
        reference, candidate: frames `(T, H, W, 3)`, uint8 or float in [0, 1], of equal shape.
        weights: file with the ImageNet backbone's state dict (`features.N.weight`, `features.N.bias`), as
            `torch.save` or safetensors writes it; it may hold the heads too (`heads.K`). None takes the
            fetched weights, or skips the metric when there are none.
        net: which backbone the file holds.
        device: torch device that runs the network.
        batch: frames per forward.

    Raises:
        FrameError: a shape, type or range is wrong, or the shapes differ, or a side is too short.
        WeightsError: the named file is missing, unreadable, or of another network.
    """
    import torch

    first, second = unit_pair(reference, candidate)
    state = {} if weights is None else _read_state(Path(weights))
    absent = store.missing(f"lpips_{net}")
    if absent and weights is None:
        return _skip(net, f"no backbone weights were given, and {absent}")
    if absent and "heads.0" not in state:
        return _skip(net, f"the weights file has no linear heads, and {absent}")
    _check_size(net, *first.shape[1:3])
    fetched = {} if absent else store.load(f"lpips_{net}")
    if weights is not None:  # the backbone comes from one place alone
        state = {k: v for k, v in fetched.items() if k.startswith("heads.")} | state
    try:
        network = Network(net, state or fetched, device)
    except KeyError as error:
        raise WeightsError(
            f"the LPIPS weights file {weights} has no {error.args[0]}; give the matching ImageNet backbone"
        ) from error
    except ValueError as error:
        raise WeightsError(
            f"the LPIPS weights file {weights} is of another network; check the net argument"
        ) from error
    one, two = (torch.from_numpy(clip).float().to(device) for clip in (first, second))
    values = _frames(network, one, two, batch)
    return FrameMetric(
        name="lpips",
        version=f"{VERSION}, {net}",
        unit="",
        higher_is_better=False,
        per_frame=tuple(values),
        pooled=float(np.mean(values)),
        worst=worst_frame(tuple(values), higher_is_better=False),
    )


def _frames(network: Network, first: torch.Tensor, second: torch.Tensor, batch: int) -> list[float]:
    """Distances of the frames of two clips `(T, H, W, 3)`."""
    parts = zip(first.split(batch), second.split(batch), strict=True)
    return [value for one, two in parts for value in network(one, two).tolist()]


def _check_size(net: Net, height: int, width: int) -> None:
    if min(height, width) < LEAST[net]:
        raise FrameError(
            f"lpips_{net} needs frames of at least {LEAST[net]}x{LEAST[net]} pixels, got {height}x{width}; "
            "use psnr instead"
        )


def _skip(net: str, reason: str) -> FrameMetric:
    return FrameMetric(
        name="lpips", version=f"{VERSION}, {net}", unit="", higher_is_better=False, skipped=reason
    )


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    import torch

    if not path.is_file():
        raise WeightsError(
            f"the LPIPS weights file {path} does not exist; name an existing file or leave it out"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way at all
        raise WeightsError(
            f"the LPIPS weights file {path} cannot be read; save the state dict again"
        ) from error
