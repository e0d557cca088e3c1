"""Contenders: who runs under the protocol, written as short texts and opened on a pipeline.

    exact                              the task's baseline
    steps=18                           the exact run with fewer solver steps
    plan:fast, plan:my.yaml            a plan of ours, also `plan:fast@few_steps.steps=12`
    peer:diffusers.mag_cache@threshold=0.06
    floor                              the exact run with another attention kernel
    seed                               the exact run with other noise

A contender gives one thing: a session on a pipeline, called like the pipeline itself. It knows `Plan`, and never a
technique.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.core.errors import ConfigError
from vivace.evaluation import record
from vivace.evaluation.record import Kind
from vivace.plans.plan import Plan
from vivace.plans.session import Session

if TYPE_CHECKING:
    from vivace.evaluation.peers.base import Peer
    from vivace.models.adapter import ModelDescription

COMPOSITE, TRAJECTORY = "composite", "trajectory"
LONG = 16384
"""Tokens from which the plain attention kernel would need too much memory for the noise floor."""


@dataclass(frozen=True)
class Contender:
    """One way to make the clips of a task. Build it with `parse`."""

    spec: str
    kind: Kind
    plan: Plan
    steps: int | None = None
    peer: Peer | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Unique within a task: the plan's own name, or the text without its prefix."""
        if self.kind == "plan":
            return self.plan.name
        return self.spec.removeprefix("peer:")

    @property
    def batch_coupled(self) -> bool:
        """Whether the samples of a batch influence each other, so that clips must be made one by one."""
        if self.peer is not None:
            return self.peer.card.batch_coupled
        return any(t.card.batch_coupled for t in self.plan.ordered())

    @property
    def own_noise(self) -> bool:
        """Whether the samples get other noise than the baseline's."""
        return self.kind == "seed"

    @cached_property
    def described(self) -> record.Contender:
        """The contender as it stands in a record."""
        techniques = self.plan.ordered()
        families = sorted({t.card.paradigm.value for t in techniques})
        family = families[0] if len(families) == 1 else COMPOSITE if families else ""
        base, _, knob = self.name.partition("@")
        facts: dict[str, Any] = {"settings": self.plan.to_dict() if techniques else {}}
        if self.kind == "steps":
            base, knob, family = "exact, fewer steps", self.name, TRAJECTORY
            facts = {"settings": {"steps": self.steps}}
        elif self.kind == "exact":
            base = "exact, fewer steps"
        elif self.peer is not None:
            card = self.peer.card
            family = card.family.value
            facts = {
                "settings": {**card.default, **dict(self.settings)},
                "package": card.package,
                "package_version": self.peer.version,
                "notes": card.notes,
            }
        return record.Contender(
            name=self.name,
            kind=self.kind,
            family=family,
            group=base,
            knob=knob,
            techniques=tuple(t.card.name for t in techniques),
            **facts,
        )

    def refuse(self, model: ModelDescription) -> str:
        """Why this contender cannot run on a model here; empty when it can."""
        from vivace.core.errors import PlanError

        if self.peer is not None:
            return self.peer.missing() or self.peer.refuse(model)
        try:
            self.plan.check(model)
        except PlanError as error:
            return str(error)
        return ""

    @contextmanager
    def session(
        self,
        pipeline: Any,
        model: ModelDescription,
        steps: int,
        counters: bool,
        folder: Path | None = None,
    ) -> Iterator[Session]:
        """A session in force on `pipeline`; everything is undone at the end.

        Args:
            steps: of the task's exact run.
            counters: count work (audit), or leave the counters out (timing).
            folder: where what a peer calibrated is kept and found again, so that a bench calibrates once.
        """
        if self.peer is not None:
            from vivace.evaluation.peers import peer_session

            settings = dict(self.settings) | self.calibrated(folder)
            with peer_session(pipeline, self.peer, steps, settings, counters=counters) as session:
                self._keep(folder, session.settings)
                yield session
            return
        with Session(pipeline, self.plan, model=model, counters=counters) as session:
            if self.kind == "floor":
                with _other_kernel(model):
                    yield session
            else:
                yield session

    def calibrated(self, folder: Path | None) -> dict[str, Any]:
        """Settings that a calibration in `folder` found for this peer; empty when there was none."""
        file = self._calibration(folder)
        return json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}

    def _calibration(self, folder: Path | None) -> Path | None:
        if folder is None or self.peer is None:
            return None
        return folder / f"calibration-{self.peer.name}-{self.call_steps(0)}.json"

    def _keep(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        """Only what no setting gave and no default has was found out by a run of the model."""
        file = self._calibration(folder)
        if file is None or self.peer is None or file.is_file():
            return
        stated = self.peer.settings({k: v for k, v in self.settings if k != "steps"})
        if found := {k: v for k, v in settings.items() if stated.get(k) != v and k in stated}:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found), encoding="utf-8")

    def call_steps(self, steps: int) -> int | None:
        """`num_inference_steps` to pass, or None where the plan decides."""
        if self.kind == "plan":
            return None
        if self.peer is not None:
            return int(dict(self.settings).get("steps", steps))
        return self.steps or steps


def parse(text: str) -> Contender:
    """A contender from its text; see the module's docstring.

    Raises:
        ConfigError, UnknownNameError: it names nothing that can run; the sentence says what is known.
    """
    text = text.strip()
    exact = Plan(name="exact")
    if text in ("exact", "floor", "seed"):
        return Contender(text, text, exact)
    if match := re.fullmatch(r"steps=(\d+)", text):
        if not 1 <= int(match[1]) <= 1000:
            raise ConfigError(f"a run of {match[1]} steps cannot be made; give from 1 to 1000.")
        return Contender(text, "steps", exact, steps=int(match[1]))
    prefix, colon, rest = text.partition(":")
    if colon and prefix == "peer":
        from vivace.evaluation.peers import parse as parse_peer

        peer, settings = parse_peer(rest)
        return Contender(text, "peer", exact, peer=peer, settings=tuple(sorted(settings.items())))
    if colon and prefix == "plan":
        plan = plan_of(rest)
        return parse("exact") if rest == "exact" else Contender(text, "plan", plan)
    raise ConfigError(
        f"'{text}' names no contender; give exact, steps=18, plan:fast, peer:NAME@knob=value, floor or seed."
    )


def plan_of(text: str) -> Plan:
    """`fast`, `my.yaml`, or `fast@few_steps.steps=12,guidance_interval.high=0.8`.

    A stand-in (`unless:` in the plan) whose setting is changed is meant to act: what it stands in for is left out.

    Raises:
        ConfigError: a change names no technique of the plan, or its value is not JSON.
    """
    name, _, changes = text.partition("@")
    plan = Plan.load(name)
    if not changes:
        return plan
    called = f"{plan.name}@{changes}"
    items = {t.card.name: t for t in plan.techniques}
    for change in changes.split(","):
        path, equals, value = change.partition("=")
        technique, _, field = path.strip().partition(".")
        if not equals or technique not in items:
            raise ConfigError(
                f"'{change}' changes nothing in {name}; write technique.setting=value, with one of {', '.join(items)}."
            )
        try:
            items[technique] = items[technique].replace(**{field: json.loads(value)})
        except (ValueError, TypeError):
            raise ConfigError(f"'{change}' cannot be read; write technique.setting=value.") from None
    changed = {change.partition(".")[0].strip() for change in changes.split(",")}
    replaced = {plan.unless[name] for name in changed if name in plan.unless}
    kept = [t for name, t in items.items() if name not in replaced]
    unless = {name: other for name, other in plan.unless.items() if other not in replaced}
    return Plan(kept, called, plan.summary, plan.optional - replaced, unless, plan.beside)


@contextmanager
def _other_kernel(model: ModelDescription) -> Iterator[None]:
    """Another attention kernel for the same arithmetic: plain where it fits, memory-efficient for long sequences."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    grid = model.grid(model.workload())
    tokens = grid.tokens if grid is not None else 0
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if tokens >= LONG else SDPBackend.MATH):
        yield
