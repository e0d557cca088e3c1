"""A session with a peer in force instead of a plan: the same counters, the same receipt, the same exact undo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vivace.core.errors import ConfigError, ModelError, UnavailableError
from vivace.core.receipt import Receipt, TechniqueRecord
from vivace.evaluation.peers._snapshot import Snapshot
from vivace.evaluation.peers.base import STEPS, Installed, Peer
from vivace.models.describe import describe_pipeline
from vivace.plans.plan import Plan
from vivace.plans.session import Output, Session

NOTHING_LEFT_OUT = 1e-6
"""An evaluation that executed this share less than a full one counts as answered in part from a cache."""


class PeerSession(Session):
    """An empty plan's session with a peer laid over it.

    Our counters sit on the real modules, below everything the peer installs, so what a peer leaves out is not counted
    as done. The peer is taken out first and the counters after it; then every attribute that either left behind is put
    back. A peer's memory is cleared before every generation: libraries clear theirs at the end of a run, so a run that
    was broken off would spoil the next one.

    Args:
        pipeline: a diffusers video pipeline.
        peer: the peer.
        steps: solver steps of the generations to come.
        settings: the peer's settings, defaults filled in.
        counters: count work; off for timed runs.
        compile_backend: compile block bodies below the peer.

    Raises:
        UnavailableError: the peer cannot run here.
        ModelError: the peer cannot act on this pipeline.
        ConfigError: the settings, or compiled blocks, cannot be used with this peer.
        NoEffectError: the peer found nothing to change; everything has been undone.
    """

    def __init__(
        self,
        pipeline: Any,
        peer: Peer,
        steps: int,
        settings: Mapping[str, Any],
        *,
        counters: bool = True,
        compile_backend: str | None = None,
    ) -> None:
        if compile_backend is not None and peer.card.inside_blocks:
            raise ConfigError(f"{peer.name} works inside the blocks, which then cannot be compiled whole.")
        super().__init__(pipeline, Plan(), counters=counters, compile_backend=compile_backend)
        self.peer, self.steps, self.settings = peer, steps, dict(settings)
        self._snapshot = Snapshot(pipeline)
        self._installed = Installed(lambda: None)
        try:
            self._installed = peer.install(pipeline, steps, **self.settings)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the peer out, then the counters. Closing twice is harmless."""
        if self._closed:
            return
        try:
            self._installed()
        finally:
            self._snapshot.restore()
            super().close()

    def __call__(
        self, prompt: str | Sequence[str] | None = None, *, seed: int | Sequence[int] = 0, **call: Any
    ) -> Output:
        """Generate, as `Session` does; the number of steps is the session's.

        Raises:
            ConfigError: another number of steps is asked for.
        """
        if call.setdefault("num_inference_steps", self.steps) != self.steps:
            raise ConfigError(
                f"{self.peer.name} was set up for {self.steps} steps; open another session for "
                f"{call['num_inference_steps']}."
            )
        self._installed.reset()
        for key in self._installed.counts:
            self._installed.counts[key] = 0
        return super().__call__(prompt, seed=seed, **call)

    def receipt(self) -> Receipt:
        """The receipt of the last generation, with the peer in the place of the techniques."""
        receipt, card = super().receipt(), self.peer.card
        spent = self.meter.spent
        # The first evaluation of a run has nothing to reuse, so the dearest one is a full one.
        full = max(spent, default=0.0)
        hits = sum(cost < full * (1.0 - NOTHING_LEFT_OUT) for cost in spent)
        effects = {"hits": float(hits), **self._installed.effects, **self._installed.counts}
        settings = {**self.settings, STEPS: self.steps}
        receipt.techniques = [
            TechniqueRecord(
                card.name, card.family.value, settings, str(card.cite), len(self._installed.effects), effects
            )
        ]
        receipt.cache_hits = hits
        if receipt.completed and self._counters and not self.peer.acted(receipt):
            receipt.warnings.append(f"{card.name} was in force and did nothing in this run")
        return receipt


def peer_session(
    pipeline: Any,
    peer: Peer,
    steps: int,
    settings: Mapping[str, Any] | None = None,
    *,
    counters: bool = True,
    compile_backend: str | None = None,
    call: Mapping[str, Any] | None = None,
) -> PeerSession:
    """Put a peer in force on a pipeline; use it as a context manager, call it like the pipeline.

    Args:
        steps: solver steps; a `steps` among the settings wins.
        settings: what differs from the peer's defaults.
        counters: count work; off for timed runs.
        compile_backend: compile block bodies below the peer.
        call: the pipeline's arguments of the runs to come, for peers that calibrate themselves.

    Raises:
        UnavailableError: the peer cannot run on this machine; the sentence says what it needs.
        ModelError: the peer cannot act on this pipeline.
        ConfigError: a setting is not one of the peer's.
    """
    given = dict(settings or {})
    steps = given.pop(STEPS, steps)
    full = peer.settings(given)
    if reason := peer.missing():
        raise UnavailableError(reason)
    if reason := peer.refuse(describe_pipeline(pipeline)):
        raise ModelError(reason)
    full = peer.prepare(pipeline, steps, full, **dict(call or {}))
    return PeerSession(pipeline, peer, steps, full, counters=counters, compile_backend=compile_backend)
