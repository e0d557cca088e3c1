"""Which pattern suits which head: measured in exact runs.

`MaskErrors` computes, for sampled queries of every self- and joint attention, what each head would give under each
candidate pattern, and how far that is from dense. `mask_file` keeps the errors and chooses from them;
`vivace.plans.mask_searching` drives the runs. `Recorder` is what other searches share with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vivace.calibration.artifact import Key
from vivace.core.errors import ConfigError
from vivace.core.shapes import TokenGrid
from vivace.kernels.block_sparse_attention.spec import BlockMap
from vivace.models.adapter import AttentionSite, Expert, ModelDescription, RootCall
from vivace.techniques.attention.head_patterns import head_map
from vivace.techniques.attention.mask_file import MaskFile
from vivace.techniques.attention.placed import KINDS
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Target, Technique, exclusive, knob

if TYPE_CHECKING:
    import torch

NAME = "mask_errors"
AT_ONCE = 1 << 26
"""Scores of sampled queries that are held at a time."""


@dataclass
class Sink:
    """Where a recorder writes: sums by (expert, layer), how many were added, and the grid they were measured on."""

    sums: dict[tuple[str, int], Any] = field(default_factory=dict)
    counts: dict[tuple[str, int], int] = field(default_factory=dict)
    grid: TokenGrid | None = None

    def add(self, site: tuple[str, int], values: Any) -> None:
        """One more measurement, a tensor."""
        self.sums[site] = self.sums[site] + values if site in self.sums else values
        self.counts[site] = self.counts.get(site, 0) + 1

    def mean(self, site: tuple[str, int]) -> np.ndarray | None:
        """Mean of a layer's measurements; None where there is none."""
        return None if site not in self.sums else (self.sums[site] / self.counts[site]).cpu().numpy()


class Watched:
    """The model's own attention at one site, which shows its inputs to a recorder while `watch` is set."""

    def __init__(self, backend: Any) -> None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        self._dispatch, self._backend = dispatch_attention_fn, backend
        self.watch: Callable[..., None] | None = None

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        if self.watch is not None:
            self.watch(q.detach(), k.detach(), v.detach(), mask)
        return self._dispatch(q, k, v, attn_mask=mask, backend=self._backend)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorder(Technique):
    """Watches the attention of exact runs and changes nothing. Do not compile the session."""

    abstract: ClassVar[bool] = True

    block: int = knob(128, choices=(64, 128))
    """Most tokens of a block."""
    every: int = knob(1, low=1, high=50)
    """Of so many steps one is measured."""
    sink: Sink = field(default_factory=Sink)

    def to_dict(self) -> dict[str, Any]:
        return {"_type": self.type_name(), "_version": self.version}

    def prepare(self, grid: TokenGrid, device: Any) -> Any:
        """What `measure` needs for a grid, made once."""
        raise TypeError(f"{type(self).__name__} does not say what it prepares")

    def measure(self, q: Any, k: Any, v: Any, mask: Any, prepared: Any) -> Any:
        """A tensor for one call, q, k, v (B, S, H, D); its mean over calls is kept."""
        raise TypeError(f"{type(self).__name__} does not say what it measures")

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            placed = []
            for site in expert.attentions:
                if site.kind in KINDS:
                    kernel = Watched(getattr(site.module.processor, "_attention_backend", None))
                    target.set_kernel(site, kernel)
                    placed.append((site, kernel))
            if placed:
                target.around_expert(expert, self._around(target, expert, placed))

    def _around(
        self, target: Target, expert: Expert, placed: list[tuple[AttentionSite, Watched]]
    ) -> Callable[..., Any]:
        ready: dict[Any, Any] = {}

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            if target.clock.step % self.every:
                return run(call)
            assert target.adapter is not None  # without one there are no sites
            grid = target.adapter.grid_of_call(expert.config, call.values)
            device = call.values["hidden_states"].device
            if (grid, device) not in ready:
                ready[grid, device] = self.prepare(grid, device)
            self.sink.grid = grid
            for site, kernel in placed:
                kernel.watch = self._watch((expert.name, site.index), ready[grid, device])
            try:
                return run(call)
            finally:
                for _, kernel in placed:
                    kernel.watch = None
                target.report(self.card.name, "evaluations_seen", 1)

        return handler

    def _watch(self, site: tuple[str, int], prepared: Any) -> Callable[..., None]:
        def watch(q: Any, k: Any, v: Any, mask: Any) -> None:
            self.sink.add(site, self.measure(q, k, v, mask, prepared))

        return watch

    def by_layer(self, model: ModelDescription) -> dict[str, list[np.ndarray]]:
        """Expert -> the mean of every layer.

        Raises:
            ConfigError: there is a layer that was not seen.
        """
        out: dict[str, list[np.ndarray]] = {}
        for expert in model.experts:
            for layer in range(expert.depth):
                if (found := self.sink.mean((expert.name, layer))) is None:
                    raise ConfigError(
                        f"no attention was seen in layer {layer} of {expert.name}: run the session first, and let it "
                        "measure more steps (every=1)."
                    )
                out.setdefault(expert.name, []).append(found)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Token masks of sampled queries: `rows` (R,), `seen` bool (patterns, R, S)."""

    rows: torch.Tensor
    seen: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskErrors(Recorder):
    """Measures the error that each candidate pattern makes in each head's output."""

    abstract: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.ATTENTION,
        summary="Measures what each pattern of attention would cost each head; changes nothing.",
        objective="calibration",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        cite=Cite(title="Sparse-vDiT; Fast Video Generation with Sliding Tile Attention", arxiv="2506.03065"),
        lossless=True,
    )

    patterns: tuple[str, ...] = ()
    """Candidates (`vivace.techniques.attention.head_patterns`)."""
    rows: int = knob(64, low=1, high=4096)
    """Queries that are looked at in a call, spread evenly over the video."""

    def map(self, grid: TokenGrid, pattern: str) -> BlockMap:
        """A candidate's map of a grid."""
        return head_map(grid, pattern, self.block)

    def prepare(self, grid: TokenGrid, device: Any) -> Candidates:
        import torch

        rows = sampled(grid, self.rows)
        seen = np.stack([_rows_of(self.map(grid, p), rows) for p in self.patterns])
        return Candidates(torch.from_numpy(rows).to(device), torch.from_numpy(seen).to(device))

    def measure(self, q: Any, k: Any, v: Any, mask: Any, prepared: Candidates) -> torch.Tensor:
        """Relative errors, float64 (H, patterns), mean over the batch."""
        import torch

        b, s, h, _ = q.shape
        kept = prepared.seen.shape[0]
        missed = torch.zeros(b, h, kept, dtype=torch.float64, device=q.device)
        size = torch.zeros(b, h, dtype=torch.float64, device=q.device)
        values = v.transpose(1, 2).float()
        at_once = max(1, AT_ONCE // (b * h * s))
        for first in range(0, len(prepared.rows), at_once):
            part = slice(first, first + at_once)
            scores = scores_of(q, k, mask, prepared.rows[part])
            dense = torch.softmax(scores, -1) @ values
            size += dense.double().square().sum((-1, -2))
            for i in range(kept):
                chosen = scores.masked_fill(~prepared.seen[i, part], float("-inf"))
                # A query none of whose keys is left gives zeros, as the kernels do.
                out = torch.softmax(chosen, -1).nan_to_num(0.0) @ values
                missed[..., i] += (out - dense).double().square().sum((-1, -2))
        return (missed / size.clamp_min(1e-30)[..., None]).sqrt().mean(0)

    def file(
        self, model: ModelDescription, key: Key, prompts: int, prompts_sha256: str, seed: int, vivace: str
    ) -> MaskFile:
        """What was measured.

        Raises:
            ConfigError: nothing was seen.
        """
        layers = self.by_layer(model)
        assert self.sink.grid is not None  # something was seen
        return MaskFile(
            key=key,
            patterns=self.patterns,
            densities=tuple(self.map(self.sink.grid, p).density for p in self.patterns),
            block=self.block,
            errors={e: [x.tolist() for x in found] for e, found in layers.items()},
            prompts=prompts,
            prompts_sha256=prompts_sha256,
            seed=seed,
            vivace=vivace,
        )


def sampled(grid: TokenGrid, count: int) -> np.ndarray:
    """Video tokens spread evenly over a grid, as places in the sequence: int64 (rows,)."""
    count = min(count, grid.video)
    return (2 * np.arange(count) + 1) * grid.video // (2 * count) + (grid.text if grid.text_first else 0)


def scores_of(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, rows: torch.Tensor
) -> torch.Tensor:
    """Scores of some queries with all keys, masked: float32 (B, H, R, S)."""
    import torch

    chosen = q.index_select(1, rows).transpose(1, 2).float()
    scores = chosen @ k.permute(0, 2, 3, 1).float() * q.shape[-1] ** -0.5
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()


def _rows_of(block_map: BlockMap, rows: np.ndarray) -> np.ndarray:
    """Keys that some queries see, bool (rows, S)."""
    block_of = np.empty(block_map.tokens, dtype=np.int64)
    block, slot = np.nonzero(block_map.slots >= 0)
    block_of[block_map.slots[block, slot]] = block
    return block_map.keep[0][block_of[rows]][:, block_of]
