"""The second time embedding against its formula, on tiny real transformers, and its coming and going."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from vivace.core.errors import ModelError
from vivace.core.shapes import Workload
from vivace.core.surgery import Surgery
from vivace.models import second_time
from vivace.models.describe import describe_pipeline
from vivace.testing.models import CALL, pipeline

FAMILIES = ("wan2.1", "wan2.2-ti2v", "ltx", "hunyuan", "cogvideox")


def call_of(pipe, rows=1):
    """A transformer call of small noise."""
    model = describe_pipeline(pipe)
    size = Workload(CALL["num_frames"], CALL["height"], CALL["width"], 4, 1.0, text=16).with_(batch=rows)
    call = model.adapter.dummy_call(model, size, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name in ("hidden_states", "encoder_hidden_states"):
        call[name] = torch.randn(call[name].shape, generator=generator)
    return call


@torch.no_grad()
def run(pipe, call):
    return pipe.transformer(**call, return_dict=False)[0]


def stir(second, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in second.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return second


@pytest.mark.parametrize("name", FAMILIES)
def test_changes_nothing_at_first_then_depends_on_the_gap_and_goes(name):
    pipe = pipeline(name)
    call = call_of(pipe)
    before, keys = run(pipe, call), set(pipe.transformer.state_dict())
    random = torch.random.get_rng_state()
    second = second_time.attach(pipe.transformer)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(run(pipe, call), before)
    stir(second)
    outs = []
    for gap in (0.0, 0.3, 1.0):
        second.gap = gap
        outs.append(run(pipe, call))
    assert not torch.allclose(outs[0], outs[1], atol=1e-5)
    assert not torch.allclose(outs[1], outs[2], atol=1e-5)
    own = set(pipe.transformer.state_dict()) - keys
    assert own == {f"second_time.linear_{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")}
    shapes = second_time.shapes(pipeline(name).transformer)
    assert shapes == {k: tuple(pipe.transformer.state_dict()[k].shape) for k in own}
    with pytest.raises(ModelError, match="already"):
        second_time.attach(pipe.transformer)
    second_time.detach(pipe.transformer)
    assert torch.equal(run(pipe, call), before)
    assert set(pipe.transformer.state_dict()) == keys


def test_is_the_formula():
    pipe = pipeline("wan2.1")
    embedder = pipe.transformer.condition_embedder.time_embedder
    seen = torch.randn(2, embedder.linear_1.in_features)
    plain = embedder(seen)
    second = stir(second_time.attach(pipe.transformer))
    second.gap = torch.tensor([0.25, 0.5])
    # Sinusoids of 1000 times the gap, cosines first.
    half = embedder.linear_1.in_features // 2
    rates = torch.exp(-torch.arange(half) / half * torch.log(torch.tensor(10000.0)))
    angles = (1000.0 * second.gap)[:, None] * rates
    wave = torch.cat([angles.cos(), angles.sin()], dim=1)
    hidden = F.silu(wave @ second.linear_1.weight.T + second.linear_1.bias)
    expected = plain + hidden @ second.linear_2.weight.T + second.linear_2.bias
    assert torch.allclose(embedder(seen), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2-ti2v", "ltx"])
def test_each_sample_has_its_own_gap(name):
    pipe = pipeline(name)
    second = stir(second_time.attach(pipe.transformer))
    call = call_of(pipe, rows=2)
    second.gap = torch.tensor([0.2, 0.7])
    both = run(pipe, call)
    for i in range(2):
        second.gap = float(torch.tensor([0.2, 0.7])[i])
        assert torch.allclose(run(pipe, call)[i], both[i], atol=1e-5)


def test_it_trains_and_is_copied_with_its_transformer():
    pipe = pipeline("wan2.1")
    second = stir(second_time.attach(pipe.transformer))
    second.gap = 0.5
    call = call_of(pipe)
    pipe.transformer(**call, return_dict=False)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in second.parameters())
    before = run(pipe, call)
    twin = copy.deepcopy(pipe.transformer)
    own = second_time.of(twin)
    assert own is not second
    with torch.no_grad():
        assert torch.equal(twin(**call, return_dict=False)[0], before)
        own.gap = 0.1
        assert not torch.allclose(twin(**call, return_dict=False)[0], before, atol=1e-5)
    assert torch.equal(run(pipe, call), before)
    second_time.detach(twin)
    assert second_time.of(twin) is None
    assert second_time.of(pipe.transformer) is second


def test_through_the_ledger_it_comes_and_goes():
    pipe = pipeline("wan2.1")
    call, trained = call_of(pipe), pipeline("wan2.1")
    state = stir(second_time.attach(trained.transformer)).state_dict()
    before, keys = run(pipe, call), list(pipe.transformer.state_dict())
    edit = Surgery()
    second = second_time.install(edit, pipe.transformer, state)
    for gap in (0.0, 0.4):
        second.gap = second_time.of(trained.transformer).gap = gap
        assert torch.equal(run(pipe, call), run(trained, call))
    assert list(pipe.transformer.state_dict()) == keys
    edit.close()
    assert torch.equal(run(pipe, call), before)
    assert second_time.of(pipe.transformer) is None


def test_a_model_without_a_known_time_embedder_is_told():
    with pytest.raises(ModelError, match="Linear has no time embedder"):
        second_time.attach(torch.nn.Linear(2, 2))
    assert second_time.shapes(torch.nn.Linear(2, 2)) == {}
