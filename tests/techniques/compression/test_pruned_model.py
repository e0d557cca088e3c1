"""A pruned model in force: the output is the smaller model's, the receipt tells its work, others work on top of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from vivace import Plan, accelerate
from vivace.core.errors import PlanError, WeightsError
from vivace.models import pruned_file
from vivace.models.describe import describe_pipeline
from vivace.models.families import for_module
from vivace.models.pruning import Kept, carved
from vivace.plans.costs import baseline
from vivace.plans.memory import predict
from vivace.techniques.base import registry
from vivace.techniques.compression.pruned_model import PrunedModel
from vivace.testing import models

STAYS = Kept(
    ("blocks.0", "blocks.2", "blocks.3"),
    {"blocks.0.attn1": (1,)},
    {f"blocks.{i}.ffn": tuple(range(0, 48, 2)) for i in (0, 2, 3)},
)


def generate(pipe: Any, techniques: Any, **options: Any) -> Any:
    call = models.call("wan2.1") | {"num_inference_steps": 4, "output_type": "latent"} | options
    with accelerate(pipe, Plan(techniques)) as fast:
        return fast("a red sphere", seed=3, **call)


def latents(out: Any) -> torch.Tensor:
    return torch.as_tensor(out.raw.frames)


def small_of(pipe: Any, kept: Kept = STAYS) -> Any:
    """A pruned copy with other weights than the whole model's, as repair leaves them."""
    adapter: Any = for_module(pipe.transformer)
    small = carved(adapter, pipe.transformer, kept).eval()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in small.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=draw))
    return small.requires_grad_(False)


@pytest.fixture
def pipe() -> Any:
    return models.pipeline("wan2.1")


@pytest.fixture
def file(pipe: Any, tmp_path: Any) -> str:
    head = pruned_file.head_of(pipe.transformer, STAYS, {})
    return str(pruned_file.save(tmp_path / "p.safetensors", small_of(pipe).state_dict(), head, "fp32"))


@pytest.mark.parametrize("keep", ["host", "device"])
def test_the_output_is_the_smaller_model_s(pipe: Any, file: str, keep: str) -> None:
    whole, exact = pipe.transformer, latents(generate(pipe, ()))
    out = generate(pipe, [PrunedModel(file=file, keep=keep)])
    assert pipe.transformer is whole
    assert len(whole.blocks) == whole.config.num_layers == 4
    assert torch.equal(latents(generate(pipe, ())), exact)
    other = copy.deepcopy(pipe)
    other.transformer = small_of(pipe)
    assert torch.equal(latents(out), latents(generate(other, ())))
    assert not torch.equal(latents(out), exact)


def test_the_receipt_tells_what_is_left(pipe: Any, file: str) -> None:
    exact, out = generate(pipe, ()).receipt, generate(pipe, [PrunedModel(file=file)]).receipt
    assert out.blocks_run == exact.blocks_run * 3 / 4
    # One block of four is gone, and one head of two in the self-attention of another one.
    tokens, text = 3 * 2 * 2, 16
    one = 2 * tokens * (tokens + text)
    assert exact.attention_pairs == 8 * 4 * one
    assert out.attention_pairs == 8 * (3 * one - tokens * tokens)
    assert out.flops < 0.75 * exact.flops
    effects = next(t for t in out.techniques if t.name == "pruned_model").effects
    assert (effects["blocks"], effects["blocks_removed"]) == (3, 1)
    assert effects["parameters"] == sum(p.numel() for p in small_of(pipe).parameters())
    model = describe_pipeline(pipe)
    call = models.call("wan2.1")
    workload = model.workload(frames=call["num_frames"], height=call["height"], width=call["width"], steps=4)
    workload = workload.with_(text=16)
    estimate = PrunedModel(file=file).estimate(model, workload, baseline(model, workload))
    assert estimate.problems(out.counts) == []
    assert estimate.flops[0] == estimate.flops[1]


def test_wrong_models_are_refused(pipe: Any, file: str, tmp_path: Any) -> None:
    other = models.pipeline("wan2.1", seed=1)
    exact = latents(generate(other, ()))
    with pytest.raises(WeightsError, match="made from other weights"):
        generate(other, [PrunedModel(file=file)])
    assert torch.equal(latents(generate(other, ())), exact)
    with pytest.raises(PlanError, match="another architecture"):
        generate(models.pipeline("wan2.1", layers=2), [PrunedModel(file=file)])
    with pytest.raises(PlanError, match="there is no pruned model"):
        generate(pipe, [PrunedModel(file=str(tmp_path / "none"))])
    with pytest.raises(PlanError, match="has none"):
        generate(pipe, [PrunedModel(file=file, expert="transformer_2")])
    plan = Plan([PrunedModel(file=file)], optional=["pruned_model"])
    assert plan.fitted(describe_pipeline(models.pipeline("wan2.1", layers=2))).techniques == ()


def test_the_packaged_file_is_the_embedded_model_s(pipe: Any) -> None:
    reason = PrunedModel().missing(describe_pipeline(pipe))
    wanted = (
        "another architecture"
        if pruned_file.packaged().is_file()
        else "no pruned model comes with the package"
    )
    assert wanted in reason


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("first_block_cache", {"threshold": 0.5, "warmup": 1}),
        ("fora", {}),
        ("taylorseer", {}),
        ("int8_linear", {"mode": "weight_only", "backend": "reference"}),
        ("radial", {}),
        ("token_merging", {"ratio": 0.5, "window_frames": 3, "window_height": 2, "window_width": 2}),
    ],
)
def test_others_act_on_what_is_left(pipe: Any, file: str, name: str, settings: dict[str, Any]) -> None:
    """The same as on a pipeline that has the smaller model from the start: nothing sees the blocks that went."""
    technique = registry[name](**settings)
    call = {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 6}
    got = generate(pipe, [PrunedModel(file=file), technique], **call)
    other = copy.deepcopy(pipe)
    other.transformer = small_of(pipe)
    try:
        want = generate(other, [technique], **call)
    except PlanError as error:
        pytest.fail(f"the smaller model alone is refused: {error}")
    torch.testing.assert_close(latents(got), latents(want), rtol=1e-5, atol=1e-5)
    assert got.receipt.counts == want.receipt.counts
    other = models.pipeline("wan2.1")
    assert torch.equal(latents(generate(pipe, ())), latents(generate(other, ())))


def test_what_needs_the_whole_model_is_refused(pipe: Any, file: str, tmp_path: Any) -> None:
    lora = registry["lora"].examples(tmp_path, pipe)[0]
    with pytest.raises(PlanError, match="changes weights of the whole model"):
        generate(pipe, [PrunedModel(file=file), lora])
    masks = registry["efficient_vdit"].examples(tmp_path, pipe)
    with_file = [m for m in masks if getattr(m, "file", "")]
    deep = registry["int8_linear"](skip_blocks=2)
    problems = Plan([PrunedModel(file=file), deep]).problems(describe_pipeline(pipe))
    assert [p.kind for p in problems] == ["pointless"]  # two of four at both ends leave none in any case
    assert with_file
    for mask in with_file:
        found = Plan([PrunedModel(file=file), mask]).problems(describe_pipeline(pipe))
        assert any(p.kind == "composition" for p in found)


def test_memory_is_that_of_what_is_left(pipe: Any, file: str) -> None:
    model = describe_pipeline(pipe)
    workload = model.workload(frames=9, height=32, width=32, text=16)
    whole = predict(model, workload, dtype="float32").part("transformer")
    part = predict(model, workload, Plan([PrunedModel(file=file)]), dtype="float32").part("transformer")
    small = small_of(pipe)
    left = sum(p.nbytes for p in (*small.parameters(), *small.buffers()))
    assert len(part.blocks) == 3
    assert part.weights < whole.weights
    assert part.weights == pytest.approx(left, rel=1e-3)
    more = predict(
        model, workload, Plan([PrunedModel(file=file), registry["int8_linear"]()]), dtype="float32"
    )
    assert more.part("transformer").weights < part.weights
