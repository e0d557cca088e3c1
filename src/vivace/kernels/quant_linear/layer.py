"""The layer: codes in the place of a weight, and what stands around the product."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from vivace.kernels.quant_linear import formats
from vivace.kernels.quant_linear.rotation import Rotation
from vivace.kernels.quant_linear.spec import Recipe

EXACT_SVD = 512
"""Up to this smaller side a branch is cut from the whole decomposition; above, from iterated subspaces."""
ITERATIONS, SPARE = 6, 16
"""Of the subspace iteration: repetitions, and columns beside the rank (Halko et al., arXiv 0909.4061)."""


class Thin(nn.Module):
    """A product with a matrix (out, in) of 16-bit numbers, in the type of its input; counted like a linear layer."""

    counts_as_linear = True

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: str | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        empty = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(M, in) to (M, out)."""
        return F.linear(x, self.weight.to(x.dtype))


class QuantLinear(nn.Linear):
    """A linear layer (K inputs, N outputs) by a recipe (`spec`); inference only. Backends are subclasses.

    Attributes:
        weight: codes (`formats.Codes.values`), of any shape the format asks for.
        scale, outer: their scales.
        smooth: float32 (K,), what inputs are multiplied by, 1 / s; None without smoothing.
        full: while True, the layer computes with `original`, which must then be there.
        original: the weight before, on any device; None where it is not kept.
        original_bias: the bias before, where training has changed it; None where `bias` is it.

    Args:
        branch: type of the low-rank branch, a 16-bit one.
        smoothed: whether there is a smoothing vector.
        device: where the empty tensors are; `from_linear` fills them.
    """

    backend = ""
    scale: torch.Tensor
    outer: torch.Tensor | None
    smooth: torch.Tensor | None
    original: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        recipe: Recipe,
        *,
        branch: torch.dtype = torch.bfloat16,
        smoothed: bool = False,
        device: str | None = "meta",
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.recipe, self.full, self.original = recipe, False, None
        self.original_bias: torch.Tensor | None = None
        empty = torch.empty(out_features, in_features, device="meta")
        codes = formats.quantise(empty, recipe.weights, recipe.group, tensor=recipe.weights == "nvfp4")
        values, scale = (torch.empty_like(t, device=device) for t in (codes.values, codes.scale))
        self._put(
            values, scale, None if codes.outer is None else torch.empty_like(codes.outer, device=device)
        )
        self.register_buffer("smooth", torch.empty(in_features, device=device) if smoothed else None)
        rank = min(recipe.low_rank, min(in_features, out_features) // 2)
        self.rotation = Rotation(in_features) if recipe.rotate else None
        self.down = Thin(in_features, rank, branch, device) if rank else None
        self.up = Thin(rank, out_features, branch, device) if rank else None

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, recipe: Recipe, smooth: torch.Tensor | None = None) -> Self:
        """A layer in the place of `linear`, which is left alone; the bias object is the same.

        Args:
            smooth: s, float (K,), positive: inputs are divided by it and weights multiplied.
        """
        kind = linear.weight.dtype
        half = kind if kind in (torch.bfloat16, torch.float16) else torch.bfloat16
        new = cls(linear.in_features, linear.out_features, recipe, branch=half, smoothed=smooth is not None)
        weight = linear.weight.detach().float()
        if smooth is not None:
            new.smooth = 1.0 / smooth.to(device=weight.device, dtype=torch.float32)
            weight = weight / new.smooth
        if new.rotation is not None:
            new.rotation.to(weight.device)
            weight = new.rotation(weight)
        if new.down is not None and new.up is not None:
            left, right = low_rank(weight, new.down.out_features)
            # In rows, as they come back from a file: another layout would add up in another order.
            new.down.weight = nn.Parameter(right.to(half).contiguous(), requires_grad=False)
            new.up.weight = nn.Parameter(left.to(half).contiguous(), requires_grad=False)
            # What rounding the branch to 16 bits loses is left to the codes.
            weight = weight - new.up.weight.float() @ new.down.weight.float()
        new._put(
            *_tensors(
                formats.quantise(weight, recipe.weights, recipe.group, tensor=recipe.weights == "nvfp4")
            )
        )
        new.bias = linear.bias
        return new.train(linear.training)

    def _put(self, values: torch.Tensor, scale: torch.Tensor, outer: torch.Tensor | None) -> None:
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("outer", outer)

    @property
    def codes(self) -> formats.Codes:
        """The weight as the format has it."""
        return formats.Codes(self.recipe.weights, self.in_features, self.weight, self.scale, self.outer)

    @property
    def nbytes(self) -> int:
        """Bytes of everything but the bias and a kept original."""
        parts = [
            self.weight,
            *self.buffers(),
            *(p for m in (self.down, self.up) if m for p in m.parameters()),
        ]
        return sum(p.nbytes for p in parts)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.full and self.original is not None:
            bias = self.bias if self.original_bias is None else self.original_bias.to(input.device)
            return F.linear(input, self.original.to(input.device), bias)
        x = input.reshape(-1, self.in_features)
        if self.smooth is not None:
            x = x * self.smooth
        if self.rotation is not None:
            x = self.rotation(x.float())
        out = self.product(x, input.dtype)
        if self.down is not None and self.up is not None:
            out = out + self.up(self.down(x.to(input.dtype)))
        if self.bias is not None:
            out = out + self.bias
        return out.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The quantised product of x (M, K): (M, N) in float32 or `dtype`, without branch and bias."""
        raise TypeError(f"{type(self).__name__} does not multiply")

    def extra_repr(self) -> str:
        r = self.recipe
        parts = [super().extra_repr(), f"{r.weights}/{r.activations}", self.backend]
        told = {f"group={r.group}": r.group, "rotated": r.rotate, f"rank={r.low_rank}": r.low_rank}
        parts += [text for text, value in told.items() if value]
        return ", ".join(parts)


def _tensors(codes: formats.Codes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return codes.values, codes.scale, codes.outer


def low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest product of rank `rank` to a float32 (N, K): left (N, rank) and right (rank, K), float32.

    Large matrices are decomposed by subspace iteration from a fixed start: the result is the same every time.
    """
    if min(weight.shape) > EXACT_SVD:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(weight.shape[1], rank + SPARE, generator=generator).to(weight.device)
        basis = torch.linalg.qr(weight @ start)[0]
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis)[0])[0]
        u, s, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
        u = basis @ u
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def smoothing(inputs: torch.Tensor, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """SmoothQuant's vector s_j = max|x_j| ** strength / max|W_j| ** (1 - strength), float32 (K,).

    Args:
        inputs: largest magnitude of every input channel, (K,).
        weight: (N, K).
        strength: 0 to 1. Channels that are always 0 on either side keep 1.
    """
    tops = weight.detach().float().abs().amax(0)
    inputs = inputs.to(device=tops.device, dtype=torch.float32)
    s = inputs.pow(strength) / tops.pow(1.0 - strength)
    return torch.where((inputs > 0) & (tops > 0) & torch.isfinite(s) & (s > 0), s, 1.0)
