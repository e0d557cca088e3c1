"""Students start when the one that they go on from is there, one on a device, and what cannot start is said."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from small_store import script

from vivace.cli.distill import recipe_of
from vivace.training.distillation.run import Choices

module = script("train_students")
Job = module.Job


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Jobs as programs that take no time: (name, device, begun, what was there) of each; those named `bad` fail."""
    found = []

    def started(job, logs, device, command):
        found.append((job.name, device, time.monotonic(), {f.stem for f in tmp_path.glob("*.json")}))
        text = f"import pathlib; pathlib.Path({str(tmp_path / job.name)!r} + '.json').touch()"
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)" if "bad" in job.name else text])

    monkeypatch.setattr(module, "started", started)

    def run(jobs, devices=("0", "1")):
        return module.train(jobs, tmp_path, tmp_path / "data", list(devices), [], 1), found

    return run


def test_order_and_devices(runs) -> None:
    jobs = [
        Job("c", "tdm", 1, init="a"),
        Job("a", "pcm", 1),
        Job("b", "pcm", 1),
        Job("d", "tdm", 1, init="c"),
    ]
    failed, found = runs(jobs)
    assert failed == []
    assert {name for name, *_ in found} == {"a", "b", "c", "d"}
    assert [name for name, *_ in found][-1] == "d"
    assert {device for _, device, *_ in found[:2]} == {"0", "1"}
    there = {name: before for name, _, _, before in found}
    assert "a" in there["c"]
    assert "c" in there["d"]
    assert runs(jobs)[1] == found, "finished ones are not trained again"


def test_what_failed_and_what_stood_on_it(runs) -> None:
    failed, found = runs(
        [
            Job("bad", "pcm", 1),
            Job("e", "tdm", 1, init="bad"),
            Job("f", "tdm", 1, init="e"),
            Job("g", "lcm", 1),
        ]
    )
    assert failed == ["bad", "e", "f"]
    assert {name for name, *_ in found} == {"bad", "g"}


def test_a_student_goes_on_from_a_merged_one_and_fails_with_its_parts(runs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module.Artifact, "of", lambda _: None)
    monkeypatch.setattr(module, "merge_students", lambda files, weights, out, **_: out.touch())
    monkeypatch.setattr(module, "MERGED", {"both": ("a", "b"), "none": ("a", "bad")})
    jobs = [
        Job("c", "tdm", 1, init="both"),
        Job("d", "tdm", 1, init="none"),
        *(Job(name, "pcm", 1) for name in ("a", "bad", "b")),
    ]
    failed, found = runs(jobs)
    assert sorted(failed) == ["bad", "d", "none"]
    there = {name: before for name, _, _, before in found}
    assert {"a", "b"} <= there["c"]
    assert (tmp_path / "both.safetensors").is_file()
    assert "d" not in there


@pytest.mark.parametrize("jobs", [module.students(), module.equal(60.0)])
def test_every_command_is_one_that_distill_takes(jobs, tmp_path) -> None:
    names = [job.name for job in jobs]
    for job in jobs:
        before = module.MERGED.get(job.init, (job.init,) if job.init else ())
        assert all(names.index(part) < names.index(job.name) for part in before)
        more = dict(zip(job.more[::2], job.more[1::2], strict=True))
        settings = [v for k, v in zip(job.more[::2], job.more[1::2], strict=True) if k == "--set"]
        assert recipe_of(job.recipe, settings, job.steps).steps == job.steps
        Choices(
            out=tmp_path / "s.safetensors",
            store=more.get("--store", "int8-delta"),
            lora=int(more.get("--lora", 0)),
        )
    assert {p for parts in module.MERGED.values() for p in parts} <= {job.name for job in module.students()}
