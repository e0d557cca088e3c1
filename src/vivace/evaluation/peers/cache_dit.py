"""cache-dit: dual-block caching, with a Taylor forecast, and by a fixed mask of steps."""

from __future__ import annotations

import logging
import os
from typing import Any, ClassVar

from vivace.core.errors import ConfigError
from vivace.core.quiet import quiet
from vivace.evaluation.peers._hooks import only
from vivace.evaluation.peers.base import Installed, Peer, PeerCard, experts
from vivace.models.adapter import ModelDescription
from vivace.techniques.base import Cite, Paradigm

_CITE = Cite(title="cache-dit", code="https://github.com/vipshop/cache-dit")
_LIMIT = (
    "At most 3 skips in a row, where the library sets no limit: without one, thresholds that act skip long runs of "
    "steps (embedded model, 50 steps: 28 dB to the exact run at 63 % of the work). max_skip=1 saves less and is the "
    "better choice for small savings (20 steps: 44 dB at 65 %)."
)
_PARITY = (
    "It tells guidance branches by counting calls (even, odd), not by what the pipeline announces: set "
    "guided=false for runs without guidance."
)
_FN = "Stock Fn_compute_blocks=8 never caches a model of 8 blocks; here the first block alone decides (Fn=1)."
_GLOBAL = "It replaces the call of the pipeline's class; the session puts it back."
_BATCH = "One decision for the whole batch: the change is averaged over all clips, so it is run one clip at a time."


class _CacheDit(Peer):
    """What the three have in common."""

    abstract = True

    def refuse(self, model: ModelDescription) -> str:
        return only(model, self.name, ("wan",))

    def configs(self, steps: int, settings: dict[str, Any]) -> tuple[Any, Any]:
        """Cache configuration and calibrator configuration or None."""
        raise TypeError(f"{type(self).__name__} gives no configuration")

    def install(self, pipeline: Any, steps: int, **settings: Any) -> Installed:
        cache_dit = _library()
        levels = _hush()
        try:
            cache, calibrator = self.configs(steps, settings)
            cache_dit.enable_cache(pipeline, cache_config=cache, calibrator_config=calibrator)
        except BaseException:
            _speak(levels)
            raise

        def undo() -> None:
            try:
                cache_dit.disable_cache(pipeline)
            finally:
                _speak(levels)

        # Its memory is made anew at every call of the pipeline, also after a call that broke off.
        return Installed(undo, effects={"transformers": float(len(experts(pipeline)))})


class DualBlockCache(_CacheDit):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="cache_dit.dbcache",
        package="cache-dit",
        family=Paradigm.CACHING,
        summary="Run the first block; when its residual hardly changed, reuse the residual of all later blocks.",
        knob="threshold",
        sweep=(0.03, 0.05, 0.08, 0.12, 0.2),
        default={"threshold": 0.08, "warmup": 8, "fn": 1, "bn": 0, "max_skip": 3, "guided": True},
        range_=(0.0, 10.0),
        notes=(_FN, _LIMIT, _BATCH, _PARITY, _GLOBAL),
        cite=_CITE,
        batch_coupled=True,
    )

    def configs(self, steps: int, settings: dict[str, Any]) -> tuple[Any, Any]:
        return _dbcache(steps, settings), None


class DualBlockTaylor(_CacheDit):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="cache_dit.taylorseer",
        package="cache-dit",
        family=Paradigm.CACHING,
        summary="Dual-block caching with the skipped residual forecast by a Taylor series.",
        knob="threshold",
        sweep=(0.05, 0.08, 0.12, 0.2, 0.4),
        default={
            "threshold": 0.08,
            "warmup": 8,
            "fn": 1,
            "bn": 0,
            "max_skip": 3,
            "order": 1,
            "guided": True,
        },
        range_=(0.0, 10.0),
        notes=(_FN, _LIMIT, _BATCH, _PARITY, _GLOBAL),
        cite=_CITE,
        batch_coupled=True,
    )

    def configs(self, steps: int, settings: dict[str, Any]) -> tuple[Any, Any]:
        from cache_dit import TaylorSeerCalibratorConfig

        return _dbcache(steps, settings), TaylorSeerCalibratorConfig(taylorseer_order=settings["order"])


class StepsMask(_CacheDit):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="cache_dit.steps_mask",
        package="cache-dit",
        family=Paradigm.CACHING,
        summary="Compute the steps of a fixed mask and reuse the residual in the others.",
        knob="policy",
        sweep=("slow", "medium", "fast", "ultra"),
        default={"policy": "medium", "fn": 1, "order": 1, "guided": True},
        choices=("slow", "medium", "fast", "ultra"),
        notes=(
            "The masks are the library's, stretched by it to the number of steps; the policy is static, so no decision "
            "depends on the clips. order=0 reuses the residual as it is.",
            "Stock Fn_compute_blocks=8 would run all 8 blocks in the skipped steps; here Fn=1.",
            _PARITY,
            _GLOBAL,
        ),
        cite=_CITE,
    )

    def configs(self, steps: int, settings: dict[str, Any]) -> tuple[Any, Any]:
        from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

        cache = DBCacheConfig(
            Fn_compute_blocks=settings["fn"],
            Bn_compute_blocks=0,
            enable_separate_cfg=settings["guided"],
            num_inference_steps=steps,
            steps_computation_mask=mask(settings["policy"], steps),
            steps_computation_policy="static",
        )
        order = settings["order"]
        return cache, TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None


def _library() -> Any:
    """The package; what its import does to the environment variables is taken back."""
    before = dict(os.environ)
    with quiet():
        import cache_dit
    if before != dict(os.environ):
        os.environ.clear()
        os.environ.update(before)
    return cache_dit


def _hush() -> dict[str, int]:
    """Silence the library's loggers, each of which writes to the standard output; returns their levels."""
    loggers = [n for n in logging.root.manager.loggerDict if n.lower().startswith(("cache_dit", "cache-dit"))]
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    return levels


def _speak(levels: dict[str, int]) -> None:
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def mask(policy: str, steps: int) -> list[int]:
    """The library's mask of a policy, 1 for a computed step.

    Raises:
        ConfigError: the library has no mask for so few steps.
    """
    from cache_dit import steps_mask

    try:
        return steps_mask(total_steps=steps, mask_policy=policy)
    except AssertionError:
        raise ConfigError(f"cache-dit has no steps mask for {steps} steps; use 4, 6 or at least 8.") from None


def _dbcache(steps: int, settings: dict[str, Any]) -> Any:
    from cache_dit import DBCacheConfig

    return DBCacheConfig(
        Fn_compute_blocks=settings["fn"],
        Bn_compute_blocks=settings["bn"],
        residual_diff_threshold=settings["threshold"],
        max_warmup_steps=settings["warmup"],
        max_continuous_cached_steps=settings["max_skip"],
        enable_separate_cfg=settings["guided"],
        num_inference_steps=steps,
    )
