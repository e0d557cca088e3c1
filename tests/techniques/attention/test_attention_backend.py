"""The dense vendor at the model's sites: which sites, what is recorded, and that nothing is handed over in silence."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vivace.core.errors import ConfigError, VivaceError
from vivace.kernels import api
from vivace.kernels.dense_attention.spec import OP
from vivace.techniques.attention.attention_backend import AttentionBackend
from vivace.testing.subjects import Subject, distance

CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="vendors of a CPU")


def chosen(run):
    return {(k.choice, k.why) for k in run.receipt.kernels if k.op == OP}


@pytest.mark.parametrize(("settings", "kinds"), [({}, {"self"}), ({"cross": True}, {"self", "cross"})])
def test_the_sites(settings, kinds):
    subject = Subject("wan2.1")
    sites = [s for e in subject.experts for s in e.attentions if s.kind in kinds]
    with subject.open(AttentionBackend(vendor="math", **settings)) as session:
        placed = {
            s.site for e in subject.experts for s in e.attentions
            if type(s.module.processor).__name__ == "WanKernelProcessor"
        }  # fmt: skip
        run = subject.generate(session)
    assert placed == {s.site for s in sites}
    (record,) = run.receipt.techniques
    assert record.effects["sites"] == len(sites)
    assert chosen(run) == {("math", "asked for by name")}


@CPU
def test_equals_torchs_own_math_attention_everywhere():
    plain = Subject("wan2.1")
    forward = plain.pipeline.transformer.forward

    @functools.wraps(forward)
    def by_math(*args, **kwargs):
        with sdpa_kernel(SDPBackend.MATH):
            return forward(*args, **kwargs)

    plain.pipeline.transformer.forward = by_math
    want = plain.run().latents
    subject = Subject("wan2.1")
    assert torch.equal(subject.run(AttentionBackend(vendor="math", cross=True)).latents, want)
    assert not torch.equal(subject.exact().latents, want)
    assert distance(subject.exact().latents, want) < 1e-4


@CPU
@pytest.mark.parametrize("family", ["hunyuan", "ltx"])
def test_masks_of_padded_text_are_served(family):
    subject = Subject(family)
    exact = subject.exact().latents
    run = subject.run(AttentionBackend(vendor="math", cross=True))
    assert distance(run.latents, exact) < 1e-4
    assert "math" in {name for name, _ in chosen(run)}


@CPU
def test_auto_takes_the_fastest_and_says_so(monkeypatch):
    slow = 0.02
    times = {"flash": slow, "math": 0.001}
    asked = []

    def told(op, calls, context, **options):
        asked.append((calls, dict(context)))
        ranking = sorted((api.Timing(n, t, 0.0, 5) for n, t in times.items()), key=lambda t: t.seconds)
        return api.Measured(op, tuple(ranking))

    monkeypatch.setattr("vivace.techniques.attention.attention_backend.measured", told)
    subject = Subject("wan2.1")
    run = subject.run(AttentionBackend())
    ((name, why),) = chosen(run)
    assert name == "math"
    assert why.startswith("fastest of 2 measured: math 1 ms, flash 20 ms; ")
    assert torch.equal(run.latents, subject.run(AttentionBackend(vendor="math")).latents)
    # Measured once, at the live shape, one row.
    ((((q, k, v, mask),), context),) = asked
    grid = subject.model.grid(subject.workload())
    assert grid is not None
    assert q.shape[:2] == k.shape[:2] == v.shape[:2] == (1, grid.tokens)
    assert mask is None
    assert context["head_dim"] == q.shape[3]
    times["flash"] = 0.0001
    assert {n for n, _ in chosen(subject.run(AttentionBackend()))} == {"flash"}


@CPU
def test_auto_for_real_leaves_the_random_numbers_alone():
    api.forget()
    context = {"device": "cpu", "dtype": "float32", "head_dim": 8, "scores": 300, "mask": True}
    before = torch.random.get_rng_state()
    choice = AttentionBackend._fastest((10, 10, 3, 8), torch.float32, torch.device("cpu"), context)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert choice.why.startswith("fastest of 2 measured: ")


@CPU
def test_a_vendor_that_cannot_run_here_is_an_error():
    with pytest.raises(ConfigError, match="cudnn: needs a GPU"):
        Subject("wan2.1").run(AttentionBackend(vendor="cudnn"))
    with pytest.raises(VivaceError, match="vendor must be one of auto, "):
        Subject("wan2.1").run(AttentionBackend(vendor="nobody"))
