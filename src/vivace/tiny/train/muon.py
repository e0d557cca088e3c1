"""Muon for the matrices of a network, AdamW for the rest, in few kernel launches.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) steps along the orthogonalised momentum of each weight
matrix. Here all matrices of one shape are stacked, so the Newton-Schulz iteration is a handful of batched products for
the whole network; convolution kernels count as matrices (out, in x taps). Updates are scaled to the size of an AdamW
step (Liu et al. 2025, arXiv:2502.16982), so one learning rate has the same meaning for both kinds of parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration: (N, R, C) -> the same with singular values pushed to about one, in bf16 on GPUs."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon over parameters of two or more dimensions; every group of equal (out, in) shape is one batched update.

    `lr` is an AdamW-like rate: the update has root mean square `0.2 lr` per element. Parameters need gradients at
    every step (frozen ones must not be passed).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in params:
            by_shape[(parameter.shape[0], parameter[0].numel())].append(parameter)
        groups = [{"params": list(group)} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every stack; `closure` is not supported and must be None."""
        for group in self.param_groups:
            parameters = group["params"]
            gradient = torch.stack([p.grad.flatten(1) for p in parameters]).float()
            state = self.state[parameters[0]]  # one momentum buffer for the stack, kept with its first member
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradient)
            buffer = state["momentum"].lerp_(gradient, 1.0 - group["momentum"])
            update = orthogonalise(gradient.lerp(buffer, group["momentum"])).float()
            scale = 0.2 * max(update.shape[1:]) ** 0.5
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
            steps = [u.view_as(p) for u, p in zip(update.contiguous().unbind(0), parameters, strict=True)]
            torch._foreach_add_(parameters, steps, alpha=-group["lr"] * scale)


class SplitOptimizer:
    """Muon for hidden matrices and AdamW for the rest, with one schedule factor and one state dict.

    `matrices` are stepped by Muon at `muon_lr`, `others` by AdamW at `adam_lr`.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        muon_lr: float,
        adam_lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        fused = others[0].is_cuda
        self.adam = torch.optim.AdamW(
            others, adam_lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused
        )
        self.muon = Muon(matrices, muon_lr, weight_decay=weight_decay) if matrices else None
        self._members = [self.adam] + ([self.muon] if self.muon else [])
        self._base = [[g["lr"] for g in member.param_groups] for member in self._members]

    def step(self, factor: float) -> None:
        """One update with every learning rate times `factor`; gradients are freed afterwards."""
        for member, base in zip(self._members, self._base, strict=True):
            for group, lr in zip(member.param_groups, base, strict=True):
                group["lr"] = lr * factor
            member.step()
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [member.state_dict() for member in self._members]

    def load_state_dict(self, state: list[dict]) -> None:
        for member, part in zip(self._members, state, strict=True):
            member.load_state_dict(part)


def split_parameters(
    module: nn.Module, exclude: tuple[str, ...] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices, others): weights with two or more dimensions, without the names that contain one of `exclude`."""
    matrices, others = [], []
    for name, parameter in module.named_parameters():
        hidden = (
            parameter.ndim >= 2
            and name.endswith("weight")
            and min(parameter.shape[0], parameter[0].numel()) > 1
        )
        (matrices if hidden and not any(word in name for word in exclude) else others).append(parameter)
    return matrices, others
