"""LoRA against peft (as diffusers loads it) and against weights changed by hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vivace.core.errors import PlanError
from vivace.models.describe import describe_pipeline
from vivace.models.student import save_student
from vivace.models.student_artifact import Artifact
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.distillation.lora import Lora
from vivace.techniques.distillation.student import StudentCheckpoint
from vivace.testing.models import CALL, pipeline

RANK = 3


def factors(module, seed=0):
    """Random updates of the attention linears: {layer: (down, up)}."""
    generator, out = torch.Generator().manual_seed(seed), {}
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear) and ".attn" in name:
            down = 0.3 * torch.randn(RANK, linear.in_features, generator=generator)
            out[name] = (down, 0.3 * torch.randn(linear.out_features, RANK, generator=generator))
    return out


def peft_style(updates, prefix="transformer."):
    tensors = {}
    for layer, (down, up) in updates.items():
        tensors |= {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
    return tensors


def merge(module, updates, strength):
    with torch.no_grad():
        for layer, (down, up) in updates.items():
            module.get_submodule(layer).weight += strength * (up @ down)


def latents(pipe, *techniques):
    with accelerate(pipe, Plan(techniques)) as fast:
        return fast("a red ball", seed=3, output_type="latent", **CALL).raw.frames


def problem(technique, pipe):
    [found] = Plan([technique]).problems(describe_pipeline(pipe))
    return found.kind, found.message


@pytest.fixture
def lora_file(tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(peft_style(factors(pipeline("wan2.1").transformer)), file)
    return file


def test_equals_diffusers_own_lora_at_any_scale(lora_file):
    peft = pipeline("wan2.1")
    peft.load_lora_weights(str(lora_file.parent), weight_name=lora_file.name, adapter_name="a")
    pipe, exact = pipeline("wan2.1"), latents(pipeline("wan2.1"))
    for scale in (1.0, 0.4):
        peft.set_adapters(["a"], [scale])
        ours = latents(pipe, Lora(path=str(lora_file), scale=scale))
        assert torch.allclose(ours, latents(peft), atol=1e-4)
        assert not torch.allclose(ours, exact, atol=1e-2)


def test_comes_back_bit_for_bit_and_scale_zero_is_nothing(lora_file):
    pipe = pipeline("wan2.1")
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    exact = latents(pipe)
    assert torch.equal(latents(pipe, Lora(path=str(lora_file), scale=0.0)), exact)
    latents(pipe, Lora(path=str(lora_file)))
    assert all(torch.equal(v, before[k]) for k, v in pipe.transformer.state_dict().items())
    assert torch.equal(latents(pipe), exact)


@pytest.mark.parametrize("alpha", [1.0, 6.0])
@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("", ".lora_A.weight", ".lora_B.weight"),
        ("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"),
        ("transformer.", ".lora_down.weight", ".lora_up.weight"),
        ("transformer.", ".lora.down.weight", ".lora.up.weight"),
    ],
)
def test_names_of_other_trainers_and_alpha(prefix, down, up, alpha, tmp_path):
    pipe, tensors = pipeline("wan2.1"), {}
    updates = factors(pipe.transformer)
    for layer, (a, b) in updates.items():
        tensors |= {prefix + layer + down: a, prefix + layer + up: b}
        tensors[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    ours = latents(pipe, Lora(path=str(tmp_path), scale=0.5))
    merge(pipe.transformer, updates, 0.5 * alpha / RANK)
    assert torch.allclose(ours, latents(pipe), atol=1e-5)


def test_alpha_in_the_files_metadata_as_diffusers_writes_it(tmp_path):
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    trained = pipeline("wan2.1")
    trained.transformer.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained.transformer.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    WanPipeline.save_lora_weights(
        str(tmp_path),
        transformer_lora_layers=get_peft_model_state_dict(trained.transformer),
        transformer_lora_adapter_metadata=trained.transformer.peft_config["default"].to_dict(),
    )
    ours = latents(pipeline("wan2.1"), Lora(path=str(tmp_path)))
    assert torch.allclose(ours, latents(trained), atol=1e-4)


def test_both_experts_and_two_loras_at_once(tmp_path):
    pipe = pipeline("wan2.2")
    first, second = factors(pipe.transformer, 1), factors(pipe.transformer_2, 2)
    save_file(peft_style(first) | peft_style(second, "transformer_2."), tmp_path / "both.safetensors")
    more = factors(pipe.transformer_2, 3)
    save_file(peft_style(more), tmp_path / "more.safetensors")
    ours = latents(
        pipe,
        Lora(path=str(tmp_path / "both.safetensors")),
        Lora(path=str(tmp_path / "more.safetensors"), expert="transformer_2", scale=0.5),
    )
    merge(pipe.transformer, first, 1.0)
    merge(pipe.transformer_2, second, 1.0)
    merge(pipe.transformer_2, more, 0.5)
    assert torch.allclose(ours, latents(pipe), atol=1e-5)


def test_files_that_cannot_be_used_are_named(lora_file, tmp_path):
    pipe = pipeline("wan2.1")
    assert problem(Lora(), pipe) == ("file", "give the LoRA's file or folder: path=...")
    kind, message = problem(Lora(path=str(tmp_path / "none.safetensors")), pipe)
    assert (kind, "none.safetensors is missing" in message) == ("file", True)
    lora_file.write_bytes(lora_file.read_bytes()[:200])
    with pytest.raises(PlanError, match=r"lora\.safetensors cannot be read as safetensors"):
        accelerate(pipe, Plan([Lora(path=str(lora_file))]))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"blocks.0.norm.weight": (4,)}, "which is no LoRA factor"),
        ({"blocks.0.attn1.to_q.lora_A.weight": (2, 24)}, "only half of the update of blocks.0.attn1.to_q"),
        (
            {"blocks.9.attn1.to_q.lora_A.weight": (2, 24), "blocks.9.attn1.to_q.lora_B.weight": (24, 2)},
            "no layer blocks.9.attn1.to_q",
        ),
        (
            {"blocks.0.attn1.to_q.lora_A.weight": (2, 24), "blocks.0.attn1.to_q.lora_B.weight": (24, 3)},
            "the update of blocks.0.attn1.to_q is",
        ),
        (
            {"transformer_2.a.lora_A.weight": (2, 24), "transformer_2.a.lora_B.weight": (24, 2)},
            "has weights for transformer_2, and WanPipeline has none",
        ),
    ],
)
def test_updates_that_do_not_fit_say_which(tensors, words, tmp_path):
    save_file({k: torch.zeros(size) for k, size in tensors.items()}, tmp_path / "lora.safetensors")
    _, message = problem(Lora(path=str(tmp_path)), pipeline("wan2.1"))
    assert words in message


def test_the_same_lora_twice_is_refused(lora_file):
    twice = [Lora(path=str(lora_file)), Lora(path=str(lora_file))]
    found = Plan(twice).problems(describe_pipeline(pipeline("wan2.1")))
    assert [p.kind for p in found] == ["duplicate"]


def test_a_lora_is_merged_after_the_checkpoint_whatever_the_order(lora_file, tmp_path):
    pipe = pipeline("wan2.1")
    base = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    generator = torch.Generator().manual_seed(4)
    state = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
    path = save_student(tmp_path / "student.safetensors", state, base, Artifact())
    student, lora = StudentCheckpoint(path=str(path)), Lora(path=str(lora_file))
    ours = [latents(pipe, *both) for both in ((student, lora), (lora, student))]
    with accelerate(pipe, Plan([student])):
        state = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    pipe.transformer.load_state_dict(state)
    merge(pipe.transformer, factors(pipe.transformer), 1.0)
    expected = latents(pipe)
    assert all(torch.allclose(found, expected, atol=1e-5) for found in ours)


def test_the_names_of_the_models_own_code_and_whole_differences(tmp_path):
    pipe, tensors = pipeline("wan2.1"), {}
    own = {"attn1.to_q": "self_attn.q", "attn2.to_out.0": "cross_attn.o", "ffn.net.0.proj": "ffn.0"}
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        expected = pipeline("wan2.1")
        for ours, theirs in own.items():
            linear = expected.transformer.get_submodule(f"blocks.1.{ours}")
            down = 0.3 * torch.randn(2, linear.in_features, generator=generator)
            up = 0.3 * torch.randn(linear.out_features, 2, generator=generator)
            bias = torch.randn(linear.out_features, generator=generator)
            name = f"diffusion_model.blocks.1.{theirs}"
            tensors |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.diff_b": bias,
            }
            linear.weight += 0.5 * (up @ down)
            linear.bias += 0.5 * bias
        for ours, theirs in (("proj_out", "head.head"), ("blocks.0.norm2", "blocks.0.norm3")):
            layer = expected.transformer.get_submodule(ours)
            tensors[f"diffusion_model.{theirs}.diff"] = torch.randn(layer.weight.shape, generator=generator)
            layer.weight += 0.5 * tensors[f"diffusion_model.{theirs}.diff"]
    save_file(tensors, tmp_path / "lora.safetensors")
    exact = latents(pipe)
    assert torch.allclose(latents(pipe, Lora(path=str(tmp_path), scale=0.5)), latents(expected), atol=1e-5)
    assert torch.equal(latents(pipe), exact)
    save_file({"diffusion_model.head.head.diff": torch.zeros(3)}, tmp_path / "lora.safetensors")
    assert "the update of proj_out is (3,)" in problem(Lora(path=str(tmp_path)), pipe)[1]
    save_file({"blocks.0.attn1.to_q.alpha": torch.ones(())}, tmp_path / "lora.safetensors")
    assert "only half" in problem(Lora(path=str(tmp_path)), pipe)[1]
