"""Rotation of input channels by a block Hadamard matrix with signs."""

from __future__ import annotations

import torch
from torch import nn

MOST = 1024
"""Largest block: two factors of 32, so that a rotation costs 64 multiply-adds a value, whatever the layer's width."""


def block_of(columns: int) -> int:
    """Size of the blocks: the largest power of two that divides the number of columns, `MOST` at most."""
    return min(columns & -columns, MOST)


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix over sqrt(size): float32 (size, size), symmetric and its own inverse.

    Raises:
        ValueError: the size is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of this kind has a power of two as its size, not {size}")
    out = torch.ones(1, 1)
    while out.shape[0] < size:
        out = torch.cat((torch.cat((out, out), 1), torch.cat((out, -out), 1)), 0)
    return out / size**0.5


def signs(columns: int) -> torch.Tensor:
    """+1 or -1 for each column, the same for every layer of a width: int8 (columns,).

    They keep a mean that all channels share from falling into one channel. A bit of a multiplicative hash of the
    column's number, so that no generator has a say.
    """
    numbers = torch.arange(1, columns + 1, dtype=torch.int64) * 0x9E3779B1 & 0xFFFFFFFF
    numbers = (numbers ^ (numbers >> 15)) * 0x85EBCA6B & 0xFFFFFFFF
    return (1 - 2 * (numbers >> 31 & 1)).to(torch.int8)


class Rotation(nn.Module):
    """x (M, K) to x diag(signs) H, H block diagonal; the inverse of H is H.

    A block of size a * b is the Kronecker product of two smaller matrices, which are applied one after the other.
    """

    counts_as_linear = True
    signs: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        size = block_of(columns)
        a = 1 << ((size.bit_length() - 1) // 2)
        self.in_features, self.out_features = columns, a + size // a
        with torch.device("cpu"):  # not on the meta device, where loaders build layers
            for name, value in (
                ("signs", signs(columns)),
                ("left", hadamard(a)),
                ("right", hadamard(size // a)),
            ):
                self.register_buffer(name, value, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (M, K) to float32 (M, K)."""
        y = (x * self.signs).view(-1, self.left.shape[0], self.right.shape[0]) @ self.right
        if x.device.type != "cuda":
            return (self.left @ y).reshape(x.shape)
        # From the left it is one small product a row there; from the right one large product.
        return (y.mT.contiguous() @ self.left).mT.reshape(x.shape)
