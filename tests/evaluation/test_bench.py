"""The bench end to end on the embedded model: records, anchors, resuming after a kill, processes, refusals."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing

import numpy as np
import pytest

from vivace.core.errors import ConfigError, UnknownNameError
from vivace.evaluation import shards
from vivace.evaluation.assemble import LEFT_OUT
from vivace.evaluation.bench import Bench, Options
from vivace.evaluation.contender import parse, plan_of
from vivace.evaluation.peers import get, names
from vivace.evaluation.shards import Shard
from vivace.evaluation.store import Store
from vivace.evaluation.task import MetricUse, Task

SPECS = ["steps=2", "plan:fast@few_steps.steps=3", "floor", "seed"]
METRICS = ("psnr", "attributes", "latent_error")


@pytest.fixture(scope="module")
def task():
    return Task.load("world-smoke@1").model_copy(
        update={
            "name": "trial",
            "frames": 9,
            "height": 64,
            "width": 64,
            "steps": 4,
            "per_prompt": 2,
            "batch": 4,
            "clips": 1,
            "latent_samples": 2,
            "cpu_warmups": 1,
            "cpu_repeats": 2,
            "metrics": tuple(MetricUse(name=n, version=1) for n in METRICS),
        }
    )


def bench(task, out, specs=SPECS, watch=lambda *_: None, **options):
    defaults = {"limit": 3, "memory": False, "timing": False, "threads": 1, "dtype": "float32"}
    return Bench(task, specs, out, Options(**defaults | options), watch)


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory):
    job = bench(task, tmp_path_factory.mktemp("store"), timing=True)
    return job, job.run()


@pytest.fixture(scope="module")
def records(whole):
    job, outcome = whole
    return {name: job.store.record(id_) for name, id_ in outcome.records.items()}


def test_every_contender_has_a_record(whole, records):
    job, outcome = whole
    assert not outcome.failed
    assert not outcome.refused
    assert set(records) == {"exact", "steps=2", "fast@few_steps.steps=3", "floor", "seed"}
    kinds = {name: r.contender.kind for name, r in records.items()}
    assert kinds["steps=2"] == "steps"
    assert kinds["fast@few_steps.steps=3"] == "plan"
    for record in records.values():
        assert record.task == job.task.ref
        assert record.environment["fingerprint"] == job.environment["fingerprint"]
        assert record.model.sha256 == records["exact"].model.sha256


def test_counts_are_those_of_one_clip(records):
    exact, half = records["exact"].counts, records["steps=2"].counts
    assert exact["nfe"] == 8
    assert half["nfe"] == 4
    assert half["flops"] == pytest.approx(exact["flops"] / 2)
    assert exact["full_equivalents"] == pytest.approx(8)
    assert exact["flops_vae"] > 0
    assert "all 6 clips" in records["exact"].counted


def test_anchors_bracket_the_contenders(records):
    floor = records["floor"].quality.fidelity["psnr"]
    seed = records["seed"].quality.fidelity["psnr"].mean
    steps = records["steps=2"].quality.fidelity["psnr"].mean
    assert seed < steps
    assert floor.mean is None or floor.mean > 60  # equal clips have an infinite PSNR, which is left out


def test_the_baseline_is_measured_absolutely_only(records):
    quality = records["exact"].quality
    assert "reference" in quality.skipped["psnr"]
    assert not quality.fidelity
    assert quality.absolute["attributes"].prompts == 3
    assert records["steps=2"].quality.reference == "exact"


def test_other_noise_has_no_common_trajectory(records):
    assert "other noise" in records["seed"].quality.skipped["latent_error"]
    assert records["floor"].quality.fidelity["latent_rel_l2"].mean < 1e-3


def test_timed_runs_take_turns_and_are_not_the_counted_ones(records):
    timing = records["steps=2"].timing
    assert timing.interleaved_with == ("exact", "fast@few_steps.steps=3")
    assert timing.stages["total"].n == 2
    assert timing.clips == records["exact"].timing.clips
    assert timing.cold is not None
    assert timing.clock == "wall"
    stages = {n: s.median for n, s in timing.stages.items()}
    assert stages["denoise"] + stages["vae"] <= stages["total"]
    assert records["floor"].timing is None


def test_samples_and_clips_lie_beside_the_record(whole, records):
    job, _ = whole
    samples = job.store.samples(records["steps=2"])
    assert samples.ids == ("0.0", "1.0", "2.0", "0.1", "1.1", "2.1")
    assert len(set(samples.hashes)) == 6
    assert all(math.isfinite(v) for v in samples.columns["psnr"])
    # Latents are kept of the first two samples; the others are NaN, never zero.
    assert [math.isnan(v) for v in samples.columns["latent_rel_l2"]] == [False] * 2 + [True] * 4
    assert [len(row) for row in samples.curves["latent_rel_l2"]] == [2, 2]  # two clips, two steps
    assert samples.curves["latent_rel_l2"][0][-1] == pytest.approx(
        samples.columns["latent_rel_l2"][0], rel=1e-5
    )
    assert list(records["exact"].clips) == ["0.0"]
    assert (job.store.path / records["exact"].clips["0.0"]).stat().st_size > 500


def test_a_killed_bench_goes_on_where_it_was(task, whole, records, tmp_path):
    finished = []

    def kill(what, done, of):
        if done > 0:
            finished.append(what)
        if len(finished) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(task, tmp_path, ["steps=2"], kill).run()
    assert [r.contender.name for r in Store(tmp_path).records()] == ["exact"]
    made = {f: f.stat().st_mtime_ns for f in tmp_path.glob("work/*/*/[0-9]*.json")}
    assert len(made) == 3
    outcome = bench(task, tmp_path, ["steps=2"]).run()
    assert {f: f.stat().st_mtime_ns for f in made} == made
    again = Store(tmp_path).record(outcome.records["steps=2"])
    job, _ = whole
    assert job.store.samples(records["steps=2"]) == Store(tmp_path).samples(again)


def test_what_is_finished_is_recorded_before_a_kill(task, tmp_path):
    def killed(name, done, total):
        if name == "steps=2" and done > 0 and len(Store(tmp_path).records()) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(task, tmp_path, ["steps=2", "floor"], killed, limit=1).run()
    assert {r.contender.name for r in Store(tmp_path).records()} == {"exact", "steps=2"}
    outcome = bench(task, tmp_path, ["steps=2", "floor"], limit=1).run()
    assert set(outcome.records) == {"exact", "steps=2", "floor"}
    assert len(Store(tmp_path).records()) == 3


def test_a_contender_that_comes_later_gets_the_baseline_made_again(task, whole):
    job, _ = whole
    assert not (job.work / "baseline").exists()
    later = bench(task, job.store.path, ["steps=3"])
    outcome = later.run()
    assert not outcome.failed
    assert later.store.record(outcome.records["steps=3"]).quality.fidelity["psnr"].samples == 6


def test_half_a_contender_gives_no_record(task, whole, tmp_path):
    job = bench(task, tmp_path, ["steps=2"])
    worker_job = job.job
    (shard,) = [Shard.load(whole[0].job.folder(parse("steps=2")), 0)]
    shard.save(worker_job.folder(parse("steps=2")), 0)
    outcome = bench(task, tmp_path, ["steps=2"], quality=False).run()
    assert "1 of 2 shards" in outcome.failed["steps=2"]
    assert "steps=2" not in outcome.records


@pytest.mark.slow
def test_only_the_chosen_metrics_are_measured(task, whole, records, tmp_path):
    # Named in another order than the task's: the order makes no other work.
    job = bench(task, tmp_path, ["steps=2"], metrics=("attributes", "psnr"))
    outcome = job.run()
    record = job.store.record(outcome.records["steps=2"])
    assert [m.name for m in record.quality.metrics] == ["psnr", "attributes"]
    assert record.quality.skipped == {"latent_error": LEFT_OUT}
    assert "measured 2 of 3 metrics: psnr, attributes." in record.warnings
    assert record.quality.fidelity["psnr"] == records["steps=2"].quality.fidelity["psnr"]
    samples = job.store.samples(record)
    assert "latent_rel_l2" not in samples.columns
    assert samples.hashes == whole[0].store.samples(records["steps=2"]).hashes
    assert not any("measured" in w for w in records["steps=2"].warnings)


def test_work_of_other_metrics_lies_elsewhere(task, tmp_path):
    def folder(*names):
        return bench(task, tmp_path, [], metrics=names).work

    assert folder("psnr", "attributes") == folder("attributes", "psnr", "psnr")
    assert folder("psnr") != folder("attributes") != folder() != folder("psnr")
    assert folder(*METRICS) == folder()


def test_a_metric_that_the_task_has_not_is_told(task, tmp_path):
    with pytest.raises(
        ConfigError, match="has no metric 'fid' or 'ssim'; choose from psnr, attributes, latent_error"
    ):
        bench(task, tmp_path, [], metrics=("fid", "psnr", "ssim"))
    speed = Task.load("speed-wan1.3b-480p@1")
    with pytest.raises(ConfigError, match="measures no quality; leave --metrics out"):
        bench(speed, tmp_path, [], metrics=("psnr",))


@pytest.mark.parametrize(
    ("device", "gpus", "places"),
    [
        ("cuda", 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]),
        ("cuda", 8, ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4"]),
        ("cuda", 1, ["cuda:0"] * 5),
        ("cuda", 0, ["cuda"] * 5),
        ("cuda:1", 4, ["cuda:1"] * 5),
        ("cpu", 4, ["cpu"] * 5),
    ],
)
def test_workers_are_dealt_out_over_the_gpus(device, gpus, places):
    assert [shards.device_of_worker(device, i, gpus) for i in range(5)] == places


def test_each_worker_starts_on_its_own_gpu(task, tmp_path, monkeypatch):
    """The initialiser as it runs in three processes, without a GPU: devices are recorded, nothing is built."""
    current, started = [], multiprocessing.get_context("spawn").Value("i", 0)
    monkeypatch.setattr(shards, "_worker", None)
    monkeypatch.setattr(shards, "_end_with_parent", lambda parent: None)
    monkeypatch.setattr(shards, "Worker", lambda job: job)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: current.append(str(device)))
    job, places = shards.Job(task=task, work=tmp_path, device="cuda"), []
    for _ in range(3):
        shards.start_worker(job, started)
        places.append(shards._worker.device)
    assert places == current == ["cuda:0", "cuda:1", "cuda:0"]
    shards.start_worker(dataclasses.replace(job, device="cpu"), started)
    assert shards._worker.device == "cpu"
    assert started.value == len(current) == 3


@pytest.mark.slow
def test_two_processes_make_the_same_samples(task, whole, records, tmp_path):
    outcome = bench(task, tmp_path, ["steps=2"], jobs=2).run()
    store = Store(tmp_path)
    mine, theirs = (
        store.samples(store.record(outcome.records["steps=2"])),
        whole[0].store.samples(records["steps=2"]),
    )
    assert mine.ids == theirs.ids
    assert mine.hashes == theirs.hashes
    np.testing.assert_allclose(mine.columns["psnr"], theirs.columns["psnr"], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fastest", "names no contender"),
        ("steps=0", "cannot be made"),
        ("plan:fats", "fast"),
        ("plan:fast@solver.solver=1", "changes nothing"),
        ("plan:fast@few_steps.steps=many", "cannot be read"),
        ("peer:diffusers.first_blok_cache", "first_block_cache"),
    ],
)
def test_a_contender_that_cannot_be_is_told_before_anything_runs(task, tmp_path, text, said):
    with pytest.raises((ConfigError, UnknownNameError), match=said):
        bench(task, tmp_path, [text])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", names())
def test_every_peer_takes_several_settings(name):
    default = get(name).card.default
    told = {k: v for k, v in default.items() if isinstance(v, (bool, int, float, str))} | {"steps": 7}
    text = ",".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in told.items())
    contender = parse(f"peer:{name}@{text}")
    assert dict(contender.settings) == told
    assert contender.call_steps(50) == 7


def test_a_peers_settings_reach_the_bench(tmp_path):
    spec = "peer:diffusers.taylorseer@interval=3,order=2"
    _, peer = bench(Task.load("world-smoke@1"), tmp_path, [spec]).contenders
    assert peer.name == "diffusers.taylorseer@interval=3,order=2"
    assert peer.described.settings == {"interval": 3, "order": 2, "start": 8}


def test_a_plan_may_be_varied():
    plan = plan_of("fast@few_steps.steps=12")
    assert plan.name == "fast@few_steps.steps=12"
    # What few_steps stands in for would act in its place on the embedded model.
    assert {t.card.name for t in plan.techniques} == {"few_steps", "guidance_interval", "whole_clip_decode"}
    assert next(t for t in plan.techniques if t.card.name == "few_steps").steps == 12
    kept = plan_of("fast@fitted_solver.steps=10")
    assert {"fitted_solver", "few_steps"} <= {t.card.name for t in kept.techniques}
    assert kept.unless == {"few_steps": "fitted_solver", "guidance_interval": "fitted_solver"}


def test_a_task_that_needs_a_model_says_so(tmp_path):
    with pytest.raises(ConfigError, match="needs a model"):
        bench(Task.load("vbench-custom@1"), tmp_path)
    with pytest.raises(ConfigError, match="leave --model out"):
        bench(Task.load("world-smoke@1"), tmp_path, model="elsewhere")
