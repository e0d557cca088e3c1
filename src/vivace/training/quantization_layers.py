"""Linear layers that round as `quantized_linear` will, and learn through the rounding.

The forward pass has the numbers of `vivace.kernels.quant_linear`: the same rotation, the same scales (one a token for
activations, one a row or a group for weights), the same rounding, and the same branch in 16 bits. The backward pass
takes rounding for the identity (straight-through estimator, arXiv 1308.3432), as scales follow the largest value and
nothing is clipped.

Beside the codes stands a branch L diag(g) R of the rotated input, QVGen's auxiliary module (arXiv 2505.11497): it
starts as what rounding the weights loses, keeps the first steps of training near the exact network, and is annealed
away rank by rank (`RankSchedule`). The columns that a recipe's own low-rank branch asks for stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vivace.kernels.quant_linear import formats
from vivace.kernels.quant_linear.layer import low_rank
from vivace.kernels.quant_linear.rotation import Rotation, block_of, hadamard, signs
from vivace.kernels.quant_linear.spec import INTEGERS, Recipe


def rounded_weight(weight: Tensor, recipe: Recipe) -> Tensor:
    """What a weight float32 (N, K) becomes: float32 (N, K), as `formats` reads its codes back."""
    if recipe.weights == "nvfp4":
        return _nvfp4(weight, weight.abs().amax().view(1, 1, 1))
    if recipe.weights not in INTEGERS:
        codes = formats.quantise(weight, recipe.weights)
        return formats.dequantise(codes)
    # The same steps without packing, which training would only undo.
    rows, columns = weight.shape
    width = formats.width_of(recipe.weights, columns, recipe.group)
    blocks = F.pad(weight, (0, -columns % width)).view(rows, -1, width)
    top = formats.LARGEST[recipe.weights]
    scale = blocks.abs().amax(-1, keepdim=True) / top
    if recipe.group:
        scale = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    codes = torch.where(scale > 0, blocks / scale, 0.0).round().clamp(-top, top)
    return (codes * scale).view(rows, -1)[:, :columns]


def rounded_tokens(x: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """Codes of every row of x float32 (M, K) and their scale (M, 1); read-back values and None without integers."""
    if name == "nvfp4":
        return _nvfp4(x, x.abs().amax(-1).view(-1, 1, 1)), None
    if name not in INTEGERS:
        return (x if name == "none" else formats.rounded(x, name)), None
    return formats.integers(x, name)


def _nvfp4(x: Tensor, top: Tensor) -> Tensor:
    """A matrix float32 (M, K) to NVFP4 and back, as `formats` does it, without packing.

    Args:
        top: largest magnitudes that the outer scales follow, (M, 1, 1) or (1, 1, 1).
    """
    width, most = formats.BLOCK["nvfp4"], formats.LARGEST["nvfp4"]
    highest = torch.finfo(formats.E4M3).max
    blocks = F.pad(x, (0, -x.shape[1] % width)).view(x.shape[0], -1, width)
    outer = top / (most * highest)
    scale = torch.where(outer > 0, blocks.abs().amax(-1, keepdim=True) / most / outer, 0.0)
    scale = scale.clamp(max=highest).to(formats.E4M3).float()
    step = scale * outer
    ratio = torch.where(step > 0, blocks / step, 0.0)
    size = ratio.abs()
    # Between powers of two e2m1 is an even grid: halves below 2, ones below 4, twos above.
    grid = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    value = ((ratio / grid).round() * grid).clamp(-most, most)
    return (value * scale * outer).view(x.shape[0], -1)[:, : x.shape[1]]


class RoundedProduct(torch.autograd.Function):
    """Q(x) Q(w)^T of x (M, K) and w (N, K), both float32, by a recipe; gradients as if nothing were rounded."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, recipe: Recipe, low: torch.dtype | None) -> Tensor:  # type: ignore[override]
        """Float32 (M, N). `low`: type of the products of the backward pass (and of weight-only ones), or None."""
        codes, scale = rounded_tokens(x, recipe.activations)
        weight = rounded_weight(weight, recipe)
        ctx.save_for_backward(codes, scale, weight)
        ctx.low = low or torch.float32
        if scale is None:
            if recipe.activations == "none":
                return F.linear(codes.to(ctx.low), weight.to(ctx.low)).float()
            return F.linear(codes, weight)
        # Integer codes, and 4-bit ones times a bf16 scale, are exact in TF32; the token's scale comes afterwards.
        return F.linear(codes.float(), weight) * scale

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        codes, scale, weight = ctx.saved_tensors
        gradient = gradient.to(ctx.low)
        to_input = (gradient @ weight.to(ctx.low)).float()
        if scale is not None:
            gradient = (gradient * scale).to(ctx.low)
        to_weight = (gradient.t() @ codes.to(ctx.low)).float()
        return to_input, to_weight, None, None


@dataclass(frozen=True, kw_only=True)
class RankSchedule:
    """How many auxiliary ranks there are, and how strong those are that go.

    Ranks are halved (`shrink`) in stages of equal length between the progress `start` and `stop` of a run; within a
    stage the weight of those that go falls from 1 to 0 along a cosine.

    Raises:
        ValueError: a rank below 0, or times that are not in order.
    """

    rank: int = 32
    shrink: float = 0.5
    start: float = 0.05
    stop: float = 0.65

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0.0 < self.shrink < 1.0 or not 0.0 <= self.start < self.stop <= 1.0:
            raise ValueError(f"there is no schedule of {self}")

    @property
    def ranks(self) -> list[int]:
        """Ranks at the start of every stage, and 0."""
        out = [self.rank]
        while out[-1] > 0:
            out.append(int(out[-1] * self.shrink))
        return out

    def at(self, progress: float) -> tuple[int, int, int, float]:
        """(stage, ranks that there are, ranks that stay, weight of those that go); (stages, 0, 0, 0) when all went."""
        ranks = self.ranks
        stages = len(ranks) - 1
        passed = (progress - self.start) / (self.stop - self.start) * stages
        stage = max(0, min(stages, math.floor(passed)))
        if stage == stages:
            return stages, 0, 0, 0.0
        weight = 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, passed - stage))))
        return stage, ranks[stage], ranks[stage + 1], weight


class StudentLinear(nn.Linear):
    """In the place of a linear layer (K inputs, N outputs) while it learns to live with a recipe's rounding.

    Weights are kept in the basis in which they are rounded: smoothed and rotated, without the branch.

    Attributes:
        weight: float32 (N, K), a parameter; fixed in LoRA mode.
        lora_down, lora_up: (rank, K) and (N, rank) in LoRA mode, added to the weight before it is rounded.
        down, up: R (ranks, K) and L (N, ranks) of the branch; None without any.
        gain: (ranks,), how strong each rank of the branch is.
        used: ranks that are computed; the others have no weight.
        keep: ranks of the recipe's own branch.
        smooth: float32 (K,), what inputs are multiplied by, or None.

    Args:
        linear: the exact layer; it is left alone.
        auxiliary: ranks of the auxiliary branch.
        lora: rank of the trained deltas; 0 trains the whole weight.
        smooth: s of SmoothQuant, float (K,).
    """

    down: nn.Parameter | None
    up: nn.Parameter | None
    gain: Tensor
    smooth: Tensor | None
    hadamard: Tensor
    signs: Tensor

    @torch.no_grad()
    def __init__(
        self,
        linear: nn.Linear,
        recipe: Recipe,
        *,
        auxiliary: int = 0,
        lora: int = 0,
        smooth: Tensor | None = None,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.recipe, device = recipe, linear.weight.device
        weight = linear.weight.detach().float().clone()
        self.register_buffer("smooth", None if smooth is None else 1.0 / smooth.to(device).float())
        if self.smooth is not None:
            weight = weight / self.smooth
        self.rotation = Rotation(self.in_features).to(device) if recipe.rotate else None
        if self.rotation is not None:
            weight = self.rotation(weight)
            size = block_of(self.in_features)
            self.register_buffer("hadamard", hadamard(size).to(device), persistent=False)
            self.register_buffer("signs", signs(self.in_features).float().to(device), persistent=False)
        most = min(self.in_features, self.out_features) // 2
        self.keep = min(recipe.low_rank, most)
        ranks = self.keep + max(0, min(auxiliary, most - self.keep))
        up, down = weight.new_zeros(self.out_features, ranks), weight.new_zeros(ranks, self.in_features)
        if self.keep:
            up[:, : self.keep], down[: self.keep] = _low_rank(weight, self.keep)
            weight = weight - _half(up) @ _half(down)
        if ranks > self.keep:
            lost = weight - rounded_weight(weight, recipe)
            up[:, self.keep :], down[self.keep :] = _low_rank(lost, ranks - self.keep)
        self.up, self.down = (nn.Parameter(up), nn.Parameter(down)) if ranks else (None, None)
        self.register_buffer("gain", torch.ones(ranks, device=device))
        self.used = ranks
        self.weight = nn.Parameter(weight, requires_grad=not lora)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float().clone())
        self.lora_down = self.lora_up = None
        if lora:
            start = torch.randn(lora, self.in_features, device=device) / self.in_features**0.5
            self.lora_down = nn.Parameter(start)
            self.lora_up = nn.Parameter(torch.zeros(self.out_features, lora, device=device))

    def latent(self) -> Tensor:
        """The weight that is rounded, float32 (N, K)."""
        if self.lora_up is None or self.lora_down is None:
            return self.weight
        return torch.addmm(self.weight, self.lora_up, self.lora_down)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        mixed = torch.is_autocast_enabled(kind)
        low = torch.get_autocast_dtype(kind) if mixed else input.dtype
        with torch.autocast(kind, enabled=False):
            # As the layer of a model in 16 bits would get it.
            x = input.reshape(-1, self.in_features).to(low)
            if self.smooth is not None:
                x = x * self.smooth
            if self.rotation is not None:
                x = self._rotated(x.float())
            out = RoundedProduct.apply(x.float(), self.latent(), self.recipe, low)
            if self.up is not None and self.down is not None and self.used:
                thin = F.linear(x.to(low), _half(self.down[: self.used]).to(low))
                if self.used > self.keep:
                    thin = thin * self.gain[: self.used].to(low)
                out = out + F.linear(thin, _half(self.up[:, : self.used]).to(low))
            if self.bias is not None:
                out = out + self.bias
            return out.to(low).view(*input.shape[:-1], self.out_features)

    def _rotated(self, x: Tensor) -> Tensor:
        """As `Rotation`, on a GPU by one product: +-1/sqrt(size) and inputs of bf16 are exact in TF32."""
        assert self.rotation is not None
        if x.device.type != "cuda":
            return self.rotation(x)
        y = (x * self.signs).view(-1, self.hadamard.shape[0])
        return (y @ self.hadamard).view(x.shape)

    @torch.no_grad()
    def sort_branch(self, auxiliary: int) -> None:
        """Write the branch as its singular vectors, the strongest first, cut to the ranks that there still are."""
        self.use(auxiliary)
        if self.up is None or self.down is None:
            return
        ranks = self.used
        q_up, r_up = torch.linalg.qr(self.up * self.gain)
        q_down, r_down = torch.linalg.qr(self.down.T)
        u, s, vh = torch.linalg.svd(r_up @ r_down.T)
        root = s.sqrt()
        root[ranks:] = 0.0
        self.up.copy_(q_up @ (u * root))
        self.down.copy_((root[:, None] * vh) @ q_down.T)
        self.gain.fill_(1.0)
        self.gain[ranks:] = 0.0

    def use(self, auxiliary: int) -> None:
        """Compute so many auxiliary ranks and no more."""
        self.used = min(self.keep + auxiliary, self.gain.numel())

    def set_gain(self, ranks: int, stay: int, weight: float) -> None:
        """Auxiliary ranks from `stay` to `ranks` get a weight, those above 0."""
        self.gain[self.keep + stay : self.keep + ranks] = weight
        self.gain[self.keep + ranks :] = 0.0

    @torch.no_grad()
    def trained(self) -> dict[str, Tensor]:
        """What a quantised layer needs (`vivace.models.quantized.TrainedLinears`), on the CPU.

        Raises:
            ValueError: an auxiliary rank is still there.
        """
        if self.gain[self.keep :].any():
            raise ValueError("the auxiliary branch is still there; finish the schedule first")
        recipe = self.recipe
        codes = formats.quantise(
            self.latent(), recipe.weights, recipe.group, tensor=recipe.weights == "nvfp4"
        )
        out: dict[str, Tensor | None] = {
            "weight": codes.values,
            "scale": codes.scale,
            "outer": codes.outer,
            "smooth": self.smooth,
            "bias": self.bias,
        }
        if self.keep and self.up is not None and self.down is not None:
            out |= {"up": self.up[:, : self.keep].bfloat16(), "down": self.down[: self.keep].bfloat16()}
        return {k: v.detach().cpu().contiguous() for k, v in out.items() if v is not None}


def _low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As `low_rank`, by the processor, which is faster at many small decompositions."""
    left, right = low_rank(x.cpu(), rank)
    return left.to(x.device), right.to(x.device)


def _half(x: Tensor) -> Tensor:
    """Rounded to bf16, as the branch is stored, with the identity's gradient (x + (r - x) is r without rounding)."""
    return x + (x.detach().bfloat16().float() - x.detach())
