"""SageAttention on live pipelines, against its arithmetic written out by hand in the model's processors."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from vivace import Plan, accelerate
from vivace.core.errors import PlanError
from vivace.kernels.block_attention.layout import bias_of
from vivace.kernels.low_bit_attention.spec import EMULATED
from vivace.models.families import for_module
from vivace.techniques.attention.sage_attention import LowBitSite, SageAttention
from vivace.techniques.attention.sparge import SpargeAttention
from vivace.testing import models
from vivace.testing.subjects import Subject, distance

CALL = {"num_inference_steps": 3, "output_type": "latent"}
SETTINGS = (
    SageAttention(),
    SageAttention(pv="bf16"),
    SageAttention(qk="bf16", dense_steps=1),
    SageAttention(dense_steps=1, dense_layers=1),
)


def e4m3(x):
    """To the nearest number with three bits behind the leading one, exponents -6 .. 8, halves to even."""
    step = torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=2.0**-6))) - 3)
    return ((x / step).round() * step).clamp(-448.0, 448.0)


def rows_to_int8(x):
    """Tokens of (B, H, S, D), 32 of which share the scale of the largest."""
    out = []
    for part in x.split(32, 2):
        scale = part.abs().amax((2, 3), keepdim=True) / 127
        out.append((part / scale).round() * scale)
    return torch.cat(out, 2)


class ByHand:
    """The oracle: the method's formulas in float64, for a clip of one block of keys (no running maximum)."""

    def __init__(self, technique) -> None:
        self.technique, self.clock = technique, None

    def __call__(self, q, k, v, mask=None):
        assert k.shape[1] <= self.technique.block
        kind, (q, k, v) = q.dtype, (x.transpose(1, 2).double() for x in (q, k, v))
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.double()
        if self.clock.step < self.technique.dense_steps:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return out.transpose(1, 2).to(kind)
        factor = q.shape[-1] ** -0.5
        if self.technique.qk == "int8":
            q, k = rows_to_int8(q), rows_to_int8(k - k.mean(2, keepdim=True))
        scores = q @ k.mT * factor
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        total = p.sum(-1, keepdim=True)
        if self.technique.pv == "fp8":
            channel = v.abs().amax(2, keepdim=True) / 448
            p, v = e4m3(448 * p) / 448, e4m3(v / channel) * channel
        return (p @ v / total).transpose(1, 2).to(kind)


def by_hand(family, technique):
    """Latents of a run with the oracle put into the processors by hand."""
    pipe, oracle = models.pipeline(family), ByHand(technique)
    for name in ("transformer", "transformer_2"):
        if (module := getattr(pipe, name, None)) is None:
            continue
        adapter = for_module(module)
        for site in adapter.expert(name, module).attentions:
            if site.kind != "cross" and site.index >= technique.dense_layers:
                site.module.set_processor(adapter.processor(site, oracle))
    with accelerate(pipe, Plan()) as session:
        oracle.clock = session.clock
        out = session("a red sphere", seed=3, **(models.call(family) | CALL))
    return torch.as_tensor(out.raw.frames)


def generate(family, *techniques):
    with accelerate(models.pipeline(family), Plan(techniques)) as fast:
        return fast("a red sphere", seed=3, **(models.call(family) | CALL))


@functools.cache
def exact(family):
    return torch.as_tensor(generate(family).raw.frames)


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2", "cogvideox", "hunyuan"])
@pytest.mark.parametrize(
    "technique", SETTINGS, ids=lambda t: f"{t.qk}-{t.pv}-{t.dense_steps}-{t.dense_layers}"
)
def test_equals_the_arithmetic_by_hand(family, technique) -> None:
    want = by_hand(family, technique)
    out = generate(family, technique)
    got = torch.as_tensor(out.raw.frames)
    lost = distance(want, exact(family))
    assert 1e-6 < lost < SageAttention.card.fidelity
    # A probability on the edge between two numbers may be rounded apart; all else is equal.
    assert distance(got, want) < 0.2 * lost
    assert out.receipt.attention_pairs == out.receipt.attention_pairs_dense


def test_receipt_says_that_a_cpu_emulates() -> None:
    run = Subject("wan2.1").run(SageAttention())
    (kernel,) = [k for k in run.receipt.kernels if k.op == "low_bit_attention"]
    assert kernel.choice == "reference"
    assert kernel.why.startswith(EMULATED)


def test_dense_steps_are_the_models_own() -> None:
    subject = Subject("wan2.1")
    steps = subject.exact().receipt.steps
    with pytest.raises(PlanError, match="it can never act"):
        subject.run(SageAttention(dense_steps=len(steps)))
    by = [s.branches[0].by for s in subject.run(SageAttention(dense_steps=2)).receipt.steps]
    assert ["sage_attention" in b for b in by] == [i >= 2 for i in range(len(steps))]


def test_unusual_masks_go_to_the_model() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 24, 2, 16, generator=generator) for _ in range(3))
    site, seen = LowBitSite(None), []

    def attend(q, k, v, bias=None):
        seen.append(bias)
        return torch.zeros_like(q), None

    site.attend = attend
    own = torch.rand(2, 1, 24, 24, generator=generator) < 0.7
    own[..., 0] = True
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=own)
    torch.testing.assert_close(site(q, k, v, own), want.transpose(1, 2))
    assert not seen
    keys = torch.ones(1, 1, 1, 24, dtype=torch.bool)
    keys[..., 20:] = False
    assert not site(q, k, v, keys).any()
    assert not site(q, k, v).any()
    assert torch.equal(seen[0], torch.where(keys[:, 0, 0], 0.0, float("-inf")).expand(2, -1))
    assert seen[1] is None
    added = torch.randn(2, 1, 1, 24, generator=generator)
    assert torch.equal(bias_of(added), added[:, 0, 0])


@pytest.mark.parametrize(
    ("technique", "words"),
    [
        (SageAttention(qk="bf16", pv="bf16"), "nothing is left"),
        (SageAttention(dense_layers=8), "keeps all"),
        (SageAttention(backend="gather"), "backend must be one of"),
    ],
)
def test_refused(technique, words) -> None:
    with pytest.raises(PlanError, match=words):
        Subject("wan2.1").run(technique)


def test_sparse_methods_can_use_the_low_bit_kernel() -> None:
    clip = {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 2}
    subject = Subject("wan2.1", clip)  # 5 x 4 x 4 tokens: 5 blocks of 16
    full, low = (subject.run(SpargeAttention(mass=0.5, precision=p)) for p in ("full", "int8"))
    assert 1e-6 < distance(low.latents, full.latents) < SageAttention.card.fidelity
    chosen = {k.op: k.choice for k in low.receipt.kernels}
    assert chosen["low_bit_attention"] == "reference"
    assert "block_attention" not in chosen
    with pytest.raises(PlanError, match="precision must be full or int8"):
        subject.run(SpargeAttention(precision="int4"))
