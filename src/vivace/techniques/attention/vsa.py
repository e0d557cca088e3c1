"""Video Sparse Attention: cubes of tokens attend to each other by their means, which also says what is seen exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.errors import WeightsError
from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.spec import Routes
from vivace.models.adapter import AttentionSite, ModelDescription
from vivace.techniques.attention.dynamic import DynamicAttention, View
from vivace.techniques.attention.trained import misfit, read
from vivace.techniques.base import Card, Cite, Need, Paradigm, Problem, Stage, exclusive, knob

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vivace.kernels.block_attention.layout import Layout

GATE = "gate"


@dataclass(frozen=True, kw_only=True)
class VideoSparseAttention(DynamicAttention):
    """The `top` best cubes exactly, plus a gate times attention between the means of all cubes (arXiv 2505.13389).

    The method is meant to be trained. Without a file the coarse attention only chooses cubes: its own output enters
    with the constant `gate`, 0 by default. A `file` of trained gates is a safetensors file with `<site>.gate` (heads,)
    for every sparse attention site. Both branches are differentiable, in q, k, v and in the gates, which stand in
    `SparseSite.weights` of every site.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="vsa",
        paradigm=Paradigm.ATTENTION,
        summary="Cubes of 4 x 4 x 4 tokens: the best ones exactly, all of them coarsely through a gate.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        training="optional",
        cite=Cite(
            title="VSA: Faster Video Diffusion with Trainable Sparse Attention",
            arxiv="2505.13389",
            code="https://github.com/hao-ai-lab/FastVideo",
            differs="one gate for each head, where the original projects a gate for every token and channel from the "
            "hidden state; the exact branch has no gate; text of joint attention is always exact and takes no part in "
            "the coarse branch; small clips have smaller cubes",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.6,
    )

    top: int = knob(32, low=1, high=512)
    """Key cubes that every cube of queries sees exactly."""
    gate: float = knob(0.0, low=-1.0, high=1.0)
    """Of the coarse output in all heads, where there is no file."""
    file: str = ""
    """Trained gates: a .safetensors file."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        import torch
        from safetensors.torch import save_file

        from vivace.models.families import for_module

        adapter = for_module(pipeline.transformer)
        sites = list(cls()._sites(adapter.expert("transformer", pipeline.transformer))) if adapter else []
        gates = {f"{s.site}.{GATE}": torch.linspace(0.0, 0.3, s.heads) for s in sites}
        save_file(gates, workdir / "gates.safetensors")
        trained = (cls(top=2, file=str(workdir / "gates.safetensors")),) if gates else ()
        return (cls(top=2), cls(top=1, gate=0.2), *trained)

    def slots(self, grid: TokenGrid, block: int) -> np.ndarray:
        from vivace.kernels.trained_sparse import cubes

        return cubes(grid, block)

    def check(self, model: ModelDescription) -> list[Problem]:
        found = super().check(model)
        if self.file and not found:
            sites = [site for expert in model.experts for site in self._described(model, expert)]
            try:
                reason = misfit(self.file, sites, {GATE: (model.experts[0].heads,)})
            except WeightsError as error:
                reason = str(error)
            if reason:
                found.append(self.problem("file", reason))
        return found

    def weights(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        if not self.file:
            return {}
        return read(self.file, site.site, (GATE,), next(site.module.parameters()).device)

    def least_share(self, blocks: int) -> float:
        return min(self.top, blocks) / blocks

    def most_share(self, blocks: int) -> float:
        return min(self.top, blocks) / blocks

    def beside(self, layout: Layout, head_dim: int) -> tuple[float, float]:
        coarse = float(layout.video_blocks**2) if self.file or self.gate else 0.0
        return coarse, coarse

    def route(self, view: View) -> Routes:
        return view.routes(view.pooled_scores().detach(), share=self.least_share(view.video))

    def finish(self, view: View, routes: Routes, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        import torch

        from vivace.kernels.trained_sparse import coarse_branch

        gate = view.weights[GATE].to(out)[:, None, None] if GATE in view.weights else self.gate
        if isinstance(gate, float) and gate == 0.0:
            return out
        n, c = view.video, view.layout.block
        view.beside += float(n * n)
        coarse = coarse_branch(view.pooled_scores(), view.mean("v")[:, :, :n], gate, c).to(out.dtype)
        return torch.cat([out[:, :, : n * c] + coarse, out[:, :, n * c :]], 2)
