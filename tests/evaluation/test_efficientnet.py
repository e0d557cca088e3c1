"""EfficientNet-Lite0 against logits that the published package gave for the same weights, once."""

from __future__ import annotations

import pytest
import torch

from vivace.core.errors import WeightsError
from vivace.evaluation import efficientnet
from vivace.evaluation.efficientnet import EfficientNetLite0, features, network, prepare

needs_weights = pytest.mark.skipif(bool(efficientnet.missing()), reason=efficientnet.missing() or "here")


def pattern(side: int) -> torch.Tensor:
    """Waves on the network's scale, (1, 3, side, side): no random numbers, so that every machine makes the same."""
    i = torch.arange(side, dtype=torch.float64)
    y, x = torch.meshgrid(i, i, indexing="ij")
    waves = [0.5 + 0.5 * torch.sin(0.11 * x + 0.05 * y * (c + 1) + c) for c in range(3)]
    return torch.stack(waves).float()[None] * 2 - 1


def published(model: EfficientNetLite0) -> dict[str, torch.Tensor]:
    """A state dict with the published names and batch norms that do nothing but divide by sqrt(1 + eps)."""
    state = {"_fc.weight": model.classify.weight, "_fc.bias": model.classify.bias}
    parts = {"_conv_stem": ("_bn0", model.stem.conv), "_conv_head": ("_bn1", model.head.conv)}
    for k, block in enumerate(model.blocks):
        for number, part in enumerate(("expand", "depthwise", "project")):
            if hasattr(unit := getattr(block, part), "conv"):
                parts[f"_blocks.{k}._{part}_conv"] = (f"_blocks.{k}._bn{number}", unit.conv)
    for name, (norm, conv) in parts.items():
        ones = torch.ones(conv.out_channels)
        state[f"{name}.weight"], state[f"{norm}.running_mean"] = conv.weight, 0.25 * ones
        state |= {f"{norm}.running_var": ones, f"{norm}.weight": ones, f"{norm}.bias": 0.5 * ones}
    return {name: value.detach() for name, value in state.items()}


@needs_weights
@pytest.mark.parametrize(
    ("side", "first", "best"),
    [
        (224, (1.8318, 2.0636, 0.2250, -0.7724), {807: 8.7282, 418: 8.6724, 767: 5.6481}),
        (160, (2.5599, 3.5263, 0.1330, -1.0607), {418: 10.8206, 807: 9.5611, 767: 8.2717}),
    ],
)
def test_logits_are_those_of_the_published_network(side, first, best) -> None:
    with torch.no_grad():
        logits = network()(pattern(side))[0]
    assert logits[:4].tolist() == pytest.approx(first, abs=1e-3)
    top = logits.topk(3)
    assert dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) == pytest.approx(best, abs=1e-3)


@needs_weights
def test_pooled_features_are_those_of_the_published_network() -> None:
    with torch.no_grad():
        assert float(network().pooled(pattern(160)).sum()) == pytest.approx(289.7996, abs=1e-2)


def test_batch_norm_is_folded() -> None:
    torch.manual_seed(0)
    model = EfficientNetLite0()
    state = published(model)
    with torch.no_grad():
        conv = model.stem.conv
        assert conv.bias is not None
        raw = torch.nn.functional.conv2d(torch.ones(1, 3, 8, 8), conv.weight, stride=2)
        model.load_published(state)
        norm = torch.nn.functional.batch_norm(
            raw, torch.full((32,), 0.25), torch.ones(32), torch.ones(32), torch.full((32,), 0.5), eps=1e-3
        )
        # The interior alone: padding is at the right and the bottom.
        assert torch.allclose(model.stem(torch.ones(1, 3, 8, 8))[..., :3, :3], norm.clamp(0, 6), atol=1e-6)


def test_wrong_weights_are_refused_with_what_to_do() -> None:
    state = published(EfficientNetLite0())
    del state["_blocks.3._bn0.running_var"]
    with pytest.raises(WeightsError, match="fetch them with"):
        EfficientNetLite0().load_published(state)


def test_the_shorter_side_is_set_and_the_aspect_is_kept() -> None:
    frames = torch.zeros(1, 2, 48, 96, 3)
    assert prepare(frames, 32).shape == (2, 3, 32, 64)
    assert prepare(frames, 48).shape == (2, 3, 48, 96)
    white, black = prepare(frames + 1, 32), prepare(frames, 32)
    assert float(white.max()) == pytest.approx(1.0)
    assert float(black.min()) == pytest.approx(-127 / 128)


@needs_weights
def test_a_clip_has_the_same_features_in_any_batch() -> None:
    clips = torch.rand(3, 5, 32, 40, 3, generator=torch.Generator().manual_seed(1))
    whole = features(clips, side=64)
    assert whole.shape == (3, 5, 1280)
    assert all(torch.equal(features(clips[i : i + 1], side=64)[0], whole[i]) for i in range(3))
