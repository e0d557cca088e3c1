"""What a context says of its GPU: reasons that several operations share for refusing a candidate."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any


def on_gpu(context: Mapping[str, Any]) -> bool:
    """Whether the tensors are on a CUDA device."""
    return context.get("device", "cpu") == "cuda"


def capability(context: Mapping[str, Any]) -> tuple[int, int]:
    """Compute capability of the context's GPU (`capability`, or that of the current device)."""
    import torch

    return tuple(context.get("capability") or torch.cuda.get_device_capability())  # type: ignore[return-value]


def without_triton(context: Mapping[str, Any]) -> str | None:
    """Why no Triton kernel runs, or None; without a GPU its interpreter does."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if on_gpu(context) or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "Triton needs a GPU (or TRITON_INTERPRET=1, for tests)"


def too_old(context: Mapping[str, Any], what: str, needs: tuple[int, int]) -> str | None:
    """Why the GPU cannot do something that came with a compute capability; None without a GPU."""
    if not on_gpu(context) or (has := capability(context)) >= needs:
        return None
    return f"{what} need compute capability {needs[0]}.{needs[1]}, and this GPU has {has[0]}.{has[1]}"


def avoid_interpreted(context: Mapping[str, Any]) -> str | None:
    """Why a kernel that is interpreted is not chosen by itself."""
    return None if on_gpu(context) else "Triton's interpreter is for tests"
