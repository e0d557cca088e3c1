"""k-means of tokens, for every sample and head on its own: what semantic permutations of attention rest on.

    select("cluster_tokens", ...).run() -> Clustering(cluster, take, put)

    cluster(x, centres, iterations, gone) -> (labels, order, centres)
        Lloyd's iterations from given centres (`start` makes the first ones). Each gives every token its nearest centre
        and moves every centre to the mean of its tokens; one without tokens stays where it is.
    take(x, order) -> like x, contiguous: row i is row order[i] of x.
    put(x, order) -> like x, contiguous: row order[i] is row i of x, so put(take(x, order), order) is x.

Shapes: B batch rows, H heads, S slots, K centres, D head dimension.

* x (B, H, S, D) in any floating dtype and layout; centres (B, H, K, D) float32, at most `MOST` of them; gone bool (S,),
  slots that hold no token.
* labels int32 (B, H, S) of the last assignment, K where there is no token; order int32 (B, H, S), the slots sorted by
  label, equal ones as they stood, those without a token last; centres float32 after the last iteration.
* Nearest means the largest x . c - |c|^2 / 2 in float32, with c rounded to the dtype of x; of equal ones the first.
  Scores that are no numbers are never nearest; labels are always in range.
* `take` and `put`: order int32 (B, H, V), V <= S, is a permutation of the first V rows; those behind stay where they
  are. Both are differentiable in x, `cluster` is not.

Deterministic, and no synchronisation. All are custom operations of torch with fake implementations.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.kernels.api import Candidate, register
from vivace.kernels.block_attention.spec import avoid_interpreted, refuse_triton

if TYPE_CHECKING:
    import torch

OP = "cluster_tokens"
MOST = 8192
"""Centres of a head at most."""


@dataclass(frozen=True, slots=True)
class Clustering:
    """The three operations on one backend."""

    cluster: Callable[..., Any]
    take: Callable[..., Any]
    put: Callable[..., Any]


def start(x: torch.Tensor, clusters: int, real: int) -> torch.Tensor:
    """First centres (B, H, K, D) float32: evenly spaced ones of the first `real` tokens of x (B, H, S, D)."""
    import torch

    return x[:, :, torch.arange(clusters, device=x.device) * real // clusters].float()


def check_inputs(x: torch.Tensor, centres: torch.Tensor, iterations: int, gone: torch.Tensor) -> None:
    """Refuse tensors that do not fit each other.

    Raises:
        ValueError: the sentence says which.
    """
    (b, h, s, d), k = x.shape, centres.shape[2]
    if iterations < 1:
        raise ValueError(f"k-means needs at least one iteration, not {iterations}.")
    if tuple(centres.shape) != (b, h, k, d) or not 1 <= k <= MOST:
        raise ValueError(f"centres must be {(b, h)} x 1 to {MOST} x {d}, not {tuple(centres.shape)}.")
    if tuple(gone.shape) != (s,):
        raise ValueError(f"gone must be ({s},), not {tuple(gone.shape)}.")


def check_order(x: torch.Tensor, order: torch.Tensor) -> None:
    """Refuse an order that does not fit x.

    Raises:
        ValueError: the sentence says why.
    """
    if order.shape[:2] != x.shape[:2] or order.shape[2] > x.shape[2]:
        raise ValueError(f"an order {tuple(order.shape)} does not fit {tuple(x.shape)}.")


def _never(context: Mapping[str, Any]) -> str | None:
    return None


def _refuse(context: Mapping[str, Any]) -> str | None:
    # Tiles of tokens are its own: blocks of attention may have any size.
    return refuse_triton({name: value for name, value in context.items() if name != "block"})


def _load(name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        return importlib.import_module(f"vivace.kernels.{OP}.op").runner(name)

    return load


register(OP, Candidate("triton", _refuse, _load("triton"), avoid_interpreted))
register(OP, Candidate("reference", _never, _load("reference")))
