"""k-means of tokens, for every sample and head on its own: what semantic permutations of attention rest on.

    cluster(x, centres, iterations, gone) -> (labels, centres)

See `vivace.kernels.cluster_tokens.op` for shapes. One implementation so far, in plain torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from vivace.kernels.api import Candidate, register

OP = "cluster_tokens"


def _load() -> Callable[..., Any]:
    return importlib.import_module(f"vivace.kernels.{OP}.op").cluster


def _never(context: Mapping[str, Any]) -> str | None:
    return None


register(OP, Candidate("lloyd", _never, _load))
