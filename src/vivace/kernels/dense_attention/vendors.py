"""The vendors' implementations behind one signature; see `spec`. Each entry of `VENDORS` makes a function."""

# The packages need a GPU and are not there on the machine that checks types.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

T = torch.Tensor
Attend = Callable[..., T]


def _refuse_mask(name: str, mask: T | None) -> None:
    if mask is not None:
        raise ValueError(f"{name} takes no mask; choose a vendor that does (math, efficient).")


def sdpa(backend: SDPBackend) -> Attend:
    """torch's attention on one backend, all others off: what it cannot serve raises a RuntimeError."""

    def attend(q: T, k: T, v: T, mask: T | None = None) -> T:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
        return out.transpose(1, 2)

    return attend


def flex() -> Attend:
    """`torch.nn.attention.flex_attention` without a score modification, compiled for every shape it meets."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def attend(q: T, k: T, v: T, mask: T | None = None) -> T:
        _refuse_mask("flex", mask)
        # Inside somebody's compiled graph the plain function is what belongs there; it is compiled with the rest.
        run = flex_attention if torch.compiler.is_compiling() else compiled
        out = run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        assert isinstance(out, torch.Tensor)
        return out.transpose(1, 2)

    return attend


def flash_attn() -> Attend:
    """FlashAttention-2 of the package `flash-attn` (arXiv 2307.08691)."""
    from flash_attn import flash_attn_func

    def attend(q: T, k: T, v: T, mask: T | None = None) -> T:
        _refuse_mask("flash_attn", mask)
        return flash_attn_func(q, k, v)

    return attend


def flash_attn_3() -> Attend:
    """FlashAttention-3 (arXiv 2407.08608), from its own module."""
    from flash_attn_interface import flash_attn_func

    def attend(q: T, k: T, v: T, mask: T | None = None) -> T:
        _refuse_mask("flash_attn_3", mask)
        out = flash_attn_func(q, k, v)
        # Some versions also return the logarithm of the sum of exponentials.
        return out[0] if isinstance(out, tuple) else out

    return attend


def sage() -> Attend:
    """SageAttention of the package `sageattention` (arXiv 2410.02367)."""
    from sageattention.core import sageattn

    def attend(q: T, k: T, v: T, mask: T | None = None) -> T:
        _refuse_mask("sage", mask)
        # Version 1 subtracts the mean from the keys in place, and these are the caller's.
        k = k.clone(memory_format=torch.contiguous_format)
        return sageattn(q, k, v, tensor_layout="NHD", is_causal=False)

    return attend


VENDORS: Mapping[str, Callable[[], Attend]] = {
    "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    "efficient": lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "math": lambda: sdpa(SDPBackend.MATH),
    "flex": flex,
    "flash_attn": flash_attn,
    "flash_attn_3": flash_attn_3,
    "sage": sage,
}
