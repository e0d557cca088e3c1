"""Int8 weights through torchao's tensor subclasses: least memory at once, least time when compiled."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

_LOUD = ("torchao", "torch.utils._pytree", "diffusers")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that is said inside reaches the user; loggers, streams and filters come back as they were.

    Importing torchao on a machine without its GPU libraries reports every library it did not find.
    """
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    try:
        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


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
