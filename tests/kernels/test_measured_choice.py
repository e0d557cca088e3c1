"""Measured choice, with candidates whose times are known because they sleep."""

from __future__ import annotations

import sys
import time
import types

import pytest
import torch

from vivace.core.errors import ConfigError
from vivace.kernels import api
from vivace.kernels.api import Candidate, Measured, Timing, forget, measure, measured, select

OP = "test_only_sleep"
CALLS = [(torch.zeros(2, 3), 0.0)]


def sleeper(name, seconds, refuse=None, avoid=None, log=None):
    def run(x, more=0.0):
        if log is not None:
            log.append(name)
        time.sleep(seconds + more)
        return x

    return Candidate(name, lambda c: refuse, lambda: run, lambda c: avoid)


def broken(x, more=0.0):
    raise RuntimeError("no such unit\nand a long story")


@pytest.fixture
def op(monkeypatch):
    """A test-only operation; gives a function that registers candidates, in order of preference."""
    monkeypatch.setattr(api, "_OPS", {})
    monkeypatch.setattr(api, "_measured", {})
    for name in (f"vivace.kernels.{OP}", f"vivace.kernels.{OP}.spec"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def add(*candidates):
        for candidate in candidates:
            api.register(OP, candidate)

    return add


@pytest.fixture
def three(op):
    op(sleeper("slow", 0.02), sleeper("quick", 0.001), sleeper("middle", 0.008))


def test_ranking_is_by_time(three):
    table = measure(OP, CALLS, {"device": "cpu"}, repeats=3, warmup=1)
    assert [t.name for t in table.ranking] == ["quick", "middle", "slow"]
    assert (table.seconds("slow") or 0) >= 0.02
    assert all(t.repeats == 3 for t in table.ranking)
    assert table.seconds("nobody") is None


def test_the_fastest_is_chosen_and_the_numbers_are_the_reason(three):
    table = Measured(OP, (Timing("quick", 0.0115, 0.0, 5), Timing("slow", 0.0184, 0.0, 5)))
    choice = select(OP, measured=table, device="cpu")
    assert choice.name == "quick"
    assert choice.why == "fastest of 2 measured: quick 11.5 ms, slow 18.4 ms; middle: not measured"
    assert choice.run(7) == 7


def test_without_measurements_nothing_has_changed(three):
    assert select(OP).name == "slow"
    assert select(OP).why == "first that fits here"
    assert select(OP, measured=Measured(OP, ())).name == "slow"


def test_a_name_wins_over_measurements(three):
    table = measure(OP, CALLS, {}, repeats=1, warmup=0)
    choice = select(OP, "slow", measured=table)
    assert (choice.name, choice.why) == ("slow", "asked for by name")


def test_refused_and_avoided_are_not_run(op):
    ran = []
    op(
        sleeper("gone", 0.0, refuse="not here", log=ran),
        sleeper("rough", 0.0, avoid="rounds", log=ran),
        sleeper("good", 0.002, log=ran),
    )
    table = measure(OP, CALLS, {}, repeats=2)
    assert set(ran) == {"good"}
    assert table.left_out == {"gone": "not here", "rough": "rounds"}
    assert "gone: not here" in select(OP, measured=table).why
    by_name = measure(OP, CALLS, {}, names=("rough", "good"), repeats=2)
    assert by_name.ranking[0].name == "rough"
    # It was measured because somebody asked; it still is not taken unasked.
    assert select(OP, measured=by_name).name == "good"


def test_a_fast_one_that_is_refused_elsewhere_is_passed_over(op):
    op(sleeper("slow", 0.0), Candidate("quick", lambda c: "no masks" if c.get("mask") else None, lambda: abs))
    table = Measured(OP, (Timing("quick", 1e-3, 0.0, 1), Timing("slow", 1.5, 0.0, 1)))
    assert select(OP, measured=table).name == "quick"
    choice = select(OP, measured=table, mask=True)
    assert choice.why == "the only one measured: slow 1.5 s; quick: no masks"


def test_a_failing_one_is_left_out_with_its_error(op):
    op(Candidate("broken", lambda c: None, lambda: broken), sleeper("good", 0.001))
    table = measure(OP, CALLS, {})
    assert [t.name for t in table.ranking] == ["good"]
    assert table.left_out["broken"] == "failed: RuntimeError: no such unit"
    assert "broken: failed: RuntimeError: no such unit" in select(OP, measured=table).why


def test_one_that_fails_only_later_is_left_out_too(op):
    state = {"calls": 0}

    def tires(x, more=0.0):
        state["calls"] += 1
        if state["calls"] > 3:
            raise ValueError("tired")

    op(Candidate("tires", lambda c: None, lambda: tires), sleeper("good", 0.001))
    table = measure(OP, CALLS, {}, repeats=4, warmup=2)
    assert [t.name for t in table.ranking] == ["good"]
    assert table.left_out == {"tires": "failed: ValueError: tired"}


def test_candidates_take_turns(op):
    ran = []
    op(sleeper("a", 0.0, log=ran), sleeper("b", 0.0, log=ran))
    measure(OP, CALLS, {}, repeats=3, warmup=1)
    assert ran == ["a", "b", *["a", "b"] * 3]


def test_all_calls_are_timed_together(op):
    op(sleeper("a", 0.001))
    table = measure(OP, [(0, 0.004), (0, 0.008)], {}, repeats=2, warmup=0)
    assert (table.seconds("a") or 0) >= 0.014


def test_preparation_is_not_timed(op):
    def prepare(run):
        time.sleep(0.05)
        return lambda x, more: run(x, more)

    op(sleeper("a", 0.001))
    assert measure(OP, CALLS, {}, prepare=prepare, repeats=2, warmup=0).ranking[0].seconds < 0.04


def test_measured_once_for_each_shape_type_and_context(op):
    ran = []
    op(sleeper("a", 0.0, log=ran))
    first = measured(OP, CALLS, {"device": "cpu"}, repeats=1, warmup=0)
    assert measured(OP, [(torch.ones(2, 3), 0.0)], {"device": "cpu"}, repeats=1, warmup=0) is first
    assert len(ran) == 1
    for calls, context in (
        ([(torch.zeros(2, 4), 0.0)], {"device": "cpu"}),
        ([(torch.zeros(2, 3, dtype=torch.float64), 0.0)], {"device": "cpu"}),
        (CALLS, {"device": "cpu", "mask": True}),
    ):
        assert measured(OP, calls, context, repeats=1, warmup=0) is not first
    assert len(ran) == 4
    forget()
    measured(OP, CALLS, {"device": "cpu"}, repeats=1, warmup=0)
    assert len(ran) == 5


def test_times_of_another_operation_are_a_mistake(three):
    with pytest.raises(ValueError, match="not of"):
        select(OP, measured=Measured("other", (Timing("quick", 1.0, 0.0, 1),)))


def test_nothing_that_can_run_is_still_an_error(op):
    op(sleeper("gone", 0.0, refuse="not here"))
    table = measure(OP, CALLS, {})
    assert table.ranking == ()
    with pytest.raises(ConfigError, match="gone: not here"):
        select(OP, measured=table)


@pytest.mark.gpu
def test_a_gpu_is_timed_with_its_own_clock():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    q, k, v = torch.randn(3, 1, 4096, 8, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    context = {"device": "cuda", "dtype": "bfloat16", "head_dim": 64}
    table = measure("dense_attention", [(q, k, v)], context)
    assert table.ranking[-1].name == "math"
