"""8-bit linear layers whose neighbours run inside the rounding pass and the product, and where they may be put.

A layer rounds its input (`vivace.kernels.quantise_rows`) and multiplies codes (`vivace.kernels.scaled_matmul`). What
stands before it (norm and modulation, GELU) can be handed to its `Rounding`, what stands behind (gate and residual) to
the layer itself, for the next call only: so attention processors, which call `to_q(x)` and `to_out(x)` and know nothing
of this, stay as they are. Layers that take the same tensor share a `Rounding`, and the tensor is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vivace.kernels.quantise_rows.op import quantise_rows
from vivace.kernels.quantise_rows.spec import Before
from vivace.kernels.scaled_matmul.op import scaled_matmul
from vivace.kernels.scaled_matmul.spec import After

Backends = tuple[str, str]
"""Names of a backend of `quantise_rows` and one of `scaled_matmul`."""


class Kernels:
    """Which backends serve the layers of one size: chosen once for every device and type of the input.

    Args:
        choose: (device type, dtype of the input) to names; called outside of compiled code only.
    """

    def __init__(self, choose: Callable[[str, torch.dtype], Backends]) -> None:
        self._choose = choose
        self._known: dict[tuple[str, torch.dtype], Backends] = {}

    def serving(self, device: str, dtype: torch.dtype) -> Backends:
        """The backends for inputs of a type on a device."""
        if (device, dtype) not in self._known:
            self._known[device, dtype] = self._choose(device, dtype)
        return self._known[device, dtype]


class Rounding:
    """Codes of an input, made once for all layers that take it.

    Attributes:
        kind: `int8` or `fp8`.
        users: layers that share it. Codes are dropped when so many have had them.
        gelu: whether GELU (tanh) always comes before.
        before: what comes before in the next call only, on inputs (B, S, K); the taker of the first codes resets it.
    """

    def __init__(self, kind: str, users: int = 1) -> None:
        self.kind, self.users, self.gelu = kind, users, False
        self.before: Before | None = None
        self._input: torch.Tensor | None = None
        self._codes: tuple[torch.Tensor, torch.Tensor] | None = None
        self._left = 0

    def codes(self, x: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (M, K) and scales (M,) of x (..., K)."""
        # The same object, not an equal one: whoever shortens the sequence between two layers hands on a new tensor.
        if self._left and x is self._input and self.before is None and self._codes is not None:
            made = self._codes
            self._left -= 1
            if not self._left:
                self._input = self._codes = None
            return made
        before, self.before = self.before, None
        if before is None and self.gelu:
            before = Before(gelu=True)
        rows = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
        codes, scale = quantise_rows(rows, self.kind, before, backend)
        made = codes.flatten(0, 1), scale.flatten()
        self._left = self.users - 1
        self._input, self._codes = (x, made) if self._left else (None, None)
        return made


class FusedLinear(nn.Linear):
    """A linear layer (K inputs, N outputs) on 8-bit codes; inference only.

    Attributes:
        weight: codes (N, K), int8 or float8_e4m3fn; `scale`: float32 (N,), one to an output channel.
        rounding: how its input is rounded, and who else takes that input.
        after: what comes behind the product in the next call only.
    """

    counts_as_linear = True
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear, rounding: Rounding, kernels: Kernels) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.detach()
        backend, _ = kernels.serving(weight.device.type, weight.dtype)
        codes, scale = quantise_rows(weight[None], rounding.kind, None, backend)
        self.weight = nn.Parameter(codes[0], requires_grad=False)
        self.register_buffer("scale", scale[0])
        self.bias = linear.bias
        self.rounding, self.kernels = rounding, kernels
        self.after: After | None = None
        self.train(linear.training)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.weight.nbytes + self.scale.nbytes

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        first, second = self.kernels.serving(input.device.type, input.dtype)
        codes, scale = self.rounding.codes(input, first)
        after, self.after = self.after, None
        y = scaled_matmul(
            codes, scale, self.weight, self.scale, self.bias, after, input.dtype, second
        )  # fmt: skip
        return y.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.rounding.kind}"


@dataclass(frozen=True, slots=True, eq=False)
class GeluFeedForward:
    """The parts of a feed-forward module with a tanh GELU between two linears.

    Attributes:
        activation: the module that projects up and applies GELU; with `project` as its forward it only projects.
        down: the linear behind it.
    """

    activation: nn.Module
    up: nn.Module
    down: nn.Module

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The activation module without its GELU."""
        return self.up(hidden_states)


def gelu_feed_forward(module: Any) -> GeluFeedForward | None:
    """The parts of diffusers' `FeedForward` where its GELU is the tanh approximation; None for any other module."""
    net = getattr(module, "net", None)
    if net is None or len(net) < 3 or "forward" in vars(net[0]):
        return None
    first, dropout, last = net[0], net[1], net[2]
    if getattr(first, "approximate", None) != "tanh" or not hasattr(first, "proj"):
        return None
    if not isinstance(dropout, nn.Dropout) or (dropout.p and dropout.training):
        return None
    return GeluFeedForward(first, first.proj, last)
