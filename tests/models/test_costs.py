"""The predicted cost of the exact run: its scaling, and published models."""

from __future__ import annotations

import time

import pytest
import torch

from vivace.core.errors import ModelError
from vivace.models.describe import describe_configs, describe_pipeline
from vivace.models.known import KNOWN
from vivace.models.loading import describe
from vivace.plans.costs import baseline
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.testing import models


def tiny(name: str):
    model = describe_pipeline(models.pipeline(name))
    return model, model.workload(frames=9, height=32, width=32, steps=8, text=16)


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox"])
def test_steps_batch_and_branches_scale_the_cost(name):
    model, workload = tiny(name)
    one = baseline(model, workload)
    assert one.nfe == (16, 16)
    assert one.blocks_run == (16 * 4, 16 * 4)
    assert baseline(model, workload.with_(steps=4)) == one.scaled(0.5)
    assert baseline(model, workload.with_(guidance=1.0)).flops[0] == pytest.approx(one.flops[0] / 2)
    double = baseline(model, workload.with_(batch=2))
    assert double.nfe == one.nfe
    assert double.flops[0] == pytest.approx(2 * one.flops[0])


def test_a_batch_of_prompts_costs_what_is_predicted():
    pipe = models.pipeline("cogvideox")
    model, workload = tiny("cogvideox")
    with accelerate(pipe, Plan()) as session:
        receipt = session(["red", "blue"], **models.call("cogvideox")).receipt
    assert receipt.samples == 2
    assert not baseline(model, workload.with_(batch=2)).problems(receipt.counts, slack=1e-9)


def test_the_boundary_divides_the_steps_among_experts_of_different_depth():
    pipe = models.pipeline("wan2.2")
    deeper = models.pipeline("wan2.1", layers=6).transformer
    pipe.register_modules(transformer_2=deeper)
    model = describe_pipeline(pipe)
    call = models.call("wan2.2")
    with accelerate(pipe, Plan()) as session:
        receipt = session("red", **call).receipt
    workload = model.workload(frames=9, height=32, width=32, steps=8, text=16)
    used = [step.branches[0].expert for step in receipt.steps]
    assert used == sorted(used)
    assert set(used) == {"transformer", "transformer_2"}
    assert not baseline(model, workload).problems(receipt.counts, slack=1e-9)


def test_no_adapter_no_prediction():
    model = describe_configs("mine", "MyPipeline", {"transformer": {}}, {"transformer": "MyTransformer"})
    with pytest.raises(ModelError, match="no adapter"):
        baseline(model, model.workload())


@pytest.mark.parametrize(
    ("name", "tokens", "parameters", "nfe"),
    [
        ("wan2.1-1.3b", 32_760, 1.42e9, 100),
        ("wan2.1-14b", 32_760, 14.29e9, 100),
        ("hunyuanvideo", 33 * 45 * 80 + 256, 12.82e9, 50),
    ],
)
def test_published_models_are_costed_at_once(name, tokens, parameters, nfe):
    model = describe(name)
    workload = model.workload()
    assert model.grid(workload).tokens == tokens
    start = time.process_time()
    cost = baseline(model, workload)
    assert time.process_time() - start < 10.0  # 0.1 s to 0.3 s on a quiet machine
    assert cost.nfe == (nfe, nfe)
    assert cost.blocks_run[0] == nfe * model.depth
    with torch.device("meta"):
        module = KNOWN[name].build_transformer(device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(parameters, rel=0.01)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    # Every token passes every weight at least once, and attention comes on top.
    assert cost.flops[0] > 2 * parameters * 0.5 * tokens * nfe


def test_self_attention_pairs_of_wan_are_the_formula():
    model = describe("wan2.1-1.3b")
    workload = model.workload(steps=1)
    own, cross = 32_760 * 32_760, 32_760 * 512
    assert baseline(model, workload).attention_pairs[0] == 2 * 30 * 12 * (own + cross)
