"""Simulated policies against the techniques themselves, on tiny real models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from vivace.calibration import solve
from vivace.calibration.artifact import Calibration
from vivace.calibration.gram import schedule_error
from vivace.core.errors import ConfigError, PlanError
from vivace.plans.calibrating import calibrate
from vivace.plans.solving import Simulator, Trial, best, corrected, solved, technique_for, within
from vivace.techniques.caching.engine import Cache, Pass
from vivace.techniques.caching.teacache import TeaCache
from vivace.techniques.compression.int8_linear import Int8Linear
from vivace.testing.subjects import Subject

STEPS = 12
FIXED = ("teacache@warmup=1", "teacache@warmup=2,tail=2,max_consecutive=1", "magcache@retention=0.0")
ONLINE = ("first_block_cache@warmup=1,tail=0", "first_block_cache", "easycache@warmup=1,max_consecutive=2")
Made = dict[str, tuple[Subject, Calibration, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    out: Made = {}
    for name in ("wan2.1", "ltx", "wan2.2"):
        subject = Subject(name, layers=2) if name != "ltx" else Subject(name)
        found = calibrate(
            subject.pipeline,
            ["a red ball"],
            model=subject.model,
            seed=7,
            num_inference_steps=STEPS,
            **subject.call,
        )
        path = found.save(tmp_path_factory.mktemp("made") / f"{name}.json")
        out[name] = subject, Calibration.load(path), path
    return out


def simulator(made: Made, name: str, text: str) -> Simulator:
    _, found, path = made[name]
    return Simulator(found, technique_for(text, path))


@pytest.mark.parametrize("name", ["wan2.1", "ltx", "wan2.2"])
@pytest.mark.parametrize("text", FIXED)
def test_a_simulated_mask_is_the_receipts(made, name: str, text: str) -> None:
    sim = simulator(made, name, text)
    threshold = sim.nearest(0.35)
    receipt = made[name][0].run(sim.technique.replace(threshold=threshold), num_inference_steps=STEPS).receipt
    (mask,) = sim.masks(threshold)
    assert any(mask)
    assert [s.branches[0].action != "computed" for s in receipt.steps] == mask
    # Receipts count the blocks that are left and what lies outside of them.
    assert 1.0 / receipt.compute_share == pytest.approx(sim.predict(threshold).speedup, rel=1e-6)


@pytest.mark.parametrize("name", ["wan2.1", "ltx", "wan2.2"])
@pytest.mark.parametrize("text", ONLINE)
def test_on_the_exact_trajectory_the_engine_decides_as_simulated(
    made, name: str, text: str, monkeypatch
) -> None:
    """The engine decides and remembers as always, but every step is computed, so that nothing leaves the trajectory."""
    sim, decided = simulator(made, name, text), {}
    decide, remember = Cache.decide, Cache.remember

    def watched(self, moment):
        now = decide(self, moment)
        decided[self.clock.step] = bool(now.skip)
        return Pass(moment, list(range(len(moment.who))), [])

    def kept(self, now, row, value, whole):
        if self.memory.ballot(now.moment.who[row][1]).reuse:
            self._after(now, row, whole, computed=False)
        else:
            remember(self, now, row, value, whole)

    monkeypatch.setattr(Cache, "decide", watched)
    monkeypatch.setattr(Cache, "remember", kept)
    for saved in (0.2, 0.35):
        threshold = sim.nearest(saved)
        decided.clear()
        made[name][0].run(sim.technique.replace(threshold=threshold), num_inference_steps=STEPS)
        (mask,) = sim.masks(threshold)
        assert any(mask)
        assert [decided[i] for i in range(STEPS)] == mask


@pytest.mark.parametrize("text", ["first_block_cache@warmup=1", "easycache@warmup=1"])
def test_a_real_run_follows_up_to_where_it_leaves_the_trajectory(made, text: str) -> None:
    sim = simulator(made, "wan2.1", text)
    threshold = sim.nearest(0.2)
    receipt = made["wan2.1"][0].run(sim.technique.replace(threshold=threshold), num_inference_steps=STEPS)
    real = [s.branches[0].action != "computed" for s in receipt.receipt.steps]
    (mask,) = sim.masks(threshold)
    first = mask.index(True)
    assert real[: first + 1] == mask[: first + 1]


def test_solved_for_speed_and_for_loss(made) -> None:
    sim = simulator(made, "wan2.1", "teacache@warmup=1")
    fast = solved(sim, "speedup", 1.5)
    assert fast.speedup == pytest.approx(1.5, rel=0.1)
    careful = solved(sim, "loss", fast.error)
    assert careful.error <= fast.error
    assert careful.speedup >= fast.speedup
    with pytest.raises(ConfigError, match="no threshold of teacache makes 12 steps 9 times cheaper"):
        solved(sim, "speedup", 9.0)
    with pytest.raises(ConfigError, match="keeps the loss at 0"):
        solved(sim, "loss", 0.0)


def test_the_error_is_that_of_the_algebra(made) -> None:
    """Holding both branches costs what the schedule's algebra says; an input that is added is a further term."""
    _, found, _ = made["wan2.1"]
    skipped = [i % 3 != 0 for i in range(STEPS)]
    steps = [i for i in range(STEPS) if not skipped[i]]
    told = schedule_error(found.matrix, found.sigmas, steps, None, 0, found.key.guidance)["end"]
    mine = solve.mask_error(found.matrix, found.sigmas, skipped, found.key.guidance)
    assert mine == pytest.approx(told, rel=1e-9)
    # One held step of a constant output: the input moves by stride * v, and the error is stride^2 * |v|.
    flat = np.zeros((4, 4))
    flat[:2, :2] = 1.0
    assert solve.mask_error(flat, [1, 0.6, 0], [False, True], 1.0) == pytest.approx(0.0, abs=1e-9)
    assert solve.mask_error(flat, [1, 0.6, 0], [False, True], 1.0, True) == pytest.approx(0.4 * 0.6)


def test_a_correction_moves_the_threshold(made) -> None:
    sim = simulator(made, "ltx", "first_block_cache@warmup=1,tail=0")
    start = sim.nearest(1 - 1 / 1.6)
    # The real model is as the simulated one, with every change a fifth larger.
    trials = corrected(sim, 1.6, lambda t: sim.predict(t / 1.2).speedup, start, tolerance=0.02)
    assert 2 <= len(trials) <= 4
    assert abs(best(trials, speedup=1.6).counted / 1.6 - 1) < abs(trials[0].counted / 1.6 - 1)
    assert best([Trial(0.1, 1.0), Trial(0.2, 1.7)], speedup=1.6).threshold == 0.2
    # It does not run for ever where nothing helps, and not at all where the first run was right.
    assert len(corrected(sim, 1.6, lambda t: 3.0, start)) <= 4
    assert len(corrected(sim, 1.6, lambda t: 1.62, start)) == 1
    fixed = simulator(made, "wan2.1", "teacache@warmup=1")
    assert len(corrected(fixed, 1.6, lambda t: fixed.predict(t).speedup, fixed.nearest(0.1))) == 1


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_a_loss_is_measured_and_kept(made, factor: float) -> None:
    """A real run whose loss is the predicted one times a factor that grows a little with the error."""
    sim = simulator(made, "wan2.1", "teacache@warmup=1")
    asked = 2.0 * sim.error(sim.nearest(0.3))

    def run(found):
        return Trial(found.threshold, found.speedup, factor * found.error**1.1)

    tried = within(lambda bound: solved(sim, "loss", bound), run, asked)
    kept = best([t for _, t in tried], loss=asked)
    possible = [sim.predict(t) for t in np.geomspace(sim.low, sim.high, 400)]
    fastest = max(p.speedup for p in possible if factor * p.error**1.1 <= asked)
    assert kept.loss <= asked
    assert kept.counted > 1.0 + 0.6 * (fastest - 1.0)
    assert len(tried) <= 4
    assert best([Trial(1, 2.0, 0.5), Trial(2, 3.0, 0.7)], loss=0.1).loss == 0.5


def test_a_loss_below_every_setting_ends(made) -> None:
    sim = simulator(made, "wan2.1", "teacache@warmup=1")
    tried = within(
        lambda bound: solved(sim, "loss", bound), lambda f: Trial(f.threshold, f.speedup, 1e6), 10.0
    )
    assert 1 <= len(tried) <= 4


def test_the_calibration_binds_weights_and_shape(made) -> None:
    subject, _, path = made["wan2.1"]
    cache = TeaCache(threshold=0.2, warmup=1, calibration=str(path))
    with pytest.raises(PlanError, match="the calibration was made for model hash"):
        Subject("wan2.1", layers=2, seed=3).run(cache)
    with pytest.raises(PlanError, match="height 32 and not 48"):
        subject.run(cache, height=48)
    with pytest.raises(PlanError, match="guidance"):
        subject.run(cache, guidance_scale=2.5)
    assert subject.run(cache, num_inference_steps=6).receipt.cache_hits


def test_quantised_weights_are_not_compared(made) -> None:
    subject, _, path = made["wan2.1"]
    cache = TeaCache(threshold=0.2, warmup=1, calibration=str(path))
    assert subject.run(cache, Int8Linear(), num_inference_steps=6).receipt.cache_hits


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fora", "cannot be solved for"),
        ("teacahe", "did you mean teacache"),
        ("teacache@warmup", "write key=value"),
        ("teacache@threshold=0.1", "leave out threshold"),
        ("teacache@speed=1", "no setting called speed"),
    ],
)
def test_wrong_techniques_are_refused(text: str, told: str) -> None:
    with pytest.raises((ConfigError, LookupError), match=told):
        technique_for(text, "c.json")


def test_files_without_signals_are_refused(made) -> None:
    _, found, path = made["wan2.1"]
    with pytest.raises(ConfigError, match="kept no signals"):
        Simulator(dataclasses.replace(found, signals=[]), technique_for("teacache", path))
