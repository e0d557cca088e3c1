"""Selection of key blocks: every backend against a loop that takes one block after the other."""

from __future__ import annotations

import math

import pytest
import torch

from vivace.kernels.api import select
from vivace.kernels.block_select.op import select_blocks
from vivace.kernels.block_select.spec import OP
from vivace.testing.interpreter import interpret

BACKENDS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(bool(interpret()), reason=interpret() or "runs")),
]


def by_hand(row: list[float], top: int, mass: float, must: list[bool], softmax: bool) -> list[int]:
    """The best blocks one by one: forced ones first, then by score, the lower number first among equals."""
    able = [j for j, s in enumerate(row) if s > -math.inf or must[j]]
    peak = max((s for s in row if s > -math.inf), default=0.0)
    weights = [math.exp(s - peak) for s in row] if softmax else [s if s > -math.inf else 0.0 for s in row]
    total = sum(weights) if softmax else 1.0
    taken: list[int] = []
    reached = 0.0
    for j in sorted(able, key=lambda j: (not must[j], 0.0 if must[j] else -row[j], j)):
        if not (len(taken) < top or reached < mass * total - 1e-9 or must[j]):
            break
        taken.append(j)
        reached += weights[j]
    return sorted(taken)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trial", range(24))
def test_lists_are_those_taken_by_hand(backend, trial) -> None:
    make = torch.Generator().manual_seed(trial)
    nq, nk, text = [(3, 5, 0), (4, 8, 2), (1, 1, 1), (5, 13, 3)][trial % 4]
    scores = torch.randn(1, 2, nq, nk, generator=make)
    if trial % 3 == 0:
        scores = scores.round()  # ties
    if trial % 5 == 0:
        scores[0, 0, 0, (nk + 1) // 2 :] = -math.inf
    top, mass = [0, 1, 3, nk + 2][trial % 4], [0.0, 0.5, 0.95, 0.3][(trial // 4) % 4]
    forced = torch.eye(nq, nk, dtype=torch.bool) if trial % 2 or (top == 0 and mass == 0.0) else None
    softmax = trial % 7 != 0
    given = scores if softmax else torch.softmax(scores, -1)
    index, count = select_blocks(given, top, mass, forced, text, softmax, backend)
    assert index.shape == (1, 2, nq + text, nk + text)
    for h in range(2):
        for i in range(nq + text):
            got = index[0, h, i, : count[0, h, i]].tolist()
            if i >= nq:
                assert got == list(range(nk + text))
                continue
            must = [bool(forced[i, j]) if forced is not None else False for j in range(nk)]
            want = by_hand(given[0, h, i].tolist(), top, mass, must, softmax)
            assert got == [*want, *range(nk, nk + text)]


def test_nothing_to_take_is_refused() -> None:
    with pytest.raises(ValueError, match="rows may stay empty"):
        select_blocks(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="forced must be"):
        select_blocks(torch.zeros(1, 1, 2, 2), forced=torch.ones(1, 2, dtype=torch.bool))


def test_one_node_in_a_compiled_graph() -> None:
    scores = torch.randn(1, 2, 3, 4)
    compiled = torch.compile(lambda s: select_blocks(s * 2, top=2)[0], backend="eager", fullgraph=True)
    assert torch.equal(compiled(scores), select_blocks(scores * 2, top=2)[0])


def test_the_choice_says_why(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert select(OP, device="cuda", blocks=500).name == "triton"
    assert "at most 4096" in select(OP, device="cuda", blocks=5000).why
