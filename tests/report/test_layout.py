"""Units, timeline, curves and receipt rows: what the page says is what the data says."""

from __future__ import annotations

import math

import pytest

from vivace.report import curves, units
from vivace.report.compare_page import ComparePage
from vivace.report.curves import QualityCurve, chart
from vivace.report.receipt_table import receipt_rows, stage_bars
from vivace.report.timeline import CELL_HEIGHT, timelines


def spaced(text: str) -> str:
    """Numbers and units are joined by no-break spaces; ordinary ones read better here."""
    return text.replace(units.SPACE, " ")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (units.number(0), "0"),
        (units.number(1234.0), "1,234"),
        (units.number(6.4321), "6.43"),
        (units.number(math.inf), "\N{INFINITY}"),
        (units.number(None), units.MISSING),
        (units.plain(0.08), "0.08"),
        (units.seconds(0.0123), "12.3 ms"),
        (units.seconds(8.4), "8.40 s"),
        (units.seconds(125), "2 min 05 s"),
        (units.count(8.31e12, "FLOP"), "8.31 TFLOP"),
        (units.count(12345), "12,345"),
        (units.count(2.5e6), "2.50 M"),
        (units.size(8 * 2**20), "8 MiB"),
        (units.percent(0.148), "14.8 %"),
        (units.factor(units.quotient(54.0, 8.4)), "6.43\N{MULTIPLICATION SIGN}"),
        (units.factor(units.quotient(54.0, 0)), units.MISSING),
    ],
)
def test_units(said: str, wanted: str) -> None:
    assert spaced(said) == wanted


def test_timeline_draws_every_branch_of_every_step(page: ComparePage) -> None:
    exact, fast = timelines(page.exact_receipt, page.fast_receipt)
    kinds = [box.kind for box in fast.boxes]
    assert [box.kind for box in exact.boxes].count("computed") == 100
    assert len(fast.rows) == 40
    assert kinds.count("skipped") == 7
    assert kinds.count("reused") == sum(row["action"] == "reused" for row in fast.rows) == 17
    assert kinds.count("seconds") == 20
    # Equal columns: 20 steps end at two fifths of the strip of 50.
    assert max(box.x for box in fast.boxes) < 0.45 * max(box.x for box in exact.boxes)
    assert "7 skipped" in fast.summary


def test_a_partly_computed_cell_is_filled_by_its_share() -> None:
    branch = {
        "branch": "cond",
        "action": "reused",
        "blocks_run": 2,
        "blocks_total": 8,
        "by": "first_block_cache",
    }
    step = {"index": 0, "sigma": 0.5, "timestep": 500.0, "seconds": 0.25, "branches": [branch]}
    line, _ = timelines({"steps": [step]}, {})
    part = next(box for box in line.boxes if box.kind == "part")
    whole = next(box for box in line.boxes if box.kind == "reused")
    assert part.height == pytest.approx(CELL_HEIGHT / 4)
    assert part.y + part.height == pytest.approx(whole.y + whole.height)
    assert spaced(whole.tip).splitlines() == [
        "step 1 of 1 \N{MIDDLE DOT} sigma 0.5000 \N{MIDDLE DOT} timestep 500 \N{MIDDLE DOT} 250 ms",
        "cond: reused from cache by first_block_cache, 2 of 8 blocks run",
    ]


def test_experts_and_repeated_calls() -> None:
    def step(index: int, expert: str, actions: list[str]) -> dict:
        branches = [
            {
                "branch": "fused",
                "expert": expert,
                "action": a,
                "blocks_run": 8 * (a == "computed"),
                "blocks_total": 8,
            }
            for a in actions
        ]
        return {"index": index, "branches": branches}

    receipt = {
        "steps": [step(0, "transformer", ["computed"] * 2), step(1, "transformer_2", ["computed", "skipped"])]
    }
    line, empty = timelines(receipt, {})
    assert [label.text for label in line.expert_labels] == ["transformer", "transformer_2"]
    assert [(row["action"], row["blocks"]) for row in line.rows] == [
        ("computed", "16 / 16"),
        ("reused", "8 / 16"),
    ]
    assert empty.boxes == ()


def test_curve_values_map_to_heights() -> None:
    curve = QualityCurve(
        name="psnr",
        version="v",
        unit="dB",
        higher_is_better=True,
        per_frame=(40.0, 30.0, 35.0),
        pooled=33.0,
        worst=1,
    )
    panel = chart(curve)
    ys = [y for _, y in panel.points]
    assert ys[0] < ys[2] < ys[1]
    assert [x for x, _ in panel.points] == [curves.LEFT, 279.0, curves.WIDTH - curves.RIGHT]
    # Ticks sit on the same scale as the points.
    per_decibel = (ys[1] - ys[0]) / 10
    for tick in panel.y_ticks:
        assert tick.position == pytest.approx(ys[0] + (40 - float(tick.text)) * per_decibel, abs=0.02)
    assert spaced(panel.worst) == "30 dB at frame 2"


def test_identical_frames_are_marked_not_plotted() -> None:
    values = (math.inf, 30.0, math.inf)
    common = {"name": "psnr", "version": "v", "unit": "dB", "higher_is_better": True}
    panel = chart(QualityCurve(**common, per_frame=values, pooled=35.0, worst=1))
    assert len(panel.equal) == 2
    assert panel.path.count("M") == 1
    assert [spaced(text) for text in panel.texts] == ["identical", "30 dB", "identical"]
    same = chart(QualityCurve(**common, per_frame=(math.inf,) * 3, pooled=math.inf, worst=0))
    assert (same.path, same.pooled, same.worst_point, same.y_ticks) == ("", "identical", None, ())


def test_flat_and_single_frame_curves() -> None:
    for values in ((0.5,), (0.5, 0.5), (0.0, 0.0)):
        panel = chart(
            QualityCurve(
                name="lpips",
                version="v",
                unit="",
                higher_is_better=False,
                per_frame=values,
                pooled=0.0,
                worst=0,
            )
        )
        assert all(math.isfinite(c) for point in panel.points for c in point)


def test_receipt_rows_say_less_more_and_same(page: ComparePage) -> None:
    rows = {row.label: row for row in receipt_rows(page.exact_receipt, page.fast_receipt)}
    assert rows["Network evaluations (NFE)"].ratio == "3.03\N{MULTIPLICATION SIGN} less"
    assert rows["Wall time"].tone == "good"
    assert rows["VAE decode"].ratio == "same"
    assert "Peak memory" not in rows
    worse = {row.label: row for row in receipt_rows({"nfe": 2, "flops": 1.0}, {"nfe": 4, "flops": 0.0})}
    assert (worse["Network evaluations (NFE)"].ratio, worse["FLOPs executed"].ratio) == (
        "2\N{MULTIPLICATION SIGN} more",
        "none left",
    )
    assert receipt_rows({}, {}) == ()
    noise = receipt_rows({"stages": {"vae": 1.0}}, {"stages": {"vae": 1.02}})
    assert {row.ratio for row in noise} == {"about the same"}


def test_stage_bars_share_one_scale(page: ComparePage) -> None:
    bars = stage_bars(page.exact_receipt, page.fast_receipt)
    assert sum(segment.share for segment in bars["exact"]) == pytest.approx(1.0)
    ratio = page.fast_receipt["stages"]["total"] / page.exact_receipt["stages"]["total"]
    assert sum(segment.share for segment in bars["fast"]) == pytest.approx(ratio)
    assert stage_bars({}, {}) == {}
