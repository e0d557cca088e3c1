"""Sparse-Linear Attention: few key blocks exactly, the middling ones by linear attention, the least not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.errors import WeightsError
from vivace.kernels.block_attention.spec import Routes
from vivace.models.adapter import AttentionSite, ModelDescription
from vivace.techniques.attention.dynamic import DynamicAttention, View
from vivace.techniques.attention.trained import misfit, read
from vivace.techniques.base import Card, Cite, Need, Paradigm, Problem, Stage, exclusive, knob

if TYPE_CHECKING:
    import torch

    from vivace.kernels.block_attention.layout import Layout

WEIGHT, BIAS = "proj.weight", "proj.bias"


@dataclass(frozen=True, kw_only=True)
class SparseLinearAttention(DynamicAttention):
    """Of the pooled map's key blocks the top share is exact, the bottom share is left out, the middle is linear.

    With the feature map f = softmax over the head's dimensions, the linear branch of a block of queries is

        f(q) (sum_j f(k_j)^T v_j) / (f(q) . sum_j f(k_j))

    over the keys j of its middling blocks (arXiv 2509.24006). It is another function than the softmax it stands for, so
    it enters through a trained projection: out = exact + linear W^T + b. A `file` is a safetensors file with
    `<site>.proj.weight` (D, D) and `<site>.proj.bias` (D,) for every sparse attention site. Without one both are zero,
    as at the start of training: the linear branch is not computed, and the middling blocks are left out too.

    Both branches are differentiable; W and b stand in `SparseSite.weights` of every site.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="sla",
        paradigm=Paradigm.ATTENTION,
        summary="The best key blocks exactly, the middling ones by a trained linear branch, the rest not at all.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        training="optional",
        cite=Cite(
            title="SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
            arxiv="2509.24006",
            code="https://github.com/thu-ml/SLA",
            differs="without trained projections only the exact branch runs; the two branches are separate passes, not "
            "one fused kernel; as in the paper the linear branch covers the middling blocks, where the authors' code "
            "lets it cover all keys and has one share, of the exact blocks; text of joint attention is always exact",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.8,
    )

    critical: float = knob(0.05, low=0.01, high=1.0)
    """Share of the video's key blocks that every block of queries sees exactly; at least one block.

    5 % and 10 % skipped are the paper's for Wan2.1-1.3B. The example of the authors' code sees 20 % exactly."""
    skipped: float = knob(0.1, low=0.0, high=1.0)
    """Share of the video's key blocks, the worst, that it does not see at all."""
    file: str = ""
    """Trained projections: a .safetensors file."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        import torch
        from safetensors.torch import save_file

        from vivace.models.families import for_module

        adapter = for_module(pipeline.transformer)
        sites = list(cls()._sites(adapter.expert("transformer", pipeline.transformer))) if adapter else []
        generator, tensors = torch.Generator().manual_seed(0), {}
        for site in sites:
            d = site.head_dim
            tensors[f"{site.site}.{WEIGHT}"] = 0.2 * torch.randn(d, d, generator=generator) / d**0.5
            tensors[f"{site.site}.{BIAS}"] = 0.02 * torch.randn(d, generator=generator)
        save_file(tensors, workdir / "projections.safetensors")
        trained = (cls(critical=0.3, file=str(workdir / "projections.safetensors")),) if sites else ()
        return (*trained, cls(critical=0.3))

    def check(self, model: ModelDescription) -> list[Problem]:
        found = super().check(model)
        if self.file and not found:
            d = model.experts[0].head_dim
            sites = [site for expert in model.experts for site in self._described(model, expert)]
            try:
                reason = misfit(self.file, sites, {WEIGHT: (d, d), BIAS: (d,)})
            except WeightsError as error:
                reason = str(error)
            if reason:
                found.append(self.problem("file", reason))
        elif not self.file:
            message = "without a file of trained projections the linear branch has no weight: only the top "
            message += f"{self.critical:.0%} of the key blocks are seen."
            found.append(self.problem("untrained", message, severity="warning"))
        return found

    def weights(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        if not self.file:
            return {}
        return read(self.file, site.site, (WEIGHT, BIAS), next(site.module.parameters()).device)

    def least_share(self, blocks: int) -> float:
        return self.critical

    def most_share(self, blocks: int) -> float:
        return self.critical

    def beside(self, layout: Layout, head_dim: int) -> tuple[float, float]:
        work = self._work(layout, head_dim) if self.file else 0.0
        return work, work

    def _work(self, layout: Layout, head_dim: int) -> float:
        """Pairs of one head that the linear branch is worth: a product with a (D, D) matrix is worth D / 2 of them."""
        slots = layout.video_blocks * layout.block
        # States of blocks of keys, their sums for every block of queries, queries times those, and the projection.
        return (slots + layout.video_blocks**2 + slots + slots) * head_dim / 2

    def route(self, view: View) -> Routes:
        return view.routes(view.pooled_scores().detach(), share=self.critical)

    def finish(self, view: View, routes: Routes, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        import torch

        from vivace.kernels.trained_sparse import linear_branch, middling

        if WEIGHT not in view.weights:
            return out
        n, c = view.video, view.layout.block
        view.beside += self._work(view.layout, out.shape[-1])
        scores, exact = view.pooled_scores(), routes.mask(view.layout.blocks)[:, :, :n, :n]
        q, k, v = (x[:, :, : n * c].unflatten(2, (n, c)) for x in (view.q, view.k, view.v))
        seen = middling(scores, exact, self.skipped)
        linear = linear_branch(q, k, v, seen, view.layout.gone.view(-1, c)[:n])
        weight, bias = (view.weights[name].to(out) for name in (WEIGHT, BIAS))
        video = out[:, :, : n * c] + torch.nn.functional.linear(linear, weight, bias)
        return torch.cat([video, out[:, :, n * c :]], 2)
