"""What a model family looks like to a technique: roles and sites, never architecture names.

An `Adapter` knows one family of diffusers transformers. From configurations alone it makes a `ModelDescription`
(no weights, used to check plans); from a live pipeline it finds the `Expert`s with their blocks, attention sites
and linears. Legend of shapes: B batch rows (a fused guidance pair has two rows per sample), S tokens, L text
tokens, H heads, D head dimension, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.core.context import COND
from vivace.core.shapes import PixelRules, TokenGrid, Workload

if TYPE_CHECKING:
    import torch
    from torch import nn

EXPERTS = ("transformer", "transformer_2")


class Need(StrEnum):
    """What a technique may need from a model."""

    ORDERED_BLOCKS = "ordered blocks"
    ATTENTION_SITES = "attention sites"
    TOKEN_GRID = "token grid"
    LINEAR_SITES = "linear sites"
    GUIDANCE = "classifier-free guidance"
    FLOW_SCHEDULER = "flow-matching scheduler"
    WHOLE_CLIP_DECODE = "whole-clip decoding"


class Guidance(StrEnum):
    """How a pipeline evaluates classifier-free guidance."""

    SEPARATE = "separate"
    FUSED = "fused"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Argument names of a block's forward. Blocks with a text stream return (hidden, text), others hidden."""

    hidden: str = "hidden_states"
    text: str | None = None
    time: str = "temb"
    batched: tuple[str, ...] = ("hidden_states", "encoder_hidden_states", "temb")
    kind: str = "blocks"
    rotary: str = "image_rotary_emb"
    """Rotary position factors (cos, sin) of the video tokens."""


@dataclass(eq=False)
class Block:
    """One transformer block. `site` is its address, e.g. `transformer.blocks.3`."""

    site: str
    index: int
    module: nn.Module
    layout: BlockLayout

    @cached_property
    def _signature(self) -> inspect.Signature:
        whole = inspect.signature(type(self.module).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    @cached_property
    def _variadic(self) -> bool:
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return any(p.kind in kinds for p in self._signature.parameters.values())

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockCall:
        """Name the arguments of a call."""
        values = dict(self._signature.bind(*args, **kwargs).arguments)
        return BlockCall(self.layout, values, self._signature if self._variadic else None)


@dataclass(slots=True)
class BlockCall:
    """A block's arguments by name, with the streams that pass from block to block."""

    layout: BlockLayout
    values: dict[str, Any]
    signature: inspect.Signature | None = None
    """Only for a block that takes `*args` or `**kwargs`, which cannot be passed by name."""

    @property
    def hidden(self) -> torch.Tensor:
        """Video stream (B, S, C)."""
        return self.values[self.layout.hidden]

    @property
    def text(self) -> torch.Tensor | None:
        """Text stream (B, L, C) where the block updates one, else None."""
        return self.values[self.layout.text] if self.layout.text else None

    @property
    def time(self) -> torch.Tensor | None:
        """Time embedding (B, ...) handed to the block; None where it gets none."""
        return self.values.get(self.layout.time)

    def run(self, forward: Callable[..., Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Call `forward`; returns (hidden, text or None)."""
        if self.signature is None:
            return self.split(forward(**self.values))
        bound = inspect.BoundArguments(self.signature, self.values)  # type: ignore[arg-type]
        return self.split(forward(*bound.args, **bound.kwargs))

    def split(self, out: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A block's return value as (hidden, text or None)."""
        return (out[0], out[1]) if self.layout.text else (out, None)

    def join(self, hidden: torch.Tensor, text: torch.Tensor | None) -> Any:
        """Inverse of `split`."""
        return (hidden, text) if self.layout.text else hidden

    def rows(self, index: torch.Tensor) -> BlockCall:
        """The same call for some batch rows only. `index` (R,) int64."""
        total = self.hidden.shape[0]

        def take(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(take(v) for v in value)
            batched = hasattr(value, "shape") and value.ndim and value.shape[0] == total
            return value.index_select(0, index) if batched else value

        chosen = {name: take(self.values[name]) for name in self.layout.batched if name in self.values}
        rotary = self.values.get(self.layout.rotary)
        # Positions (S, D) or (1, S, ...) are of all rows; whoever merged tokens row by row gave every row its own.
        if isinstance(rotary, tuple) and all(hasattr(part, "ndim") and part.ndim > 2 for part in rotary):
            chosen[self.layout.rotary] = take(rotary)
        return BlockCall(self.layout, self.values | chosen, self.signature)


@dataclass(slots=True, eq=False)
class AttentionSite:
    """One attention module. `kind` is `self` (video with itself), `cross` (video to text) or `joint`."""

    site: str
    index: int
    module: nn.Module
    kind: str
    heads: int
    head_dim: int

    def lengths(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
        """(rows, queries, keys) of a call of the module."""
        hidden = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        rows, queries = hidden.shape[0], hidden.shape[1]
        extra = 0 if text is None else text.shape[1]
        if self.kind == "joint":
            return rows, queries + extra, queries + extra
        return rows, queries, extra if self.kind == "cross" else queries


@dataclass(slots=True, eq=False)
class LinearSite:
    """One linear layer of a block.

    `role` is one of `attention.q|k|v|out`, `cross.q|k|v|out`, `ffn.in|out`, `text.q|k|v|out` (the text stream's own
    projections in joint attention), `text.ffn.in|out` (its feed-forward), or `other`.
    """

    site: str
    block: int
    role: str
    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        return self.parent._modules[self.name]  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, eq=False)
class FeedForwardSite:
    """One feed-forward module of a block: token by token, (B, S, C) to (B, S, C).

    `kind` is `ffn` (the video stream, or both streams where one module sees the joined tokens in the order of joint
    attention), or `text.ffn` (the text stream's own).
    """

    site: str
    index: int
    module: nn.Module
    kind: str


@dataclass(slots=True, eq=False)
class Expert:
    """One transformer of the pipeline (Wan 2.2 has two)."""

    name: str
    module: nn.Module
    blocks: list[Block] = field(default_factory=list)
    attentions: list[AttentionSite] = field(default_factory=list)
    feed_forwards: list[FeedForwardSite] = field(default_factory=list)
    linears: list[LinearSite] = field(default_factory=list)

    @property
    def config(self) -> Mapping[str, Any]:
        """The transformer's configuration."""
        return self.module.config  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class ExpertDescription:
    """One transformer, from its configuration alone."""

    name: str
    depth: int
    heads: int
    head_dim: int
    config: Mapping[str, Any] = field(hash=False, compare=False, repr=False)
    class_name: str = ""
    block_sites: tuple[str, ...] = ()
    attention_sites: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelDescription:
    """A pipeline from its configuration files alone: enough to check a plan, no weights."""

    name: str
    pipeline_class: str
    family: str
    experts: tuple[ExpertDescription, ...]
    scheduler_class: str
    scheduler: Mapping[str, Any] = field(hash=False, compare=False, repr=False)
    guidance: Guidance
    pixels: PixelRules | None
    offers: frozenset[Need]
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
    components: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)
    boundary_ratio: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False, repr=False)
    """The pipeline's own settings beside its components, e.g. `expand_timesteps`."""
    configs: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict, hash=False, compare=False, repr=False
    )
    """Configurations by component, as far as they are known."""
    weights: str = field(default="", compare=False)
    """Hash of the loaded weights, where somebody needed it (`vivace.calibration.artifact.model_hash`)."""

    @property
    def depth(self) -> int:
        """Blocks of one expert (all experts of one pipeline have the same depth)."""
        return self.experts[0].depth if self.experts else 0

    @cached_property
    def adapter(self) -> Adapter | None:
        """The family's adapter; None for a pipeline Vivace has no adapter for."""
        from vivace.models.families import by_family

        return by_family(self.family) if self.family else None

    def workload(self, **changes: Any) -> Workload:
        """The model's default workload with changes; what it does not say is its family's usual."""
        d = {**_USUAL, **(self.adapter.usual if self.adapter else {}), **self.defaults}
        scale = self.adapter.guidance_argument if self.adapter else "guidance_scale"
        base = Workload(
            frames=d["num_frames"],
            height=d["height"],
            width=d["width"],
            steps=d["num_inference_steps"],
            guidance=d[scale] if self.guidance is not Guidance.NONE else 1.0,
            text=d["max_sequence_length"],
        )
        return base.with_(**{k: v for k, v in changes.items() if v is not None})

    def asked(self, call: Mapping[str, Any]) -> Workload:
        """The workload of a call of the pipeline; what it leaves out is the default."""
        scale = self.adapter.guidance_argument if self.adapter else "guidance_scale"
        return self.workload(
            frames=call.get("num_frames"),
            height=call.get("height"),
            width=call.get("width"),
            steps=call.get("num_inference_steps"),
            guidance=call.get(scale),
        )

    def grid(self, workload: Workload) -> TokenGrid | None:
        """Token grid of a workload; None without an adapter."""
        return self.adapter.grid(self, workload) if self.adapter else None

    def takes_latents(self, workload: Workload) -> bool:
        """Whether the transformer is given latents (B, C, T, H, W), from which it reads their size."""
        import torch

        if self.adapter is None:
            return False
        try:
            call = self.adapter.dummy_call(self, workload, "meta", torch.float32)
        except TypeError:  # an adapter that does not say
            return False
        return tuple(call["hidden_states"].shape[2:]) == tuple(self.adapter.latent(self, workload))


_USUAL = {
    "num_frames": 81,
    "height": 480,
    "width": 832,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "max_sequence_length": 512,
}


class Adapter:
    """One family. Subclasses state facts; the shared code below walks the modules."""

    family: ClassVar[str]
    transformer_classes: ClassVar[tuple[str, ...]]
    guidance: ClassVar[Guidance] = Guidance.SEPARATE
    layouts: ClassVar[Mapping[str, BlockLayout]] = {"blocks": BlockLayout()}
    """Block-list attribute of the transformer -> layout, in the order they run."""
    roles: ClassVar[Mapping[str, str]] = {}
    """Path of a linear inside a block -> role."""
    attention: ClassVar[Mapping[str, str]] = {}
    """Attribute of an attention module inside a block -> kind."""
    rotary: ClassVar[str] = "image_rotary_emb"
    """Argument of a self- or joint-attention module that takes the rotary factors; see `rotary_at` for their shapes."""
    feed_forward: ClassVar[Mapping[str, str]] = {}
    """Attribute of a feed-forward module inside a block -> kind (see `FeedForwardSite`).

    A block that projects attention and feed-forward out together has none.
    """
    depth_keys: ClassVar[Mapping[str, str]] = {"blocks": "num_layers"}
    """Block-list attribute -> configuration key of its length."""
    joint_text: ClassVar[str] = ""
    """Where text stands in the video's attention: `first`, `last`, or nowhere."""
    multiple: ClassVar[int] = 16
    """The pipelines want height and width to be multiples of this, whatever VAE and patch size are."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    """The call argument above 1 of which the unconditional branch is evaluated."""
    template_tokens: ClassVar[int] = 0
    """Tokens that the pipeline lays around a prompt for its first text encoder, and cuts off again."""
    all_hidden_states: ClassVar[bool] = False
    """Whether the pipeline asks its first text encoder for the states of all layers."""
    decode_chunk: ClassVar[int] = 0
    """Latent frames that the VAE decodes at a time, carrying a cache of past ones along; 0 where it does otherwise."""
    usual: ClassVar[Mapping[str, Any]] = {}
    """Call arguments the family's models are usually run with."""
    fuses_blocks: ClassVar[bool] = False
    """Whether `fused_block` knows the family's blocks."""

    def expert(self, name: str, module: nn.Module) -> Expert:
        """Find blocks, attention sites and linears of a live transformer."""
        expert = Expert(name, module)
        heads, head_dim = self.head_shape(module.config)  # type: ignore[arg-type]
        for attribute, layout in self.layouts.items():
            for i, block in enumerate(getattr(module, attribute, ())):
                index, site = len(expert.blocks), f"{name}.{attribute}.{i}"
                expert.blocks.append(Block(site, index, block, layout))
                for path, kind in self.attention.items():
                    if (found := getattr(block, path, None)) is not None:
                        expert.attentions.append(
                            # A pruned module has fewer heads than the configuration says.
                            AttentionSite(
                                f"{site}.{path}", index, found, kind, getattr(found, "heads", heads), head_dim
                            )
                        )
                for path, kind in self.feed_forward.items():
                    if (found := getattr(block, path, None)) is not None:
                        expert.feed_forwards.append(FeedForwardSite(f"{site}.{path}", index, found, kind))
                expert.linears.extend(self._linears(site, index, block))
        return expert

    def _linears(self, site: str, index: int, block: nn.Module) -> Iterator[LinearSite]:
        from torch import nn

        for path, module in block.named_modules():
            if isinstance(module, nn.Linear):
                parent, _, leaf = path.rpartition(".")
                # peft keeps the original linear of a LoRA under `base_layer`.
                role = self.roles.get(path.removesuffix(".base_layer"), "other")
                yield LinearSite(f"{site}.{path}", index, role, block.get_submodule(parent), leaf)

    def describe_expert(self, name: str, class_name: str, config: Mapping[str, Any]) -> ExpertDescription:
        """As `expert`, from the configuration alone."""
        heads, head_dim = self.head_shape(config)
        sites = [
            f"{name}.{attribute}.{i}"
            for attribute, key in self.depth_keys.items()
            for i in range(config.get(key, 0))
        ]
        attentions = [f"{s}.{path}" for s in sites for path in self.attention]
        return ExpertDescription(
            name, len(sites), heads, head_dim, config, class_name, tuple(sites), tuple(attentions)
        )

    def head_shape(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """(heads, head_dim)."""
        return config["num_attention_heads"], config["attention_head_dim"]

    def compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        """(temporal, spatial) compression of a VAE, from its configuration."""
        return vae.get("temporal_compression_ratio") or 4, vae.get("spatial_compression_ratio") or 8

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Size (frames, height, width) in latent positions of what becomes one token."""
        size = config["patch_size"]
        return config.get("patch_size_t") or 1, size, size

    def pixels(self, components: Mapping[str, Mapping[str, Any]]) -> PixelRules | None:
        """Which clips can be made, from the components' configurations (by component name)."""
        transformer = next(components[e] for e in EXPERTS if e in components)
        temporal, spatial = self.compression(components.get("vae", {}))
        return PixelRules(temporal, max(spatial * self.patch(transformer)[1], self.multiple))

    def latent(self, model: ModelDescription, workload: Workload) -> tuple[int, int, int]:
        """Latent (frames, height, width) that the transformer sees."""
        temporal, spatial = self.compression(model.defaults.get("vae", {}))
        return (workload.frames - 1) // temporal + 1, workload.height // spatial, workload.width // spatial

    def text_tokens(self, model: ModelDescription, workload: Workload, branch: str = COND) -> int:
        """Length of the text sequence in a transformer call of a guidance branch."""
        return workload.text

    def grid(self, model: ModelDescription, workload: Workload) -> TokenGrid:
        """Token grid of a workload, from configurations."""
        text = self.text_tokens(model, workload) if self.joint_text else 0
        return self._grid(model.experts[0].config, self.latent(model, workload), text)

    def grid_of_call(self, config: Mapping[str, Any], call: Mapping[str, Any]) -> TokenGrid:
        """Token grid of a live call of the transformer, from its named arguments; hidden_states (B, C, T, H, W)."""
        text = call["encoder_hidden_states"].shape[1] if self.joint_text else 0
        return self._grid(config, call["hidden_states"].shape[2:], text)

    def _grid(self, config: Mapping[str, Any], latent: Sequence[int], text: int) -> TokenGrid:
        t, h, w = (size // p for size, p in zip(latent, self.patch(config), strict=True))
        return TokenGrid(t, h, w, text, self.joint_text == "first")

    def dummy_call(
        self, model: ModelDescription, workload: Workload, device: Any, dtype: Any, branch: str = COND
    ) -> dict[str, Any]:
        """Arguments of one transformer call of the workload's shape, `workload.batch` rows of zeros.

        Used on the meta device, where nothing is computed, and in speed runs.
        """
        raise TypeError(f"the {self.family} adapter cannot make inputs")

    def processor(self, site: AttentionSite, kernel: Callable[..., Any]) -> Any:
        """An attention processor equal to the model's own, with `kernel(q, k, v, mask)` in the place of attention.

        q, k, v are (B, S, H, D) as diffusers' dispatcher takes them; the kernel returns (B, S, H, D).
        """
        raise TypeError(f"the {self.family} adapter cannot change attention")

    def fused_block(self, block: Block) -> Callable[..., torch.Tensor] | str | None:
        """A block's forward with what stands around its `FusedLinear`s (`vivace.models.fused_parts`) run inside them.

        A string is the reason why this block cannot have one; None: the family has none, or no part of the block has
        all the layers that it takes.
        """
        return None

    def whole_clip_decoder(self, vae: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """`decode(latents) -> video`, equal to the VAE's own decoding in chunks; None where there is no such pass.

        `vae` is a live VAE, or its class name when only the configuration is known (then the result is not called).
        """
        return None

    def fused_now(self, pipeline: Any) -> bool:
        """Whether the running call batches the guidance pair."""
        return self.guidance is Guidance.FUSED and float(getattr(pipeline, "guidance_scale", 1.0)) > 1.0


@dataclass(slots=True)
class RootCall:
    """A transformer call's arguments by name. `rows` is the batch (twice the samples for a fused guidance pair)."""

    values: dict[str, Any]
    rows: int

    @classmethod
    def bind(cls, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RootCall:
        """Name the arguments of `module(*args, **kwargs)`."""
        values = dict(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)
        values.pop(next(iter(values)))
        return cls(values, values["hidden_states"].shape[0])

    @property
    def key(self) -> tuple[tuple[int, ...], ...]:
        """Shapes without the batch: calls with equal keys cost the same per row."""
        text = self.values.get("encoder_hidden_states")
        return (
            tuple(self.values["hidden_states"].shape[1:]),
            tuple(text.shape[1:]) if text is not None else (),
        )

    def select(self, start: int, stop: int) -> RootCall:
        """The same call for the batch rows start to stop."""
        values = {
            k: v[start:stop] if hasattr(v, "shape") and v.ndim and v.shape[0] == self.rows else v
            for k, v in self.values.items()
        }
        return RootCall(values, stop - start)

    def rows_at(self, index: Sequence[int]) -> RootCall:
        """The same call for some batch rows, in the order of `index`."""
        import torch

        where = torch.tensor(list(index), device=self.values["hidden_states"].device)
        values = {
            k: v.index_select(0, where) if hasattr(v, "shape") and v.ndim and v.shape[0] == self.rows else v
            for k, v in self.values.items()
        }
        return RootCall(values, len(where))
