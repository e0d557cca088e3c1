"""The contenders of `students_world.py` can run, and `student_quality.py` measures renders as renders."""

from __future__ import annotations

from small_store import FOLDER, script

from vivace.evaluation.contender import parse
from vivace.evaluation.subject import Subject
from vivace.evaluation.task import Task

world, quality = script("students_world"), script("student_quality")


def test_all_can_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    plans = {name: plan for part in world.plans(None).values() for name, plan in part.items()}
    assert {"naive-4", "unguided-1", "turbo"} <= set(plans)
    model = Subject(Task.load("world-motion@1")).description
    for name, plan in plans.items():
        contender = parse(f"plan:{plan.save(tmp_path / f'{name}.yaml')}")
        assert not contender.refuse(model), name


def test_renders_are_what_their_captions_say_on_the_scale_of_the_metric() -> None:
    """As many clips as a bootstrap needs."""
    shown, verifier = quality.scenes(32), quality.Verifier.load()
    prompts = [quality.caption(s.attributes, s.seed) for s in shown]
    row = quality.examined(quality.rendered(shown, "cpu", 8), prompts, verifier, 4)
    assert row["attributes"]["low"] <= row["attributes"]["value"] <= row["attributes"]["high"]
    assert row["attributes"]["value"] > 0.9
    assert row["motion"]["n"] == 32
    table = row["features"]
    assert 0.5 < float((table**2).mean()) ** 0.5 < 2.0
    low, high = quality.interval(table, table)
    assert low <= quality.mmd2(table, table) <= high


def test_a_subset_is_compared_with_the_exact_run_clip_by_clip() -> None:
    subset = script("students_subset")
    exact = {
        f"{p}.{k}": {
            "attributes": 1.0,
            "motion": float("nan") if p == 1 else 1.0,
            "dynamic_degree": 1.0,
            "flow_magnitude": 0.5,
        }
        for p in range(4)
        for k in range(2)
    }
    rows = [
        {"id": name, "attributes": 0.5, "motion": 0.0, "dynamic_degree": 1.0, "flow_magnitude": 0.25}
        for name in exact
    ]
    found = subset.compared(rows, exact)
    assert found["clips"] == 8
    assert found["attributes"]["difference"]["value"] == -0.5
    assert found["motion"]["exact"] == 1.0
    assert found["flow_magnitude"]["value"] == 0.25


def test_rows_of_a_subset_are_kept_as_columns_and_come_back(tmp_path) -> None:
    subset, out = script("students_subset"), tmp_path / "subset.json"
    assert subset.before(out)["contenders"] == {}
    row = {"id": "0.1", "attributes": 0.5, "motion": None, "dynamic_degree": 1.0, "flow_magnitude": 0.25}
    record = {"task": "t", "contenders": {"turbo": {"rows": [row, row | {"id": "1.0"}], "clips": 2}}}
    subset.kept(record, out)
    assert subset.before(out) == record
