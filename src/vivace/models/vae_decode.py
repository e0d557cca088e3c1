"""Decoding by a video VAE with other numbers, memory formats, compiled parts and pieces; the same frames to rounding.

`AutoencoderKLWan` is decoded by `wan_decode` in pieces of any size. Of the other VAEs everything but the decoder's
weights and compiled blocks stays the class's own. No VAE is changed: what differs from its own is kept here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from vivace.core.errors import ConfigError
from vivace.kernels.api import Choice, select
from vivace.kernels.pixel_rows.spec import OP

if TYPE_CHECKING:
    import torch

    from vivace.models.wan_decode import WanDecode

CAUSAL = ("AutoencoderKLWan",)
"""VAEs that can be decoded in pieces of time and space."""
GENERIC = {
    "AutoencoderKLCogVideoX": "CogVideoXResnetBlock3D",
    "AutoencoderKLLTXVideo": "LTXVideoResnetBlock3d",
    "AutoencoderKLHunyuanVideo": "HunyuanVideoResnetBlockCausal3D",
}
"""VAEs of which only numbers, memory format and compiled parts can differ -> the decoder's repeated block."""
DTYPES = ("own", "bfloat16", "float16")
FORMATS = ("auto", "on", "off")
COMPILE = ("off", "default", "max-autotune")
FUSED = ("auto", "on", "off")
SMALLEST_TILE = 4
"""Latent positions: below, halos cost more than they save."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How to decode.

    Attributes:
        dtype: `own` (the VAE's), or the type that weights and activations are converted to.
        channels_last: memory format `channels_last_3d`; `auto`: on GPUs.
        compile: mode of `torch.compile` for the repeated parts. `max-autotune` leaves CUDA graphs out: a graph that
            is run again for the next block would overwrite what the last one returned.
        fused: passes between the convolutions joined (`vivace.kernels.pixel_rows`), which goes with channels last and
            without compiling; `auto`: where a GPU runs the Triton kernels and neither is asked otherwise.
        chunk: latent frames of a piece; 0: as many as fit into `max_gib`.
        tile: latent positions of a tile's side; 0: no tiles as long as one frame fits into `max_gib`.
        slicing: one sample of a batch at a time, also where more would fit.
        max_gib: bound on the activations of a piece in GiB.
        backend: of `torch.compile`.
    """

    dtype: str = "own"
    channels_last: str = "auto"
    compile: str = "off"
    fused: str = "auto"
    chunk: int = 0
    tile: int = 0
    slicing: bool = False
    max_gib: float = 4.0
    backend: str = "inductor"


@dataclass(frozen=True)
class Pieces:
    """How a batch of latents is cut: samples, latent frames and positions of a piece; `gib` of its activations."""

    rows: int
    chunk: int
    tile: int
    gib: float

    def __str__(self) -> str:
        tile = f", tiles of {self.tile}x{self.tile}" if self.tile else ""
        return f"{self.rows} clips x {self.chunk} latent frames{tile} in one pass, about {self.gib:.2g} GiB"


def missing(class_name: str) -> str:
    """Why a VAE class cannot be decoded here, as a sentence; empty when it can."""
    if class_name in CAUSAL or class_name in GENERIC:
        return ""
    known = ", ".join([*CAUSAL, *GENERIC])
    return f"{class_name or 'a model without a VAE'} has no fast decoding here; VAEs that have: {known}."


class VaeDecoder:
    """Decodes latents of a live VAE; weights are taken over at the first call, and again when they have changed.

    Raises:
        ConfigError: the VAE's class cannot be decoded here, or not in pieces.
    """

    def __init__(self, vae: Any, options: DecodeOptions | None = None) -> None:
        self.vae, self.options = vae, options or DecodeOptions()
        self.kind = type(vae).__name__
        if reason := missing(self.kind):
            raise ConfigError(reason)
        if self.kind not in CAUSAL and (self.options.chunk or self.options.tile):
            raise ConfigError(
                f"only {', '.join(CAUSAL)} can be decoded in exact pieces, not {self.kind}; leave chunk and tile at 0."
            )
        self._state: tuple[Any, ...] = ()
        self._made: Any = None

    @property
    def causal(self) -> bool:
        """Whether pieces and streams are possible."""
        return self.kind in CAUSAL

    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        import torch

        own = next(self.vae.decoder.parameters()).dtype
        return own if self.options.dtype == "own" else getattr(torch, self.options.dtype)

    def aside(self, z: torch.Tensor) -> str | None:
        """Why latents z should be decoded by the VAE itself, or None."""
        if reason := busy(self.vae, z):
            return reason
        if self.causal and (self.vae.use_tiling or self.vae.use_slicing):
            return "the VAE's own tiling or slicing is switched on"
        return None

    def pieces(self, z: torch.Tensor) -> Pieces:
        """How latents (B, z, n, h, w) are cut so that a piece's activations fit into `max_gib`.

        Samples are parted first, then frames, then the picture. What is smaller than one frame of the smallest tile
        is decoded all the same.
        """
        options = self.options
        rows, _, frames, height, width = z.shape
        if not self.causal:
            return Pieces(1 if options.slicing else rows, frames, 0, 0.0)
        net: WanDecode = self._network()
        rows = 1 if options.slicing else rows
        chunk = options.chunk or frames
        tile = options.tile if options.tile < max(height, width) else 0

        def gib() -> float:
            if not tile:
                return net.gib(rows, chunk, height, width)
            return net.gib(rows, chunk, min(tile, height), min(tile, width), tiled=True)

        if rows > 1 and gib() > options.max_gib:
            rows = 1
        if not options.chunk:
            while chunk > 1 and gib() > options.max_gib:
                chunk -= 1
        if not options.tile:
            count = 1
            while gib() > options.max_gib and max(height, width) > count * SMALLEST_TILE:
                count += 1
                tile = -(-max(height, width) // count)
        return Pieces(rows, chunk, tile, gib())

    def __call__(self, z: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Frames (B, 3, T, H, W) of latents (B, z, n, h, w), in the type of z.

        Args:
            arguments: further ones of the VAE's own `decode`.

        Raises:
            FloatingPointError: float16 could not hold the activations; decode in another type.
        """
        import torch

        cut = self.pieces(z)
        parts = [self._rows(rows, cut, arguments) for rows in z.split(cut.rows)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.options.dtype == "float16" and not torch.isfinite(out).all():
            raise FloatingPointError("float16 cannot hold the decoder's activations; use bfloat16.")
        return out.to(z.dtype)

    def _rows(self, z: torch.Tensor, cut: Pieces, arguments: dict[str, Any]) -> torch.Tensor:
        import torch

        if not self.causal:
            with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=256):  # type: ignore[attr-defined]
                return type(self.vae).decode(
                    self._twin(), z.to(self.dtype()), **arguments, return_dict=False
                )[0]
        from vivace.models.wan_decode import Memory, latent_chunks

        net, memory, out = self._network(), Memory(), []
        for start, stop in latent_chunks(z.shape[2], cut.chunk):
            last = stop == z.shape[2]
            out.append(net.piece(z[:, :, start:stop], memory, last=last, tile=cut.tile))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def stream(self, latents: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """See `decode_stream`."""
        from vivace.models.wan_decode import Memory, latent_chunks

        if not self.causal:
            raise ConfigError(f"only {', '.join(CAUSAL)} can be decoded as a stream, not {self.kind}.")
        net, memory, shape = self._network(), Memory(), None
        for z in latents:
            sides = (*z.shape[:2], *z.shape[3:])
            if shape not in (None, sides):
                raise ConfigError(
                    f"a stream of latents cannot change from {shape} to {sides} (batch, channels, height, width); "
                    "begin a new one."
                )
            shape, cut = sides, self.pieces(z)
            for start, stop in latent_chunks(z.shape[2], cut.chunk):
                yield net.piece(z[:, :, start:stop], memory, tile=cut.tile).to(z.dtype)

    # -- weights --------------------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, Any]:
        names = ("post_quant_conv", "decoder")
        return {n: m for n in names if (m := getattr(self.vae, n, None)) is not None}

    def _last_format(self) -> bool:
        on_gpu = next(self.vae.decoder.parameters()).device.type == "cuda"
        return on_gpu if self.options.channels_last == "auto" else self.options.channels_last == "on"

    def _made_of(self, make: Callable[[], Any]) -> Any:
        """What `make` gives, made anew when a weight has been replaced, moved or written to."""
        state = tuple(
            (p.data_ptr(), 0 if p.is_inference() else p._version, p.device, p.dtype)
            for module in self._parts().values()
            for p in module.parameters()
        )
        if state != self._state:
            self._made, self._state = None, state
            self._made = make()
        return self._made

    def _network(self) -> WanDecode:
        from vivace.models.wan_decode import WanDecode

        if (rows := self.rows()) is not None:
            from vivace.models.wan_decode_rows import RowsDecode

            joined = cast(Any, rows.run)  # an object with one method for each pass
            return self._made_of(lambda: RowsDecode(self.vae, self.dtype(), joined))
        return self._made_of(
            lambda: WanDecode(self.vae, self.dtype(), self._last_format(), compiler(self.options))
        )

    def rows(self) -> Choice | None:
        """What joins the passes between the convolutions, with the reason; None where they stay apart."""
        options = self.options
        if not self.causal or options.fused == "off":
            return None
        if options.fused == "auto" and (options.compile != "off" or not self._last_format()):
            return None
        weights = next(self.vae.decoder.parameters())
        context = {
            "device": weights.device.type,
            "channels": max(p.shape[0] for p in self.vae.decoder.parameters()),
        }
        chosen = select(OP, **context)
        return None if options.fused == "auto" and chosen.name == "reference" else chosen

    def _twin(self) -> Any:
        return self._made_of(self._make_twin)

    def _make_twin(self) -> Any:
        """The VAE with a decoder of its own: same class, same settings, the encoder shared."""
        twin = object.__new__(type(self.vae))
        twin.__dict__.update(self.vae.__dict__)
        twin.__dict__.pop("decode", None)
        twin._modules = dict(self.vae._modules)
        for name, module in self._parts().items():
            twin._modules[name] = _converted(module, self.dtype(), self._last_format())
        if (compile := compiler(self.options)) is not None:
            for module in twin.decoder.modules():
                if type(module).__name__ == GENERIC[self.kind]:
                    # The copy is ours; its class and the user's modules stay as they are.
                    module._compiled_call_impl = compile(module._call_impl)
        return twin


def decode_stream(
    vae: Any, latents: Iterable[torch.Tensor], options: DecodeOptions | None = None
) -> Iterator[torch.Tensor]:
    """Frames of a stream of latents, piece by piece; together they equal `vae.decode` of the whole to rounding.

    Args:
        vae: a live `AutoencoderKLWan`.
        latents: pieces (B, z, k, h, w) in the order of time, any k >= 1, as `vae.decode` takes them.
        options: how; a piece that would not fit into `max_gib` is cut further.

    Yields:
        Frames (B, 3, T, H, W) in [-1, 1]: t (k - 1) + 1 for the first piece and t k for others, t being the VAE's
        compression in time. Memory does not grow with the stream: two frames of every convolution's input are kept.

    Raises:
        ConfigError: the VAE is not causal, or a piece has another batch or size than the first.
    """
    return VaeDecoder(vae, options).stream(latents)


def around(
    old: Callable[..., Any], run: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor | None]
) -> Callable[..., Any]:
    """A VAE's `decode` around the `old` one.

    Args:
        run: frames of latents, from these and from arguments beside `return_dict`; None: `old` decodes.
    """

    def decode(z: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        # LTX-Video has the timestep's embedding in second place, the others `return_dict`.
        for value in args:
            if isinstance(value, bool):
                return_dict = value
            else:
                kwargs["temb"] = value
        sample = run(z, kwargs)
        if sample is None:
            return old(z, return_dict=return_dict, **kwargs)
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=sample) if return_dict else (sample,)

    return decode


def busy(vae: Any, z: torch.Tensor) -> str | None:
    """Why latents z must be decoded by the VAE's own method, or None."""
    import torch

    if hasattr(vae, "_hf_hook"):
        return "the VAE is offloaded"
    if vae.training:
        return "the VAE is in training mode"
    if torch.is_grad_enabled() and z.requires_grad:
        return "gradients are wanted"
    return None


def compiler(options: DecodeOptions) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """`torch.compile` as the options want it; None for eager."""
    if options.compile == "off":
        return None
    import torch

    tuned = options.compile == "max-autotune" and options.backend == "inductor"
    mode = "max-autotune-no-cudagraphs" if tuned else None
    return functools.partial(torch.compile, dynamic=False, backend=options.backend, mode=mode)


def _converted(module: Any, dtype: torch.dtype, channels_last: bool) -> Any:
    """A copy in another type and memory format; tensors that need neither are shared."""
    import torch

    tensors = [*module.parameters(), *module.buffers()]
    twin = copy.deepcopy(module, {id(t): t for t in tensors})
    for part in twin.modules():
        for kind in (part._parameters, part._buffers):
            for name, tensor in kind.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                new = tensor.detach().to(dtype)
                if channels_last and new.ndim == 5:
                    new = new.contiguous(memory_format=torch.channels_last_3d)
                kind[name] = torch.nn.Parameter(new, requires_grad=False) if kind is part._parameters else new
    return twin


def bare(class_name: str, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A VAE of a class without weights, on the meta device, to count what decoding takes."""
    import diffusers
    import torch

    # The constructors want lists where a configuration in Python has tuples.
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    with torch.device("meta"):
        return getattr(diffusers, class_name).from_config(plain).eval().to(dtype)
