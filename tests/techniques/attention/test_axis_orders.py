"""The search of PAROAttention's orders: block probabilities against loops, the choice against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from vivace.core.errors import ConfigError
from vivace.core.shapes import TokenGrid
from vivace.plans.mask_searching import search_orders
from vivace.techniques.attention.axis_orders import AxisMass, OrderFile, packed, pick, unpacked
from vivace.techniques.attention.head_patterns import AXES
from vivace.testing import models


def ordered_blocks(grid, axes, size):
    """Tokens of the video in an order of axes, cut by hand: list of lists."""
    places = list(itertools.product(range(grid.frames), range(grid.height), range(grid.width)))
    tokens = sorted(range(len(places)), key=lambda i: [places[i][a] for a in axes])
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_block_probabilities_are_those_of_loops(text_first, masked, monkeypatch) -> None:
    monkeypatch.setattr(
        "vivace.techniques.attention.axis_orders.AT_ONCE", 5 * 2 * 2 * 70
    )  # a few queries at a time
    grid = TokenGrid(4, 4, 4, text=6, text_first=text_first)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, grid.tokens, 2, 4, generator=generator) * 2 for _ in range(3))
    hidden = torch.zeros(2, grid.tokens, dtype=torch.bool)
    text = slice(0, 6) if text_first else slice(64, 70)
    hidden[1, text] = masked
    # Every query is looked at: 64 tokens make 32 blocks of two.
    recorder = AxisMass(rows=2)
    got = recorder.measure(q, k, v, ~hidden[:, None, None] if masked else None, recorder.prepare(grid, "cpu"))
    assert got.shape == (6, 2, 32, 32)

    first = 6 if text_first else 0
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / math.sqrt(4)
    p = torch.softmax(scores.masked_fill(hidden[:, None, None], float("-inf")), -1).mean(0)
    for o, axes in enumerate(AXES):
        blocks = ordered_blocks(grid, axes, 2)
        for (i, qs), (j, ks) in itertools.product(enumerate(blocks[:6]), enumerate(blocks)):
            for h in range(2):
                want = sum(p[h, first + a, first + b] for a in qs for b in ks)
                assert float(got[o, h, i, j]) == pytest.approx(float(want), abs=1e-5)


def test_sampled_queries_stand_for_their_blocks() -> None:
    """Queries that are all alike give the same probabilities however few are looked at; a short block counts less."""
    grid = TokenGrid(7, 13, 1)
    q, k = torch.ones(1, 91, 1, 4), torch.randn(1, 91, 1, 4, generator=torch.Generator().manual_seed(0))
    few, all_of_them = AxisMass(rows=1), AxisMass(rows=128)
    maps = [r.measure(q, k, k, None, r.prepare(grid, "cpu")) for r in (few, all_of_them)]
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=1e-5)
    assert float(maps[0][0].sum()) == pytest.approx(91, rel=1e-4)


def looking_along(axis: int, grid: TokenGrid) -> torch.Tensor:
    """(S, D) of queries and keys: a token looks at tokens that differ from it in one axis alone."""
    places = torch.tensor(list(itertools.product(range(grid.frames), range(grid.height), range(grid.width))))
    others = [a for a in range(3) if a != axis]
    sides = (grid.frames, grid.height, grid.width)
    line = places[:, others[0]] * sides[others[1]] + places[:, others[1]]
    return torch.nn.functional.one_hot(line, int(line.max()) + 1).float() * 12


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_head_that_looks_along_an_axis_gets_an_order_that_ends_in_it(axis) -> None:
    grid = TokenGrid(4, 4, 4)
    x = looking_along(axis, grid)[None, :, None]
    recorder = AxisMass(rows=2)
    maps = recorder.measure(x, x, x, None, recorder.prepare(grid, "cpu")).numpy()
    order, mask, held = pick(maps, mass=0.999)
    assert AXES[order[0]][-1] == axis
    # A line of four tokens is two blocks of two, which see each other and nothing else.
    assert mask[0].sum() == 32 * 2
    assert held > 0.999
    worst = pick(maps[[i for i, a in enumerate(AXES) if a[-1] != axis]], mass=0.999)[1]
    assert worst.sum() >= 2 * mask.sum()


def random_maps(seed):
    random = np.random.default_rng(seed)
    return random.gamma(0.3, size=(6, 3, 4, 4))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mass", [0.3, 0.8, 1.0])
def test_fewest_blocks_for_a_mass_are_those_of_brute_force(seed, mass) -> None:
    maps = random_maps(seed)
    order, mask, _ = pick(maps, mass)
    for head in range(3):
        counts = []
        for o in range(6):
            values = sorted(maps[o, head].ravel(), reverse=True)
            counts.append(next(n for n in range(1, 17) if sum(values[:n]) >= (mass - 1e-9) * sum(values)))
        assert order[head] == counts.index(min(counts))
        best = np.sort(maps[order[head], head].ravel())[::-1][: min(counts)]
        want = np.isin(maps[order[head], head], best) | np.eye(4, dtype=bool)
        assert (mask[head] == want).all()


@pytest.mark.parametrize("density", [0.05, 0.25, 1.0])
def test_most_mass_in_so_many_blocks_is_that_of_brute_force(density) -> None:
    maps = random_maps(9)
    order, mask, held = pick(maps, 0.9, density)
    number = max(1, math.ceil(density * 16))
    share = []
    for head in range(3):
        kept = [np.sort(m.ravel())[::-1][:number].sum() / m.sum() for m in maps[:, head]]
        assert order[head] == int(np.argmax(np.round(kept, 9)))
        assert number <= mask[head].sum() <= number + 4
        share.append((maps[order[head], head] * mask[head]).sum() / maps[order[head], head].sum())
    assert held == pytest.approx(np.mean(share))


def test_masks_come_back_from_text() -> None:
    mask = np.random.default_rng(0).random((3, 5, 5)) < 0.3
    assert (unpacked(packed(mask), (3, 5, 5)) == mask).all()
    with pytest.raises(ValueError, match="bytes for"):
        unpacked(packed(mask), (4, 5, 5))


def test_a_search_on_a_pipeline_makes_a_file(tmp_path) -> None:
    call = models.call("wan2.2") | {"num_inference_steps": 4}
    made = search_orders(models.pipeline("wan2.2"), ["a ball", "a cone"], mass=0.7, **call)
    again = OrderFile.load(made.save(tmp_path / "orders.json"))
    assert again == made
    assert made.grid == (3, 2, 2)
    assert made.shape() == {"transformer": [2] * 4, "transformer_2": [2] * 4}
    assert 0.7 <= made.mass < 1.0
    masks = np.stack([made.mask(e, i) for e in made.orders for i in range(4)])
    assert masks.shape == (8, 2, 12, 12)
    assert masks.mean() < 0.8
    with pytest.raises(ConfigError, match="are shares"):
        search_orders(models.pipeline("wan2.2"), ["a"], mass=1.5)
