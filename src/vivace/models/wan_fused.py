"""A Wan block on fused 8-bit layers: norms, modulation, gates and residuals inside the roundings and products.

What diffusers' `WanTransformerBlock` computes (Wan, arXiv 2503.20314; adaLN as in DiT, arXiv 2212.09748), with
`[...]` for one pass over memory:

    q, k, v  = product[round[norm(x) (1 + scale) + shift]]          self-attention; the rounded input is shared
    x        = product[round[attended]] * gate + x
    q        = product[round[norm(x)]]                              cross-attention to text
    x        = product[round[attended]] + x
    x        = product[round[gelu(product[round[norm(x) (1 + scale) + shift]])]] * gate + x

The attention modules are called as ever, only with x itself and for the new x: their processors, whoever set them,
run as they are. Sums that diffusers rounds to the stream's type before they meet the residual stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vivace.kernels.quantise_rows.spec import Before
from vivace.kernels.scaled_matmul.spec import After
from vivace.models.fused_parts import FusedLinear

CHANGED = (
    "{what} has a forward of its own (a hook, or another package's wrapper), which expects what the model's own block "
    "hands it"
)


def fused_forward(block: Any) -> Callable[..., torch.Tensor] | str | None:
    """The forward of a WanTransformerBlock whose linears may have become `FusedLinear`s.

    Returns:
        What takes the place of `block.forward`; the reason why nothing may; None where no part of the block has all the
        layers it needs.
    """
    watched = {"the block": block, "self-attention": block.attn1, "cross-attention": block.attn2}
    watched["feed-forward"] = block.ffn
    for what, module in watched.items():
        if "forward" in vars(module):
            return CHANGED.format(what=what)
        if getattr(module, "fused_projections", False):
            return f"the projections of {what} were joined (unfuse_qkv_projections() parts them)"
    for norm, affine in ((block.norm1, False), (block.norm3, False), (block.norm2, None)):
        if not _plain_norm(norm, affine):
            return f"{type(norm).__name__} is no layer norm that the block is known with"
    made = FusedWanBlock(block)
    return made.forward if made.parts else None


def _plain_norm(norm: nn.Module, affine: bool | None) -> bool:
    if affine is None and isinstance(norm, nn.Identity):
        return True
    if not isinstance(norm, nn.LayerNorm) or "forward" in vars(norm):
        return False
    return affine is None or (norm.weight is not None) == affine


class FusedWanBlock:
    """A block and its parts that are fused: `self`, `cross`, `ffn`. The others run as the model has them."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self.self_in = _layers(block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        self.self_out = _layers(block.attn1.to_out[0])
        self.cross_in, self.cross_out = _layers(block.attn2.to_q), _layers(block.attn2.to_out[0])
        self.up, self.down = _layers(block.ffn.net[0].proj), _layers(block.ffn.net[2])
        shared = len({id(layer.rounding) for layer in self.self_in}) == 1
        self.attends = bool(shared and self.self_out)
        self.crosses = bool(self.cross_in and self.cross_out)
        self.feeds = bool(self.up and self.down)
        named = {"self": self.attends, "cross": self.crosses, "ffn": self.feeds}
        self.parts = tuple(name for name, there in named.items() if there)
        norm = block.norm2
        self.cross_norm = "none" if isinstance(norm, nn.Identity) else "layer"
        # Not by the norm's own call, before which offloading would bring them: they stay, as they are small.
        self.affine = [
            None if t is None else t.detach()
            for t in (getattr(norm, "weight", None), getattr(norm, "bias", None))
        ]

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: torch.Tensor,
    ) -> torch.Tensor:
        """See the module. hidden_states (B, S, C); temb (B, 6, C), or (B, S, 6, C) with a timestep for every token."""
        block, x = self.block, hidden_states
        axis = temb.ndim - 2
        shift, scale, gate, more_shift, more_scale, last_gate = (
            t if axis == 2 else t[:, None]
            for t in (block.scale_shift_table + temb.float()).expand(len(x), *temb.shape[1:]).unbind(axis)
        )
        if self.attends:
            self.self_in[0].rounding.before = Before("layer", block.norm1.eps, scale=scale, shift=shift)
            self.self_out[0].after = After(residual=x.flatten(0, 1), gate=gate.flatten(0, 1))
            x = block.attn1(x, None, None, rotary_emb)
        else:
            y = (block.norm1(x.float()) * (1 + scale) + shift).type_as(x)
            x = (x.float() + block.attn1(y, None, None, rotary_emb) * gate).type_as(x)
        if self.crosses:
            weight, bias = (None if t is None else t.to(x.device) for t in self.affine)
            self.cross_in[0].rounding.before = Before(self.cross_norm, self._cross_eps, weight, bias)
            self.cross_out[0].after = After(residual=x.flatten(0, 1))
            x = block.attn2(x, encoder_hidden_states, None, None)
        else:
            x = x + block.attn2(block.norm2(x.float()).type_as(x), encoder_hidden_states, None, None)
        if self.feeds:
            self.up[0].rounding.before = Before("layer", block.norm3.eps, scale=more_scale, shift=more_shift)
            self.down[0].after = After(residual=x.flatten(0, 1), gate=last_gate.flatten(0, 1))
            return block.ffn(x)
        y = (block.norm3(x.float()) * (1 + more_scale) + more_shift).type_as(x)
        return (x.float() + block.ffn(y).float() * last_gate).type_as(x)

    @property
    def _cross_eps(self) -> float:
        return getattr(self.block.norm2, "eps", 1e-6)


def _layers(*linears: nn.Module) -> list[FusedLinear]:
    """The linears, where all of them are fused ones; else none."""
    found = [x for x in linears if isinstance(x, FusedLinear)]
    return found if len(found) == len(linears) else []
