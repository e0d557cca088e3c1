"""Tokens into blocks and back: both backends against loops over single slots, and the gradients of each."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from vivace.kernels.api import select
from vivace.kernels.arrange_blocks.op import arrange_blocks, restore_blocks
from vivace.kernels.arrange_blocks.spec import OP
from vivace.kernels.block_attention.layout import Layout
from vivace.testing.interpreter import interpret

TRITON = pytest.param("triton", marks=pytest.mark.skipif(bool(interpret()), reason=interpret() or "runs"))
BACKENDS = ["reference", TRITON]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclasses.dataclass(frozen=True)
class Setting:
    """`sizes` are the tokens of every block, the last `text` of them text's."""

    sizes: tuple[int, ...]
    block: int
    dim: int = 8
    batch: int = 2
    heads: int = 3
    text: int = 0
    shuffled: bool = True


SETTINGS = (
    Setting((8, 8, 8, 3), 8),
    Setting((64, 17), 64, 16, batch=1),
    Setting((16, 0, 5, 16), 16, 24),  # a block without tokens, and channels that are no power of two
    Setting((48, 40), 48),  # nor is the block
    Setting((16, 16, 11, 16, 2), 16, text=2),
    Setting((1,), 16, 32, batch=1, heads=1),
    Setting((16, 16), 16, shuffled=False),
)


def layout_of(s: Setting, backend: str = "reference") -> Layout:
    total = sum(s.sizes)
    order = np.random.default_rng(7).permutation(total) if s.shuffled else np.arange(total)
    slots = np.full((len(s.sizes), s.block), -1)
    for n, (size, end) in enumerate(zip(s.sizes, np.cumsum(s.sizes), strict=True)):
        slots[n, :size] = order[end - size : end]
    return Layout(slots, s.text, backend=backend)


def tokens(s: Setting, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """(B, S, H, D) inside a larger tensor whose other numbers are poison."""
    make = torch.Generator().manual_seed(seed)
    wide = torch.full((s.batch, sum(s.sizes) + 2, s.heads, s.dim + 3), math.nan)
    inner = wide[:, 1:-1, :, : s.dim]
    inner.copy_(torch.randn(inner.shape, generator=make))
    return wide.to(dtype)[:, 1:-1, :, : s.dim]


def by_hand(layout: Layout, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slot after slot, means and cosines in float64."""
    (n, c), (b, _, h, d) = layout.slots.shape, x.shape
    blocks = torch.zeros(b, h, n * c, d, dtype=x.dtype)
    mean, alike = torch.zeros(b, h, n, d, dtype=torch.float64), torch.zeros(b, h, n, dtype=torch.float64)
    for block in range(n):
        here = layout.slots[block][layout.slots[block] >= 0]
        for slot, token in enumerate(here):
            blocks[:, :, block * c + slot] = x[:, token]
        for i, j in np.ndindex(b, h):
            rows = x[i, here, j].double()
            if len(here):
                mean[i, j, block] = rows.mean(0)
                pairs = [torch.cosine_similarity(p, q, 0) for p in rows for q in rows]
                alike[i, j, block] = torch.stack(pairs).mean()
    return blocks, mean, alike


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_token_stands_in_its_slot(setting, backend) -> None:
    layout = layout_of(setting)
    for dtype in DTYPES if setting is SETTINGS[0] else DTYPES[:1]:
        x = tokens(setting, dtype)
        want, want_mean, want_alike = by_hand(layout, x)
        blocks, mean, alike = arrange_blocks(x, layout.places, True, True, True, backend)
        assert torch.equal(blocks, want)
        assert mean.dtype == alike.dtype == torch.float32
        torch.testing.assert_close(mean.double(), want_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alike.double(), want_alike, rtol=1e-4, atol=1e-5)
        assert torch.equal(restore_blocks(blocks, None, layout.places, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_wanted_comes_back(backend) -> None:
    layout, x = layout_of(SETTINGS[0]), tokens(SETTINGS[0])
    whole = arrange_blocks(x, layout.places, True, True, True, backend)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        for part, full, asked in zip(
            arrange_blocks(x, layout.places, *wanted, backend), whole, wanted, strict=True
        ):
            assert torch.equal(part, full) if asked else part.numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_read_on_the_way_back(backend) -> None:
    s = SETTINGS[0]
    layout, x = layout_of(s), tokens(s)
    blocks = layout.arrange(x)
    blocks[:, :, layout.gone] = math.nan
    assert torch.equal(restore_blocks(blocks, None, layout.places, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[2], SETTINGS[4], SETTINGS[6]])
def test_each_is_the_others_transpose(setting, backend) -> None:
    """<arrange(x), (y, m)> = <x, restore(y, m)>, and autograd says the same, twice over."""
    layout = layout_of(setting)
    x = tokens(setting).clone().requires_grad_()
    make = torch.Generator().manual_seed(2)
    blocks, mean, alike = arrange_blocks(x, layout.places, True, True, True, backend)
    assert not alike.requires_grad
    y = torch.randn(blocks.shape, generator=make, requires_grad=True)
    m = torch.randn(mean.shape, generator=make, requires_grad=True)
    inner = (blocks * y).sum() + (mean * m).sum()
    back = restore_blocks(y, m, layout.places, backend=backend)
    torch.testing.assert_close(inner, (x * back).sum(), rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad(inner, x, create_graph=True)[0]
    torch.testing.assert_close(got, back, rtol=1e-5, atol=1e-6)
    # The gradient's own gradient: back is linear in y and m.
    aim = torch.randn(x.shape, generator=make)
    for found, want in zip(
        torch.autograd.grad((got * aim).sum(), [y, m]),
        arrange_blocks(aim, layout.places, True, True, False, backend)[:2],
        strict=True,
    ):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_means_alone(backend) -> None:
    s = SETTINGS[0]
    layout = layout_of(s)
    x = tokens(s, torch.bfloat16).clone().requires_grad_()
    mean = arrange_blocks(x, layout.places, False, True, False, backend)[1]
    m = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad((mean * m).sum(), x)[0]
    assert got.dtype == torch.bfloat16
    block = layout.back // s.block
    want = m.transpose(1, 2)[:, block] / layout.counts[block][:, None, None]
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[4], SETTINGS[6]])
def test_a_layout_has_means_of_the_same_pass(setting, backend) -> None:
    layout, x = layout_of(setting, backend), tokens(setting)
    assert layout.moves.name == backend
    assert layout.fused == (backend == "triton")
    blocks, mean, alike = layout.arrange_pooled(x, True)
    assert torch.equal(blocks, layout.arrange(x))
    torch.testing.assert_close(mean, layout.mean(blocks), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean, layout_of(setting).mean(blocks), rtol=1e-5, atol=1e-6)
    assert alike is not None
    assert alike.shape == mean.shape[:3]
    assert layout.arrange_pooled(x)[2] is None
    assert torch.equal(layout.restore(blocks), x)
    if layout.in_order:
        assert blocks.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_means_of_arranged_blocks_have_gradients(backend) -> None:
    layout, x = layout_of(SETTINGS[0], backend), tokens(SETTINGS[0]).clone().requires_grad_()
    mean = layout.mean(layout.arrange(x))
    m = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad((mean * m).sum(), x)[0]
    torch.testing.assert_close(got, restore_blocks(None, m, layout.places), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_node_each_in_a_compiled_graph(backend) -> None:
    layout, x = layout_of(SETTINGS[0], backend), tokens(SETTINGS[0]).clone()

    def there_and_back(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks, mean, _ = layout.arrange_pooled(x * 2)
        return layout.restore(blocks + 1), mean + layout.mean(blocks)

    compiled = torch.compile(there_and_back, backend="eager", fullgraph=True)
    for got, want in zip(compiled(x), there_and_back(x), strict=True):
        torch.testing.assert_close(got, want)
    places = layout.places.slots, layout.places.back, layout.places.counts
    for op, args in (
        (torch.ops.vivace.arrange_blocks, (x, *places, True, True, True, "reference")),
        (torch.ops.vivace.arrange_blocks, (x, *places, False, True, False, "reference")),
        (
            torch.ops.vivace.restore_blocks,
            (layout.arrange(x), None, *places, torch.float32, "reference"),
        ),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused() -> None:
    layout, x = layout_of(SETTINGS[0]), tokens(SETTINGS[0])
    with pytest.raises(ValueError, match="27 tokens in 4 blocks of 8"):
        arrange_blocks(x[:, :-1], layout.places)
    with pytest.raises(ValueError, match="27 tokens in 4 blocks of 8"):
        restore_blocks(layout.arrange(x)[:, :, :-1], None, layout.places)
    with pytest.raises(ValueError, match="means of"):
        restore_blocks(None, torch.zeros(2, 3, 5, 8), layout.places)
    with pytest.raises(ValueError, match="blocks, means or both"):
        restore_blocks(None, None, layout.places)


def test_the_choice_says_why(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert select(OP, device="cuda").name == "triton"
    chosen = select(OP, device="cpu")
    assert chosen.name == "reference"
    assert "needs a GPU" in chosen.why
