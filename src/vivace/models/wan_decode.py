"""The decoder of diffusers' `AutoencoderKLWan` in pieces of any size, equal to its own decoding to rounding.

In time, a causal convolution that is given the last frames of the piece before equals the convolution over the whole
clip (Wan, arXiv 2503.20314, section 4.1; the class itself does so for one latent frame at a time). In space, the
convolutions behind the middle block see a few positions around each pixel: a tile that brings so many positions with it
gives the pixels of the whole picture. What the attention of the middle block sees is the whole frame; it and all before
it run untiled, at latent resolution, where they cost little.

The pieces run over plain tensors (weights in the type and memory format asked for), not over the modules: so one
compiled residual block serves every block and every clip of the same shape.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanResample,
    WanResidualBlock,
    unpatchify,
)
from torch import Tensor, nn

LIVE_TENSORS = 4
"""Activations of a residual block that live at the same time, as a bound on memory."""
RECOMPILE_LIMIT = 256
"""Shapes that one compiled part may be made for: stages, first and later chunks, tiles at borders."""
Margins = tuple[int, int, int, int]
"""Positions beside what is wanted: top, bottom, left, right."""
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Conv:
    """A causal 3-D convolution: weight (O, I, kt, k, k), zero padding in space only."""

    weight: Tensor
    bias: Tensor | None

    @property
    def past(self) -> int:
        return self.weight.shape[2] - 1

    @property
    def radius(self) -> int:
        return self.weight.shape[3] // 2


@dataclass(frozen=True)
class Residual:
    """Two times norm, SiLU and convolution, beside a shortcut."""

    gains: tuple[Tensor, Tensor]
    convs: tuple[Conv, Conv]
    shortcut: Conv | None


@dataclass(frozen=True)
class Stage:
    """Residual blocks of one resolution and the way to the next; `time` doubles the frames, `space` the sides."""

    residuals: tuple[Residual, ...]
    time: Conv | None
    space: tuple[Tensor, Tensor | None] | None
    shortcut: nn.Module | None

    def need(self, after: int) -> int:
        """Positions that must lie around a tile at the stage's input for `after` exact ones around its output."""
        if self.space is not None:
            after = math.ceil((after + self.space[0].shape[-1] // 2) / 2)
        return after + sum(c.radius for r in self.residuals for c in r.convs)


@dataclass
class Memory:
    """Last frames of every convolution's input; one for each clip (rows of a batch) and stream."""

    past: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    begun: bool = False

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.past.values())


def unit(
    x: Tensor, past: Tensor | None, gain: Tensor | None, weight: Tensor, bias: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Norm and SiLU (where there is a `gain`), then the causal convolution of `past` and x (B, C, T, H, W)."""
    if gain is not None:
        x = F.silu(_norm(x, gain))
    frames, radius = weight.shape[2] - 1, weight.shape[3] // 2
    if frames == 0:
        return F.conv3d(x, weight, bias, padding=(0, radius, radius)), None
    x = F.pad(x, (0, 0, 0, 0, frames, 0)) if past is None else torch.cat((past, x), dim=2)
    new = x[:, :, -frames:].clone() if keep else None
    return F.conv3d(x, weight, bias, padding=(0, radius, radius)), new


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    """Root-mean-square norm over channels; `gain` (C, 1, 1, 1) holds the square root of C too."""
    if x.dtype == torch.float32:
        return F.normalize(x, dim=1) * gain
    return F.normalize(x.float(), dim=1).to(x.dtype) * gain


def residual(
    x: Tensor,
    pasts: tuple[Tensor | None, Tensor | None],
    gains: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    shortcut: tuple[Tensor, Tensor | None] | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A residual block (B, C, T, H, W) -> (B, C', T, H, W), and what its convolutions must remember."""
    beside = x if shortcut is None else F.conv3d(x, *shortcut)
    y, first = unit(x, pasts[0], gains[0], weights[0], biases[0], keep)
    y, second = unit(y, pasts[1], gains[1], weights[1], biases[1], keep)
    return y + beside, first, second


def double_space(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every frame repeated two by two and convolved: (B, C, T, H, W) -> (B, C', T, 2 H, 2 W)."""
    batch, _, time = x.shape[:3]
    y = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2.0, mode="nearest-exact")
    y = F.conv2d(y, weight, bias, padding=weight.shape[-1] // 2)
    return y.unflatten(0, (batch, time)).transpose(1, 2)


def double_time(x: Tensor) -> Tensor:
    """(B, 2 C, T, H, W) -> (B, C, 2 T, H, W); the first half of the channels are the earlier frames."""
    return x.unflatten(1, (2, -1)).transpose(1, 2).transpose(2, 3).flatten(2, 3)


class WanDecode:
    """The decoder of a live VAE over plain tensors.

    Args:
        vae: whose weights are read now; later changes of them are not seen.
        dtype: of weights and activations; None: as they are, and then nothing is copied.
        channels_last: memory format `channels_last_3d`.
        compile: `torch.compile` or the like, applied to the repeated parts; None: eager.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        compile: Compile | None = None,
    ) -> None:
        net = cast(Any, vae.decoder)
        self.dtype, self.channels_last = dtype or next(net.parameters()).dtype, channels_last
        self.patch: int | None = cast(Any, vae.config).patch_size
        self.entry = (self._conv(vae.post_quant_conv), self._conv(net.conv_in))
        middle = list(net.mid_block.resnets)
        self.middle = [self._residual(b) for b in middle]
        # Attention keeps its module's own forward, in a copy where the type differs.
        self.attention = [self._module(a) for a in net.mid_block.attentions]
        self.stages = [self._stage(b) for b in net.up_blocks]
        self.exit_gain, self.exit = self._gain(net.norm_out), self._conv(net.conv_out)
        wrap: Compile = (lambda f: _limited(compile(f))) if compile is not None else (lambda f: f)
        self._unit, self._block, self._space = wrap(unit), wrap(residual), wrap(double_space)
        self._time = double_time

    # -- weights --------------------------------------------------------------------------------------------------

    def _weight(self, weight: Tensor) -> Tensor:
        weight = weight.detach().to(self.dtype)
        if not self.channels_last:
            return weight
        return weight.contiguous(
            memory_format=torch.channels_last_3d if weight.ndim == 5 else torch.channels_last
        )

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias.detach().to(self.dtype)

    def _conv(self, layer: Any) -> Conv:
        return Conv(self._weight(layer.weight), self._bias(layer.bias))

    def _gain(self, norm: Any) -> Tensor:
        return (norm.gamma.detach().float() * norm.scale).to(self.dtype)

    def _module(self, module: nn.Module | None) -> nn.Module | None:
        if module is None or next(module.parameters()).dtype == self.dtype:
            return module
        return copy.deepcopy(module).to(self.dtype)

    def _residual(self, block: WanResidualBlock) -> Residual:
        skip = block.conv_shortcut
        return Residual(
            (self._gain(block.norm1), self._gain(block.norm2)),
            (self._conv(block.conv1), self._conv(block.conv2)),
            None if isinstance(skip, nn.Identity) else self._conv(skip),
        )

    def _stage(self, block: Any) -> Stage:
        # Wan 2.1 has a list of one upsampler, Wan 2.2 one upsampler and a shortcut around all of the block.
        lists = getattr(block, "upsamplers", None)
        up: WanResample | None = lists[0] if lists else getattr(block, "upsampler", None)
        time = space = None
        if up is not None:
            layer = cast(Any, up.resample)[1]
            space = (self._weight(layer.weight), self._bias(layer.bias))
            time = self._conv(up.time_conv) if up.mode == "upsample3d" else None
        residuals = tuple(self._residual(r) for r in block.resnets)
        return Stage(residuals, time, space, getattr(block, "avg_shortcut", None))

    # -- facts ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def needs(self) -> tuple[int, ...]:
        """Positions around a tile at the input of each stage, and at last of the output convolution."""
        found = [self.exit.radius]
        for stage in reversed(self.stages):
            found.insert(0, stage.need(found[0]))
        return tuple(found)

    @property
    def halo(self) -> int:
        """Latent positions that a tile must bring along on every side: the radius of the receptive field."""
        return self.needs[0]

    def gib(self, rows: int, frames: int, height: int, width: int, tiled: bool = False) -> float:
        """GiB of activations for a piece of latents (rows, z, frames, height, width): a bound.

        `tiled`: height and width are a tile's, and every stage computes its margins beside it.
        """
        peak, frames, scale = 0, rows * frames, 1
        for number, stage in enumerate(self.stages):
            margin = 2 * self.needs[number] if tiled else 0
            positions = frames * (height * scale + margin) * (width * scale + margin)
            widest = max(max(c.weight.shape[:2]) for r in stage.residuals for c in r.convs)
            peak = max(peak, LIVE_TENSORS * widest * positions)
            if stage.time is not None:
                frames, positions = 2 * frames, 2 * positions
            if stage.space is not None:
                scale, positions = 2 * scale, 4 * positions
                out, inner = stage.space[0].shape[:2]
                # Doubled input, output, and the shortcut where there is one.
                peak = max(peak, (inner + (2 if stage.shortcut is not None else 1) * out) * positions)
        return peak * self.dtype.itemsize / 2**30

    # -- decoding -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def piece(self, z: Tensor, memory: Memory, *, last: bool = False, tile: int = 0) -> Tensor:
        """Frames of the next latent frames.

        Args:
            z: (B, z, k, h, w), any k >= 1.
            memory: of this clip; holds what the next piece needs, or nothing new when this is the `last`.
            tile: latent positions of a tile's side; 0: no tiles.

        Returns:
            (B, 3, t k, s h, s w) in [-1, 1]; the first piece has t (k - 1) + 1 frames.
        """
        step = _Step(self, memory, keep=not last)
        x = z.to(self.dtype)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        for number, conv in enumerate(self.entry):
            x = step.conv(f"entry.{number}", x, None, conv)
        for number, block in enumerate(self.middle):
            if number and (attention := self.attention[number - 1]) is not None:
                x = attention(x)
            x = step.residual(f"middle.{number}", x, block)
        if not tile or (tile >= x.shape[3] and tile >= x.shape[4]):
            out = self._finish(step, x, (0, 0, 0, 0))
        else:
            out = self._tiles(step, x, tile)
        memory.begun = True
        return out

    def _tiles(self, step: _Step, x: Tensor, tile: int) -> Tensor:
        height, width = x.shape[3:]
        out: Tensor | None = None
        for number, (top, bottom, left, right) in enumerate(tiles(height, width, tile)):
            step.tile = number + 1
            margins = (
                min(top, self.halo),
                min(height - bottom, self.halo),
                min(left, self.halo),
                min(width - right, self.halo),
            )
            rows = slice(top - margins[0], bottom + margins[1])
            part = self._finish(step, x[:, :, :, rows, left - margins[2] : right + margins[3]], margins)
            scale = part.shape[3] // (bottom - top)
            if out is None:
                out = part.new_empty(*part.shape[:3], height * scale, width * scale)
            out[:, :, :, top * scale : bottom * scale, left * scale : right * scale] = part
        assert out is not None
        return out

    def _finish(self, step: _Step, x: Tensor, margins: Margins) -> Tensor:
        """From behind the middle block to pixels; of the margins every stage gets what it still needs."""
        for number, stage in enumerate(self.stages):
            x, margins = crop(x, margins, self.needs[number])
            entry = x
            for index, block in enumerate(stage.residuals):
                x = step.residual(f"{number}.{index}", x, block)
            if stage.time is not None:
                x = step.double_time(f"{number}.time", x, stage.time)
            if stage.space is not None:
                x = self._space(x, *stage.space)
                margins = cast(Margins, tuple(2 * m for m in margins))
            if stage.shortcut is not None:
                x = x + stage.shortcut(entry, first_chunk=not step.memory.begun)
        x, margins = crop(x, margins, self.needs[-1])
        x = step.conv("exit", x, self.exit_gain, self.exit)
        x, _ = crop(x, margins, 0)
        if self.patch is not None:
            x = unpatchify(x, self.patch)
        return x.clamp(-1.0, 1.0)


class _Step:
    """One piece on its way through the decoder: runs parts with their memory."""

    def __init__(self, net: WanDecode, memory: Memory, keep: bool) -> None:
        self.net, self.memory, self.keep, self.tile = net, memory, keep, 0

    def _take(self, name: str) -> Tensor | None:
        return self.memory.past.pop((self.tile, name), None)

    def _put(self, name: str, past: Tensor | None) -> None:
        if past is not None:
            self.memory.past[self.tile, name] = past

    def conv(self, name: str, x: Tensor, gain: Tensor | None, conv: Conv) -> Tensor:
        keep = self.keep and conv.past > 0
        y, past = self.net._unit(x, self._take(name), gain, conv.weight, conv.bias, keep)
        self._put(name, past)
        return y

    def residual(self, name: str, x: Tensor, block: Residual) -> Tensor:
        pasts = (self._take(f"{name}.0"), self._take(f"{name}.1"))
        weights, biases = zip(*((c.weight, c.bias) for c in block.convs), strict=True)
        skip = None if block.shortcut is None else (block.shortcut.weight, block.shortcut.bias)
        y, first, second = self.net._block(x, pasts, block.gains, weights, biases, skip, self.keep)
        self._put(f"{name}.0", first)
        self._put(f"{name}.1", second)
        return y

    def double_time(self, name: str, x: Tensor, conv: Conv) -> Tensor:
        """The clip's first frame passes by; the convolution never sees it."""
        if self.memory.begun:
            return self.net._time(self.conv(name, x, None, conv))
        if x.shape[2] == 1:
            return x
        later = self.net._time(self.conv(name, x[:, :, 1:], None, conv))
        return torch.cat((x[:, :, :1], later), dim=2)


def crop(x: Tensor, margins: Margins, need: int) -> tuple[Tensor, Margins]:
    """Cut margins (top, bottom, left, right) of x (..., H, W) down to `need`; those of borders are smaller."""
    off = [max(m - need, 0) for m in margins]
    if any(off):
        x = x[..., off[0] : x.shape[-2] - off[1], off[2] : x.shape[-1] - off[3]]
    return x, cast(Margins, tuple(min(m, need) for m in margins))


def tiles(height: int, width: int, tile: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of tiles as even as can be, none longer than `tile`."""
    for top, bottom in spans(height, tile):
        for left, right in spans(width, tile):
            yield top, bottom, left, right


def spans(length: int, most: int) -> list[tuple[int, int]]:
    """`length` cut into the fewest pieces of at most `most`, as even as can be."""
    count = math.ceil(length / most)
    ends = [round(i * length / count) for i in range(count + 1)]
    return list(itertools.pairwise(ends))


def _limited(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Call a compiled function with room for all shapes of a decoder, and leave the global limit as it is."""

    def call(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):  # type: ignore[attr-defined]
            return compiled(*args)

    return call


def latent_chunks(frames: int, chunk: int) -> Sequence[tuple[int, int]]:
    """Pieces of a clip of latent frames; 0: one piece.

    Pieces of `chunk` and a rest: two shapes and the first one to compile, whatever the clip's length.
    """
    if not chunk:
        return [(0, frames)]
    return [(start, min(start + chunk, frames)) for start in range(0, frames, chunk)]
