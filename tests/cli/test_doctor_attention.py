"""`vivace doctor --attention`, and the break-even density behind it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from vivace.cli.shared import health
from vivace.kernels import breakeven
from vivace.kernels.api import Choice
from vivace.kernels.breakeven import CPU_BREAK_EVEN, BreakEven, Shape, break_even, crossing, pays, some_blocks

SMALL = Shape(tokens=256, heads=2, head_dim=16, block=16)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    """Nor does an interpreted kernel, which other tests switch on, count as one of this machine."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    breakeven.forget()
    yield
    breakeven.forget()


def _found(points, dense=10e-3, shape=SMALL, device="a card"):
    choices = [Choice(op, name, "so it is", len) for op, name in (("d", "cudnn"), ("s", "triton"))]
    return BreakEven("block_attention", device, shape, choices[0], dense, choices[1], points)


@pytest.mark.parametrize(
    ("points", "where"),
    [
        (((0.1, 2e-3), (0.5, 6e-3), (1.0, 16e-3)), 0.7),
        (((0.1, 2e-3), (0.5, 10e-3), (1.0, 9e-3)), 0.5),
        (((0.1, 12e-3), (0.5, 60e-3)), 0.0),
        (((0.1, 1e-3), (0.5, 4e-3)), 0.5),
    ],
)
def test_crossing(points, where):
    assert crossing(points, 10e-3) == pytest.approx(where)
    assert _found(points).density == pytest.approx(where)


def test_times_between_the_points():
    found = _found(((0.1, 2e-3), (0.5, 6e-3), (1.0, 16e-3)))
    for density, ms in ((0.1, 2), (0.3, 4), (0.5, 6), (0.75, 11), (1.0, 16), (0.05, 1.5)):
        assert found.seconds(density) == pytest.approx(ms * 1e-3)


def test_blocks_of_a_density():
    keep = some_blocks(20, 5)
    assert (keep.sum(1) == 5).all()
    assert keep.diagonal().all()
    assert torch.equal(keep, some_blocks(20, 5))
    assert some_blocks(7, 7).all()


@pytest.mark.parametrize("op", breakeven.SPARSE)
def test_a_real_measurement(op):
    found = break_even(op, SMALL, densities=(0.1, 0.5, 1.0), repeats=2)
    assert [d for d, _ in found.points] == [2 / 16, 0.5, 1.0]
    assert all(s > 0 for _, s in found.points)
    assert 0.0 <= found.density <= 1.0
    assert found.dense.why.startswith("fastest of 2 measured: ") or torch.cuda.is_available()
    assert found.sparse.op == op


def test_the_sparse_runs_do_what_the_density_says(monkeypatch):
    """The timed call visits as many pairs as it claims."""
    seen = []
    old = breakeven._sparse_run

    def watched(op, choice, qkv, keep, block, device):
        run = old(op, choice, qkv, keep, block, device)
        mask = keep.repeat_interleave(block, 0).repeat_interleave(block, 1)
        rows = [x.transpose(1, 2) for x in qkv]
        want = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=mask)
        out = run()
        out = out[0] if isinstance(out, tuple) else out.transpose(1, 2)
        seen.append(((out - want).abs().max().item(), mask.float().mean().item()))
        return run

    monkeypatch.setattr(breakeven, "_sparse_run", watched)
    for op in breakeven.SPARSE:
        break_even(op, SMALL, densities=(0.25, 0.5), repeats=1)
    assert max(error for error, _ in seen) < 1e-4
    assert [share for _, share in seen] == [0.25, 0.5] * 2


def test_another_operation_is_refused():
    with pytest.raises(ValueError, match="int8_linear is not"):
        break_even("int8_linear", SMALL)


def test_what_was_measured_decides(monkeypatch):
    found = break_even("block_attention", SMALL, densities=(0.5,), repeats=1)
    key = ("block_attention", found.device, SMALL)
    monkeypatch.setitem(
        breakeven._table, key, _found(((0.1, 2e-3), (0.5, 6e-3), (1.0, 16e-3)), device=found.device)
    )
    context = {"device": "cpu", "tokens": 256, "heads": 2, "head_dim": 16, "block": 16}
    assert pays("block_attention", 0.65, context) == ""
    sentence = pays("block_attention", 0.8, context)
    assert "visits 80% of the pairs" in sentence
    assert "triton would take 12 ms where cudnn takes 10 ms" in sentence
    assert "it pays below 70%" in sentence
    # Another shape has not been measured: the stored figure stands.
    assert pays("block_attention", 0.65, context | {"heads": 3}) != ""


def test_the_stored_figure_is_the_techniques_own():
    from vivace.techniques.attention.block_sparse import NO_GAIN

    assert CPU_BREAK_EVEN == NO_GAIN
    assert pays("block_sparse_attention", NO_GAIN, {"device": "cpu"}) == ""
    assert "above 60%" in pays("block_sparse_attention", 0.61, {"device": "cpu"})
    # Nothing was measured for it.
    assert breakeven._table == {}


def test_a_gpu_nothing_is_known_of_refuses_nothing():
    assert pays("block_attention", 0.99, {"device": "cuda"}) == ""


SHAPE = ("--tokens", "256", "--heads", "2", "--head-dim", "16")


def test_doctor_prints_the_break_even(vivace):
    ran = vivace("doctor", "--attention", *SHAPE)
    assert "Attention" in ran.out
    assert "256 tokens x 2 heads x 16" in ran.out
    assert "break-even" in ran.out
    assert "sparse kernel" in ran.out


def test_doctor_json_has_the_numbers(vivace):
    ran = vivace("doctor", "--json", "--attention", *SHAPE)
    rows = {c["name"]: c for c in json.loads(ran.out)["checks"] if c["section"] == "Attention"}
    assert {"timed", "all pairs", "break-even", "sparse kernel", "25% of them", "100% of them"} <= set(rows)
    assert rows["all pairs"]["advice"].startswith(("fastest of", "the only one"))
    if not torch.cuda.is_available():
        assert rows["sparse kernel"]["detail"] == "gather"


def test_plain_doctor_times_nothing(vivace, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("timed")

    monkeypatch.setattr(breakeven, "break_even", never)
    ran = vivace("doctor", "--json")
    assert all(c["section"] != "Attention" for c in json.loads(ran.out)["checks"])


def test_the_models_shape(monkeypatch):
    asked = []

    def note(op, shape, device):
        asked.append(shape)
        return _found(((0.5, 12e-3),), shape=shape)

    monkeypatch.setattr(breakeven, "break_even", note)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = health.attention("wan2.1-1.3b")
    assert dataclasses.astuple(asked[0]) == (health.CPU_TOKENS, 12, 128, 64, "float32")
    assert "32,760 tokens asked for" in rows[0].advice
    assert any("no mask pays, not even one that keeps 50%" in c.detail for c in rows)
    health.attention("wan2.1-1.3b", tokens=300, heads=5)
    assert dataclasses.astuple(asked[1]) == (300, 5, 128, 16, "float32")


def test_a_mistaken_shape_is_one_sentence(vivace):
    assert vivace("doctor", "--attention", "--model", "no-such-model").code == 2
    assert vivace("doctor", "--attention", "--tokens", "1").code == 2


def test_a_shape_without_timing_is_refused(vivace) -> None:
    run = vivace("doctor", "--tokens", "64")
    assert run.code == 2
    assert "--attention" in run.sentence
