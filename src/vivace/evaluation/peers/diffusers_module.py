"""Caches of diffusers that act within the blocks: TaylorSeer, Pyramid Attention Broadcast, FasterCache."""

from __future__ import annotations

from typing import Any, ClassVar

from vivace.evaluation.peers._hooks import DiffusersCache, announces, by_branch, only
from vivace.evaluation.peers.base import Installed, PeerCard
from vivace.models.adapter import ModelDescription
from vivace.techniques.base import Cite, Paradigm

_DIFFUSERS = "https://github.com/huggingface/diffusers"
_TAYLOR = Cite(
    title="From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers",
    arxiv="2503.06923",
    code=_DIFFUSERS,
)
_PAB = Cite(
    title="Real-Time Video Generation with Pyramid Attention Broadcast", arxiv="2408.12588", code=_DIFFUSERS
)
_FASTER = Cite(
    title="FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality",
    arxiv="2410.19355",
    code=_DIFFUSERS,
)
_PHASE = "Its schedule computes steps start+1, start+1+interval, ...: the step after the warm-up is predicted already."
_START = (
    "Caching starts at step 8, not at the stock 3: measured on the embedded model in 50 steps, interval 5 then costs "
    "less than interval 3 from step 3 and stays nearer to the exact run (40.7 against 37.1 dB)."
)
WAN_MODULES = (r"blocks\.\d+\.attn[12]", r"blocks\.\d+\.ffn")


class TaylorSeer(DiffusersCache):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="diffusers.taylorseer",
        package="diffusers",
        family=Paradigm.CACHING,
        summary="Predict the outputs of attention and feed-forward modules by a Taylor series in the step.",
        knob="interval",
        sweep=(2, 3, 4, 5, 7),
        default={"interval": 5, "start": 8, "order": 1},
        range_=(2, 100),
        notes=(
            "Stock settings match no module of Wan and do nothing, without a warning; here the patterns name Wan's "
            "attn1, attn2 and ffn.",
            _PHASE,
            _START,
            "Factors are kept in fp32, as in the library's example, not in the stock bf16.",
            "Modulation, norms and residuals still run in every block: block calls stay full, FLOPs do not.",
        ),
        cite=_TAYLOR,
        inside_blocks=True,
    )

    def refuse(self, model: ModelDescription) -> str:
        return only(model, self.name, ("wan",)) or announces(model, self.name)

    def config(self, pipeline: Any, steps: int, **settings: Any) -> Any:
        import torch
        from diffusers import TaylorSeerCacheConfig

        return TaylorSeerCacheConfig(
            cache_interval=settings["interval"],
            disable_cache_before_step=settings["start"],
            max_order=settings["order"],
            taylor_factors_dtype=torch.float32,
            cache_identifiers=list(WAN_MODULES),
        )


class TaylorSeerLite(TaylorSeer):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="diffusers.taylorseer_lite",
        package="diffusers",
        family=Paradigm.CACHING,
        summary="Predict the model's last projection by a Taylor series in the step and skip all blocks.",
        knob="interval",
        sweep=(2, 3, 4, 5, 7),
        default={"interval": 5, "start": 8, "order": 1},
        range_=(2, 100),
        notes=(
            _PHASE,
            _START,
            "Factors are kept in fp32, as in the library's example, not in the stock bf16.",
        ),
        cite=_TAYLOR,
    )

    def config(self, pipeline: Any, steps: int, **settings: Any) -> Any:
        import torch
        from diffusers import TaylorSeerCacheConfig

        return TaylorSeerCacheConfig(
            cache_interval=settings["interval"],
            disable_cache_before_step=settings["start"],
            max_order=settings["order"],
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,
        )


class PyramidAttentionBroadcast(DiffusersCache):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="diffusers.pab",
        package="diffusers",
        family=Paradigm.CACHING,
        summary="Reuse attention outputs for a number of calls in the middle of the schedule.",
        knob="spatial",
        sweep=(2, 3, 4, 6),
        default={"spatial": 2, "cross": 6, "early": 800, "late": 100},
        range_=(1, 1000),
        notes=(
            "Measured as the library is: one memory serves both guidance branches of a pipeline that evaluates them "
            "one after the other. With spatial=2 the unconditional branch always gets the conditional branch's "
            "attention of the same step and nothing is reused over time; larger ranges mix both in turn. See "
            "diffusers.pab_branchwise for the method without this defect.",
            "Wan has one attention over space and time: it is treated as spatial. The cross range of 6 is the paper's.",
        ),
        cite=_PAB,
        branches_apart=False,
        inside_blocks=True,
    )

    def refuse(self, model: ModelDescription) -> str:
        return only(model, self.name, ("wan",)) or announces(model, self.name)

    def config(self, pipeline: Any, steps: int, **settings: Any) -> Any:
        from diffusers import PyramidAttentionBroadcastConfig

        window = (settings["late"], settings["early"])
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=settings["spatial"],
            cross_attention_block_skip_range=settings["cross"],
            spatial_attention_timestep_skip_range=window,
            cross_attention_timestep_skip_range=window,
            current_timestep_callback=lambda: pipeline.current_timestep,
        )


class PyramidAttentionBroadcastBranchwise(PyramidAttentionBroadcast):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="diffusers.pab_branchwise",
        package="diffusers",
        family=Paradigm.CACHING,
        summary="Pyramid Attention Broadcast with one memory for each guidance branch.",
        knob="spatial",
        sweep=(2, 3, 4, 6),
        default={"spatial": 2, "cross": 6, "early": 800, "late": 100},
        range_=(1, 1000),
        notes=(
            "Not what a user of the library gets: its hooks, with their memory exchanged by us whenever the pipeline "
            "announces the other guidance branch. This is the method as its paper means it.",
            "Wan has one attention over space and time: it is treated as spatial. The cross range of 6 is the paper's.",
        ),
        cite=_PAB,
        inside_blocks=True,
    )

    def install(self, pipeline: Any, steps: int, **settings: Any) -> Installed:
        return by_branch(self, pipeline, super().install(pipeline, steps, **settings))


class FasterCache(DiffusersCache):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="diffusers.faster_cache",
        package="diffusers",
        family=Paradigm.CACHING,
        summary="Extrapolate attention outputs from the last two in the later part of the schedule.",
        knob="spatial",
        sweep=(2, 3, 4, 6),
        default={"spatial": 2, "early": 681, "weight": 0.5},
        range_=(2, 1000),
        notes=(
            "Stock settings crash on a pipeline that evaluates the guidance branches one after the other, so it is run "
            "as if guidance were distilled: self-attention is reused, the method's reuse of the unconditional "
            "branch is off.",
            "One memory serves both guidance branches, as in diffusers.pab; see diffusers.faster_cache_branchwise.",
            "The weight of the extrapolation is the library's constant 0.5; the paper raises it from 0 to 1.",
        ),
        cite=_FASTER,
        branches_apart=False,
        inside_blocks=True,
    )

    def refuse(self, model: ModelDescription) -> str:
        return only(model, self.name, ("wan",)) or announces(model, self.name)

    def config(self, pipeline: Any, steps: int, **settings: Any) -> Any:
        from diffusers import FasterCacheConfig

        weight = settings["weight"]
        return FasterCacheConfig(
            spatial_attention_block_skip_range=settings["spatial"],
            spatial_attention_timestep_skip_range=(-1, settings["early"]),
            attention_weight_callback=lambda _: weight,
            tensor_format="BCFHW",
            is_guidance_distilled=True,
            current_timestep_callback=lambda: pipeline.current_timestep,
        )


class FasterCacheBranchwise(FasterCache):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="diffusers.faster_cache_branchwise",
        package="diffusers",
        family=Paradigm.CACHING,
        summary="FasterCache's attention part with one memory for each guidance branch.",
        knob="spatial",
        sweep=(2, 3, 4, 6),
        default={"spatial": 2, "early": 681, "weight": 0.5},
        range_=(2, 1000),
        notes=(
            "Not what a user of the library gets: its hooks, with their memory exchanged by us whenever the pipeline "
            "announces the other guidance branch.",
            "The method's reuse of the unconditional branch is off: the library can do it on batched guidance only.",
            "The weight of the extrapolation is the library's constant 0.5; the paper raises it from 0 to 1.",
        ),
        cite=_FASTER,
        inside_blocks=True,
    )

    def install(self, pipeline: Any, steps: int, **settings: Any) -> Installed:
        return by_branch(self, pipeline, super().install(pipeline, steps, **settings))
