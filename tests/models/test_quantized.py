"""A quantised transformer goes into a file and comes back bit for bit."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vivace import Plan, accelerate
from vivace.core.errors import WeightsError
from vivace.models.quantized import load_quantized, save_quantized
from vivace.techniques.compression.activation_maxima import ActivationMaxima
from vivace.techniques.compression.quantized_linear import QuantizedLinear
from vivace.testing import models

CALL = {"num_inference_steps": 2, "output_type": "latent"}


def clip(pipe, family) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.as_tensor(pipe(prompt="a ball", generator=generator, **(models.call(family) | CALL)).frames)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("wan2.1", {"weights": "int8"}),
        ("wan2.1", {"weights": "int4", "group": 32, "rotate": "hadamard", "low_rank": 4, "smooth": 0.5}),
        ("wan2.1", {"weights": "nvfp4", "activations": "nvfp4", "full_first": 1, "keep": "device"}),
        ("cogvideox", {"weights": "mxfp4", "activations": "mxfp8", "roles": "attention"}),
        ("hunyuan", {"weights": "fp8", "activations": "none", "roles": "ffn"}),
    ],
)  # fmt: skip
def test_round_trip(family, settings, tmp_path) -> None:
    pipe = models.pipeline(family, layers=2)
    if settings.get("smooth"):
        tops = {
            f"transformer.{path}": torch.rand(m.in_features) + 0.1
            for path, m in pipe.transformer.named_modules()
            if isinstance(m, torch.nn.Linear)
        }
        tops = {k: v for k, v in tops.items() if ".blocks." in k}
        file = ActivationMaxima(family="wan", model_hash="", layers=tops).save(tmp_path / "a.safetensors")
        settings = settings | {"maxima": str(file)}
    path = tmp_path / "transformer.safetensors"
    technique = QuantizedLinear(**settings)
    with accelerate(pipe, Plan([technique])):
        save_quantized(pipe.transformer, path)
        state = {
            k: v.clone() for k, v in pipe.transformer.state_dict().items() if not k.endswith(".original")
        }
        kinds = {k: type(m) for k, m in pipe.transformer.named_modules()}
    with accelerate(pipe, Plan([technique.replace(full_first=0)])):
        want = clip(pipe, family)
    loaded = load_quantized(path)
    assert {k: type(m) for k, m in loaded.named_modules()} == kinds
    again = loaded.state_dict()
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert again[name].dtype == value.dtype
        assert torch.equal(again[name].view(torch.uint8), value.contiguous().view(torch.uint8)), name
    pipe.transformer = loaded
    assert torch.equal(clip(pipe, family), want)


def test_weights_in_full_are_neither_stored_nor_made(tmp_path, monkeypatch) -> None:
    pipe = models.pipeline("wan2.1", layers=2)
    with accelerate(pipe, Plan([QuantizedLinear(weights="int4", full_first=1, keep="device")])):
        path = save_quantized(pipe.transformer, tmp_path / "t.safetensors")
    with safe_open(path, "pt") as reader:
        kinds = {k: reader.get_tensor(k).dtype for k in reader.keys()}  # noqa: SIM118
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.uint8
    assert not [k for k in kinds if "original" in k]

    # torch.empty reserves pages and touches none; filling them is what would cost memory.
    def filled(*args, **kwargs):
        raise AssertionError("weights were initialised")

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", filled)
    loaded = load_quantized(path)
    assert not any(p.is_meta for p in loaded.parameters())


def test_what_is_no_such_file_is_refused(tmp_path) -> None:
    pipe = models.pipeline("wan2.1", layers=2)
    with pytest.raises(WeightsError, match="no quantised layer"):
        save_quantized(pipe.transformer, tmp_path / "t.safetensors")
    with pytest.raises(WeightsError, match="there is no file"):
        load_quantized(tmp_path / "t.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="holds no quantised transformer"):
        load_quantized(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_quantized(tmp_path / "b.safetensors")
    with accelerate(pipe, Plan([QuantizedLinear()])):
        path = save_quantized(pipe.transformer, tmp_path / "t.safetensors")
    with safe_open(path, "pt") as reader:
        head = reader.metadata()
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != "blocks.1.attn1.to_q.scale"}, path, head)
    with pytest.raises(WeightsError, match=r"lacks blocks.1.attn1.to_q.scale"):
        load_quantized(path)
    save_file(tensors | {"blocks.1.attn1.to_q.scale": torch.ones(3)}, path, head)
    with pytest.raises(WeightsError, match="does not take"):
        load_quantized(path)
    save_file(tensors | {"blocks.77.scale": torch.ones(3)}, path, head)
    with pytest.raises(WeightsError, match="does not have"):
        load_quantized(path)
