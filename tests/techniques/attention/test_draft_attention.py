"""DraftAttention against average pooling of frames and a sort of the whole map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from views import view_of

from vivace.core.shapes import TokenGrid
from vivace.techniques.attention.draft_attention import DraftAttention, largest
from vivace.testing.subjects import Subject

GRIDS = (TokenGrid(4, 8, 8), TokenGrid(3, 8, 12, text=10), TokenGrid(5, 8, 8, text=20, text_first=True))


def draft_by_hand(q, k, grid, side):
    """The low-resolution map of one head from its video tokens (S, D): regions of `side` in order, by pooling."""

    def pool(x):
        images = x.view(grid.frames, grid.height, grid.width, -1).permute(0, 3, 1, 2)
        return F.avg_pool2d(images, side).permute(0, 2, 3, 1).reshape(-1, x.shape[-1])

    return torch.softmax(pool(q.double()) @ pool(k.double()).T / q.shape[-1] ** 0.5, -1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_keeps_the_largest_entries_of_the_draft(grid, sparsity) -> None:
    technique = DraftAttention(sparsity=sparsity)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, grid.tokens, 3, 8, generator=generator) * 2.0 for _ in range(3))
    view = view_of(technique, grid, q, k, v)
    out, routes = technique.attention(view, None)
    # These frames are cut into squares of 4 x 4, which is what 16 tokens allow.
    side, start = (4, 4), grid.text if grid.text_first else 0
    places = torch.arange(grid.video)
    frame, row, column = (
        places // (grid.height * grid.width),
        places // grid.width % grid.height,
        places % grid.width,
    )
    region = (frame * (grid.height // 4) + row // 4) * (grid.width // 4) + column // 4

    n = grid.video // 16
    seen = torch.ones(2, 3, grid.tokens, grid.tokens, dtype=torch.bool)
    video = slice(start, start + grid.video)
    for b in range(2):
        for h in range(3):
            draft = draft_by_hand(q[b, video, h], k[b, video, h], grid, side)
            entries = sorted(((float(draft[i, j]), i, j) for i in range(n) for j in range(n)), reverse=True)
            kept = {(i, j) for _, i, j in entries[: round((1 - sparsity) * n * n + 0.4999)]}
            kept |= {(i, int(draft[i].argmax())) for i in range(n)}
            blocks = torch.tensor([[(i, j) in kept for j in range(n)] for i in range(n)])
            assert torch.equal(routes.mask(view.layout.blocks)[b, h, :n, :n], blocks)
            seen[b, h, video, video] = blocks[region][:, region]
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen).transpose(
        1, 2
    )
    torch.testing.assert_close(view.layout.restore(out), want, rtol=1e-4, atol=1e-5)


def test_a_region_is_8_by_16_of_one_frame_where_that_fits() -> None:
    grid = TokenGrid(3, 48, 80)
    layout = DraftAttention().layout(grid)
    assert (layout.block, layout.blocks, layout.padded) == (128, 90, False)
    for slots in layout.slots:
        frame, rest = divmod(slots, 48 * 80)
        row, column = divmod(rest, 80)
        spans = [int(x.max() - x.min()) + 1 for x in (frame, row, column)]
        assert spans == [1, 8, 16]


def test_rows_share_the_heads_budget() -> None:
    """One row with large entries takes what is left after every row has its best."""
    draft = torch.full((1, 1, 4, 4), 0.01)
    draft[..., 0, :] = torch.tensor([0.9, 0.8, 0.7, 0.6])
    draft[..., 1:, 3] = 0.02
    keep = largest(draft, 0.25)[0, 0]
    assert keep[0].all()
    assert torch.equal(keep[1:], torch.tensor([[False, False, False, True]] * 3))


def test_more_sparsity_visits_fewer_pairs() -> None:
    subject = Subject("hunyuan", {"num_frames": 17, "height": 64, "width": 64})
    pairs = [subject.run(DraftAttention(sparsity=s)).receipt.attention_pairs for s in (0.0, 0.3, 0.6, 0.9)]
    assert pairs == sorted(set(pairs), reverse=True)
