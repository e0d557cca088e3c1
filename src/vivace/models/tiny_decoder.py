"""A small causal decoder in the place of a video VAE's own: the same latents, the same clip shape, another network.

Every block is separable: a 3x3 convolution per channel in space, a mix with the features of the previous frame per
channel in time, then a perceptron per position. So it can be fed one latent frame at a time and streams. Sizes follow
from the VAE's configuration. After Turbo-VAED (arXiv 2508.09136: separable 3-D convolutions, distilled) and TAEHV
(blocks that remember the previous frame, surplus first frames cut off); the 3-D kernel is here split into space and
time, and the remembered frame is weighted per channel instead of being stacked.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vivace.core.errors import ConfigError, WeightsError

FORMAT = "vivace.tiny_decoder/1"
PACKAGED = Path(__file__).parent / "decoders"
"""Where weights that come with the package lie, by name."""


@dataclass(frozen=True, kw_only=True)
class TinyDecoderConfig:
    """Sizes of a decoder.

    Attributes:
        latent_channels: of the VAE (z).
        temporal, spatial: the VAE's compression in time and space; powers of two.
        width: channels of the last stage; each stage before it has as many more.
        depth: blocks of each stage.
        patch: pixels per side that one position of the last stage paints; a power of two up to `spatial`.
    """

    latent_channels: int
    temporal: int
    spatial: int
    width: int = 64
    depth: int = 2
    patch: int = 4

    def __post_init__(self) -> None:
        for name in ("temporal", "spatial", "patch"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ConfigError(f"the tiny decoder's {name} must be a power of two, not {value}.")
        if self.patch > self.spatial:
            raise ConfigError(
                f"patch {self.patch} is larger than the VAE's compression {self.spatial}; use at most that."
            )
        if min(self.width, self.depth, self.latent_channels) < 1:
            raise ConfigError("width, depth and latent_channels of the tiny decoder must be at least 1.")

    @classmethod
    def of(cls, vae_class: str, config: Mapping[str, Any], **sizes: int) -> Self:
        """For a diffusers video VAE, from its class name and configuration; `sizes` are width, depth, patch.

        Raises:
            ConfigError: the class is unknown, or a size cannot be.
        """
        temporal, spatial = _compression(vae_class, config)
        channels = config.get("z_dim") or config.get("latent_channels")
        sizes = {"patch": min(4, spatial)} | sizes
        return cls(latent_channels=int(channels or 16), temporal=temporal, spatial=spatial, **sizes)

    @property
    def stages(self) -> int:
        return 1 + max(int(math.log2(self.spatial // self.patch)), int(math.log2(self.temporal)))

    def channels(self, stage: int) -> int:
        return self.width * (self.stages - stage)


def _compression(vae_class: str, config: Mapping[str, Any]) -> tuple[int, int]:
    from vivace.models.cogvideox import CogVideoXAdapter
    from vivace.models.hunyuan import HunyuanVideoAdapter
    from vivace.models.ltx import LTXAdapter
    from vivace.models.wan import WanAdapter

    adapters = {
        "AutoencoderKLWan": WanAdapter,
        "AutoencoderKLCogVideoX": CogVideoXAdapter,
        "AutoencoderKLLTXVideo": LTXAdapter,
        "AutoencoderKLHunyuanVideo": HunyuanVideoAdapter,
    }
    if vae_class not in adapters:
        raise ConfigError(f"no tiny decoder for {vae_class}; there is one for {', '.join(adapters)}.")
    return adapters[vae_class]().compression(config)


class TinyBlock(nn.Module):
    """x + perceptron(mix in time(convolution in space(x))) over frames (B T, C, H, W)."""

    def __init__(self, channels: int, expand: int = 2) -> None:
        super().__init__()
        self.space = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.now = nn.Parameter(torch.ones(channels, 1, 1))
        self.before = nn.Parameter(torch.zeros(channels, 1, 1))
        self.widen = nn.Conv2d(channels, expand * channels, 1)
        self.narrow = nn.Conv2d(expand * channels, channels, 1)
        nn.init.normal_(self.narrow.weight, std=0.1 * (expand * channels) ** -0.5)
        nn.init.zeros_(self.narrow.bias)  # type: ignore[arg-type]

        self.run: Callable[..., tuple[Tensor, Tensor]] = block

    def forward(self, x: Tensor, rows: int, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Also returns the last frame (B, 1, C, H, W) that the next call needs as `past`; None: a clip begins."""
        convs = [(c.weight, c.bias) for c in (self.space, self.widen, self.narrow)]
        return self.run(x, rows, past, self.now, self.before, *convs)


def block(
    x: Tensor,
    rows: int,
    past: Tensor | None,
    now: Tensor,
    before: Tensor,
    space: tuple[Tensor, Tensor],
    widen: tuple[Tensor, Tensor],
    narrow: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """What `TinyBlock` computes, from tensors alone: compiled once for all blocks of a width."""
    y = F.conv2d(x, *space, padding=1, groups=x.shape[1]).unflatten(0, (rows, -1))
    last = y[:, -1:].clone()
    earlier = torch.cat((torch.zeros_like(last) if past is None else past, y[:, :-1]), dim=1)
    y = torch.addcmul(y * now, earlier, before).flatten(0, 1)
    return x + F.conv2d(F.silu(F.conv2d(y, *widen)), *narrow), last


class TinyDecoder(nn.Module):
    """See the module. Latents (B, z, n, h, w) as `vae.decode` takes them -> (B, 3, t (n - 1) + 1, s h, s w).

    Args:
        config: sizes.
        mean, std: of the latents by channel; they are divided out first. None: 0 and 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, config: TinyDecoderConfig, mean: list[float] | None = None, std: list[float] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        for name, values in (("mean", mean or [0.0] * z), ("std", std or [1.0] * z)):
            if len(values) != z:
                raise ConfigError(f"{len(values)} values of {name} for {z} latent channels.")
            self.register_buffer(name, torch.tensor(values).view(1, z, 1, 1, 1))
        self.entry = nn.Conv2d(z, config.channels(0), 3, padding=1)
        self.blocks = nn.ModuleList()
        self.ups = nn.ModuleList()
        doublings = int(math.log2(config.spatial // config.patch))
        times = int(math.log2(config.temporal))
        self.factors = [(2 if i < times else 1, 2 if i < doublings else 1) for i in range(config.stages - 1)]
        for stage in range(config.stages):
            width = config.channels(stage)
            self.blocks.append(nn.ModuleList(TinyBlock(width) for _ in range(config.depth)))
            if stage < config.stages - 1:
                frames, side = self.factors[stage]
                self.ups.append(nn.Conv2d(width, config.channels(stage + 1) * frames * side**2, 1))
        self.exit = nn.Conv2d(config.width, 3 * config.patch**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """A whole clip, unclamped (for training)."""
        return self.piece(latents, {}, first=True)

    def piece(self, latents: Tensor, memory: dict[str, Tensor], *, first: bool) -> Tensor:
        """The next latent frames of a clip or stream, unclamped.

        Args:
            latents: (B, z, k, h, w).
            memory: what the last piece left, changed in place; empty at first.
            first: whether a clip begins: its first latent frame is one frame, every other `temporal` frames.
        """
        rows, config = latents.shape[0], self.config
        x = ((latents - self.mean) / self.std).to(self.entry.weight.dtype)
        # Frames lie in the batch: 2-D kernels, channels last in memory.
        x = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = self.entry(x)
        for stage, blocks in enumerate(self.blocks):
            for number, part in enumerate(blocks):  # type: ignore[arg-type]
                name = f"{stage}.{number}"
                x, memory[name] = part(x, rows, memory.get(name))
            if stage < config.stages - 1:
                x = _grow(self.ups[stage](x), rows, *self.factors[stage])
        x = F.pixel_shuffle(self.exit(F.silu(x)), config.patch)
        x = x.unflatten(0, (rows, -1)).transpose(1, 2)
        return x[:, :, config.temporal - 1 :] if first else x

    def compile_blocks(self, compile: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Run the blocks' arithmetic compiled; blocks of one width share what was compiled."""
        mixed = compile(block)
        for stage in self.blocks:
            for part in stage:  # type: ignore[union-attr]
                part.run = mixed

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = 0) -> Tensor:
        """A clip in [-1, 1], `chunk` latent frames at a time (0: at once), in the type of `latents`."""
        memory: dict[str, Tensor] = {}
        parts = latents.split(chunk or latents.shape[2], dim=2)
        out = [self.piece(p, memory, first=i == 0) for i, p in enumerate(parts)]
        return torch.cat(out, dim=2).clamp(-1.0, 1.0).to(latents.dtype)


def _grow(x: Tensor, rows: int, frames: int, side: int) -> Tensor:
    """(B T, C f s s, H, W) -> (B T f, C, s H, s W)."""
    if frames > 1:
        x = x.unflatten(1, (frames, -1)).flatten(0, 1)
        x = x.contiguous(memory_format=torch.channels_last)
    return F.pixel_shuffle(x, side) if side > 1 else x


def build(vae_class: str, config: Mapping[str, Any], **sizes: int) -> TinyDecoder:
    """A decoder with random weights for a VAE; `sizes` are width, depth, patch."""
    sized = TinyDecoderConfig.of(vae_class, config, **sizes)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if not mean and (scale := config.get("scaling_factor")):
        std = [1.0 / float(scale)] * sized.latent_channels
    return TinyDecoder(sized, list(mean) if mean else None, list(std) if std else None)


def fingerprint(vae_class: str, config: Mapping[str, Any]) -> str:
    """SHA-256 of a VAE's class and configuration without names and versions: equal for VAEs of one kind.

    The statistics of the latents are in it where the configuration has them, which tells most retrained VAEs apart.
    """
    import diffusers

    # A configuration file may leave out what the class sets by default.
    wanted = inspect.signature(getattr(diffusers, vae_class).__init__).parameters
    plain = {n: config.get(n, p.default) for n, p in wanted.items() if n != "self"}
    text = json.dumps([vae_class, plain], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Header:
    """What a file says about itself: sizes, and the VAE that it was distilled from."""

    config: TinyDecoderConfig
    vae_class: str
    vae: str
    """Fingerprint."""


def save(path: Path, decoder: TinyDecoder, vae_class: str, config: Mapping[str, Any]) -> Path:
    """Write weights and header as safetensors; an interruption leaves the old file whole."""
    from safetensors.torch import save_file

    metadata = {
        "format": FORMAT,
        "config": json.dumps(asdict(decoder.config)),
        "vae_class": vae_class,
        "vae": fingerprint(vae_class, config),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in decoder.state_dict().items()}, partial, metadata)
    partial.replace(path)
    return path


def find(path: str) -> Path:
    """The file at a path, or the packaged one of that name.

    Raises:
        WeightsError: there is neither; the sentence says what there is.
    """
    if not path:
        raise WeightsError("give the tiny decoder's file: path=...")
    if (place := Path(path).expanduser()).is_file():
        return place
    if (packaged := PACKAGED / f"{path}.safetensors").is_file():
        return packaged
    names = sorted(p.stem for p in PACKAGED.glob("*.safetensors"))
    offer = f"packaged: {', '.join(names)}" if names else "none is packaged"
    raise WeightsError(
        f"there is no tiny decoder {path} ({offer}); train one: python -m vivace.training.decoder --out {path}."
    )


def header(path: Path) -> Header:
    """The header of a file; no weight is read.

    Raises:
        WeightsError: the file is damaged or of another kind; the sentence names it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as reader:
            said = reader.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} cannot be read as safetensors ({error}); copy or train it again."
        ) from None
    if said.get("format") != FORMAT:
        raise WeightsError(f"{path} is no tiny decoder of this version ({FORMAT}); train one.")
    try:
        return Header(TinyDecoderConfig(**json.loads(said["config"])), said["vae_class"], said["vae"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"the header of {path} is damaged ({error}); copy or train it again.") from None


def load(path: Path) -> TinyDecoder:
    """The decoder of a file in the type it was saved in, in eval mode.

    Raises:
        WeightsError: the file is damaged, or its weights do not fit its header.
    """
    from safetensors.torch import load_file

    with torch.device("meta"):  # no random numbers are drawn
        decoder = TinyDecoder(header(path).config)
    try:
        decoder.load_state_dict(load_file(str(path)), assign=True)
    except RuntimeError as error:
        raise WeightsError(
            f"the weights of {path} do not fit its header ({error}); train it again."
        ) from None
    return decoder.eval()
