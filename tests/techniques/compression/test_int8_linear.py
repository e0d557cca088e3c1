"""Int8 linear layers on live pipelines: which layers, what they cost, and that the originals come back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vivace import Plan, accelerate
from vivace.core.errors import PlanError
from vivace.models.describe import describe_pipeline
from vivace.techniques.compression import int8_linear
from vivace.techniques.compression.int8_linear import Int8Linear
from vivace.testing import models

FAMILIES = ("wan2.1", "wan2.2", "cogvideox", "ltx", "hunyuan")
BACKENDS = ("int_mm", "torchao", "reference")


def generate(pipe, techniques, family="wan2.1", **options):
    call = models.call(family) | {"num_inference_steps": 3, "output_type": "latent"} | options.pop("call", {})
    with accelerate(pipe, Plan(techniques), **options) as fast:
        return fast("a red sphere", seed=3, **call)


def latents(out) -> torch.Tensor:
    return torch.as_tensor(out.raw.frames)


def fake_quantised(pipe, technique):
    """A copy of the pipeline whose weights went through int8 and back by hand: the oracle of `weight_only`."""
    pipe = copy.deepcopy(pipe)
    for name in ("transformer", "transformer_2"):
        if (module := getattr(pipe, name, None)) is None:
            continue
        for path, linear in module.named_modules():
            if isinstance(linear, nn.Linear) and "blocks" in path and takes(path, technique.roles):
                scale = linear.weight.data.abs().amax(1, keepdim=True) / 127
                linear.weight.data = (linear.weight.data / scale).round() * scale
    return pipe


def takes(path: str, roles: str) -> bool:
    """Wan's, CogVideoX' and LTX' layers by name: attention, feed-forward, and nothing else."""
    attention, feed_forward = "attn" in path, ".ff" in path
    return {"all": attention or feed_forward, "attention": attention, "ffn": feed_forward}[roles]


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2", "cogvideox", "ltx"])
@pytest.mark.parametrize("roles", ["all", "ffn", "attention"])
def test_weight_only_is_rounding_the_weights(family, roles) -> None:
    pipe, technique = (
        models.pipeline(family),
        Int8Linear(mode="weight_only", roles=roles, backend="reference"),
    )
    want = latents(generate(fake_quantised(pipe, technique), (), family))
    got = latents(generate(pipe, [technique], family))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_stays_near_and_counts_the_same(family, backend) -> None:
    pipe = models.pipeline(family)
    exact = generate(pipe, (), family)
    out = generate(pipe, [Int8Linear(backend=backend)], family)
    change = (latents(out) - latents(exact)).norm() / latents(exact).norm()
    assert 0 < change < 0.1
    for count in ("nfe", "blocks_run", "attention_pairs", "flops", "flops_dense"):
        assert getattr(out.receipt, count) == getattr(exact.receipt, count)
    (record,) = out.receipt.techniques
    assert record.effects["bytes_after"] < 0.35 * record.effects["bytes_before"]
    saved = exact.receipt.weight_bytes - out.receipt.weight_bytes
    assert saved == record.effects["bytes_before"] - record.effects["bytes_after"]
    assert [k.choice for k in out.receipt.kernels] == [backend]


@pytest.mark.parametrize("keep", ["host", "device"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_originals_come_back(keep, backend) -> None:
    pipe = models.pipeline("wan2.1")
    modules = dict(pipe.transformer.named_modules())
    parameters = dict(pipe.transformer.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    generate(pipe, [Int8Linear(keep=keep, backend=backend)])
    assert dict(pipe.transformer.named_modules()) == modules
    after = dict(pipe.transformer.named_parameters())
    assert all(after[name] is p for name, p in parameters.items())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_host_frees_the_device(backend) -> None:
    pipe = models.pipeline("wan2.1")
    linear = pipe.transformer.blocks[0].attn1.to_q
    weight = linear.weight
    with accelerate(pipe, Plan([Int8Linear(backend=backend)])):
        assert weight.numel() == 0
    with accelerate(pipe, Plan([Int8Linear(backend=backend, keep="device")])):
        assert weight.numel() > 0
    assert linear.weight is weight


def test_first_and_last_blocks_can_be_left_alone() -> None:
    pipe = models.pipeline("wan2.1")
    with accelerate(pipe, Plan([Int8Linear(skip_blocks=1)])):
        kinds = [
            {m.weight.dtype for m in b.modules() if isinstance(m, nn.Linear)} for b in pipe.transformer.blocks
        ]
    assert kinds == [{torch.float32}, {torch.int8}, {torch.int8}, {torch.float32}]


def test_modulation_and_embeddings_stay() -> None:
    pipe = models.pipeline("cogvideox")
    with accelerate(pipe, Plan([Int8Linear()])):
        converted = {
            path
            for path, m in pipe.transformer.named_modules()
            if isinstance(m, nn.Linear) and m.weight.dtype == torch.int8
        }
    assert converted
    assert not [path for path in converted if "norm" in path or "embed" in path or "blocks" not in path]


def test_weights_are_quantised_as_they_are_then() -> None:
    """A change of the weights before the session opens is in the codes."""
    pipe = models.pipeline("wan2.1")
    before = latents(generate(pipe, [Int8Linear()]))
    with torch.no_grad():
        pipe.transformer.blocks[1].ffn.net[2].weight.mul_(1.5)
    assert not torch.equal(latents(generate(pipe, [Int8Linear()])), before)


def test_claims_and_problems() -> None:
    model = describe_pipeline(models.pipeline("wan2.1"))
    (claim,) = Int8Linear(skip_blocks=1).claims(model)
    assert claim.sites == {"transformer.blocks.1", "transformer.blocks.2"}
    with pytest.raises(PlanError, match="leaves none of 4 blocks"):
        Plan([Int8Linear(skip_blocks=2)]).check(model)
    with pytest.raises(PlanError, match="backend must be one of auto, int_mm, torchao, reference"):
        Plan([Int8Linear(backend="magic")]).check(model)
    with pytest.raises(PlanError, match="set mode: dynamic"):
        Plan([Int8Linear(backend="int_mm", mode="weight_only")]).check(model)


def test_effects_are_in_every_receipt_of_the_session() -> None:
    pipe = models.pipeline("wan2.1")
    call = models.call("wan2.1") | {"num_inference_steps": 2, "output_type": "latent"}
    with accelerate(pipe, Plan([Int8Linear()])) as fast:
        effects = [fast("a cube", seed=s, **call).receipt.techniques[0].effects for s in (1, 2)]
    assert effects[0] == effects[1]
    assert effects[0]["linears"] == 40


@pytest.mark.parametrize("backend", ["int_mm", "torchao"])
def test_blocks_compile_once(backend) -> None:
    from torch._dynamo.utils import counters

    pipe, technique = models.pipeline("wan2.1"), Int8Linear(backend=backend)
    eager = latents(generate(pipe, [technique]))
    torch._dynamo.reset()
    counters.clear()
    call = models.call("wan2.1") | {"num_inference_steps": 3, "output_type": "latent"}
    with accelerate(pipe, Plan([technique]), compile_backend="eager") as fast:
        first = latents(fast("a red sphere", seed=3, **call))
        graphs = counters["stats"]["unique_graphs"]
        fast("a red sphere", seed=3, **call)
    assert counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(first, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_layers_that_get_no_faster_are_left_alone(monkeypatch, gain) -> None:
    """`when: faster` goes by the times of this device; here the clock is set."""

    def clock(runs, device, repeats):
        for run in runs.values():
            run()
        return {"exact": [gain] * repeats, "int8": [1.0] * repeats}

    monkeypatch.setattr(int8_linear, "timed", clock)
    monkeypatch.setattr(int8_linear, "_gains", {})
    pipe = models.pipeline("wan2.1")
    count = len([m for m in pipe.transformer.blocks.modules() if isinstance(m, nn.Linear)])
    exact = latents(generate(pipe, []))
    out = generate(pipe, [Int8Linear(when="faster", backend="int_mm")])
    effects = next(t for t in out.receipt.techniques if t.name == "int8_linear").effects
    left = count if gain < 1 else 0
    assert (effects.get("linears_left_exact", 0), effects.get("linears", 0)) == (left, count - left)
    assert torch.equal(latents(out), exact) == (gain < 1)
