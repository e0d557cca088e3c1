"""The board of a synthetic store: every number against the truth that the records were made with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_fixture import MODEL, OTHER, SERIES, TASK, columns, contender, put, samples

from vivace.core.errors import UnknownNameError
from vivace.evaluation.board import build
from vivace.evaluation.record import Record
from vivace.evaluation.store import Store
from vivace.evaluation.task import Task

PROMPTS, REPEATS = 40, 2
FULL = 1e12


def truth(share: float, bonus: float = 0.0) -> dict[str, float]:
    """What a run of this share of the FLOPs is worth: linear in log FLOPs, plus what a method adds."""
    lost = -np.log2(share)
    return {
        "psnr": 40 - 5 * lost + 5 * bonus,
        "jod": 9.5 - lost + bonus,
        "attributes": 0.9 - 0.05 * lost + 0.05 * bonus,
        "sharpness": 10.0,
        "dynamic_degree": 0.6,
    }


class Bench:
    """Adds contenders to a store, each with noise of its own."""

    def __init__(self, path: Path) -> None:
        self.store = Store(path)
        self.rng = np.random.default_rng(0)
        self.base = self.rng.normal(size=PROMPTS)

    def add(
        self, name: str, kind: str, means: dict[str, float], share: float = 1.0, first: int = 0, **more: Any
    ) -> Record:
        settings = {k: more.pop(k) for k in ("group", "knob") if k in more}
        table = samples(columns(self.rng, PROMPTS, REPEATS, means, 0.01, self.base), PROMPTS, REPEATS, first)
        values: dict[str, Any] = {
            "flops": FULL * share,
            "seconds": [4.0 * share, 4.1 * share, 3.9 * share],
            "peak": 1000,
        }
        return put(self.store, contender(name, kind, **settings), table, **(values | more))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("board"))
    absolute = {n: v for n, v in truth(1).items() if n not in ("psnr", "jod")}
    made.add("exact", "exact", absolute)
    made.add("exact-bf16", "floor", truth(1) | {"psnr": 45.0, "jod": 9.9}, distribution={"frame_mmd": 0.0})
    made.add("other-seed", "seed", truth(1) | {"psnr": 10.0, "jod": 4.0}, first=REPEATS)
    for steps in (8, 16, 32):
        made.add(
            f"steps={steps}", "steps", truth(steps / 64), steps / 64, group="steps", knob=f"steps={steps}"
        )
    # Half of the FLOPs and as good as 0.5 doublings more: better than 32 steps.
    made.add("good", "plan", truth(0.5, 0.5), 0.5, distribution={"frame_mmd": 0.1})
    # Between 16 and 32 steps, and worse than plain steps.
    made.add("bad", "peer", truth(0.35, -0.5), 0.35)
    for threshold, share in ((0.1, 0.45), (0.2, 0.3), (0.3, 0.2)):
        made.add(
            f"cache@{threshold}",
            "peer",
            truth(share, 0.3),
            share,
            group="cache",
            knob=f"threshold={threshold}",
        )
    made.add("elsewhere", "plan", truth(0.5), 0.5, environment=OTHER)
    return made


@pytest.fixture(scope="module")
def board(bench: Bench) -> dict[str, Any]:
    return build(bench.store, series=SERIES, created="2026-01-01T00:00:00+00:00")


def row(board: dict[str, Any], name: str) -> dict[str, Any]:
    return next(r for r in board["rows"] if r["contender"]["name"] == name)


def test_it_is_strict_json_and_has_the_promised_keys(board: dict[str, Any]) -> None:
    again = json.loads(json.dumps(board, allow_nan=False))
    assert again == board
    assert {
        "vivace_board",
        "title",
        "created",
        "command",
        "series",
        "environments",
        "tasks",
        "rows",
        "anchors",
    } < set(board)
    promised = {
        "id",
        "task",
        "environment",
        "contender",
        "model",
        "counts",
        "work_share",
        "cost",
        "timing",
        "memory",
    }
    promised |= {
        "energy",
        "speed_up",
        "quality",
        "paired",
        "normalised",
        "matched",
        "skipped",
        "warnings",
        "command",
    }
    assert all(promised | {"clips", "samples"} <= set(r) for r in board["rows"])
    assert set(board["series"]) == {"psnr", "jod", "attributes", "sharpness", "dynamic_degree", "frame_mmd"}
    assert set(board["rows"][0]["cost"]) == {"total", "denoise", "text", "vae", "other"}


def test_order_and_environments(board: dict[str, Any]) -> None:
    here = [r["contender"]["kind"] for r in board["rows"] if r["environment"] == "e1"]
    assert here[:6] == ["exact", "floor", "seed", "steps", "steps", "steps"]
    labels = {e["fingerprint"]: e["label"] for e in board["environments"]}
    assert labels == {"e1": "2-core A, torch 2.13", "e2": "H, torch 2.11"}


def test_costs_and_shares(board: dict[str, Any]) -> None:
    good = row(board, "good")
    assert good["work_share"] == {"value": 0.5, "low": None, "high": None, "n": 1}
    assert good["speed_up"]["value"] == pytest.approx(2)
    assert good["speed_up"]["low"] < 2 < good["speed_up"]["high"]
    total = good["cost"]["total"]
    assert (total["value"], total["q1"], total["q3"]) == pytest.approx((2.0, 1.975, 2.025))
    assert total["low"] < 2 < total["high"]
    assert good["cost"]["other"]["value"] == 0
    assert row(board, "exact")["speed_up"] is None
    assert row(board, "exact")["work_share"]["value"] == 1


def test_other_machines_are_never_mixed_in(board: dict[str, Any]) -> None:
    alone = row(board, "elsewhere")
    assert (alone["speed_up"], alone["work_share"], alone["paired"], alone["matched"]) == (
        None,
        None,
        {},
        None,
    )
    assert any("H, torch 2.11: there is no exact run" in p for p in board["problems"])
    assert all(
        p["row"] != alone["id"] for f in board["fronts"] if f["environment"] == "e1" for p in f["points"]
    )


def test_differences_to_exact_are_of_absolute_quality_alone(board: dict[str, Any]) -> None:
    bad = row(board, "bad")["paired"]
    assert set(bad) == {"attributes", "sharpness", "dynamic_degree"}
    wanted = truth(0.35, -0.5)["attributes"] - 0.9
    assert bad["attributes"]["difference"]["low"] < wanted < bad["attributes"]["difference"]["high"]
    assert bad["attributes"]["verdict"] == "inferior"
    assert bad["sharpness"]["verdict"] == "equivalent"
    seed = row(board, "other-seed")
    assert seed["paired"]["attributes"]["verdict"] == "non-inferior"
    assert any("paired by prompt" in w for w in seed["warnings"])


def test_scores_between_the_anchors(board: dict[str, Any]) -> None:
    anchor = next(a for a in board["anchors"] if a["environment"] == "e1")
    assert anchor["floor"]["psnr"]["value"] == pytest.approx(45, abs=0.02)
    assert anchor["seed"]["jod"]["value"] == pytest.approx(4, abs=0.02)
    assert row(board, "exact-bf16")["normalised"]["psnr"]["value"] == pytest.approx(1)
    assert row(board, "other-seed")["normalised"]["psnr"]["value"] == pytest.approx(0)
    good = row(board, "good")["normalised"]
    assert set(good) == {"psnr", "jod"}
    wanted = (truth(0.5, 0.5)["psnr"] - 10) / 35
    assert good["psnr"]["value"] == pytest.approx(wanted, abs=0.002)
    assert good["psnr"]["low"] < good["psnr"]["value"] < good["psnr"]["high"]


def test_the_control_nearby(board: dict[str, Any]) -> None:
    control = row(board, "good")["matched"]
    assert (control["contender"], control["by"], control["share"]) == ("steps=32", "flops", 1.0)
    psnr = control["paired"]["psnr"]
    assert psnr["verdict"] == "better"
    assert psnr["difference"]["low"] < 2.5 < psnr["difference"]["high"]
    # A departure between two approximations is no loss.
    assert control["paired"]["dynamic_degree"]["verdict"] in ("equivalent", "undecided")
    assert row(board, "steps=8")["matched"] is None


def test_the_control_between_two_runs(board: dict[str, Any]) -> None:
    control = row(board, "bad")["matched"]
    assert control["contender"] == "steps=16 .. steps=32"
    assert "interpolated" in control["note"]
    psnr = control["paired"]["psnr"]
    assert psnr["difference"]["value"] == pytest.approx(-2.5, abs=0.02)
    assert psnr["verdict"] == "worse"
    assert control["paired"]["attributes"]["verdict"] == "inferior"


def test_fronts(board: dict[str, Any], bench: Bench) -> None:
    by_key = {(f["cost"], f["series"]): f for f in board["fronts"]}
    assert set(by_key) == {
        (c, s) for c in ("seconds", "nfe", "flops", "peak_bytes") for s in ("attributes", "psnr", "jod")
    }
    flops = by_key["flops", "psnr"]
    names = {r["id"]: r["contender"]["name"] for r in board["rows"]}
    on = {names[p["row"]] for p in flops["points"] if p["front"]}
    assert {"good", "cache@0.1", "cache@0.3", "steps=8"} <= on
    assert "bad" not in on
    assert {names[p["row"]] for p in flops["points"] if p["dominated"]} >= {"bad"}
    # Anchors are no contenders, and the exact run is no distance from itself.
    assert not {"exact", "exact-bf16", "other-seed"} & {names[p["row"]] for p in flops["points"]}
    assert "exact" in {names[p["row"]] for p in by_key["flops", "attributes"]["points"]}
    assert [c["group"] for c in flops["curves"]] == ["steps", "cache"]
    (area,) = flops["areas"]
    assert (area["a"], area["b"]) == ("cache", "steps")
    # The cache is worth 0.3 doublings everywhere, 5 dB each.
    assert area["low"] < 1.5 < area["high"]
    assert area["high"] - area["low"] < 0.05
    gain = area["at_equal_quality"]["ratio"]
    assert gain["low"] < 2**0.3 < gain["high"]


def test_samples(board: dict[str, Any]) -> None:
    table = row(board, "good")["samples"]
    assert len(table["ids"]) == len(table["prompts"]) == PROMPTS * REPEATS
    assert set(table["columns"]) == {"psnr", "jod", "attributes", "sharpness", "dynamic_degree"}
    assert table["prompts"][3] == "prompt 3"


def test_the_newest_record_counts(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    made.add("exact", "exact", {"attributes": 0.5})
    new = made.add("exact", "exact", {"attributes": 0.7}, created="2026-02-01T00:00:00")
    rows = build(made.store, series=SERIES)["rows"]
    assert [r["id"] for r in rows] == [new.id]


def test_infinite_values_are_words(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    made.add("exact", "exact", {"attributes": 0.9})
    table = samples(
        {"psnr": (float("inf"),) * 80, "jod": (float("nan"),) * 2 + (10.0,) * 78, "attributes": (0.9,) * 80},
        40,
        2,
    )
    put(made.store, contender("same"), table)
    board = build(made.store, series=SERIES)
    json.dumps(board, allow_nan=False)
    same = row(board, "same")
    assert same["quality"]["psnr"]["value"] == "inf"
    assert same["quality"]["psnr"]["left_out"] == 80
    assert same["samples"]["columns"]["psnr"][0] == "inf"
    assert same["samples"]["columns"]["jod"][0] is None


def test_anchors_that_do_not_differ_give_no_score(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    made.add("exact", "exact", {"attributes": 0.9})
    made.add("floor", "floor", {"psnr": 30.0})
    made.add("seed", "seed", {"psnr": 30.0}, first=2)
    made.add("fast", "plan", {"psnr": 20.0})
    board = build(made.store, series=SERIES)
    assert row(board, "fast")["normalised"] == {}
    assert "too close" in board["anchors"][0]["not_normalised"]["psnr"]


def test_problems_name_what_could_not_be_used(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    made.add("exact", "exact", {"attributes": 0.9})
    old = made.add("old", "plan", {"attributes": 0.9}, task=TASK.model_copy(update={"sha256": "b" * 64}))
    new = made.add("new", "plan", {"attributes": 0.9}, created="2026-03-01T00:00:00")
    half = made.add(
        "half", "plan", {"attributes": 0.9}, 0.4, model=MODEL.model_copy(update={"dtype": "bfloat16"})
    )
    lost = made.add("lost", "plan", {"attributes": 0.9})
    (tmp_path / "records" / "broken.json").write_text("{")
    (tmp_path / "samples" / f"{lost.samples}.json.gz").write_bytes(b"")
    board = build(made.store, series=SERIES)
    text = "\n".join(board["problems"])
    assert f"record {old.id} of old is left out" in text
    assert "broken.json is damaged" in text
    assert "world-short@1 with tiny in bfloat16 on 2-core A, torch 2.13: there is no exact run" in text
    assert f"{lost.samples}.json.gz are damaged" in text
    assert (row(board, "half")["speed_up"], row(board, "half")["paired"]) == (None, {})
    assert {r["id"] for r in board["rows"]} >= {new.id, half.id, lost.id}
    assert old.id not in {r["id"] for r in board["rows"]}


def test_a_noise_floor_in_another_precision_joins_its_exact_run(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    half = MODEL.model_copy(update={"dtype": "bfloat16"})
    made.add("exact", "exact", {"attributes": 0.9})
    made.add("floor", "floor", {"psnr": 45.0, "attributes": 0.9}, model=half)
    made.add("seed", "seed", {"psnr": 10.0}, first=2)
    made.add("fast", "plan", {"psnr": 27.5})
    board = build(made.store, series=SERIES)
    assert len(board["anchors"]) == 1
    assert row(board, "fast")["normalised"]["psnr"]["value"] == pytest.approx(0.5, abs=0.01)
    assert any("another precision: bfloat16 and float32" in w for w in row(board, "floor")["warnings"])
    assert not [p for p in board["problems"] if "no exact run" in p]


def test_without_a_control_the_reason_is_given(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    made.add("exact", "exact", {"attributes": 0.9})
    made.add("fast", "plan", {"attributes": 0.9}, 0.1)
    assert (
        "it has no fewer-step control: no run with fewer steps was made."
        in row(build(made.store, series=SERIES), "fast")["warnings"]
    )
    made.add("steps=8", "steps", {"attributes": 0.8}, 0.2)
    made.add("slow", "plan", {"attributes": 0.9}, 0.5)
    board = build(made.store, series=SERIES)
    assert any("costs less than every run" in w for w in row(board, "fast")["warnings"])
    # Above the last fewer-step run the exact run is the upper neighbour.
    assert row(board, "slow")["matched"]["contender"] == "steps=8 .. exact"


def test_task_choice_and_texts(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    real = Task.load("world-smoke@1")
    made.add("exact", "exact", {"attributes": 0.9}, task=real.ref)
    made.add("exact", "exact", {"attributes": 0.9})
    board = build(made.store, task="world-smoke", series=SERIES)
    (task,) = board["tasks"]
    assert (task["name"], task["prompts"], task["frames"], task["guidance"]) == ("world-smoke@1", 16, 29, 4.0)
    assert board["rows"][0]["samples"]["prompts"][0] == real.prompt_texts()[0]
    with pytest.raises(UnknownNameError, match="world-short"):
        build(made.store, task="nothing", series=SERIES)
    other = build(made.store, task="world-short@1", series=SERIES, prompts={"world-short@1": ["a ball"] * 40})
    assert other["rows"][0]["samples"]["prompts"][0] == "a ball"
    assert len(build(made.store, series=SERIES)["tasks"]) == 2


def test_a_series_of_an_unknown_metric_is_shown_without_a_claim(tmp_path: Path) -> None:
    made = Bench(tmp_path)
    made.add("exact", "exact", {"attributes": 0.9})
    made.add("fast", "plan", {"attributes": 0.8})
    board = build(made.store, series={})
    assert board["series"]["attributes"]["about"] == "Its metric is not installed here."
    assert row(board, "fast")["paired"]["attributes"]["verdict"] == "worse"


def test_an_empty_store_gives_an_empty_board(tmp_path: Path) -> None:
    board = build(Store(tmp_path), series=SERIES)
    assert (board["rows"], board["fronts"], board["problems"]) == ([], [], [])


def test_needs_no_torch(bench: Bench) -> None:
    code = (
        "import sys; from vivace.evaluation import board, store; "
        f"board.build(store.Store({str(bench.store.path)!r}), series={{}}); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
