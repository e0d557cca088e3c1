"""Adversarial objectives: losses of generator and discriminator, penalties, features, and a head on a transformer.

Logits have any shape with samples first; every loss is their mean in float32. In a generator's loss gradient goes
through the discriminator to the clip: freeze its parameters before (`requires_grad_(False)`), or they collect some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vivace.core.errors import ConfigError


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """`relu(1 - real) + relu(1 + fake)` (arXiv:1705.02894), scalar."""
    return functional.relu(1.0 - real.float()).mean() + functional.relu(1.0 + fake.float()).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """`-fake`, scalar: gradient also where the discriminator is sure."""
    return -fake.float().mean()


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Cross entropy `softplus(-real) + softplus(fake)` (arXiv:1406.2661), scalar."""
    return functional.softplus(-real.float()).mean() + functional.softplus(fake.float()).mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """`softplus(-fake)`, scalar; of APT and DMD2."""
    return functional.softplus(-fake.float()).mean()


def relativistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """`softplus(fake - real)` on pairs (R3GAN, arXiv:2501.05441; AAPT, arXiv:2506.09350), scalar.

    Only differences count, so that no clip is a fake by itself. To be used with penalties on real and fake clips.
    """
    return functional.softplus(fake.float() - real.float()).mean()


def relativistic_generator(real: Tensor, fake: Tensor) -> Tensor:
    """`softplus(real - fake)` on pairs, scalar; the real logits get no gradient."""
    return functional.softplus(real.detach().float() - fake.float()).mean()


def approximated_penalty(
    judge: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    deviation: float = 0.1,
    noise: Tensor | None = None,
    logits: Tensor | None = None,
    relative: bool = False,
) -> Tensor:
    """APT's R1 without second derivatives (arXiv:2501.08316): `|D(x) - D(x + deviation noise)|^2`, scalar.

    For small deviations its mean over noise is `deviation^2 |dD/dx|^2`. With real clips this is R1, with fakes R2.

    Args:
        judge: clips (B, ...) to logits.
        deviation: of the noise in latents; the paper's is 0.01 for pictures and 0.1 for clips.
        noise: (B, ...); drawn otherwise.
        logits: of x, where they are known.
        relative: over `deviation^2`, so that weights of exact penalties carry over.

    Raises:
        ConfigError: the deviation is not positive.
    """
    if deviation <= 0:
        raise ConfigError(f"the penalty needs a positive deviation, not {deviation}.")
    x = x.detach()
    moved = x + deviation * (torch.randn_like(x) if noise is None else noise)
    change = (judge(x) if logits is None else logits).float() - judge(moved).float()
    square = change.square().mean()
    return square / deviation**2 if relative else square


def feature_matching(fake: Sequence[Tensor], real: Sequence[Tensor], *, relative: bool = False) -> Tensor:
    """Mean squared difference of a network's hidden states, mean over layers, scalar; real ones get no gradient.

    Args:
        relative: every layer over the mean square of its real states, as deep layers of transformers are far larger.

    Raises:
        ConfigError: not the same number of layers, or none.
    """
    if not fake or len(fake) != len(real):
        raise ConfigError(f"features of as many layers are needed, not {len(fake)} and {len(real)}.")
    errors = []
    for a, b in zip(fake, real, strict=True):
        target = b.detach().float()
        error = (a.float() - target).square().mean()
        errors.append(error / target.square().mean().clamp_min(1e-12) if relative else error)
    return torch.stack(errors).mean()


class DiscriminatorHead(nn.Module):
    """Logits from hidden states of a transformer, a list of (B, N, C), one branch per state.

    With `attention` one learned query per branch looks over all tokens, the branches' answers are joined, and there is
    one logit per clip (B, 1), as in APT. With `token` every token of every branch is judged by itself,
    (B, branches x N), which says where a clip is unreal. The states come from the caller: a frozen teacher's blocks, or
    those of a copy that learns too. The head sees neither time nor caption but through them.

    Args:
        width: C. branches: states per clip. pooling: `attention` or `token`. heads: of the attention. hidden: width
            inside, C by default.

    Raises:
        ConfigError: another pooling, or widths that heads do not divide.
    """

    def __init__(
        self,
        width: int,
        branches: int = 1,
        *,
        pooling: str = "attention",
        heads: int = 4,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden or width
        if pooling not in ("attention", "token"):
            raise ConfigError(f"a head pools by 'attention' or judges each 'token', not '{pooling}'.")
        if branches < 1 or hidden % heads:
            raise ConfigError(f"{heads} heads do not divide a width of {hidden}, or there is no branch.")
        self.pooling, self.heads, self.branches = pooling, heads, branches
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(branches))
        if pooling == "token":
            self.judges = nn.ModuleList(
                nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
                for _ in range(branches)
            )
            return
        self.query = nn.Parameter(torch.randn(branches, 1, hidden) * hidden**-0.5)
        self.keys = nn.ModuleList(nn.Linear(width, 2 * hidden) for _ in range(branches))
        self.join = nn.Sequential(
            nn.LayerNorm(branches * hidden),
            nn.Linear(branches * hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Logits float32, (B, 1) or (B, branches x N), of hidden states (B, N, C).

        Raises:
            ConfigError: not as many states as branches.
        """
        if len(states) != self.branches:
            raise ConfigError(f"this head is for {self.branches} hidden states, not {len(states)}.")
        tokens = [norm(state.float()) for norm, state in zip(self.norms, states, strict=True)]
        if self.pooling == "token":
            return torch.cat(
                [judge(x).float().squeeze(-1) for judge, x in zip(self.judges, tokens, strict=True)], 1
            )
        answers = []
        for query, project, x in zip(self.query, self.keys, tokens, strict=True):
            key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in project(x).chunk(2, -1))
            asked = query.to(key).expand(len(x), -1, -1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            answer = functional.scaled_dot_product_attention(asked, key, value)
            answers.append(answer.transpose(1, 2).flatten(1))
        return self.join(torch.cat(answers, -1)).float()
