"""What a peer is: somebody else's method, how it is put on a pipeline, and what a reader must know about it.

A peer is configured so that it really acts. Where its stock settings do nothing, crash or mix guidance branches, the
card says so and the record repeats it.
"""

from __future__ import annotations

import importlib.metadata
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from vivace.core.errors import ConfigError
from vivace.core.receipt import Receipt
from vivace.core.registry import Registry
from vivace.models.adapter import EXPERTS, ModelDescription
from vivace.techniques.base import Cite, Paradigm

STEPS = "steps"
"""A setting every peer takes: the solver steps of this contender, when not the task's."""


@dataclass(frozen=True, kw_only=True)
class PeerCard:
    """The facts about a peer that do not depend on its settings.

    `default` holds every setting with the value used when none is given; `sweep` holds values of `knob` from gentle to
    strong, chosen on the embedded model so that the executed share of the work spreads over the range worth plotting.
    `range_` is where the knob may lie. With `batch_coupled` the decision for one clip depends on the other clips of its
    batch: such a peer is measured one clip at a time. `inside_blocks` says that it works within the blocks, so that
    their bodies cannot be compiled whole.
    """

    name: str
    package: str
    family: Paradigm
    summary: str
    knob: str
    sweep: tuple[Any, ...]
    default: Mapping[str, Any]
    notes: tuple[str, ...]
    cite: Cite
    range_: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    needs_cuda: bool = False
    batch_coupled: bool = False
    branches_apart: bool = True
    inside_blocks: bool = False


@dataclass(eq=False)
class Installed:
    """A peer in force. Calling it takes the peer out again.

    Args:
        undo: the peer's own way out; what it leaves behind is put back by the session.
        reset: forgets everything remembered of the last generation.
        effects: facts that hold for every generation, e.g. `linears`.
        counts: what happened in the running generation, zeroed before each.
    """

    undo: Callable[[], None]
    reset: Callable[[], None] = lambda: None
    effects: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def __call__(self) -> None:
        self.undo()


class Peer(ABC):
    """Base of all peers: stateless, made without arguments."""

    card: ClassVar[PeerCard]
    abstract: ClassVar[bool] = True

    @classmethod
    def registry_name(cls) -> str:
        """The name used in contenders, e.g. `diffusers.mag_cache`."""
        return cls.card.name

    @property
    def name(self) -> str:
        """The card's name."""
        return self.card.name

    @property
    def version(self) -> str:
        """The installed version of the package; empty when it is absent."""
        try:
            return importlib.metadata.version(self.card.package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def missing(self) -> str:
        """Why the peer cannot run on this machine, as a sentence; empty when it can."""
        package = self.card.package
        if not self.version:
            return f"{self.name} needs the package {package}; install it with `pip install {package}`."
        if self.card.needs_cuda:
            import torch

            if not torch.cuda.is_available():
                return f"{self.name} needs a CUDA GPU; run it on a machine that has one."
        return ""

    def refuse(self, model: ModelDescription) -> str:
        """Why the peer cannot act on a pipeline, as a sentence; empty when it can."""
        return ""

    def settings(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The card's defaults with changes.

        Raises:
            ConfigError: a setting the peer does not have, or a value of the wrong kind or out of range.
        """
        card, given = self.card, dict(given or {})
        if unknown := sorted(set(given) - set(card.default)):
            has = ", ".join(sorted(card.default))
            raise ConfigError(f"{self.name} has no setting called {', '.join(unknown)}; it has {has}.")
        for key, value in given.items():
            if complaint := _complaint(value, card.default[key]):
                raise ConfigError(f"{self.name}: {key} must be {complaint}, not {value!r}.")
        value = given.get(card.knob, card.default.get(card.knob))
        low, high = card.range_ or (-math.inf, math.inf)
        if card.range_ is not None and not low <= float(value) <= high:  # type: ignore[arg-type]
            raise ConfigError(f"{self.name}: {card.knob} must be from {low} to {high}, not {value!r}.")
        if card.choices and value not in card.choices:
            raise ConfigError(f"{self.name}: {card.knob} must be one of {', '.join(card.choices)}.")
        return {**card.default, **given}

    def prepare(self, pipeline: Any, steps: int, settings: dict[str, Any], **call: Any) -> dict[str, Any]:
        """Settings with what a calibration run found out; `call` are the pipeline's arguments of the runs to come."""
        return settings

    @abstractmethod
    def install(self, pipeline: Any, steps: int, **settings: Any) -> Installed:
        """Put the peer in force on a pipeline that will run `steps` solver steps.

        Args:
            settings: all of them, as `settings()` gives.

        Raises:
            NoEffectError: it found nothing to change.
        """

    def acted(self, receipt: Receipt) -> bool:
        """Whether the receipt of a generation shows that the peer did something."""
        return receipt.flops < receipt.flops_dense * (1.0 - 1e-9)


registry: Registry[Peer] = Registry(
    "peer", "vivace.evaluation.peers", "vivace.evaluation.peers.base:Peer", "vivace.peers"
)


def names() -> list[str]:
    """All peers, sorted."""
    return list(registry)


def get(name: str) -> Peer:
    """The peer of a name.

    Raises:
        UnknownNameError: no peer is called so.
    """
    return registry[name]()


def parse(text: str) -> tuple[Peer, dict[str, Any]]:
    """Read `name` or `name@setting=value,setting=value`; the settings given, without the defaults.

    `steps` is taken by every peer: the solver steps of the contender.

    Raises:
        UnknownNameError: no peer is called so.
        ConfigError: a setting is not one of the peer's, or its value cannot be used.
    """
    name, _, tail = text.partition("@")
    peer, settings = get(name.strip()), {}
    for part in filter(None, (p.strip() for p in tail.split(","))):
        key, equals, value = (s.strip() for s in part.partition("="))
        if not equals or not value:
            raise ConfigError(f"{part} in {text} is no setting; write setting=value.")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(
                f"{value} in {text} is no value; write a number, a word, true or false."
            ) from None
    steps = settings.get(STEPS, 1)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"{text}: steps must be a whole number from 1.")
    peer.settings({k: v for k, v in settings.items() if k != STEPS})
    return peer, settings


def contender_name(peer: Peer, settings: Mapping[str, Any]) -> str:
    """The shortest text that `parse` reads back as these settings; what a calibration added is left out."""
    card = peer.card
    told = {
        k: v
        for k, v in settings.items()
        if (k == STEPS or k == card.knob or v != card.default.get(k)) and not isinstance(v, (list, tuple))
    }
    order = sorted(told, key=lambda k: (k != card.knob, k))
    return peer.name + ("@" + ",".join(f"{k}={_text(told[k])}" for k in order) if told else "")


def experts(pipeline: Any) -> list[Any]:
    """The pipeline's transformers."""
    return [m for e in EXPERTS if (m := getattr(pipeline, e, None)) is not None]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else f"{value}"


def _complaint(value: Any, default: Any) -> str:
    if default is None or isinstance(value, (list, tuple)):
        return ""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return "" if whole else "a whole number"
    if isinstance(default, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return "" if number else "a number"
    return "" if isinstance(value, str) else "a word"
