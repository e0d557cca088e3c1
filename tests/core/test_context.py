"""Clock, state store, meter and the small ground facts."""

from __future__ import annotations

import pytest
import torch

from vivace.core.context import COND, UNCOND, Clock, Evaluation, StateStore
from vivace.core.counters import Meter, linear_flops
from vivace.core.errors import ConfigError, ShapeError, UnknownNameError
from vivace.core.receipt import BranchRecord, Receipt, StepRecord
from vivace.core.seeding import generators
from vivace.core.shapes import PixelRules, TokenGrid


def test_state_is_kept_apart_by_technique_site_branch_and_expert():
    clock = Clock()
    store = StateStore(clock)
    clock.begin((3.0, 2.0, 1.0), ())
    seen = {}
    for expert in ("transformer", "transformer_2"):
        for branch in (COND, UNCOND):
            clock.expert, clock.branch = expert, branch
            for key in (("a", 0), ("a", 1), ("b", 0)):
                seen[(*key, branch, expert)] = id(store.get(*key, list))
    assert len(set(seen.values())) == 12 == len(store)
    assert id(store.shared("a", 0, list)) == id(store.shared("a", 0, list))
    store.clear()
    assert len(store) == 0


def test_store_counts_tensor_bytes_once():
    clock = Clock()
    store = StateStore(clock)
    tensor = torch.zeros(10)
    store.get("a", 0, lambda: {"x": tensor, "again": [tensor], "y": (torch.zeros(5, dtype=torch.float16),)})
    assert store.nbytes() == 40 + 10


def test_clock_walks_through_the_steps():
    clock = Clock()
    clock.begin((9.0, 5.0), (1.0, 0.5, 0.0))
    assert (clock.step, clock.timestep, clock.sigma, clock.last) == (0, 9.0, 1.0, False)
    assert clock.advance() is False
    assert (clock.step, clock.timestep, clock.progress, clock.last) == (1, 5.0, 0.5, True)
    assert clock.advance() is True


@pytest.mark.parametrize(("rows", "nfe"), [(2, 2), (1, 1)])
def test_half_of_a_fused_pair_is_one_evaluation(rows, nfe):
    evaluation = Evaluation(0, "fused", "transformer", requested=2, rows=2, blocks_total=3)
    assert evaluation.action == "skipped"
    evaluation.enter(rows)
    assert evaluation.nfe == nfe
    assert evaluation.rows_run == rows


def test_dense_cost_of_skipped_work_is_what_was_counted():
    clock = Clock()
    meter = Meter(clock)
    for run in (True, False):
        e = Evaluation(0, "cond", "transformer", rows=2, blocks_total=1, key="k")
        clock.evaluation = e
        with meter.evaluation(e):
            e.enter(2)
            meter.product(10.0)
            if run:
                meter.block("b", 2, lambda: meter.attention(30.0, 60.0, 1))
    assert meter.total.flops == 10 + 10 + 4 * 30
    dense = meter.dense({"transformer": ["b"]})
    assert dense.flops_dense == 2 * (10 + 4 * 60)
    assert dense.pairs_dense == 120


def test_linear_flops():
    assert linear_flops(3, 4, 5) == 120


def test_pixel_rules_give_the_nearest_valid_values():
    rules = PixelRules(temporal=4, spatial=16)
    rules.check(29, 128, 128)
    with pytest.raises(ShapeError, match=r"nearest to 30: 29 or 33.*height.*nearest to 100: 96 or 112"):
        rules.check(30, 100, 128)
    with pytest.raises(ShapeError, match="nearest to 3: 16"):
        rules.check(29, 3, 128)


def test_token_grid():
    grid = TokenGrid(8, 16, 16, text=10)
    assert (grid.video, grid.tokens, str(grid)) == (2048, 2058, "8x16x16+10 text")


def test_seeds_do_not_depend_on_the_batch():
    both, one = generators(5, 2), generators(6, 1)
    assert torch.equal(torch.randn(3, generator=both[1]), torch.randn(3, generator=one[0]))
    with pytest.raises(ConfigError, match="3 samples need 3 seeds"):
        generators([1, 2], 3)
    with pytest.raises(ConfigError, match="seed"):
        generators(-1, 1)


def test_receipt_round_trip():
    receipt = Receipt(nfe=4, flops=2.0, flops_dense=8.0, steps=[StepRecord(0, 999.0, 1.0)])
    receipt.steps[0].branches.append(BranchRecord("cond", "transformer", "computed", 2.0, 2))
    assert Receipt.from_dict(receipt.to_dict()) == receipt
    assert receipt.compute_share == 0.25


def test_unknown_name_offers_the_near_one():
    with pytest.raises(UnknownNameError, match="did you mean fast"):
        raise UnknownNameError("plan", "fsat", ["fast", "exact"])
