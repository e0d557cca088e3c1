"""Int8 weights through torchao's tensor subclasses: least memory at once, least time when compiled."""

from __future__ import annotations

from typing import Any

from torch import nn

from vivace.core.quiet import quiet


def quantise(linear: nn.Linear, mode: str) -> nn.Linear:
    """See `spec`. The new layer is a plain `nn.Linear` whose weight is a quantised tensor."""
    with quiet():
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        configs: dict[str, Any] = {
            "dynamic": Int8DynamicActivationInt8WeightConfig,
            "weight_only": Int8WeightOnlyConfig,
        }
        copy = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        copy.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        quantize_(copy, configs[mode]())
    copy.bias = linear.bias
    return copy.train(linear.training)
