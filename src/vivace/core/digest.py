"""A digest of tensors that is as fast as their memory: made on the device where they lie, in one pass.

It tells whether weights are the same; it is no protection against somebody who wants two sets to look alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CHUNK = 2**18
"""64-bit words hashed at a time: what a processor's cache holds."""
_MASK = 2**64 - 1
_STEP = (0x9E3779B97F4A7C15, 0xD1342543DE82EF95)
"""Odd numbers by which what was seen is multiplied before the next chunk is added, one for each half of the digest."""


def tensors_digest(named: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    """32 bytes that depend on the names, dtypes, shapes and every bit of the values.

    Each chunk of 64-bit words x gives sum_i x_i w_i modulo 2^64 with fixed odd w_i, so a single changed word always
    shows; chunks are joined by a polynomial; two such sums with different w make 128 bits, which are hashed with the
    names. Device and memory layout do not matter.

    Raises:
        ValueError: a tensor is on the meta device and has no values.
    """
    digest = hashlib.sha256()
    weights: dict[Any, Any] = {}
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        for part in _parts(tensor):
            if part.is_meta:
                raise ValueError(f"{name} has no values: it is on the meta device")
            digest.update(_words(part, weights))
    return digest.digest()


def _parts(tensor: Any) -> list[Any]:
    """The plain tensors that one of a quantised kind is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.detach()]
    names, _ = tensor.__tensor_flatten__()
    return [p for name in names for p in _parts(getattr(tensor, name))]


def _words(tensor: torch.Tensor, weights: dict[Any, Any]) -> bytes:
    import torch

    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if rest := -flat.numel() % 8:
        flat = torch.cat([flat, flat.new_zeros(rest)])
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    words = flat.view(torch.int64)
    if words.device not in weights:
        weights[words.device] = _multipliers(words.device)
    sums = [
        torch.stack([(chunk * w[: chunk.numel()]).sum() for chunk in words.split(CHUNK)])
        for w in weights[words.device]
        if words.numel()
    ]
    out = b""
    for step, values in zip(_STEP, sums, strict=False):
        total = 0
        for value in values.tolist():
            total = (total * step + value) & _MASK
        out += total.to_bytes(8, "little")
    return out


def _multipliers(device: Any) -> list[torch.Tensor]:
    """Two rows of fixed odd 64-bit numbers that look random."""
    import torch

    out = []
    for step in _STEP:
        signed = step - 2**64
        x = torch.arange(1, CHUNK + 1, dtype=torch.int64, device=device) * signed
        for _ in range(2):
            x = (x ^ (x >> 29)) * signed
        out.append(x | 1)
    return out
