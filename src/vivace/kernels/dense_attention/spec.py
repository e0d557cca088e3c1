"""Dense attention: one operation, and every vendor's implementation of it under a name of its own.

    out[b, i, h] = sum_j softmax_j(q[b, i, h] . k[b, j, h] / sqrt(D) + mask[b, h, i, j]) v[b, j, h]

    attend(q, k, v, mask=None) -> out

* q (B, S, H, D), k and v (B, N, H, D), one dtype, any strides, never written to; out like q.
* `mask` is None, bool (True = may be seen) or additive, of a shape that broadcasts to (B, H, S, N). Most vendors take
  none; the context key `mask` says whether there will be one.
* Every name is exactly one implementation. torch's are called with all other backends switched off, so that one that
  cannot serve a call raises instead of handing it to another.

Context: `device` ("cpu", "cuda"), `dtype` (name or torch's), `head_dim`, `mask` (bool), `scores` (query-key pairs of a
row, all heads). What is left out is not judged.

`TOLERANCE` is the largest error against float64 on unit-variance inputs, of those that compute in their inputs' dtype;
`sage` rounds products of queries and keys to 8 bits and is taken only when asked for by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from vivace.kernels.api import Candidate, register

OP = "dense_attention"
TOLERANCE: Mapping[str, float] = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
HALF = ("bfloat16", "float16")
SAGE_DIMS = (64, 96, 128)
"""Head dimensions of SageAttention 1.x (its own check)."""
FLASH_MOST, CUDNN_MOST = 256, 128
"""Largest head dimensions that FlashAttention-2 and cuDNN's forward take on every GPU they run on."""

WRITTEN_OUT = 2**28
"""Scores of a row above which `math`, which writes them to memory, is used only when named: 1 GiB in float32."""

Context = Mapping[str, Any]
Refusal = Callable[[Context], str | None]


def on_gpu(context: Context) -> bool:
    """Whether a context is for CUDA."""
    return str(context.get("device", "cpu")).startswith("cuda")


def dtype_name(context: Context) -> str | None:
    """The context's dtype without `torch.`; None where it says none."""
    return str(context["dtype"]).removeprefix("torch.") if context.get("dtype") is not None else None


def _needs_gpu(context: Context) -> str | None:
    return None if on_gpu(context) else "needs a GPU"


def _needs_half(context: Context) -> str | None:
    name = dtype_name(context)
    return f"takes bfloat16 or float16, not {name}" if name not in (None, *HALF) else None


def _no_mask(context: Context) -> str | None:
    return "takes no mask" if context.get("mask") else None


def _at_most(dims: int) -> Refusal:
    def refuse(context: Context) -> str | None:
        dim = context.get("head_dim", 8)
        return (
            f"takes heads of 8 to {dims} dimensions in steps of 8, not {dim}"
            if dim % 8 or dim > dims
            else None
        )

    return refuse


def _installed(module: str, package: str) -> Refusal:
    def refuse(context: Context) -> str | None:
        return None if importlib.util.find_spec(module) else f"{package} is not installed"

    return refuse


def _capable(least: tuple[int, int], most: tuple[int, int] = (99, 0)) -> Refusal:
    """Refuses GPUs outside a range of compute capabilities. Only asked on a machine with one."""

    def refuse(context: Context) -> str | None:
        import torch

        if not on_gpu(context) or not torch.cuda.is_available():
            return None
        found = torch.cuda.get_device_capability(torch.device(str(context["device"])))
        if least <= found <= most:
            return None
        return f"is not made for compute capability {found[0]}.{found[1]}"

    return refuse


def _first(*refusals: Refusal) -> Refusal:
    """The first reason of several."""

    def refuse(context: Context) -> str | None:
        return next((reason for r in refusals if (reason := r(context))), None)

    return refuse


def _gpu_only(refusal: Refusal) -> Refusal:
    return lambda context: refusal(context) if on_gpu(context) else None


def _refuse_sage_dims(context: Context) -> str | None:
    dim = context.get("head_dim", SAGE_DIMS[0])
    return (
        f"takes heads of {', '.join(map(str, SAGE_DIMS))} dimensions, not {dim}"
        if dim not in SAGE_DIMS
        else None
    )


def _refuse_efficient_dims(context: Context) -> str | None:
    step = 8 if dtype_name(context) in HALF else 4
    dim = context.get("head_dim", step)
    return f"takes heads of a multiple of {step} dimensions, not {dim}" if dim % step else None


def _refuse_efficient_dtype(context: Context) -> str | None:
    return "takes no float64" if dtype_name(context) == "float64" else None


def _refuse_flex(context: Context) -> str | None:
    if not on_gpu(context):
        there = any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++"))
        return None if there else "compiled flex_attention needs a C++ compiler on a CPU"
    small = context.get("head_dim", 16) < 16
    return "flex_attention on a GPU needs heads of at least 16 dimensions" if small else None


def _avoid_flex(context: Context) -> str | None:
    return None if on_gpu(context) else "compiles for seconds on a CPU and is no faster there"


def _avoid_sage(context: Context) -> str | None:
    return "rounds products of queries and keys to 8 bits: taken only when asked for by name"


def _avoid_math(context: Context) -> str | None:
    if (scores := context.get("scores", 0)) <= WRITTEN_OUT:
        return None
    return f"writes all scores to memory, {scores * 4 / 2**30:.0f} GiB: taken only when asked for by name"


def _never(context: Context) -> str | None:
    return None


def _load(name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        return importlib.import_module(f"vivace.kernels.{OP}.vendors").VENDORS[name]()

    return load


_HALF_ON_GPU = _first(_needs_gpu, _needs_half, _no_mask)
_REFUSALS: Mapping[str, Refusal] = {
    "cudnn": _first(_needs_gpu, _needs_half, _at_most(CUDNN_MOST), _capable((8, 0))),
    "flash": _gpu_only(_first(_needs_half, _no_mask, _at_most(FLASH_MOST), _capable((8, 0)))),
    "flash_attn_3": _first(
        _installed("flash_attn_interface", "flash_attn_interface (FlashAttention-3)"),
        _HALF_ON_GPU,
        _at_most(FLASH_MOST),
        _capable((9, 0), (9, 9)),
    ),
    "flash_attn": _first(
        _installed("flash_attn", "flash-attn"), _HALF_ON_GPU, _at_most(FLASH_MOST), _capable((8, 0))
    ),
    "efficient": _first(_needs_gpu, _refuse_efficient_dtype, _refuse_efficient_dims),
    "flex": _first(_refuse_flex, _no_mask),
    "sage": _first(_installed("sageattention", "sageattention"), _HALF_ON_GPU, _refuse_sage_dims),
    "math": _never,
}
"""In order of preference: where nothing was measured, the fastest on the GPUs of the day first."""

for _name, _refusal in _REFUSALS.items():
    _avoid = {"flex": _avoid_flex, "sage": _avoid_sage, "math": _avoid_math}.get(_name, _never)
    register(OP, Candidate(_name, _refusal, _load(_name), _avoid))
