"""The obviously right implementation: quantise, dequantise, multiply in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vivace.kernels.int8_linear.int_mm import Int8Base, quantise_rows


class Int8Reference(Int8Base):
    """See `spec`; both modes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input.double()
        if self.mode == "dynamic":
            codes, scale = quantise_rows(input)
            x = codes.double() * scale.double()
        weight = self.weight.double() * self.scale.double()[:, None]
        return F.linear(x, weight, None if self.bias is None else self.bias.double()).to(input.dtype)


def quantise(linear: nn.Linear, mode: str) -> nn.Linear:
    """See `spec`."""
    return Int8Reference(linear, mode)
