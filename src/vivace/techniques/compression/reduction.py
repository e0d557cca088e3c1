"""What techniques that leave out tokens by matching have in common: where, when, and what speaks against it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.core.context import COND, UNCOND
from vivace.core.shapes import TokenGrid, Workload
from vivace.models.adapter import AttentionSite, Expert, ExpertDescription, ModelDescription
from vivace.techniques.base import Claim, Problem, Target, Technique, exclusive, knob
from vivace.techniques.compression.token_matching import STRIDES, Match, Windows, parsed

if TYPE_CHECKING:
    import torch

KINDS = ("self", "joint")
"""Kinds of attention in which video tokens see each other."""


@dataclass(frozen=True, kw_only=True)
class MatchedReduction(Technique):
    """Base: the windows and strides of the matching, and the steps and blocks that are touched."""

    abstract: ClassVar[bool] = True
    dry: ClassVar[bool] = True

    window_frames: int = knob(4, low=1, high=16)
    """Most latent frames of a window in which tokens are matched."""
    window_height: int = knob(8, low=1, high=16)
    """Most rows of tokens of a window."""
    window_width: int = knob(8, low=1, high=16)
    """Most columns of tokens of a window."""
    stride: str = knob("2x2x2", choices=STRIDES)
    """Destinations are one token of so many frames x rows x columns; the other tokens are sources, which may go."""
    every: int = knob(1, low=1, high=16)
    """Steps for which a matching is kept."""
    dense_steps: int = knob(0, low=0, high=50)
    """First steps with all tokens."""
    tail: int = knob(0, low=0, high=50)
    """Last steps with all tokens."""
    dense_layers: int = knob(0, low=0, high=8)
    """Layers at the front with all tokens."""

    @property
    def warmup(self) -> int:
        """The plan compares it with the number of steps."""
        return self.dense_steps

    @property
    def remembers(self) -> bool:
        """Whether a matching is used in other places than where it was made."""
        return self.every > 1

    @property
    def rates(self) -> dict[str, float]:
        """Shares of the video tokens that go, by the names of their settings."""
        raise TypeError(f"{type(self).__name__} does not say how many tokens go")

    # -- where and when -----------------------------------------------------------------------------------------

    def acting_steps(self, steps: int) -> int:
        """How many of the steps are touched."""
        return max(0, steps - self.dense_steps - self.tail)

    def acts(self, step: int, steps: int) -> bool:
        """Whether a step is touched."""
        return self.dense_steps <= step < steps - self.tail

    def windows(self, grid: TokenGrid, device: Any = None) -> Windows:
        """The windows of a grid; without a device only their counts."""
        sides = (self.window_frames, self.window_height, self.window_width)
        return Windows(grid, sides, parsed(self.stride), device)

    def gone(self, windows: Windows, rate: float) -> int:
        """How many tokens go: a share of all of them, and never more than there are sources."""
        return min(int(rate * windows.tokens + 0.5), windows.available)

    def layers(self, depth: int) -> int:
        """How many layers are touched."""
        return max(0, depth - self.dense_layers)

    def sites(self, expert: Expert) -> list[AttentionSite]:
        """The touched attention sites of an expert in which video tokens see each other."""
        return [a for a in expert.attentions if a.kind in KINDS and a.index >= self.dense_layers]

    def described(self, model: ModelDescription, expert: ExpertDescription) -> frozenset[str]:
        """Addresses of `sites`, from a description."""
        kinds = model.adapter.attention if model.adapter is not None else {}
        paths = [path for path, kind in kinds.items() if kind in KINDS]
        blocks = expert.block_sites[self.dense_layers :]
        return frozenset(f"{block}.{path}" for block in blocks for path in paths)

    # -- before anything is loaded ------------------------------------------------------------------------------

    def claims(self, model: ModelDescription) -> tuple[Claim, ...]:
        sites = frozenset[str]().union(*(self.described(model, e) for e in model.experts))
        owned = (exclusive("tokens.set"), exclusive("attention.kernel", sites))
        # Whoever skips blocks for some samples of a batch hands the next block rows that nobody can name.
        return (*owned, exclusive("block.skip")) if self.remembers else owned

    def check(self, model: ModelDescription) -> list[Problem]:
        found = []
        if not self.layers(model.depth):
            message = f"dense_layers={self.dense_layers} leaves none of the {model.depth} layers; lower it."
            found.append(self.problem("pointless", message))
        grid = model.grid(model.workload())
        if grid is None:
            return found
        windows = self.windows(grid)
        most = windows.available / windows.tokens
        for name, rate in self.rates.items():
            if rate > most + 1e-9:
                message = (
                    f"{name}={rate:g} asks for more tokens than a stride of {self.stride} has sources on a {grid} "
                    f"clip: at most {most:.2f} go; lower it, or take a wider stride or window."
                )
                found.append(self.problem("too many", message, "warning"))
        return found

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        steps = next((s for o in others if isinstance(s := getattr(o, "steps", None), int)), None)
        steps = steps or model.workload().steps
        if self.is_identity or self.dense_steps >= steps or self.acting_steps(steps):
            return []
        message = (
            f"{self.dense_steps} steps at the start and {self.tail} at the end keep all tokens, so with {steps} steps "
            "nothing can be gained; lower dense_steps or tail, or leave it out."
        )
        return [self.problem("pointless", message, "warning")]

    def evaluations(self, workload: Workload, nfe: float) -> float:
        """Evaluations in which tokens go."""
        return nfe * workload.batch * self.acting_steps(workload.steps) / max(workload.steps, 1)

    def matchings(self, model: ModelDescription, workload: Workload, nfe: float) -> tuple[float, float]:
        """The least and the most evaluations in which a site is matched anew."""
        acting = self.acting_steps(workload.steps)
        due, more = -(-acting // self.every), len(model.experts) - 1
        # A second expert begins with a matching, and no plan says in which step that is.
        each = nfe * workload.batch / max(workload.steps, 1)
        return max(0, due - more) * each, min(acting, due + more) * each

    def texts(self, model: ModelDescription, workload: Workload) -> tuple[int, int]:
        """The fewest and the most text tokens beside the video in one attention, over the guidance branches."""
        adapter = model.adapter
        if adapter is None or not adapter.joint_text:
            return 0, 0
        found = [adapter.text_tokens(model, workload, branch) for branch in (COND, UNCOND)]
        return min(found), max(found)


class Recall:
    """Matchings remembered from step to step, for every (branch, sample) of a site."""

    def __init__(self, technique: MatchedReduction, target: Target) -> None:
        self.technique, self.target = technique, target

    def find(
        self,
        site: Hashable,
        who: list[tuple[str, int]] | None,
        x: torch.Tensor,
        make: Callable[[torch.Tensor], Match],
    ) -> tuple[Match, int]:
        """The matching of every row, and how many rows were matched anew.

        Args:
            site: where; sites of one name share what was found in a step.
            who: names of the rows; None when they are not known, and then nothing is remembered.
            x: what is matched, (B, S, C).
            make: makes a matching of some rows.
        """
        import torch

        t, clock = self.technique, self.target.clock
        if who is None or not t.remembers:
            return make(x), x.shape[0]
        memory = self.target.store.shared(t.card.name, (site, clock.chunk), dict[Hashable, tuple[int, Match]])
        due = (clock.step - t.dense_steps) % t.every == 0
        missing = [
            i for i, name in enumerate(who) if name not in memory or (due and memory[name][0] != clock.step)
        ]
        if missing:
            whole = len(missing) == len(who)
            found = make(x if whole else x.index_select(0, torch.tensor(missing, device=x.device)))
            for number, i in enumerate(missing):
                memory[who[i]] = (clock.step, found.row(number))
        return Match.stacked([memory[name][1] for name in who]), len(missing)


def known_rows(target: Target, rows: int) -> list[tuple[str, int]] | None:
    """Names (branch, sample) of the rows of a transformer call; None where only some samples are called, unnamed."""
    clock, evaluation = target.clock, target.clock.evaluation
    assert evaluation is not None  # handlers are called inside an evaluation only
    asked = evaluation.rows if clock.branch == evaluation.branch else evaluation.rows // 2
    return clock.who(rows) if rows == asked or clock.samples is not None else None


def own_backend(site: AttentionSite) -> Any:
    """The attention backend that the model's own processor has."""
    return getattr(site.module.processor, "_attention_backend", None)


def shortened(mask: torch.Tensor, keep: torch.Tensor, tokens: int, text_first: bool) -> torch.Tensor:
    """A mask over keys (B or 1, H or 1, Q or 1, tokens + text) for the kept video tokens (B, K) and all text."""
    import torch

    text = mask.shape[-1] - tokens
    video = mask[..., text:] if text_first else mask[..., :tokens]
    video = video.expand(keep.shape[0], *video.shape[1:])
    index = keep[:, None, None].expand(-1, *video.shape[1:3], -1)
    parts = [video.gather(-1, index)]
    if text:
        beside = mask[..., :text] if text_first else mask[..., tokens:]
        beside = beside.expand(keep.shape[0], *beside.shape[1:])
        parts = [beside, *parts] if text_first else [*parts, beside]
    return torch.cat(parts, dim=-1)


def key_weights(found: Match, text: int, text_first: bool) -> torch.Tensor:
    """log n of every kept key, zero for text: float32 (B, 1, 1, K + L)."""
    import torch

    return torch.nn.functional.pad(found.number.log(), (text, 0) if text_first else (0, text))[:, None, None]


def weighted(mask: torch.Tensor | None, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask over keys, bool or additive or none, with weights added to the scores."""
    import torch

    weights = weights.to(dtype)
    if mask is None:
        return weights
    return torch.where(mask, weights, float("-inf")) if mask.dtype == torch.bool else mask + weights
