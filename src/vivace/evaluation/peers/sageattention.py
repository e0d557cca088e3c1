"""SageAttention 1.x: int8 query-key products in Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from vivace.core.shapes import TokenGrid
from vivace.evaluation.peers._kernels import AttentionPeer
from vivace.evaluation.peers.base import PeerCard
from vivace.models.adapter import ModelDescription
from vivace.techniques.base import Cite, Paradigm

HEAD_DIMS = (64, 96, 128)


class SageAttention(AttentionPeer):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="sageattention.int8",
        package="sageattention",
        family=Paradigm.ATTENTION,
        summary="Queries and keys in int8 by blocks, keys smoothed by their mean, values in fp16.",
        knob="",
        sweep=(),
        default={"smooth": True},
        notes=(
            "Version 1.x, the one the package index has; 2.x must be built from source. diffusers' own `sage` backend "
            "asks for 2.1.1, so the kernel is called directly, around the model's projections.",
            "Visits every pair: FLOPs are counted as dense, the gain is in seconds. One point, not a curve.",
            "Only self-attention: cross-attention to a short text gains nothing.",
        ),
        cite=Cite(
            title="SageAttention: Accurate 8-Bit Attention for Plug-and-Play Inference Acceleration",
            arxiv="2410.02367",
            code="https://github.com/thu-ml/SageAttention",
        ),
        needs_cuda=True,
    )

    def refuse(self, model: ModelDescription) -> str:
        if reason := super().refuse(model):
            return reason
        wrong = [e.head_dim for e in model.experts if e.head_dim not in HEAD_DIMS]
        return f"{self.name} needs heads of 64, 96 or 128 channels, not {wrong[0]}." if wrong else ""

    def kernel(self, grid: Callable[[], TokenGrid], called: Callable[[], None], **settings: Any) -> Any:
        from sageattention.core import sageattn  # pyright: ignore[reportMissingImports]

        smooth = settings["smooth"]

        def attend(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
            called()
            # It subtracts the mean from the keys in place: they are ours, made for this call.
            return sageattn(q, k.contiguous(), v, tensor_layout="NHD", is_causal=False, smooth_k=smooth)

        return attend
