"""Recordings of exact runs, errors of formats layer by layer, and the choice under a budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vivace import Plan, accelerate
from vivace.core.errors import ConfigError, PlanError
from vivace.kernels.quant_linear import reference
from vivace.kernels.quant_linear.spec import Recipe
from vivace.plans.quant_searching import measure_errors, record_calls, record_maxima
from vivace.techniques.compression.mixed_bits import BitErrors, MixedBits, allocate
from vivace.techniques.compression.quantized_linear import QuantizedLinear
from vivace.testing import models

CANDIDATES = (Recipe(weights="int4", group=32), Recipe(weights="int8"))


def call(family="wan2.1", steps=3):
    return models.call(family) | {"num_inference_steps": steps}


@pytest.fixture(scope="module")
def measured():
    """A pipeline, its recorded calls, and their errors by role."""
    pipe = models.pipeline("wan2.1", layers=2)
    calls = record_calls(pipe, ["a ball"], count=2, **call())
    return pipe, calls, measure_errors(pipe, calls, CANDIDATES, by="role")


def test_maxima_are_those_of_the_inputs() -> None:
    pipe = models.pipeline("wan2.1", layers=2)
    seen: list[torch.Tensor] = []
    linear = pipe.transformer.blocks[1].ffn.net[2]
    hook = linear.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2).abs().amax(0)))
    made = record_maxima(pipe, ["a ball", "a cube"], **call())
    hook.remove()
    assert len(made.layers) == 20
    assert torch.equal(made.layers["transformer.blocks.1.ffn.net.2"], torch.stack(seen).amax(0))
    assert made.family == "wan"
    assert made.model_hash


def test_maxima_serve_the_technique(tmp_path) -> None:
    pipe = models.pipeline("wan2.1", layers=2)
    path = record_maxima(pipe, ["a ball"], **call()).save(tmp_path / "m.safetensors")
    technique = QuantizedLinear(weights="int4", activations="int4", smooth=0.5, maxima=str(path))
    with accelerate(pipe, Plan([technique])) as fast:
        fast("a ball", output_type="latent", **call())
    other = models.pipeline("wan2.1", seed=5, layers=2)
    with pytest.raises(PlanError, match="other weights"):
        accelerate(other, Plan([technique]))


def test_recorded_calls_replay_the_run(measured) -> None:
    pipe, calls, _ = measured
    assert [(c.step, c.steps) for c in calls] == [(0, 3), (0, 3), (2, 3), (2, 3)]
    with torch.no_grad():
        outs = [pipe.transformer(**c.values | {"return_dict": False})[0] for c in calls]
    assert not torch.equal(outs[0], outs[1])  # two branches
    assert record_calls(pipe, ["a ball"], count=1, **call())[0].step == 1


def test_errors_are_of_one_unit_at_a_time(measured) -> None:
    """One entry against a layer replaced by hand; everything is back afterwards."""
    pipe, calls, errors = measured
    assert list(errors.units)[:2] == [
        "transformer.blocks.0.attention.qkv",
        "transformer.blocks.0.attention.out",
    ]
    assert len(errors.units["transformer.blocks.0.attention.qkv"]) == 3
    assert errors.table.shape == (12, 2, 4)
    assert (errors.table > 0).all()
    unit = list(errors.units).index("transformer.blocks.1.ffn.in")
    parent, recipe = pipe.transformer.blocks[1].ffn.net[0], CANDIDATES[0]
    with torch.no_grad():
        exact = pipe.transformer(**calls[2].values | {"return_dict": False})[0]
        old = parent.proj
        parent.proj = reference.quantise(old, recipe)
        out = pipe.transformer(**calls[2].values | {"return_dict": False})[0]
        parent.proj = old
    want = ((out - exact).norm() / exact.norm()).item()
    assert errors.errors[unit][0][2] == pytest.approx(want, rel=1e-5)
    assert errors.sizes[unit] == 24 * 48
    assert errors.full_bytes[unit] == 4 * 24 * 48
    # 48 rows of 24 columns, filled up to 32, at half a byte, and one bf16 scale each.
    assert errors.bytes[unit][0] == 48 * 16 + 48 * 2
    assert errors.mean()[:, 1].mean() < 0.3 * errors.mean()[:, 0].mean()


def test_a_choice_meets_its_budget_and_its_prediction(measured, tmp_path) -> None:
    pipe, calls, errors = measured
    assert BitErrors.load(errors.save(tmp_path / "e.json")) == errors
    exact_bits = 8 * sum(errors.full_bytes) / sum(errors.sizes)
    for bits in (7.0, 10.0, 20.0):
        chosen = errors.choose(bits=bits)
        assert chosen.told["bits"] <= bits
    assert errors.choose(bits=exact_bits).told["error"] == 0.0
    loose, tight = errors.choose(loss=0.2), errors.choose(loss=0.02)
    assert tight.told["error"] <= 0.02
    assert loose.told["bytes"] < tight.told["bytes"]
    assert errors.choose(nbytes=loose.told["bytes"]).told["bytes"] <= loose.told["bytes"]
    path = errors.choose(bits=9.0, keep=False).save(tmp_path / "m.json")
    made = MixedBits.load(path)
    assert len({s["weights"] for s in made.layers.values() if s}) == 2
    with accelerate(pipe, Plan([QuantizedLinear(mixed=str(path))])) as fast:
        out = fast("a ball", output_type="latent", **call())
        with torch.no_grad():
            got = [pipe.transformer(**c.values | {"return_dict": False})[0] for c in calls]
    with torch.no_grad():
        exact = [pipe.transformer(**c.values | {"return_dict": False})[0] for c in calls]
    error = np.sqrt(
        np.mean([((g - e).norm() / e.norm()).item() ** 2 for g, e in zip(got, exact, strict=True)])
    )
    assert error == pytest.approx(made.told["error"], rel=0.5)  # errors of units are nearly independent
    assert out.receipt.techniques[0].effects["bytes_after"] == made.told["bytes"]


def test_a_range_of_steps_counts_alone(measured) -> None:
    _, _, errors = measured
    early, late = errors.mean(0.0, 0.5), errors.mean(0.5, 1.0)
    want = np.sqrt((errors.table[:, :, :2] ** 2).mean(-1))
    np.testing.assert_allclose(early, want)
    assert not np.allclose(early, late)
    with pytest.raises(ConfigError, match="no call was recorded"):
        errors.mean(0.2, 0.3)


def test_two_experts_are_measured_each_by_its_own_calls() -> None:
    pipe = models.pipeline("wan2.2", layers=1)
    calls = record_calls(pipe, ["a ball"], count=4, **call("wan2.2", 4))
    assert {c.expert for c in calls} == {"transformer", "transformer_2"}
    errors = measure_errors(pipe, calls, CANDIDATES[:1], by="block")
    assert list(errors.units) == ["transformer.blocks.0", "transformer_2.blocks.0"]
    own = np.array([c.expert == "transformer" for c in calls])
    assert (np.isfinite(errors.table[0, 0]) == own).all()
    assert (np.isfinite(errors.table[1, 0]) == ~own).all()
    assert errors.mean().shape == (2, 1)


def test_allocation_is_as_good_as_trying_everything() -> None:
    """Within one unit's move of the optimum of an exhaustive search, for budgets of every size."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        sizes = np.array([4.0, 8.0, 16.0]) * generator.integers(1, 6, (5, 1))
        errors = np.sort(generator.random((5, 3)))[:, ::-1] * np.array([1.0, 0.1, 0.0])
        every = list(itertools.product(range(3), repeat=5))
        cost = np.array([[sizes[range(5), e].sum(), (errors[range(5), e] ** 2).sum()] for e in every])
        largest = (errors[:, 0] ** 2).max()
        for budget in np.linspace(sizes[:, 0].sum(), sizes[:, 2].sum(), 6):
            chosen = allocate(errors, sizes, budget=budget)
            used, lost = sizes[range(5), chosen].sum(), (errors[range(5), chosen] ** 2).sum()
            best = cost[cost[:, 0] <= budget + 1e-9, 1].min()
            assert used <= budget + 1e-9
            assert best - 1e-12 <= lost <= best + largest
        for loss in (0.0, 0.3, 5.0):
            chosen = allocate(errors, sizes, loss=loss)
            assert (errors[range(5), chosen] ** 2).sum() <= loss**2 + 1e-12
        assert (chosen == 0).all()
    assert allocate(errors, sizes, loss=0.0).tolist() == [2] * 5


def test_impossible_budgets_and_files_are_told(measured, tmp_path) -> None:
    pipe, calls, errors = measured
    with pytest.raises(ConfigError, match="smallest formats take"):
        errors.choose(bits=2.0)
    with pytest.raises(ConfigError, match="best formats already lose"):
        errors.choose(loss=1e-9, keep=False)
    for budgets in ({}, {"bits": 5.0, "loss": 0.1}):
        with pytest.raises(ConfigError, match="one budget"):
            errors.choose(**budgets)
    with pytest.raises(ConfigError, match="needs calls"):
        measure_errors(pipe, [], CANDIDATES)
    with pytest.raises(ConfigError, match="units"):
        measure_errors(pipe, calls, CANDIDATES, by="head")
    with pytest.raises(ConfigError, match="at least one prompt"):
        record_maxima(pipe, [])
    with pytest.raises(ConfigError, match="at least one step"):
        record_calls(pipe, ["a"], count=0)
    path = errors.save(tmp_path / "e.json")
    with pytest.raises(ConfigError, match="is no mixed-bits file"):
        MixedBits.load(path)
    path.write_text(path.read_text().replace('"sizes"', '"sices"'))
    with pytest.raises(ConfigError, match="damaged"):
        BitErrors.load(path)
    with pytest.raises(ValueError, match="settings beside"):
        MixedBits(family="wan", model_hash="", layers={"a": {"rotate": True}})
