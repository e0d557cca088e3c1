"""SpargeAttn's filters against loops over blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.kernels.block_attention.layout import Layout
from vivace.kernels.block_attention.op import runner
from vivace.kernels.block_select.op import runner as selector
from vivace.techniques.attention.dynamic import View
from vivace.techniques.attention.sparge import SpargeAttention
from vivace.testing.interpreter import interpret

BLOCK, BLOCKS, DIM = 8, 6, 16


def view(backend: str = "gather", spread: float = 0.3) -> View:
    """Blocks of tokens around a centre each; the tokens of block 2 point everywhere."""
    make = torch.Generator().manual_seed(0)
    layout = Layout(np.arange(BLOCKS * BLOCK).reshape(BLOCKS, BLOCK))

    def blocks() -> torch.Tensor:
        centres = 2.0 * torch.randn(1, 2, BLOCKS, 1, DIM, generator=make)
        noise = torch.randn(1, 2, BLOCKS, BLOCK, DIM, generator=make)
        noise[:, :, 2] *= 30.0
        return (centres + spread * noise).flatten(2, 3)

    return View(
        blocks(), blocks(), blocks(), layout=layout, scale=DIM**-0.5, memory={},
        select=selector("reference"), attend=runner(backend),
    )  # fmt: skip


def alike(x: torch.Tensor) -> bool:
    """Mean cosine over all pairs of tokens of a block (C, D)."""
    unit = x / x.norm(dim=-1, keepdim=True)
    return float((unit @ unit.T).mean()) >= 0.5


@pytest.mark.parametrize("settings", [{"mass": 0.8}, {"share": 0.34}])
def test_blocks_are_those_of_a_loop(settings) -> None:
    seen = view()
    keep = SpargeAttention(**settings).route(seen).mask(BLOCKS)[0]
    q, k = (x[0].view(2, BLOCKS, BLOCK, DIM) for x in (seen.q, seen.k))
    for h in range(2):
        speak = [alike(k[h, j]) for j in range(BLOCKS)]
        assert not speak[2]
        for i in range(BLOCKS):
            if not alike(q[h, i]):
                assert keep[h, i].all()
                continue
            scores = {
                j: float(q[h, i].mean(0) @ k[h, j].mean(0)) / DIM**0.5 for j in range(BLOCKS) if speak[j]
            }
            whole = sum(np.exp(s) for s in scores.values())
            want, reached = {j for j in range(BLOCKS) if not speak[j]}, 0.0
            for number, j in enumerate(sorted(scores, key=lambda j: -scores[j])):
                if number >= 3 if "share" in settings else reached >= 0.8:
                    break
                want.add(j)
                reached += np.exp(scores[j]) / whole
            assert set(keep[h, i].nonzero()[:, 0].tolist()) == want


@pytest.mark.skipif(bool(interpret()), reason=interpret() or "runs")
def test_skipped_products_cost_what_they_weigh() -> None:
    """What is e^-15 of the largest is not seen; e^-0.5 is."""
    seen = view("triton")
    seen.q = 0.1 * seen.q
    exact, routes = SpargeAttention(mass=1.0).attention(seen, None)
    skipped, same = SpargeAttention(mass=1.0, skip=15.0).attention(seen, None)
    rough, _ = SpargeAttention(mass=1.0, skip=0.5).attention(seen, None)
    assert torch.equal(routes.index, same.index)
    assert float((skipped - exact).norm() / exact.norm()) < 1e-5
    assert float((rough - exact).norm() / exact.norm()) > 1e-4  # so much would be skipped that it is seen
