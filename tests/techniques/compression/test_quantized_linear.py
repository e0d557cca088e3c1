"""Quantised linear layers on live pipelines: which layers, what they cost, full steps, files, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vivace import Plan, accelerate
from vivace.core.errors import PlanError
from vivace.kernels.quant_linear import formats
from vivace.models.describe import describe_pipeline
from vivace.techniques.compression.activation_maxima import ActivationMaxima
from vivace.techniques.compression.mixed_bits import MixedBits
from vivace.techniques.compression.quantized_linear import QuantizedLinear
from vivace.techniques.distillation.lora import Lora
from vivace.testing import models

FAMILIES = ("wan2.1", "wan2.2", "cogvideox", "ltx", "hunyuan")
STEPS = 3


def small(family="wan2.1"):
    """Two blocks for each expert."""
    options = {"layers": 1, "single_layers": 1} if family == "hunyuan" else {"layers": 2}
    return models.pipeline(family, **options)


def generate(pipe, techniques, family="wan2.1", **options):
    call = models.call(family) | {"num_inference_steps": STEPS, "output_type": "latent"}
    with accelerate(pipe, Plan(techniques), **options) as fast:
        return fast("a red sphere", seed=3, **call)


def latents(out) -> torch.Tensor:
    return torch.as_tensor(out.raw.frames)


def change(a, b) -> float:
    return ((latents(a) - latents(b)).norm() / latents(b).norm()).item()


def taken(path: str) -> bool:
    """Layers of the blocks' attention and feed-forward, by Wan's names."""
    return "blocks" in path and ("attn" in path or ".ffn" in path)


def by_hand(pipe, name, group=0):
    """A copy of the pipeline whose weights went through a format and back: the oracle of weight-only layers."""
    pipe = copy.deepcopy(pipe)
    for path, linear in pipe.transformer.named_modules():
        if isinstance(linear, nn.Linear) and taken(path):
            codes = formats.quantise(linear.weight.data, name, group, tensor=name == "nvfp4")
            linear.weight.data = formats.dequantise(codes)
    return pipe


@pytest.mark.parametrize(
    ("name", "group"),
    [("int8", 0), ("int4", 0), ("int4", 32), ("fp8", 0), ("nvfp4", 0), ("mxfp8", 0), ("mxfp4", 0)],
)
def test_weight_only_is_rounding_the_weights(name, group) -> None:
    pipe = small()
    got = generate(pipe, [QuantizedLinear(weights=name, group=group, activations="none")])
    torch.testing.assert_close(latents(got), latents(generate(by_hand(pipe, name, group), ())))
    assert got.receipt.techniques[0].effects["linears_emulated"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_stay_near_count_the_same_and_tell_true_bytes(family) -> None:
    pipe = small(family)
    exact = generate(pipe, (), family)
    out = generate(pipe, [QuantizedLinear()], family)
    assert 0 < change(out, exact) < 0.1
    for count in ("nfe", "blocks_run", "attention_pairs", "flops", "flops_dense"):
        assert getattr(out.receipt, count) == getattr(exact.receipt, count)
    effects = out.receipt.techniques[0].effects
    saved = exact.receipt.weight_bytes - out.receipt.weight_bytes
    assert saved == effects["bytes_before"] - effects["bytes_after"]
    assert effects["bytes_int8"] == effects["bytes_after"] < 0.35 * effects["bytes_before"]
    assert effects["linears"] == effects["linears_int8"] > 0
    assert [k.choice for k in out.receipt.kernels] == ["int_mm"]


def test_emulated_formats_are_called_so() -> None:
    pipe = small()
    out = generate(pipe, [QuantizedLinear(weights="nvfp4", activations="nvfp4")])
    (kernel,) = out.receipt.kernels
    assert kernel.choice == "reference"
    assert kernel.why.startswith("EMULATED (nvfp4 weights, nvfp4 activations")
    effects = out.receipt.techniques[0].effects
    assert effects["linears_emulated"] == effects["linears"] == 20
    # Blocks of 16 in layers of 24 inputs are padded to 32: 5 bytes a weight in 8 would be 4.5 bits.
    assert effects["bytes_after"] < 0.2 * effects["bytes_before"]


@pytest.mark.parametrize("keep", ["host", "device"])
@pytest.mark.parametrize("first", [0, 1])
def test_originals_come_back(keep, first) -> None:
    pipe = small()
    modules = dict(pipe.transformer.named_modules())
    parameters = dict(pipe.transformer.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    generate(pipe, [QuantizedLinear(keep=keep, full_first=first, rotate="hadamard", low_rank=4)])
    assert dict(pipe.transformer.named_modules()) == modules
    after = dict(pipe.transformer.named_parameters())
    assert all(after[name] is p for name, p in parameters.items())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_kept_on_the_device_nothing_is_saved_and_the_receipt_knows() -> None:
    pipe = small()
    exact = generate(pipe, ()).receipt.weight_bytes
    host = generate(pipe, [QuantizedLinear(full_first=1)]).receipt
    device = generate(pipe, [QuantizedLinear(full_first=1, keep="device")]).receipt
    effects = device.techniques[0].effects
    assert effects["bytes_kept"] == effects["bytes_before"]
    assert device.weight_bytes == exact + effects["bytes_after"]
    assert host.weight_bytes == device.weight_bytes - effects["bytes_kept"]
    weight = pipe.transformer.blocks[0].attn1.to_q.weight
    with accelerate(pipe, Plan([QuantizedLinear(full_first=1)])):
        assert weight.numel() == 0
    assert weight.numel() == 24 * 24


@pytest.mark.parametrize(
    ("family", "branches", "keep"), [("wan2.1", 2, "device"), ("wan2.2", 2, "host"), ("cogvideox", 2, "host")]
)
def test_full_steps_are_exact_and_counted(family, branches, keep) -> None:
    """Separate and fused guidance, and two experts: all full is the exact run, and fewer full steps lie between."""
    pipe = small(family)
    exact = generate(pipe, (), family)
    rough = {"weights": "int4", "keep": keep}
    whole = generate(pipe, [QuantizedLinear(full_first=STEPS, **rough)], family)
    assert torch.equal(latents(whole), latents(exact))
    assert whole.receipt.techniques[0].effects["full_evaluations"] == branches * STEPS
    some = generate(pipe, [QuantizedLinear(full_first=1, full_last=1, **rough)], family)
    none = generate(pipe, [QuantizedLinear(**rough)], family)
    assert some.receipt.techniques[0].effects["full_evaluations"] == branches * 2
    assert "full_evaluations" not in none.receipt.techniques[0].effects
    assert 0 < change(some, exact) < change(none, exact)


def test_full_steps_are_the_first_and_the_last(monkeypatch) -> None:
    from vivace.kernels.quant_linear.layer import QuantLinear

    pipe, seen = small(), []
    forward = QuantLinear.forward

    def watched(self, input):
        seen.append(self.full)
        return forward(self, input)

    monkeypatch.setattr(QuantLinear, "forward", watched)
    generate(pipe, [QuantizedLinear(full_first=1, full_last=1)])
    calls = [seen[i] for i in range(0, len(seen), 20)]  # of the first layer: two branches a step
    assert calls == [True, True, False, False, True, True]


def test_a_branch_and_a_rotation_are_counted_as_work() -> None:
    pipe = small()
    exact = generate(pipe, ()).receipt
    flops = {}
    for label, settings in {"rank": {"low_rank": 4}, "turn": {"rotate": "hadamard"}}.items():
        out = generate(pipe, [QuantizedLinear(**settings)]).receipt
        flops[label] = out.flops - exact.flops
    # Tokens through the layers, from the exact count of one kind: 24 x 24 and 24 x 48 and 48 x 24.
    assert 0 < flops["rank"] < 0.4 * exact.flops
    assert 0 < flops["turn"] < 0.4 * exact.flops


def test_a_branch_lowers_the_error_of_four_bits() -> None:
    """Weights with a few strong channels, which plain int4 with a scale a row cannot hold."""
    pipe = small()
    with torch.no_grad():
        for path, linear in pipe.transformer.named_modules():
            if isinstance(linear, nn.Linear) and taken(path):
                linear.weight[:, 3] *= 6.0
    exact = generate(pipe, ())
    rough = {"weights": "int4", "activations": "none"}
    plain, rank = (change(generate(pipe, [QuantizedLinear(**rough, low_rank=r)]), exact) for r in (0, 8))
    assert rank < 0.8 * plain


def sites(pipe) -> dict[str, nn.Linear]:
    return {
        f"transformer.{path}": m
        for path, m in pipe.transformer.named_modules()
        if isinstance(m, nn.Linear) and taken(path)
    }


def test_mixed_formats(tmp_path) -> None:
    pipe = small()
    layers = {
        site: {"weights": "int4", "activations": "int8", "group": 32}
        for site in sites(pipe)
        if ".ffn." in site
    }
    layers |= {site: None for site in sites(pipe) if site.endswith("attn2.to_out.0")}
    path = MixedBits(family="wan", model_hash="", layers=layers).save(tmp_path / "m.json")
    assert MixedBits.load(path).layers == layers
    out = generate(pipe, [QuantizedLinear(weights="mxfp8", activations="mxfp8", mixed=str(path))])
    effects = out.receipt.techniques[0].effects
    assert (effects["linears_int4"], effects["linears_mxfp8"], effects["linears"]) == (4, 14, 18)
    assert {k.choice for k in out.receipt.kernels} == {"int_mm", "reference"}
    with accelerate(pipe, Plan([QuantizedLinear(mixed=str(path))])):
        assert type(pipe.transformer.blocks[0].attn2.to_out[0]) is nn.Linear
        assert pipe.transformer.blocks[0].ffn.net[2].recipe.weights == "int4"
        assert pipe.transformer.blocks[0].attn1.to_q.recipe.weights == "int8"


def test_smoothing_takes_the_maxima_of_its_layer(tmp_path) -> None:
    pipe = small()
    tops = {site: torch.rand(m.in_features) + 0.1 for site, m in sites(pipe).items()}
    file = ActivationMaxima(family="wan", model_hash="", layers=tops).save(tmp_path / "a.safetensors")
    assert torch.equal(
        ActivationMaxima.load(file).layers["transformer.blocks.0.attn1.to_q"], tops[next(iter(tops))]
    )
    technique = QuantizedLinear(smooth=0.6, maxima=str(file))
    with accelerate(pipe, Plan([technique])):
        layer, site = pipe.transformer.blocks[1].attn1.to_k, "transformer.blocks.1.attn1.to_k"
        smooth = 1.0 / layer.smooth
    weight = pipe.transformer.blocks[1].attn1.to_k.weight.abs().amax(0)
    torch.testing.assert_close(smooth, tops[site] ** 0.6 / weight**0.4)
    # Without rounding smoothing is nothing: 8 bits stay as near as they were.
    assert change(generate(pipe, [technique]), generate(pipe, ())) < 0.1
    del tops["transformer.blocks.0.attn1.to_q"]
    file = ActivationMaxima(family="wan", model_hash="", layers=tops).save(tmp_path / "b.safetensors")
    with pytest.raises(PlanError, match=r"no maxima of the 24 channels of transformer.blocks.0.attn1.to_q"):
        generate(pipe, [QuantizedLinear(smooth=0.6, maxima=str(file))])


def test_a_merged_lora_is_what_is_quantised(tmp_path) -> None:
    """`lora` comes first whatever the order of the plan: the codes are those of the merged weights, bit for bit."""
    pipe = small()
    generator, tensors, merged = torch.Generator().manual_seed(0), {}, copy.deepcopy(pipe)
    for path, linear in pipe.transformer.named_modules():
        if isinstance(linear, nn.Linear) and taken(path):
            down = 0.2 * torch.randn(2, linear.in_features, generator=generator)
            up = 0.2 * torch.randn(linear.out_features, 2, generator=generator)
            tensors |= {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up}
            merged.transformer.get_submodule(path).weight.data += up @ down
    save_file(tensors, tmp_path / "lora.safetensors")
    lora = Lora(path=str(tmp_path / "lora.safetensors"))
    quantised = QuantizedLinear(weights="int4", group=32, rotate="hadamard", low_rank=4)
    want = latents(generate(merged, [quantised]))
    assert torch.equal(latents(generate(pipe, [lora, quantised])), want)
    assert torch.equal(latents(generate(pipe, [quantised, lora])), want)
    assert not torch.equal(latents(generate(pipe, [quantised])), want)


def test_claims_and_problems(tmp_path) -> None:
    model = describe_pipeline(models.pipeline("wan2.1"))
    (claim,) = QuantizedLinear(skip_blocks=1).claims(model)
    assert claim.sites == {"transformer.blocks.1", "transformer.blocks.2"}
    foreign = MixedBits(family="ltx", model_hash="", layers={}).save(tmp_path / "foreign.json")
    strange = MixedBits(family="wan", model_hash="", layers={"transformer.blocks.9.x": None})
    integers = MixedBits(family="wan", model_hash="", layers={"transformer.blocks.1.x": {"weights": "fp8"}})
    (tmp_path / "bad.json").write_text("{}")
    cases = {
        "leaves none of 4 blocks": {"skip_blocks": 2},
        "backend must be one of auto, int_mm, scaled_mm, reference": {"backend": "magic"},
        "set group: 0": {"weights": "nvfp4", "group": 32},
        "integer weights and activations .* set backend: auto": {"backend": "int_mm", "activations": "none"},
        "takes fp8 weights": {"backend": "scaled_mm"},
        "smooth needs maxima": {"smooth": 0.5},
        "no file of activation maxima": {"smooth": 0.5, "maxima": str(tmp_path / "x")},
        "no mixed-bits file": {"mixed": str(tmp_path / "x.json")},
        "bad.json is no mixed-bits file": {"mixed": str(tmp_path / "bad.json")},
        "family ltx": {"mixed": str(foreign)},
        "transformer.blocks.9.x, which": {"mixed": str(strange.save(tmp_path / "strange.json"))},
        "backend int_mm: an integer": {"mixed": str(integers.save(tmp_path / "i.json")), "backend": "int_mm"},
    }
    for sentence, settings in cases.items():
        with pytest.raises(PlanError, match=sentence):
            Plan([QuantizedLinear(**settings)]).check(model)
    few = describe_pipeline(small(), defaults={"num_inference_steps": 6})
    (warned,) = QuantizedLinear(full_first=3, full_last=3).check(few)
    assert (warned.severity, warned.message[:19]) == ("warning", "6 steps leave none ")
    assert not QuantizedLinear(full_first=3, full_last=2).check(few)


def test_other_weights_than_the_files_are_refused(tmp_path) -> None:
    pipe = small()
    path = MixedBits(family="wan", model_hash="0" * 16, layers={}).save(tmp_path / "m.json")
    with pytest.raises(PlanError, match="other weights"):
        generate(pipe, [QuantizedLinear(mixed=str(path))])


def test_blocks_compile_once_also_with_full_steps() -> None:
    """Quantised and full steps are two graphs, whatever the number of steps. (The contract compiles the defaults.)"""
    from torch._dynamo.utils import counters

    pipe = models.pipeline("wan2.1", layers=1)
    technique = QuantizedLinear(weights="int4", rotate="hadamard", low_rank=4, full_first=1)
    eager = latents(generate(pipe, [technique]))
    torch._dynamo.reset()
    counters.clear()
    call = models.call("wan2.1") | {"num_inference_steps": STEPS, "output_type": "latent"}
    with accelerate(pipe, Plan([technique]), compile_backend="eager") as fast:
        first = latents(fast("a red sphere", seed=3, **call))
        fast("a red sphere", seed=3, **call)
        graphs = counters["stats"]["unique_graphs"]
        fast("a blue cube", seed=4, **call | {"num_inference_steps": 5})
    assert counters["stats"]["unique_graphs"] == graphs == 2
    torch.testing.assert_close(first, eager, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
