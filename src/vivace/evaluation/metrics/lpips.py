"""Learned perceptual image patch similarity (Zhang et al., arXiv:1801.03924), AlexNet or VGG16 backbone.

The `lpips` package brings the small linear heads but fetches the backbone from the network. Here nothing is
fetched: the backbone comes from a file the user names, and without package or file the metric is *skipped*,
with the reason.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vivace.core.errors import WeightsError
from vivace.evaluation.frames import FrameMetric, unit_pair, worst_frame

VERSION = "lpips@1: heads v0.1, RGB scaled to [-1, 1], native resolution, mean over frames"


def lpips(
    reference: Any,
    candidate: Any,
    *,
    weights: str | Path | None = None,
    net: Literal["alex", "vgg"] = "alex",
    device: str = "cpu",
    batch: int = 8,
) -> FrameMetric:
    """LPIPS distance per frame (0 is equal); the clip's value is the mean over frames.

    Args:
        reference, candidate: frames `(T, H, W, 3)`, uint8 or float in [0, 1], of equal shape.
        weights: file with the ImageNet backbone's state dict (`features.N.weight`, `features.N.bias`), as
            `torch.save` or safetensors writes it. None skips the metric.
        net: which backbone the file holds.
        device: torch device that runs the network.
        batch: frames per forward.

    Raises:
        FrameError: a shape, type or range is wrong, or the shapes differ.
        WeightsError: the named file is missing, unreadable, or of another network.
    """
    first, second = unit_pair(reference, candidate)
    if weights is None:
        return _skip(net, "no backbone weights were given, and none are fetched from the network")
    path = Path(weights)
    if not path.is_file():
        raise WeightsError(
            f"the LPIPS weights file {path} does not exist; name an existing file or leave it out"
        )
    try:
        package = importlib.import_module("lpips")
    except ImportError as error:
        return _skip(net, f"the lpips package cannot be imported ({error}); pip install lpips")
    except RuntimeError as error:  # torchvision built for another torch fails while registering its operators
        return _skip(net, f"the lpips package fails to import ({error})")

    import torch

    model = package.LPIPS(net=net, pnet_rand=True, verbose=False)  # pnet_rand: do not download the backbone
    _load_backbone(model.net, path)
    model = model.to(device).eval()
    values: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(first), batch):
            pair = [_to_network(clip[start : start + batch]).to(device) for clip in (first, second)]
            values += model(*pair).flatten().tolist()
    return FrameMetric(
        name="lpips",
        version=f"{VERSION}, {net}",
        unit="",
        higher_is_better=False,
        per_frame=tuple(values),
        pooled=float(np.mean(values)),
        worst=worst_frame(tuple(values), higher_is_better=False),
    )


def _skip(net: str, reason: str) -> FrameMetric:
    return FrameMetric(
        name="lpips", version=f"{VERSION}, {net}", unit="", higher_is_better=False, skipped=reason
    )


def _to_network(frames: np.ndarray) -> Any:
    """`(B, H, W, 3)` in [0, 1] to float32 `(B, 3, H, W)` in [-1, 1], the range the heads were fitted on."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)) * 2.0 - 1.0).float()


def _load_backbone(network: Any, path: Path) -> None:
    """Copies `features.N.*` of the file to `sliceK.N.*` of the network; every parameter must be found."""
    state = _read_state(path)
    mapped = {}
    for key in network.state_dict():
        match = re.search(r"\.(\d+\.(?:weight|bias))$", key)
        source = f"features.{match.group(1)}" if match else key
        if source not in state:
            raise WeightsError(
                f"the LPIPS weights file {path} has no {source}; give the matching ImageNet backbone"
            )
        mapped[key] = state[source]
    try:
        network.load_state_dict(mapped)
    except RuntimeError as error:
        raise WeightsError(
            f"the LPIPS weights file {path} is of another network; check the net argument"
        ) from error


def _read_state(path: Path) -> dict[str, Any]:
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way at all
        raise WeightsError(
            f"the LPIPS weights file {path} cannot be read; save the state dict again"
        ) from error
