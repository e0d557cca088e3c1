"""The bank of clips and its crops."""

from __future__ import annotations

import pytest
import torch

from vivace.tiny.train.clips import ClipBank, ClipShape, to_frames, to_model
from vivace.tiny.train.latents import pool_mask
from vivace.world.splits import train_seeds

CPU = torch.device("cpu")
SHAPE = ClipShape(frames=5, height=48, width=64, supersample=1)


@pytest.fixture
def bank() -> ClipBank:
    bank = ClipBank(SHAPE, size=6, portion=2, stream=7, device=CPU)
    bank.fill()
    return bank


def test_refresh_replaces_the_oldest(bank):
    before = bank.video.clone()
    bank.refresh()
    assert torch.equal(bank.video[2:], before[2:])
    assert torch.equal(bank.video[:2], SHAPE.render(train_seeds(6, 2, stream=7), CPU)[0])


def test_a_resumed_bank_holds_the_same_clips(bank):
    bank.refresh()
    bank.refresh()
    again = ClipBank(SHAPE, size=6, portion=2, stream=7, device=CPU)
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.video, bank.video)
    assert torch.equal(again.mask, bank.mask)
    assert again.rendered == bank.rendered


def test_crops_are_pieces_of_the_clips_and_half_show_objects(bank):
    torch.manual_seed(0)
    bank.video[:] = (
        torch.arange(64, dtype=torch.uint8)[:, None] + torch.arange(48, dtype=torch.uint8)[:, None, None]
    )
    bank.mask[:] = False
    bank.mask[:, :, 30:34, 40:44] = True
    video, mask = bank.crops(32, frames=3, side=16)
    assert video.shape == (32, 3, 16, 16, 3)
    assert mask.shape == (32, 3, 16, 16)
    steps = video.to(torch.int16).diff(dim=3)
    assert (steps == 1).all(), "neighbours in a crop are neighbours in the clip"
    share = mask.flatten(1).float().mean(dim=1)
    assert (share[:16] > 0).all()
    assert share[:16].mean() > 2 * share[16:].mean()


def test_a_portion_that_does_not_divide_the_bank_is_refused():
    with pytest.raises(ValueError, match="use a divisor"):
        ClipBank(SHAPE, size=5, portion=2, stream=0, device=CPU)


def test_values_survive_the_way_to_the_model_and_back():
    video = torch.randint(0, 256, (2, 3, 4, 5, 3), dtype=torch.uint8)
    assert torch.equal(to_frames(to_model(video)), video)


def test_masks_are_pooled_like_the_latents():
    mask = torch.zeros(1, 9, 16, 16, dtype=torch.bool)
    mask[0, 0, 3, 12] = True  # first frame stands alone
    mask[0, 8, 15, 0] = True
    pooled = pool_mask(mask, 8)
    assert pooled.shape == (1, 3, 2, 2)
    assert pooled[0].nonzero().tolist() == [[0, 0, 1], [2, 1, 0]]
