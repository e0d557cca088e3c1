"""Counting what runs: linears, convolutions, attention and blocks, by shape, through the ledger.

The meter is switched on around one evaluation and accumulates into the innermost open frame (a block, or the
part of the network outside the blocks). A block's cost per batch row is remembered per shape, so that the dense
equivalent of work that was skipped is itself a counted figure, not a formula.

Under `torch.compile` the counters stay in the eager first call of each shape: afterwards the remembered cost is
added per block call, because a Python counter inside a compiled graph would become a guard. Attention kernels that say
`varies` are asked after the compiled call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vivace.core.context import Clock, Evaluation


@dataclass(slots=True)
class Cost:
    """Work: FLOPs executed and dense-equivalent, attention query-key pairs (summed over heads) likewise."""

    flops: float = 0.0
    flops_dense: float = 0.0
    pairs: float = 0.0
    pairs_dense: float = 0.0

    def add(self, other: Cost, times: float = 1.0) -> None:
        self.flops += other.flops * times
        self.flops_dense += other.flops_dense * times
        self.pairs += other.pairs * times
        self.pairs_dense += other.pairs_dense * times

    def settle(self) -> None:
        """Numbers that are still on their way (tensors of a device that computes them) become plain; waits for them."""
        self.flops, self.pairs = float(self.flops), float(self.pairs)

    def per(self, rows: int) -> Cost:
        return Cost(self.flops / rows, self.flops_dense / rows, self.pairs / rows, self.pairs_dense / rows)


Varying = tuple[float, int, Callable[[int], float]]
"""Attention whose visited pairs differ from call to call: pairs, head dimension, and how to ask for the last call's."""


class Meter:
    """Counts one generation. `active` is False outside an evaluation and inside compiled code."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.active = False
        self.compiled: set[str] = set()
        """Sites of blocks with a compiled body: the only ones that may run without any counter seeing it."""
        self.total = Cost()
        self._frames: list[Cost] = []
        self._varying: list[Varying] = []
        self._block_cost: dict[tuple[str, Hashable, Hashable], Cost] = {}
        self._block_dense: dict[tuple[str, Hashable], Cost] = {}
        self._block_varying: dict[tuple[str, Hashable, Hashable], list[Varying]] = {}
        self._outside: dict[tuple[str, Hashable], Cost] = {}
        self._evaluations: list[tuple[Evaluation, Cost]] = []

    def reset(self) -> None:
        """Forget the counts of the generation; costs per shape stay known."""
        self.total = Cost()
        self._evaluations.clear()
        self._frames.clear()
        self.active = False

    def product(self, flops: float, tokens: int = 0) -> None:
        """A matrix product or convolution of so many FLOPs was executed, for `tokens` vectors of each sample."""
        frame = self._frames[-1]
        frame.flops += flops
        frame.flops_dense += flops * self.stretch(tokens)

    def beside(self, flops: float) -> None:
        """A technique's own products, which the dense model does not have."""
        if self.active:
            self._frames[-1].flops += flops

    def stretch(self, length: int) -> float:
        """The whole length of a sequence over this one: above 1 where tokens were dropped (`Evaluation.lengths`)."""
        evaluation = self.clock.evaluation
        if not length or evaluation is None:
            return 1.0
        return evaluation.lengths.get(length, length) / length

    def attention(
        self, pairs: float, pairs_dense: float, head_dim: int, again: Callable[[int], float] | None = None
    ) -> None:
        """Attention visited `pairs` of `pairs_dense` query-key pairs, summed over batch and heads.

        `again(rows)` tells the pairs of a later call of this shape that ran compiled; None where they are the same.
        """
        frame = self._frames[-1]
        if again is not None:
            self._varying.append((pairs, head_dim, again))
        frame.pairs += pairs
        frame.pairs_dense += pairs_dense
        frame.flops += 4.0 * pairs * head_dim
        frame.flops_dense += 4.0 * pairs_dense * head_dim

    @contextmanager
    def evaluation(self, evaluation: Evaluation) -> Iterator[None]:
        """Everything inside is one transformer call."""
        cost, self._frames, self.active = Cost(), [Cost()], True
        self._evaluations.append((evaluation, cost))
        try:
            yield
        finally:
            outside = self._frames[0]
            outside.settle()
            cost.add(outside)
            cost.settle()
            self.total.add(cost)
            if evaluation.entered:
                self._outside.setdefault(
                    (evaluation.expert, evaluation.key), outside.per(evaluation.rows_run)
                )
            self._frames, self.active = [], False

    def block(self, site: str, rows: int, run: Callable[[], Any]) -> Any:
        """Run one block's body and account for it."""
        evaluation = self.clock.evaluation
        if evaluation is None or not self._frames:
            return run()
        key, frame = (site, evaluation.key, evaluation.variant), Cost()
        self._frames.append(frame)
        self._varying = []
        try:
            out = run()
        finally:
            self._frames.pop()
        if key not in self._block_cost:
            frame.settle()
            self._block_cost[key] = frame.per(rows)
            self._block_varying[key] = [
                (float(pairs) / rows, dim, again) for pairs, dim, again in self._varying
            ]
            # Variants differ in what they execute, never in what the dense model would.
            self._block_dense.setdefault(key[:2], self._block_cost[key])
        elif site in self.compiled and not frame.flops:
            # The body ran compiled, with no counter inside: charge what its eager first call was counted at.
            frame.add(self._block_cost[key], rows)
            for pairs, dim, again in self._block_varying[key]:
                more = again(rows) - pairs * rows
                frame.add(Cost(flops=4.0 * more * dim, pairs=more))
        self._evaluations[-1][1].add(frame)
        # Rows of a fused batch are shared among the branches: half the rows of a pair is one branch's block.
        evaluation.blocks_run += evaluation.requested * rows / max(evaluation.rows, 1)
        return out

    @property
    def spent(self) -> list[float]:
        """FLOPs executed by every evaluation so far, in order."""
        return [cost.flops for _, cost in self._evaluations]

    def knows(self, site: str) -> bool:
        """Whether a block's cost for the current shape has been counted."""
        evaluation = self.clock.evaluation
        return evaluation is not None and (site, evaluation.key, evaluation.variant) in self._block_cost

    def dense(self, blocks: dict[str, list[str]]) -> Cost:
        """Cost of all requested evaluations with nothing skipped. `blocks`: block sites by expert."""
        total = Cost()
        for evaluation, spent in self._evaluations:
            rows = evaluation.rows
            cost = Cost()
            outside = self._outside.get((evaluation.expert, evaluation.key))
            if outside is not None:
                cost.add(outside, rows)
            for site in blocks.get(evaluation.expert, []):
                known = self._block_dense.get((site, evaluation.key))
                if known is not None:
                    cost.add(known, rows)
            if not blocks.get(evaluation.expert):
                cost = Cost()
                cost.add(spent if outside is None else outside, 1.0 if outside is None else rows)
            total.add(cost)
        return total


def linear_flops(rows: float, in_features: int, out_features: int) -> float:
    """FLOPs of `rows` vectors through a linear layer."""
    return 2.0 * rows * in_features * out_features
