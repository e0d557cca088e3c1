"""Two records: refused with the field that differs, or compared with the truth they were made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from record_fixture import (
    ENVIRONMENT,
    MODEL,
    OTHER,
    SERIES,
    TASK,
    columns,
    contender,
    metric_refs,
    put,
    samples,
    timing,
)
from typer.testing import CliRunner

from vivace.cli import compare_records as command
from vivace.core.errors import ConfigError, VivaceError
from vivace.evaluation import compare as module
from vivace.evaluation.compare import ComparisonError, check_comparable, compare, match, series_table
from vivace.evaluation.record import Record
from vivace.evaluation.store import Store

PROMPTS, REPEATS = 60, 2
EXACT = {"attributes": 0.9, "warp_error": 3.0, "sharpness": 10.0, "dynamic_degree": 0.6}
WORSE = {"attributes": 0.8, "warp_error": 6.0, "sharpness": 10.0, "dynamic_degree": 0.6}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def some(
    store: Store, name: str = "fast", means: dict[str, float] | None = None, seed: int = 1, **more: Any
) -> Record:
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(0).normal(size=PROMPTS)
    table = samples(columns(rng, PROMPTS, REPEATS, means or EXACT, 0.05, base), PROMPTS, REPEATS)
    who = more.pop("who", contender(name, "exact" if name == "exact" else "plan"))
    return put(store, who, more.pop("table", table), **more)


@pytest.mark.parametrize(
    ("change", "field", "values"),
    [
        (
            {"task": TASK.model_copy(update={"name": "world-dev@1"})},
            "task.name",
            ("world-short@1", "world-dev@1"),
        ),
        ({"task": TASK.model_copy(update={"sha256": "b" * 64})}, "task.sha256", ("a" * 12, "b" * 12)),
        ({"model": MODEL.model_copy(update={"name": "wan"})}, "model.name", ("tiny", "wan")),
        ({"model": MODEL.model_copy(update={"pipeline": "P"})}, "model.pipeline", ("WanPipeline", "P")),
        ({"model": MODEL.model_copy(update={"weights": "random"})}, "model.weights", ("trained", "random")),
        ({"model": MODEL.model_copy(update={"sha256": "v" * 64})}, "model.sha256", ("w" * 12, "v" * 12)),
        ({"model": MODEL.model_copy(update={"dtype": "bfloat16"})}, "model.dtype", ("float32", "bfloat16")),
        ({"environment": OTHER}, "environment.gpu", ("nothing", "H")),
        (
            {"environment": ENVIRONMENT | {"versions": {"torch": "2.11"}, "fingerprint": "e3"}},
            "environment.versions.torch",
            ("2.13", "2.11"),
        ),
        ({"environment": ENVIRONMENT | {"fingerprint": "e4"}}, "environment.fingerprint", ("e1", "e4")),
    ],
)
def test_refusal_names_the_field_and_both_values(
    store: Store, change: dict[str, Any], field: str, values: tuple[str, str]
) -> None:
    a, b = some(store, "exact"), some(store, "fast", **change)
    for one, other in ((a, b), (b, a)):
        with pytest.raises(ComparisonError) as caught:
            check_comparable(one, other)
        sentence = str(caught.value)
        assert f"differ in {field}:" in sentence
        assert all(v in sentence for v in values)
        assert isinstance(caught.value, VivaceError)
    with pytest.raises(ComparisonError, match=field):
        compare(a, b, store, series=SERIES)


def test_known_differences_get_their_verdicts(store: Store) -> None:
    exact = some(store, "exact")
    found = compare(some(store, "fast", WORSE, seed=2), exact, store, series=SERIES)
    results = found.results()
    assert results["attributes"].verdict == "inferior"
    assert results["attributes"].difference.low < -0.1 < results["attributes"].difference.high
    assert results["warp_error"].verdict == "inferior"
    assert results["sharpness"].verdict == "equivalent"
    assert (found.prompts, found.samples) == (PROMPTS, PROMPTS * REPEATS)
    assert any(
        "worse than exact in attributes by more than the margin of 0.02" in s for s in found.sentences()
    )
    assert len(found.sentences()) == len(results)
    json.dumps(found.to_dict(), allow_nan=False)
    back = compare(exact, found.a, store, series=SERIES).results()
    assert back["attributes"].difference.value == pytest.approx(-results["attributes"].difference.value)


def test_the_order_of_samples_does_not_matter(store: Store) -> None:
    a, b = some(store, "exact"), some(store, "fast", seed=2)
    table = store.samples(b)
    order = np.random.default_rng(0).permutation(len(table.ids)).tolist()
    mixed = table.model_copy(
        update={f: tuple(getattr(table, f)[i] for i in order) for f in ("ids", "prompt", "k", "seed")}
        | {"columns": {n: tuple(c[i] for i in order) for n, c in table.columns.items()}}
    )
    c = put(store, contender("shuffled"), mixed)
    one = compare(b, a, store, series=SERIES).results()["attributes"]
    two = compare(c, a, store, series=SERIES).results()["attributes"]
    assert two.difference.low == pytest.approx(one.difference.low)


def test_other_seeds_are_refused_and_seed_runs_pair_by_prompt(store: Store) -> None:
    exact = some(store, "exact")
    rng, base = np.random.default_rng(9), np.random.default_rng(0).normal(size=PROMPTS)
    ceiling = samples(columns(rng, PROMPTS, REPEATS, EXACT, 0.05, base), PROMPTS, REPEATS, first=REPEATS)
    seed = put(store, contender("seed", "seed"), ceiling)
    with pytest.raises(ComparisonError, match="share no sample"):
        compare(seed, exact, store, series=SERIES)
    found = compare(seed, exact, store, series=SERIES, pair_by="prompt")
    assert found.prompts == PROMPTS
    assert "paired by prompt" in found.notes[0]
    moved = store.samples(exact).model_copy(update={"seed": tuple(range(PROMPTS * REPEATS))})
    with pytest.raises(ComparisonError, match=r"seed of sample 1\.0: 1 and 1000|seed of sample \d+\.\d: "):
        match(moved, store.samples(exact))


def test_part_of_the_samples(store: Store) -> None:
    exact = some(store, "exact")
    table = store.samples(exact)
    few = table.model_copy(
        update={f: getattr(table, f)[:40] for f in ("ids", "prompt", "k", "seed")}
        | {"columns": {n: c[:40] for n, c in table.columns.items()}}
    )
    found = compare(put(store, contender("part"), few), exact, store, series=SERIES)
    assert found.samples == 40
    assert "only 40 samples are in both records, of 40 and 120." in found.notes


def test_another_metric_version_or_backbone_drops_the_series(store: Store) -> None:
    exact = some(store, "exact", EXACT | {"jod": 9.0}, backbone="x" * 64)
    fast = some(store, "fast", EXACT | {"jod": 9.0}, seed=2, version=2, backbone="y" * 64)
    found = compare(fast, exact, store, series=SERIES)
    assert "attributes" not in found.results()
    assert "jod" not in found.results()
    assert "warp_error" in found.results()
    assert "attributes is left out: metric.version differs, 2 and 1." in found.notes
    assert f"jod is left out: metric.backbone_sha256 differs, {'y' * 12} and {'x' * 12}." in found.notes


def test_fidelity_to_other_references_is_not_compared(store: Store) -> None:
    a = some(store, "fast", EXACT | {"psnr": 30.0})
    b = some(store, "slow", EXACT | {"psnr": 20.0}, seed=2, reference="exact-bf16")
    found = compare(a, b, store, series=SERIES)
    assert "fidelity" not in found.paired
    assert any(n.startswith("fidelity is left out: quality.reference differs") for n in found.notes)
    c = some(store, "third", EXACT | {"psnr": 20.0}, seed=2)
    assert compare(a, c, store, series=SERIES).results()["psnr"].verdict == "better"


def test_across_machines_only_quality(store: Store) -> None:
    exact = some(store, "exact", flops=1e12, seconds=[2.0, 2.1, 2.2], peak=100)
    fast = some(store, "fast", WORSE, seed=2, environment=OTHER, flops=5e11, seconds=[1.0, 1.1, 0.9], peak=50)
    found = compare(fast, exact, store, series=SERIES, cross_environment=True)
    assert found.results()["attributes"].verdict == "inferior"
    assert set(found.cost) == {"flops", "nfe"}
    assert any("quality alone is compared" in n for n in found.notes)


def test_cost(store: Store) -> None:
    exact = some(store, "exact", flops=1e12, seconds=[2.0, 2.1, 1.9], peak=100)
    fast = some(store, "fast", seed=2, flops=5e11, seconds=[1.0, 1.1, 0.9], peak=50)
    found = compare(fast, exact, store, series=SERIES)
    total = found.cost["seconds.total"]
    assert total.value == pytest.approx(2.0)
    assert 1 < total.low < 2 < total.high
    assert found.cost["flops"].value == 2
    assert found.cost["peak_bytes"].value == 2
    assert "seconds.other" not in found.cost
    assert any("did not alternate" in n for n in found.notes)
    other = some(store, "wide", seed=3, timing=timing([5.0, 5.1], batch=4))
    assert "timing.batch differs, 4 and 1" in " ".join(compare(other, exact, store, series=SERIES).notes)


def test_distribution_has_no_pairs(store: Store) -> None:
    a = some(store, "fast", distribution={"frame_mmd": 0.3})
    b = some(store, "slow", seed=2, distribution={"frame_mmd": 0.1})
    found = compare(a, b, store, series=SERIES)
    assert "distribution" not in found.paired
    assert found.to_dict()["sets"]["frame_mmd"]["a"]["value"] == pytest.approx(0.3)


def test_records_without_anything_in_common(store: Store) -> None:
    a, b = put(store, contender("a")), put(store, contender("b"))
    with pytest.raises(ComparisonError, match="nothing in common"):
        compare(a, b, store, series=SERIES)


def test_series_table_knows_directions_and_margins() -> None:
    from vivace.evaluation.metrics.base import Backbone, Better, Group, MetricCard, Scope, Series

    card = MetricCard(
        name="cvvdp",
        version=2,
        title="JOD",
        scope=Scope.PAIR,
        group=Group.FIDELITY,
        series=(
            Series(name="jod", better=Better.HIGHER, about="jod", unit="JOD", margin=0.5, low=0, high=10),
        ),
        convention="",
        blind_to=("x",),
        backbone=Backbone(name="b", sha256="s", licence="l", source="o"),
    )
    entry = series_table([card])["jod"]
    assert entry.keys() == SERIES["jod"].keys()
    assert (entry["better"], entry["margin"], entry["version"], entry["backbone"]) == ("higher", 0.5, 2, "b")
    assert type(entry["better"]) is str


# -- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "series_table", lambda cards=None: SERIES)
    app = typer.Typer()
    app.command()(command.compare_records)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})


def test_command_shows_a_table(store: Store, run: Any) -> None:
    a = some(
        store, "fast", WORSE, seed=2, flops=5e11, seconds=[1.0, 1.1, 0.9], distribution={"frame_mmd": 0.3}
    )
    b = some(store, "exact", flops=1e12, seconds=[2.0, 2.1, 1.9], distribution={"frame_mmd": 0.1})
    by_id = run(a.id, b.id, "--store", store.path)
    assert by_id.exit_code == 0, by_id.output
    for text in (
        "fast against exact",
        "attributes",
        "inferior",
        "<0.001",
        "60 prompts, 120 clips",
        "FLOPs",
        "frame_mmd",
    ):
        assert text in by_id.output
    files = [store.path / "records" / f"{r.id}.json" for r in (a, b)]
    assert run(*files).output == by_id.output


def test_command_gives_strict_json(store: Store, run: Any) -> None:
    a, b = some(store, "fast", WORSE, seed=2), some(store, "exact")
    out = run(a.id, b.id, "--store", store.path, "--json")
    data = json.loads(out.output, parse_constant=lambda c: pytest.fail(c))
    assert data["paired"]["absolute"]["attributes"]["verdict"] == "inferior"


def test_command_finds_samples_beside_each_record(store: Store, tmp_path: Path, run: Any) -> None:
    second = Store(tmp_path / "second")
    a, b = some(store, "fast", WORSE, seed=2), some(second, "exact")
    out = run(store.path / "records" / f"{a.id}.json", second.path / "records" / f"{b.id}.json")
    assert out.exit_code == 0, out.output
    assert "inferior" in out.output


def test_command_refuses_in_one_sentence(store: Store, run: Any) -> None:
    a, b = some(store, "fast", environment=OTHER), some(store, "exact")
    out = run(a.id, b.id, "--store", store.path)
    assert isinstance(out.exception, ComparisonError)
    assert "environment.gpu: H and nothing" in str(out.exception)
    assert out.exception.exit_code == 2
    assert run(a.id, b.id, "--store", store.path, "--cross-environment").exit_code == 0
    assert isinstance(run(a.id, b.id).exception, ConfigError)
    assert "no record" in str(run("ffffffff", b.id, "--store", store.path).exception)
    assert "cannot read the record" in str(run("nowhere/x.json", b.id).exception)


def test_metric_refs_name_every_series() -> None:
    assert {s for m in metric_refs() for s in m.series} == set(SERIES)
