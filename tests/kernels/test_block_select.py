"""Selection of key blocks: every backend against a loop that takes one block after the other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vivace.kernels.api import select
from vivace.kernels.block_attention.spec import Routes
from vivace.kernels.block_select.op import select_blocks, visited_pairs
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_blocks_that_are_taken_besides_count_towards_nothing(backend, lead) -> None:
    make = torch.Generator().manual_seed(5)
    scores = torch.randn(2, 3, 4, 9, generator=make)
    also = torch.rand(*lead, 4, 9, generator=make) < 0.3
    alone = select_blocks(scores, 2, 0.4, None, 1, True)
    index, count = select_blocks(scores, 2, 0.4, None, 1, True, backend, also)
    for b, h, i in np.ndindex(2, 3, 4):
        best = alone[0][b, h, i, : alone[1][b, h, i]].tolist()
        more = also.expand(2, 3, -1, -1)[b, h, i].nonzero()[:, 0].tolist()
        assert index[b, h, i, : count[b, h, i]].tolist() == sorted({*best, *more})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_selection_that_is_made_becomes_lists(backend) -> None:
    keep = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(6)) < 0.4
    keep[0, 0, 0] = False
    must = torch.eye(5, 7, dtype=torch.bool)
    for forced in (None, must):
        index, count = select_blocks(keep, forced=forced, text=2, backend=backend)
        want = keep if forced is None else keep | must
        for b, h, i in np.ndindex(2, 3, 5):
            row = [*want[b, h, i].nonzero()[:, 0].tolist(), 7, 8]
            assert index[b, h, i, : count[b, h, i]].tolist() == row
        assert torch.equal(count[:, :, 5:], torch.full((2, 3, 2), 9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("keys", "top", "mass"), [(1100, 300, 0.0), (2100, 1, 0.6), (40, 7, 0.99)])
def test_long_rows_and_extreme_scores(backend, keys, top, mass) -> None:
    """Rows of several warps; scores of all sizes and both signs, minus infinity and both zeros among them."""
    make = torch.Generator().manual_seed(keys)
    scores = torch.randn(1, 1, 2, keys, generator=make) * 10.0 ** torch.randint(
        -30, 1, (keys,), generator=make
    )
    scores[0, 0, 0, ::7] = -math.inf
    scores[0, 0, 1, 3:9] = 0.0
    scores[0, 0, 1, 4] = -0.0
    index, count = select_blocks(scores, top, mass, backend=backend)
    for i in range(2):
        row = scores[0, 0, i].tolist()
        want = by_hand(row, top, mass, [False] * keys, True)
        got = index[0, 0, i, : count[0, 0, i]].tolist()
        # A sum of thousands of probabilities may round to the other side of the mass.
        assert got == want or (mass > 0.0 and len(set(got) ^ set(want)) <= 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(1, 1), (2, 3)])
@pytest.mark.parametrize("sized", [(), (1, 1), (2, 3)])
def test_pairs_of_lists_are_those_counted_one_by_one(backend, lead, sized) -> None:
    make = torch.Generator().manual_seed(8)
    keep = torch.rand(*lead, 5, 150, generator=make) < 0.9
    keep[0, 0, 0] = False
    sizes = torch.randint(0, 17, (*sized, 150), generator=make, dtype=torch.int32) if sized else None
    queries = torch.tensor([16, 16, 3, 16, 0], dtype=torch.int32)
    routes = Routes.of_mask(keep, sizes, 16)
    if sizes is not None and lead == (1, 1) and sized != (1, 1):
        sizes = sizes[:1, :1]
        routes = Routes(routes.index, routes.count, sizes.contiguous(), 16)
    # What stands behind a list is nobody's block.
    routes.index[torch.arange(150) >= routes.count[..., None]] = 10_000
    want = 0.0
    for b, h, i in np.ndindex(2, 3, 5):
        row = keep[b % lead[0], h % lead[1], i]
        of = torch.full((150,), 16) if sizes is None else sizes[b % sizes.shape[0], h % sizes.shape[1]]
        want += float(queries[i]) * float(of[row].sum())
    assert visited_pairs(routes, queries, 2, 3, backend) == want


def test_nothing_to_take_is_refused() -> None:
    with pytest.raises(ValueError, match="rows may stay empty"):
        select_blocks(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="forced must be"):
        select_blocks(torch.zeros(1, 1, 2, 2), forced=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="also must be"):
        select_blocks(torch.zeros(2, 1, 2, 2), top=1, also=torch.ones(3, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="made already"):
        select_blocks(torch.zeros(1, 1, 2, 2, dtype=torch.bool), top=1)


def test_one_node_in_a_compiled_graph() -> None:
    scores = torch.randn(1, 2, 3, 4)
    compiled = torch.compile(lambda s: select_blocks(s * 2, top=2)[0], backend="eager", fullgraph=True)
    assert torch.equal(compiled(scores), select_blocks(scores * 2, top=2)[0])


def test_the_choice_says_why(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert select(OP, device="cuda", blocks=500).name == "triton"
    assert "at most 4096" in select(OP, device="cuda", blocks=5000).why
