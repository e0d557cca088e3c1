"""Caches of diffusers that skip the rest of the block stack: FirstBlockCache, MagCache, SeaCache."""

from __future__ import annotations

import ast
import contextlib
import io
import weakref
from typing import Any, ClassVar

from vivace.core.errors import ConfigError, NoEffectError
from vivace.core.quiet import quiet
from vivace.core.receipt import Receipt
from vivace.evaluation.peers._hooks import REGISTERED, DiffusersCache, announces, only
from vivace.evaluation.peers._snapshot import Snapshot
from vivace.evaluation.peers.base import PeerCard, experts
from vivace.models.adapter import ModelDescription
from vivace.plans.plan import Plan
from vivace.plans.session import Session
from vivace.techniques.base import Cite, Paradigm

CALIBRATION_PROMPTS = (
    "a small red sphere rolls to the left on a sandy floor",
    "a large blue cube stands still while the camera orbits it",
    "a green cone and a yellow cylinder move towards each other",
    "a shiny purple torus comes closer to the camera over a checkered floor",
)
CALIBRATION_SEED = 20_000
_calibrated: weakref.WeakKeyDictionary[Any, dict[Any, tuple[float, ...]]] = weakref.WeakKeyDictionary()


class FirstBlockCache(DiffusersCache):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="diffusers.first_block_cache",
        package="diffusers",
        family=Paradigm.CACHING,
        summary="Run the first block; when its residual hardly changed, reuse the residual of all later blocks.",
        knob="threshold",
        sweep=(0.03, 0.05, 0.08, 0.12, 0.3),
        default={"threshold": 0.05},
        range_=(0.0, 10.0),
        notes=(
            "One decision for the whole batch: the change is averaged over all clips, so it is run one clip at a time.",
            "The library has no warm-up and no limit on skips in a row: every threshold that acts skips long runs of "
            "steps. cache_dit.dbcache is the same idea with both.",
            "Guidance branches have memories of their own.",
            "The library forgets only at the end of a run; the session clears it before each run.",
        ),
        cite=Cite(
            title="First Block Cache, ParaAttention, as in diffusers",
            code="https://github.com/huggingface/diffusers",
        ),
        batch_coupled=True,
    )

    def refuse(self, model: ModelDescription) -> str:
        if model.depth == 1:
            return (
                f"{self.name} cannot hook a model of one block (it looks for a last block beside the first)."
            )
        return only(model, self.name, REGISTERED) or announces(model, self.name)

    def config(self, pipeline: Any, steps: int, **settings: Any) -> Any:
        from diffusers import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold=settings["threshold"])


class MagCache(DiffusersCache):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="diffusers.mag_cache",
        package="diffusers",
        family=Paradigm.CACHING,
        summary="Skip a step while the error predicted from a calibrated curve of residual magnitudes stays small.",
        knob="threshold",
        sweep=(0.01, 0.02, 0.06, 0.12, 0.24),
        default={"threshold": 0.06, "max_skip": 3, "retention": 0.2, "ratios": None},
        range_=(0.0, 10.0),
        notes=(
            "The ratios come from the library's own calibration on prompts outside the report set, at the same number "
            "of steps. It prints them and returns nothing, so its output is read.",
            "It takes one list of ratios for both guidance branches: they get the mean of the two calibrated lists.",
            "Each hook counts its own calls, so a run with another number of steps would be misaligned: it is refused.",
            "The stock limit of 3 skips in a row after 20 % of the steps bounds the executed share to about 0.4.",
            "Under torch.compile the whole wrapped forward of a block is left out of compilation.",
        ),
        cite=Cite(
            title="MagCache: Fast Video Generation with Magnitude-Aware Cache",
            arxiv="2506.09045",
            code="https://github.com/huggingface/diffusers",
        ),
    )

    def refuse(self, model: ModelDescription) -> str:
        if len(model.experts) > 1:
            return f"{self.name} counts the steps of each transformer from 0; a model of two transformers misaligns it."
        return only(model, self.name, REGISTERED) or announces(model, self.name)

    def prepare(self, pipeline: Any, steps: int, settings: dict[str, Any], **call: Any) -> dict[str, Any]:
        if settings["ratios"] is not None:
            return settings
        known = _calibrated.setdefault(pipeline, {})
        key = (steps, tuple(sorted((k, repr(v)) for k, v in call.items())))
        if key not in known:
            known[key] = calibrate(pipeline, steps, **call)
        return {**settings, "ratios": known[key]}

    def config(self, pipeline: Any, steps: int, **settings: Any) -> Any:
        from diffusers import MagCacheConfig

        ratios = settings["ratios"]
        if ratios is None or len(ratios) != steps:
            given = "no" if ratios is None else str(len(ratios))
            raise ConfigError(
                f"{self.name} needs one ratio for each of {steps} steps and has {given}; calibrate it."
            )
        return MagCacheConfig(
            threshold=settings["threshold"],
            max_skip_steps=settings["max_skip"],
            retention_ratio=settings["retention"],
            num_inference_steps=steps,
            mag_ratios=list(ratios),
        )


def calibrate(pipeline: Any, steps: int, **call: Any) -> tuple[float, ...]:
    """MagCache's ratios, one for each step: the mean over guidance branches and prompts of its own calibration.

    Args:
        call: the pipeline's arguments; `prompt` replaces the built-in prompts, `seed` the built-in seed.

    Raises:
        NoEffectError: the calibration printed nothing.
    """
    from diffusers import MagCacheConfig

    prompts = call.pop("prompt", None) or list(CALIBRATION_PROMPTS)
    seed = call.pop("seed", CALIBRATION_SEED)
    call |= {"num_inference_steps": steps, "output_type": "latent"}
    said = io.StringIO()
    with Session(pipeline, Plan(), counters=False) as session:
        snapshot = Snapshot(pipeline)
        try:
            with quiet():
                for transformer in experts(pipeline):
                    transformer.enable_cache(MagCacheConfig(num_inference_steps=steps, calibrate=True))
            with contextlib.redirect_stdout(said):
                session(prompts, seed=seed, **call)
        finally:
            with quiet():
                for transformer in experts(pipeline):
                    transformer.disable_cache()
            snapshot.restore()
    lists = [
        ast.literal_eval(line)
        for line in said.getvalue().splitlines()
        if line.startswith("[") and "," in line
    ]
    lists = [values for values in lists if len(values) == steps]
    if not lists:
        raise NoEffectError(
            "MagCache's calibration printed no ratios; run it with the steps it is set up for."
        )
    return tuple(sum(column) / len(column) for column in zip(*lists, strict=True))


class SeaCache(DiffusersCache):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="diffusers.sea_cache",
        package="diffusers",
        family=Paradigm.CACHING,
        summary="Skip a step while the accumulated change of the frequency-filtered latents stays small.",
        knob="threshold",
        sweep=(0.05, 0.1, 0.15, 0.3, 0.5),
        default={"threshold": 0.25, "order": 1, "start": 1, "end": 1, "max_skip": 2},
        range_=(0.0, 100.0),
        notes=(
            "One decision for the whole batch: the change is averaged over all clips, so it is run one clip at a time.",
            "Acts only where the pipeline tells step, sigma and number of steps: Wan text-to-video. Elsewhere the "
            "library runs everything and only warns.",
            "The stock limit of 2 skips in a row bounds what it can save to two steps in three.",
        ),
        cite=Cite(
            title="SeaCache: Spectral-Evolution-Aware Cache for Accelerating Diffusion Models",
            arxiv="2602.18993",
            code="https://github.com/huggingface/diffusers",
        ),
        batch_coupled=True,
    )

    def refuse(self, model: ModelDescription) -> str:
        if model.pipeline_class != "WanPipeline":
            return f"{self.name} acts in Wan text-to-video only; {model.pipeline_class} does not tell it the step."
        return ""

    def config(self, pipeline: Any, steps: int, **settings: Any) -> Any:
        from diffusers.hooks.sea_cache import SeaCacheConfig

        return SeaCacheConfig(
            threshold=settings["threshold"],
            residual_order=settings["order"],
            retention_steps=settings["start"],
            cache_end_steps=settings["end"],
            max_consecutive_cached=settings["max_skip"],
        )


def skipped(receipt: Receipt) -> dict[str, tuple[int, ...]]:
    """Steps in which less than the whole block stack ran, by guidance branch."""
    found: dict[str, list[int]] = {}
    for step in receipt.steps:
        for record in step.branches:
            found.setdefault(record.branch, [])
            if record.blocks_run < record.blocks_total:
                found[record.branch].append(step.index)
    return {branch: tuple(steps) for branch, steps in found.items()}
