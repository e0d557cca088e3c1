"""A second time for a transformer: how far a step goes, so that an evaluation may be a flow map's mean velocity.

A flow map (MeanFlow, arXiv 2505.13447, equations 3 and 4; flow maps, arXiv 2406.07507) is told where a step begins, s,
and where it ends, r. The model's own time embedder keeps s; a second one of its form embeds 1000 (s - r) with the same
sinusoidal projection, and the sum goes on:

    e = E(1000 s) + W2 silu(W1 p(1000 (s - r)) + b1) + b2

At first W2 and b2 are zero, so that the model is what it was. Training registers it on the transformer (`attach`), with
the names `second_time.linear_1|2.weight|bias` in its state dict; a session lays it over the embedder and takes it off
again (`install`). Who samples sets `of(transformer).gap` before every evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vivace.core.errors import ModelError
from vivace.core.surgery import Surgery

NAME = "second_time"
SCALE = 1000.0
"""The transformers take times from 0 to this."""
_PLACES: Mapping[str, tuple[str, str]] = {
    "WanTransformer3DModel": ("condition_embedder.time_embedder", "condition_embedder.timesteps_proj"),
    "LTXVideoTransformer3DModel": ("time_embed.emb.timestep_embedder", "time_embed.emb.time_proj"),
    "HunyuanVideoTransformer3DModel": ("time_text_embed.timestep_embedder", "time_text_embed.time_proj"),
    "CogVideoXTransformer3DModel": ("time_embedding", "time_proj"),
}
"""Transformer class -> its time embedder (linear, SiLU, linear) and its sinusoidal projection."""


class SecondTime(nn.Module):
    """The second embedder. `gap` is s - r in noise levels: one number, or (B,) with one for each sample."""

    def __init__(self, features: int, width: int, projection: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)
        self.gap: float | Tensor = 0.0
        # The model's own, and no part of this module.
        self.__dict__["_projection"] = projection

    def forward(self) -> Tensor:
        """The embedding (1 or B, width) of the gap."""
        weight = self.linear_1.weight
        gap = torch.as_tensor(self.gap, dtype=torch.float32, device=weight.device).reshape(-1)
        wave = self.__dict__["_projection"](SCALE * gap)
        return self.linear_2(F.silu(self.linear_1(wave.to(weight.dtype))))

    def added(self, time: Tensor) -> Tensor:
        """A time embedding (B, width), (B, S, width) or (B S, width) with the second one on it."""
        if self.linear_1.weight.device != time.device:
            self.to(time.device)
        own = self().to(time.dtype)
        if time.ndim == 3:
            own = own[:, None]
        elif own.shape[0] not in (1, time.shape[0]):
            own = own.repeat_interleave(time.shape[0] // own.shape[0], dim=0)
        return time + own

    def _after(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return self.added(out)


def _parts(transformer: Any) -> tuple[Any, Any]:
    """(time embedder, sinusoidal projection).

    Raises:
        ModelError: the class has no known time embedder.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in _PLACES:
            embedder, projection = _PLACES[cls.__name__]
            return transformer.get_submodule(embedder), transformer.get_submodule(projection)
    raise ModelError(
        f"{type(transformer).__name__} has no time embedder that Vivace knows, so no second time."
    )


def build(transformer: Any) -> SecondTime:
    """One that changes nothing yet, of the embedder's type and on its device; `linear_1` starts as the embedder's."""
    embedder, projection = _parts(transformer)
    first: Any = embedder.linear_1
    with torch.random.fork_rng(devices=[]):  # the layers' own first values are not used
        second = SecondTime(first.in_features, first.out_features, projection)
    second.to(first.weight)
    if not first.weight.is_meta:
        with torch.no_grad():
            second.linear_1.weight.copy_(first.weight)
            second.linear_1.bias.copy_(first.bias)
    return second


def attach(transformer: Any) -> SecondTime:
    """Register one on a transformer that is to be trained; returns it. `detach` takes it off.

    It moves, trains, is saved and is copied with the transformer.

    Raises:
        ModelError: the transformer has one, or no time embedder is known.
    """
    if of(transformer) is not None:
        raise ModelError("this transformer has a second time embedding already.")
    second = build(transformer)
    _parts(transformer)[0].register_forward_hook(second._after)
    transformer.add_module(NAME, second)
    return second


def detach(transformer: Any) -> None:
    """Take off what `attach` registered, also from a copy of the transformer."""
    second, hooks = transformer._modules.pop(NAME), _parts(transformer)[0]._forward_hooks
    for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is second]:
        del hooks[key]


def install(edit: Surgery, transformer: Any, state: Mapping[str, Tensor]) -> SecondTime:
    """Lay one with the weights `linear_1.weight` ... over a transformer's time embedder, through the ledger."""
    second = build(transformer)
    second.load_state_dict({k: v.to(second.linear_1.weight) for k, v in state.items()})
    second.requires_grad_(False)

    def make(old: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: second.added(old(*args, **kwargs))

    edit.wrap(_parts(transformer)[0], make)
    edit.set(transformer, NAME, second)
    return second


def of(transformer: Any) -> SecondTime | None:
    """A transformer's second time embedding; None where it has none."""
    return getattr(transformer, NAME, None)


def shapes(transformer: Any) -> dict[str, tuple[int, ...]]:
    """Names in the state dict and shapes that one for this transformer has; empty where none is known."""
    try:
        first: Any = _parts(transformer)[0].linear_1
    except ModelError:
        return {}
    features, width = first.in_features, first.out_features
    own = {"1.weight": (width, features), "1.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    return {f"{NAME}.linear_{name}": size for name, size in own.items()}
