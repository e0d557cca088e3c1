"""What a quantised student learns from the exact transformer, and how far it is from it on clips it never saw.

Every clip is noised once and goes through the network with its caption and with the empty prompt, as the sampler does:
guidance multiplies the difference of the two predictions, so rounding that differs between them costs most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vivace.tiny.train.latents import LatentSet, embed_text
from vivace.tiny.train.text_to_video import FlowLoss


@dataclass(frozen=True)
class Pairs:
    """Calls of a transformer with B clips: rows 0 to B have captions, rows B to 2 B the empty prompt.

    `noisy` (2 B, z, n, h, w), `timestep` (2 B,), `text` (2 B, L, D), `mask` (B, 1, n, h, w): 1 where objects are.
    """

    noisy: Tensor
    timestep: Tensor
    text: Tensor
    mask: Tensor

    def run(self, transformer: Any) -> Tensor:
        """Predictions float32 (2 B, z, n, h, w)."""
        return transformer(
            hidden_states=self.noisy,
            timestep=self.timestep,
            encoder_hidden_states=self.text,
            return_dict=False,
        )[0].float()

    def to(self, dtype: torch.dtype) -> Pairs:
        """With latents and text in another type."""
        return Pairs(self.noisy.to(dtype), self.timestep, self.text.to(dtype), self.mask)

    def part(self, rows: slice) -> Pairs:
        """Some of the clips."""
        count = len(self.mask)

        def two(x: Tensor) -> Tensor:
            return torch.cat([x[:count][rows], x[count:][rows]])

        return Pairs(two(self.noisy), two(self.timestep), two(self.text), self.mask[rows])


@torch.no_grad()
def make_pairs(
    text_encoder: Any, clean: Tensor, mask: Tensor, ids: Tensor, empty: Tensor, times: Tensor, noise: Tensor
) -> Pairs:
    """Latents (B, z, n, h, w) at times (B,) in (0, 1), with token ids (B, L) and those of "" (L,)."""
    noisy = torch.lerp(clean.float(), noise, times.view(-1, 1, 1, 1, 1))
    text = embed_text(text_encoder, torch.cat([ids, empty.expand_as(ids)]))
    return Pairs(noisy.repeat(2, 1, 1, 1, 1), 1000.0 * times.repeat(2), text, mask[:, None].float())


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """Squared error of predictions, with and without captions, and of what guidance makes of them.

    Attributes:
        guidance: scale of the sampler.
        guided: weight of the guided prediction's error beside the mean of the other two.
        object_weight: added to 1 where objects are.
        hidden: weight of the blocks' outputs, each error over the exact output's mean square.
        uniform: share of times that are uniform before the shift, as the sampler's are; others are logit-normal.
    """

    guidance: float = 4.0
    guided: float = 0.1
    object_weight: float = 1.0
    hidden: float = 0.0
    uniform: float = 0.6

    def times(self, count: int, device: torch.device, shift: float) -> Tensor:
        """`count` times in (0, 1), one from each quantile."""
        return FlowLoss(shift=shift, uniform=self.uniform).times(count, device)

    def __call__(self, output: Tensor, exact: Tensor, mask: Tensor) -> Tensor:
        """Of predictions (2 B, z, n, h, w) and mask (B, 1, n, h, w)."""
        weight = 1.0 + self.object_weight * mask
        with_text, without = (output - exact).chunk(2)
        both = 0.5 * (with_text.square() + without.square())
        if self.guided:
            guided = without + self.guidance * (with_text - without)
            both = both + self.guided * guided.square()
        return (weight * both).mean() / weight.mean()

    def of_blocks(self, output: list[Tensor], exact: list[Tensor]) -> Tensor:
        """Of the blocks' outputs."""
        pairs = zip(output, exact, strict=True)
        errors = [(a.float() - b.float()).square().mean() / b.float().square().mean() for a, b in pairs]
        return self.hidden * torch.stack(errors).mean()


@contextmanager
def watched(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that the outputs of blocks are put into while they run."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class HeldOut:
    """Fixed clips, times and noise that no training uses; every clip at each of some times.

    Args:
        times: evenly spread steps of the sampler, noise first.
        portion: clips of a call.
    """

    def __init__(
        self,
        pipeline: Any,
        data: LatentSet,
        empty: Tensor,
        *,
        shift: float,
        guidance: float,
        times: int = 6,
        portion: int = 8,
    ) -> None:
        device = data.latents.device
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(data.latents.shape, generator=generator).to(device)
        u = (torch.arange(times, device=device) + 0.5) / times
        self.guidance, self.portion = guidance, portion
        self.calls: list[Pairs] = []
        for s in (shift * u / (1.0 + (shift - 1.0) * u)).flip(0):
            pairs = make_pairs(
                pipeline.text_encoder,
                data.latents,
                data.mask,
                data.ids[:, 0].long(),
                empty,
                s.expand(len(data)),
                noise,
            )
            self.calls += [pairs.part(slice(i, i + portion)) for i in range(0, len(data), portion)]

    @torch.no_grad()
    def outputs(self, transformer: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Predictions of every call, (2 B, ...)."""
        return [(call if dtype is None else call.to(dtype)).run(transformer) for call in self.calls]

    def errors(self, got: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
        """Relative errors |got - exact| / |exact|, root mean square over calls.

        `captioned`, `empty`, and `guided`: of the guided prediction.
        """

        def split(x: Tensor) -> dict[str, Tensor]:
            a, b = x.chunk(2)
            return {"captioned": a, "empty": b, "guided": b + self.guidance * (a - b)}

        sums: dict[str, float] = {}
        for a, b in zip(got, exact, strict=True):
            left, right = split(a), split(b)
            for name in left:
                ratio = (left[name] - right[name]).square().sum() / right[name].square().sum()
                sums[name] = sums.get(name, 0.0) + float(ratio)
        return {name: (value / len(got)) ** 0.5 for name, value in sums.items()}


class Evaluator:
    """Errors of networks in the type that they are deployed in, against the exact one in that type."""

    def __init__(self, held: HeldOut, exact: Any, dtype: torch.dtype) -> None:
        self.held, self.dtype = held, dtype
        with full_precision():
            self.exact = held.outputs(exact, dtype)

    def __call__(self, transformer: Any) -> dict[str, float]:
        with full_precision():
            return self.held.errors(self.held.outputs(transformer, self.dtype), self.exact)

    def of(self, run: Callable[[], list[Tensor]]) -> dict[str, float]:
        """Errors of predictions made in another way."""
        return self.held.errors(run(), self.exact)


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32, as torch's default is and training's is not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
