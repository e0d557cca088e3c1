"""The vendor of dense attention: by name, or the one that is fastest at the live shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.kernels.api import AUTO, Choice, candidates, measured, select
from vivace.kernels.dense_attention.spec import OP
from vivace.models.adapter import Expert, ModelDescription, RootCall
from vivace.techniques.attention.placed import KINDS, PlacedAttention, own_backend
from vivace.techniques.base import (
    Card,
    Cite,
    Need,
    Paradigm,
    Problem,
    Stage,
    Target,
    exclusive,
)

if TYPE_CHECKING:
    import torch

MEASURING = 10.0
"""Seconds after which the vendors are not timed another round."""


@dataclass(frozen=True, slots=True)
class Vendors:
    """What serves the calls of one kind of sites: without a mask, and with one."""

    plain: Choice
    masked: Choice


class VendorSite:
    """The kernel of the sites of one kind: the model's own attention, or the vendors' that the technique has set.

    `met_plain` and `met_mask` tell which calls there were.
    """

    def __init__(self, backend: Any) -> None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        self._dispatch, self._backend = dispatch_attention_fn, backend
        self.plain: Callable[..., Any] | None = None
        self.masked: Callable[..., Any] | None = None
        self.met_plain = self.met_mask = False

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        run = self.plain if mask is None else self.masked
        if run is None:
            return self._dispatch(q, k, v, attn_mask=mask, backend=self._backend)
        if mask is None:
            self.met_plain = True
        else:
            self.met_mask = True
        return run(q, k, v, mask)


@dataclass(frozen=True, kw_only=True)
class AttentionBackend(PlacedAttention):
    """Every pair is still computed; only who computes it changes, so a picture moves by rounding.

    `auto` times the vendors that fit on random tensors of the live shape, once for each device, shape and type, and
    keeps the fastest. It times one row: a sample's vendor must not depend on the batch it is in. Those that round on
    purpose (`sage`) are used only when named.
    """

    dry: ClassVar[bool] = False  # it times kernels, and dense ones take no memory for their scores
    card: ClassVar[Card] = Card(
        name="attention_backend",
        paradigm=Paradigm.ATTENTION,
        summary="Dense attention by a chosen vendor (cuDNN, FlashAttention, SageAttention ...), or the fastest here.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.02,
        cite=Cite(
            title="FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
            arxiv="2307.08691",
            code="https://github.com/Dao-AILab/flash-attention",
            differs="the method is the vendors' own; ours is that the choice is measured at the shape of the clip and "
            "stands in the receipt with the times",
        ),
    )

    vendor: str = AUTO
    """A vendor by name (`vivace.kernels.dense_attention`), or `auto`: the fastest that fits, measured at first use."""
    cross: bool = False
    """Also in cross-attention to text, which is short: little to gain."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        """Named vendors, whose results do not depend on what happens to be faster."""
        return (cls(vendor="math"), cls(vendor="math", cross=True))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the sites that are served."""
        return (*KINDS, "cross") if self.cross else KINDS

    # -- before anything is loaded ------------------------------------------------------------------------------

    def check(self, model: ModelDescription) -> list[Problem]:
        found = []
        if self.vendor not in (names := [AUTO, *(c.name for c in candidates(OP))]):
            found.append(self.problem("setting", f"vendor must be one of {', '.join(names)}."))
        if not any(self._described(model, expert) for expert in model.experts):
            found.append(
                self.problem("pointless", f"{model.name} has no {' or '.join(self.kinds)} attention.")
            )
        return found

    # -- on a live pipeline -------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            placed: dict[str, VendorSite] = {}
            for site in expert.attentions:
                if site.kind in self.kinds:
                    if site.kind not in placed:
                        placed[site.kind] = VendorSite(own_backend(site))
                    target.set_kernel(site, placed[site.kind])
                    target.report(self.card.name, "sites", 1)
            if placed:
                target.around_expert(expert, self._handler(target, expert, placed))

    def _handler(
        self, target: Target, expert: Expert, placed: dict[str, VendorSite]
    ) -> Callable[..., torch.Tensor]:
        built: dict[tuple[Any, ...], dict[str, Vendors]] = {}
        told: set[Any] = set()

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            # Chosen before the blocks run: a compiled block sees plain attributes, and nothing is timed inside it.
            key = self._key(target, expert, call)
            if key not in built:
                built[key] = {kind: self._vendors(expert, kind, *key) for kind in placed}
            for kind, kernel in placed.items():
                vendors = built[key][kind]
                kernel.plain, kernel.masked = vendors.plain.run, vendors.masked.run
            try:
                return run(call)
            finally:
                for kind, kernel in placed.items():
                    vendors = built[key][kind]
                    for met, choice in ((kernel.met_plain, vendors.plain), (kernel.met_mask, vendors.masked)):
                        if met and (key, kind, choice) not in told:
                            told.add((key, kind, choice))
                            target.chosen(choice)
                    kernel.plain = kernel.masked = None
                    kernel.met_plain = kernel.met_mask = False

        return handler

    @staticmethod
    def _key(target: Target, expert: Expert, call: RootCall) -> tuple[int, int, bool, Any, Any]:
        """What a choice depends on: tokens, text tokens, whether text is masked, type, device."""
        assert target.adapter is not None  # without one there are no sites
        # The grid of what reaches the network, which need not be what the pipeline asked for.
        grid = target.adapter.grid_of_call(expert.config, call.values)
        hidden, text = call.values["hidden_states"], call.values.get("encoder_hidden_states")
        masked = any("mask" in name and value is not None for name, value in call.values.items())
        return grid.tokens, 0 if text is None else text.shape[1], masked, hidden.dtype, hidden.device

    def _vendors(
        self, expert: Expert, kind: str, tokens: int, text: int, masked: bool, dtype: Any, device: Any
    ) -> Vendors:
        """The choices for one kind of sites. Only the kind of call that is to be expected is timed.

        Raises:
            ConfigError: the named vendor cannot serve these calls; the sentence says why.
        """
        site = next(s for s in expert.attentions if s.kind == kind)
        keys = text if kind == "cross" else tokens
        # Masks hide padded text, so self-attention to video has none.
        expected = masked and kind != "self"
        context = {
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "head_dim": site.head_dim,
            "scores": tokens * keys * site.heads,
        }
        if self.vendor != AUTO:
            choice = select(OP, self.vendor, **context, mask=expected)
            return Vendors(choice, choice)
        shape = tokens, keys, site.heads, site.head_dim
        found = {
            mask: self._fastest(shape, dtype, device, context | {"mask": mask})
            if mask == expected
            else select(OP, **context, mask=mask)
            for mask in (False, True)
        }
        return Vendors(found[False], found[True])

    @staticmethod
    def _fastest(
        shape: tuple[int, int, int, int], dtype: Any, device: Any, context: dict[str, Any]
    ) -> Choice:
        """The fastest that fits, on random tensors from a generator of their own."""
        import torch

        queries, keys, heads, dim = shape
        # A processor works through the heads one after the other: one tells which is fastest.
        heads = heads if device.type == "cuda" else 1
        random = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn(1, n, heads, dim, generator=random, device=device).to(dtype)
            for n in (queries, keys, keys)
        )
        mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device) if context["mask"] else None
        table = measured(OP, [(q, k, v, mask)], context, budget=MEASURING)
        return select(OP, measured=table, **context)
