"""Linear layers with int8 weights: the operation and its implementations.

    W[o, i] ~ s_w[o] * Q[o, i]                             one scale per output channel, symmetric, Q in -127 .. 127
                                                           (torchao: the range is cut in 255, Q in -128 .. 127)
    `dynamic`:      y = s_x s_w (Qx Q^T) + b                 Qx: x rounded to int8 with one scale per token
    `weight_only`:  y = x (s_w Q)^T + b                      activations stay as they are

Scales belong to a token or an output channel, never to a batch, so a sample's result does not depend on its company.

An implementation is a function `quantise(linear, mode) -> nn.Linear` that leaves `linear` alone and returns a new
layer with the same sizes, the same bias object and an int8 weight.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from vivace.kernels.api import Candidate, register

OP = "int8_linear"
MODES = ("dynamic", "weight_only")
LIMIT = 127
"""Largest magnitude of a quantised value: symmetric, so that negation stays exact."""


def _load(module: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        import importlib

        return importlib.import_module(f"vivace.kernels.{OP}.{module}").quantise

    return load


def _refuse_int_mm(context: Mapping[str, Any]) -> str | None:
    if context.get("mode", "dynamic") != "dynamic":
        return "an integer product needs integer activations (mode dynamic)"
    if context.get("device", "cpu") == "cuda":
        if context.get("features", 8) % 8:
            return "torch._int_mm on a GPU needs layer sizes that are multiples of 8"
    elif context.get("device", "cpu") != "cpu":
        return f"torch._int_mm is not known to run on {context['device']}"
    return None


def _refuse_torchao(context: Mapping[str, Any]) -> str | None:
    return None if importlib.util.find_spec("torchao") else "torchao is not installed: pip install torchao"


def _never(context: Mapping[str, Any]) -> str | None:
    return None


def _avoid_int_mm(context: Mapping[str, Any]) -> str | None:
    if context.get("device", "cpu") == "cpu":
        return None
    return "on a GPU the layer is one fused kernel only when compiled; torchao is the maintained way there"


register(OP, Candidate("int_mm", _refuse_int_mm, _load("int_mm"), _avoid_int_mm))
register(OP, Candidate("torchao", _refuse_torchao, _load("torchao")))
register(OP, Candidate("reference", _never, _load("reference")))
