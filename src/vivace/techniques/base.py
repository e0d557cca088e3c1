"""What a technique is: data (a frozen config with a Card) plus one function (`apply`).

Constructing a technique does nothing. `check`, `claims` and `estimate` are pure and need no weights. `apply` edits
a live pipeline through the ledger only; undoing is the ledger's business, never the technique's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.config import Config, knob
from vivace.core.context import Clock, StateStore
from vivace.core.footprint import Footprint
from vivace.core.registry import Registry
from vivace.core.shapes import Workload
from vivace.core.surgery import Surgery
from vivace.models.adapter import (
    Adapter,
    AttentionSite,
    Block,
    BlockCall,
    Expert,
    ModelDescription,
    Need,
    RootCall,
)

if TYPE_CHECKING:
    import torch

    from vivace.kernels.api import Choice

__all__ = [
    "ALL_SITES",
    "Card",
    "Cite",
    "Claim",
    "Estimate",
    "Mode",
    "Need",
    "Paradigm",
    "Problem",
    "Stage",
    "Target",
    "Technique",
    "exclusive",
    "knob",
    "reads",
    "registry",
    "shared",
]

RESOURCES = (
    "weights.checkpoint",
    "linear.weight",
    "tokens.set",
    "attention.kernel",
    "attention.mask",
    "block.skip",
    "block.output",
    "module.output",
    "step.skip",
    "guidance.branches",
    "sampler.schedule",
    "sampler.solver",
    "vae.decode",
    "text.encode",
    "kv.memory",
    "compile",
    "placement",
)
"""Everything a technique can lay claim to."""

ALL_SITES: frozenset[str] = frozenset({"*"})


class Paradigm(StrEnum):
    """The survey's families."""

    DISTILLATION = "step distillation"
    ATTENTION = "efficient attention"
    COMPRESSION = "model compression"
    CACHING = "feature caching"
    TRAJECTORY = "trajectory"


class Stage(StrEnum):
    """When a technique is applied; the order of the user's list never matters.

    What shortens the sequence lies inside the caches, so that nothing is matched for a block that is skipped. A
    solver's object is replaced before trajectory techniques wrap whatever solver is then in force.
    """

    CHECKPOINT = "10 checkpoint"
    WEIGHTS = "20 weights"
    KERNELS = "30 kernels"
    COMPILE = "35 compile"
    TOKENS = "38 tokens"
    CACHE = "40 cache"
    SOLVER = "45 solver"
    TRAJECTORY = "50 trajectory"
    PLACEMENT = "60 placement"

    @property
    def number(self) -> int:
        return int(self.value[:2])


class Mode(StrEnum):
    """How a resource is claimed: two exclusive claims on overlapping sites are a conflict."""

    EXCLUSIVE = "exclusive"
    SHARED = "shared"
    READS = "reads"


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim on a resource at some sites (block, attention or linear addresses; ALL_SITES by default)."""

    resource: str
    mode: Mode
    sites: frozenset[str] = ALL_SITES

    def __post_init__(self) -> None:
        if self.resource not in RESOURCES:
            raise ValueError(f"'{self.resource}' is not a resource; the resources are {', '.join(RESOURCES)}")

    def conflicts(self, other: Claim) -> frozenset[str]:
        """Sites on which both claims are exclusive; empty when they can live together."""
        if (
            self.resource != other.resource
            or self.mode is not Mode.EXCLUSIVE
            or other.mode is not Mode.EXCLUSIVE
        ):
            return frozenset()
        if self.sites >= ALL_SITES:
            return other.sites
        return self.sites if other.sites >= ALL_SITES else self.sites & other.sites


def exclusive(resource: str, sites: frozenset[str] = ALL_SITES) -> Claim:
    """Nobody else may change this."""
    return Claim(resource, Mode.EXCLUSIVE, sites)


def shared(resource: str, sites: frozenset[str] = ALL_SITES) -> Claim:
    """Others may change it too."""
    return Claim(resource, Mode.SHARED, sites)


def reads(resource: str, sites: frozenset[str] = ALL_SITES) -> Claim:
    """Depends on it and does not change it."""
    return Claim(resource, Mode.READS, sites)


@dataclass(frozen=True, slots=True)
class Cite:
    """Where the method comes from, and what ours does differently."""

    title: str
    arxiv: str = ""
    code: str = ""
    differs: str = ""

    def __str__(self) -> str:
        return self.title + (f" (arXiv {self.arxiv})" if self.arxiv else "")


@dataclass(frozen=True, slots=True)
class Card:
    """The facts about a method that do not depend on its settings.

    `fidelity` is the declared bound on the relative L2 change of the latents at default settings on the contract's
    model; None when the method changes the picture on purpose. `unsound_with` names techniques that must not be
    combined, with the reason.
    """

    name: str
    paradigm: Paradigm
    summary: str
    objective: str
    stage: Stage
    claims: tuple[Claim, ...]
    cite: Cite
    needs: tuple[Need, ...] = ()
    packages: tuple[str, ...] = ()
    training: str = "none"
    calibration: str = "none"
    lossless: bool = False
    batch_coupled: bool = False
    fidelity: float | None = None
    unsound_with: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a plan cannot, or should not, run, with the sentence that helps.

    `severity` is `error` (refused), or `warning` (runs, and the receipt says it).
    """

    technique: str
    kind: str
    message: str
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.technique}: {self.message}" if self.technique else self.message


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predicted counts of one generation as (low, high); equal ends mean an exact prediction."""

    nfe: tuple[float, float]
    blocks_run: tuple[float, float]
    attention_pairs: tuple[float, float]
    flops: tuple[float, float]

    @classmethod
    def exact(cls, nfe: float, blocks_run: float, attention_pairs: float, flops: float) -> Estimate:
        """An estimate without slack."""
        return cls((nfe, nfe), (blocks_run, blocks_run), (attention_pairs, attention_pairs), (flops, flops))

    def scaled(self, low: float, high: float | None = None, *, fields: tuple[str, ...] = ()) -> Estimate:
        """Counts times a factor or a range of factors; `fields` limits which (all by default)."""
        high = low if high is None else high
        names = fields or ("nfe", "blocks_run", "attention_pairs", "flops")
        values = {n: getattr(self, n) for n in ("nfe", "blocks_run", "attention_pairs", "flops")}
        return Estimate(**values | {n: (values[n][0] * low, values[n][1] * high) for n in names})

    def problems(self, counts: Mapping[str, float], slack: float = 1e-6) -> list[str]:
        """Sentences for every count outside its range."""
        out = []
        for name in ("nfe", "blocks_run", "attention_pairs", "flops"):
            low, high = getattr(self, name)
            room = slack * max(abs(low), abs(high), 1.0)
            if not low - room <= counts[name] <= high + room:
                out.append(f"{name} counted {counts[name]:.6g}, estimated {low:.6g} to {high:.6g}")
        return out


BlockHandler = Callable[
    [BlockCall, Callable[[BlockCall], "tuple[torch.Tensor, torch.Tensor | None]"]],
    "tuple[torch.Tensor, torch.Tensor | None]",
]
RootHandler = Callable[[RootCall, Callable[[RootCall], "torch.Tensor"]], "torch.Tensor"]


def _transformer_output(sample: torch.Tensor) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)


@dataclass(eq=False)
class Target:
    """A live pipeline as a technique may see and edit it. `edit` is the ledger, already set to the technique's name."""

    pipeline: Any
    model: ModelDescription
    adapter: Adapter | None
    experts: tuple[Expert, ...]
    edit: Surgery
    clock: Clock
    store: StateStore
    report: Callable[[str, str, float], None]
    """report(technique, effect, amount) adds to the receipt, e.g. ("first_block_cache", "hits", 1)."""
    chosen: Callable[[Choice], None]
    """Tell the receipt which kernel was chosen and why."""
    model_hash: str = ""
    """Of the weights before any technique touched them.

    Empty where no technique of the plan is calibrated, and where the weights are not all in memory (offloaded).
    """
    spent: Callable[[float], None] = lambda flops: None
    """Tell the counters of FLOPs in matrix products of the technique's own, outside the model's modules."""

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler as it now is."""
        return self.pipeline.scheduler

    @property
    def attentions(self) -> list[AttentionSite]:
        """Attention sites of all experts."""
        return [a for e in self.experts for a in e.attentions]

    def set_kernel(self, site: AttentionSite, kernel: Callable[..., Any]) -> None:
        """Put `kernel(q, k, v, mask) -> out`, all (B, S, H, D), in the place of a site's attention.

        A kernel with a method `pairs(batch, heads, queries, keys)` reports how many query-key pairs it visits;
        without one it is counted as dense.
        """
        if self.adapter is None:
            raise ValueError("a pipeline without an adapter has no attention sites")
        self.edit.set(site.module, "processor", self.adapter.processor(site, kernel))

    def around_block(self, block: Block, handler: BlockHandler) -> None:
        """Lay `handler(call, run) -> (hidden, text)` around a block; `run(call)` is what lies below.

        Outside a generation the block runs as if the handler were not there.
        """

        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self.clock.evaluation is None:
                    return old(*args, **kwargs)
                call = block.bind(args, kwargs)
                return call.join(*handler(call, lambda c: c.run(old)))

            return forward

        self.edit.wrap(block.module, make)

    def around_expert(self, expert: Expert, handler: RootHandler) -> None:
        """Lay `handler(call, run) -> sample` around a transformer; `run(call)` is what lies below."""

        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self.clock.evaluation is None:
                    return old(*args, **kwargs)
                call = RootCall.bind(expert.module, args, kwargs)
                as_dict = call.values.pop("return_dict", True)
                sample = handler(call, lambda c: old(**c.values, return_dict=False)[0])
                return _transformer_output(sample) if as_dict else (sample,)

            return forward

        self.edit.wrap(expert.module, make)

    def state(self, technique: str, site: Hashable, make: Callable[[], Any]) -> Any:
        """Memory for the current branch and expert in this generation."""
        return self.store.get(technique, site, make)


@dataclass(frozen=True, kw_only=True)
class Technique(Config):
    """Base of all techniques. See `vivace.testing.check_technique` for what every one must satisfy."""

    card: ClassVar[Card]
    dry: ClassVar[bool] = False
    """Whether its memory is counted by running it on the meta device (`vivace.plans.dry_run`), beside `memory`."""
    within_stage: ClassVar[int] = 0
    """Within a stage, smaller first."""

    @classmethod
    def type_name(cls) -> str:
        return cls.card.name

    @classmethod
    def registry_name(cls) -> str:
        """The name used in plans."""
        return cls.card.name

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        """Settings with which the method visibly acts on a small `pipeline`; the contract suite starts from the first.

        A technique that needs a file (a checkpoint, an artefact) writes it into the empty folder `workdir`.
        """
        return (cls(),)

    @classmethod
    def companions(cls, others: tuple[Technique, ...] = ()) -> tuple[Technique, ...]:
        """What must stand beside this and `others` for the technique to act on anything; the contract adds it."""
        return ()

    def claims(self, model: ModelDescription) -> tuple[Claim, ...]:
        """Claims of this configuration; narrower than the card's when the knobs limit the sites."""
        return self.card.claims

    def missing(self, model: ModelDescription) -> str:
        """What the technique lacks to serve a model at all, as a sentence, beside `Card.needs`; empty for nothing.

        A plan may leave a technique out on such a model (`optional: true`).
        """
        return ""

    def check(self, model: ModelDescription) -> list[Problem]:
        """Every problem of this configuration on a model (needs and packages are checked by the plan)."""
        return []

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        """Problems that depend on the other techniques of the plan, told by their claims and settings."""
        return []

    def apply(self, target: Target) -> None:
        """Edit the live pipeline, through `target.edit` only."""
        raise TypeError(f"{type(self).__name__} does not say how it is applied")

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Predicted counts when this technique is the only one; `base` is the exact run's."""
        return base

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        """Predicted bytes with this technique added; `base` is the run without it."""
        return base

    def problem(self, kind: str, message: str, severity: str = "error") -> Problem:
        """A problem of this technique."""
        return Problem(self.card.name, kind, message, severity)

    @property
    def may_decline(self) -> bool:
        """Whether it may find, when it is applied, that changing nothing is best here; else that is an error."""
        return False

    @property
    def is_identity(self) -> bool:
        """Whether a knob stands at its identity value, so that the technique changes nothing."""
        return any(k.has_identity and getattr(self, name) == k.identity for name, k in self.knobs().items())


registry: Registry[Technique] = Registry(
    "technique", "vivace.techniques", "vivace.techniques.base:Technique", "vivace.techniques"
)
