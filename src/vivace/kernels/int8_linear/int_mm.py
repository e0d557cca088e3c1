"""Dynamic W8A8 on `torch._int_mm`, fast without compilation on a CPU with 8-bit dot products."""

from __future__ import annotations

import torch
from torch import nn

from vivace.kernels.int8_linear.spec import LIMIT

ROWS = 256
"""Tokens converted and multiplied at a time on a CPU: their integers stay in its cache."""


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every row to int8 with a scale of its own.

    Args:
        x: (..., K), any float dtype.

    Returns:
        (codes int8 (..., K), scale float32 (..., 1)); a row of zeros has scale 0.
    """
    x = x.float()
    # Two reductions instead of abs().amax(): no copy of x. (torch.aminmax is ten times slower here.)
    top = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    inverse = torch.where(top > 0, LIMIT / top, 0.0)
    return (x * inverse).round_().to(torch.int8), top / LIMIT


class Int8Base(nn.Linear):
    """A linear layer with an int8 weight (N, K) and a float32 scale (N,) per output channel; inference only."""

    scale: torch.Tensor

    def __init__(self, linear: nn.Linear, mode: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        codes, scale = quantise_rows(linear.weight.detach())
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale[:, 0].contiguous())
        self.bias = linear.bias
        self.mode = mode
        self.train(linear.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8 {self.mode}"


class Int8MatmulLinear(Int8Base):
    """See `spec`; mode `dynamic`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input.reshape(-1, self.in_features)
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return self._rows(x).to(input.dtype).unflatten(0, input.shape[:-1])
        out = x.new_empty(x.shape[0], self.out_features)
        for rows, place in zip(x.split(ROWS), out.split(ROWS), strict=True):
            place.copy_(self._rows(rows))
        return out.view(*input.shape[:-1], self.out_features)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """(M, K) -> float32 (M, N)."""
        codes, scale = quantise_rows(x)
        product = torch._int_mm(codes, self.weight.t()).float() * scale
        if self.bias is None:
            return product * self.scale
        return torch.addcmul(self.bias.float(), product, self.scale)


def quantise(linear: nn.Linear, mode: str) -> nn.Linear:
    """See `spec`.

    Raises:
        ValueError: a mode that keeps float activations.
    """
    if mode != "dynamic":
        raise ValueError("the integer product needs mode 'dynamic'; take backend torchao for weight_only.")
    return Int8MatmulLinear(linear, mode)
