"""Weights of what moves, and differences between frames as a loss."""

from __future__ import annotations

import pytest
import torch

from vivace.core.errors import ConfigError
from vivace.training.losses import motion
from vivace.training.losses.consistency import consistency_loss


def clip(batch=2, frames=5):
    """Still ground; one square that changes in every frame, more in the last sample."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 1, 4, 4).repeat(1, 1, frames, 1, 1)
    for b in range(batch):
        x[b, :, :, 1, 2] += (b + 1) * torch.arange(frames).float() ** 2
    return x


def test_differences_by_hand():
    x = torch.arange(5.0).square().view(1, 1, 5, 1, 1)
    assert motion.frame_differences(x).flatten().tolist() == [1, 3, 5, 7]
    assert motion.frame_differences(x, 2).flatten().tolist() == [4, 8, 12]
    for wrong in (x[:, :, :1], x[0], x[:, :, :2]):
        with pytest.raises(ConfigError, match="frames"):
            motion.frame_differences(wrong, 2)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 4.0])
def test_weights_have_mean_one_and_point_at_what_moves(strength):
    w = motion.motion_weights(clip(), strength=strength)
    assert w.shape == (2, 1, 5, 4, 4)
    torch.testing.assert_close(w.mean((1, 2, 3, 4)), torch.ones(2))
    torch.testing.assert_close(w.min(), torch.tensor(1 / (1 + strength)))
    if strength:
        still = w.clone()
        still[:, :, :, 1, 2] = 0.0
        assert bool((w[:, 0, :, 1, 2] > still.amax()).all())
        # Frames 0 to 4 change by 1, 3, 5 and 7: inside, a frame has the mean of the change before and after.
        ratio = (w[0, 0, :, 1, 2] - w.min()) / (w[0, 0, 0, 1, 2] - w.min())
        torch.testing.assert_close(ratio, torch.tensor([1.0, 2.0, 4.0, 6.0, 7.0]), rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(w, torch.ones_like(w))


def test_clips_without_motion_have_even_weights():
    for x in (torch.zeros(2, 3, 4, 2, 2), torch.randn(2, 3, 1, 2, 2)):
        torch.testing.assert_close(motion.motion_weights(x), torch.ones(2, 1, x.shape[2], 2, 2))
        torch.testing.assert_close(motion.motion_emphasis(x), torch.ones(2, 1, 1, 1, 1))
    with pytest.raises(ConfigError, match="negative"):
        motion.motion_weights(clip(), strength=-1.0)


def test_samples_that_move_more_weigh_more():
    w = motion.motion_emphasis(clip(3)).flatten()
    torch.testing.assert_close(w, torch.tensor([0.5, 1.0, 1.5]))  # by 1, 2 and 3
    torch.testing.assert_close(motion.motion_emphasis(clip(3), strength=0.0).flatten(), torch.ones(3))
    still = torch.cat([torch.zeros_like(clip(1)), clip(1)])
    w = motion.motion_emphasis(still, floor=0.1).flatten()
    torch.testing.assert_close(w, torch.tensor([0.1, 2.0]) / 1.05)
    assert motion.motion_emphasis(clip(1)).item() == 1.0


def test_temporal_loss_sees_changes_and_no_offsets():
    target = clip()
    offset = torch.randn(2, 3, 1, 4, 4)
    assert motion.temporal_difference_loss(target + offset, target) < 1e-10
    assert motion.temporal_difference_loss(target, target, huber=1e-3) == 0
    slow = torch.nn.Parameter(torch.tensor(0.5))
    teacher = torch.nn.Parameter(torch.tensor(1.0))
    loss = motion.temporal_difference_loss(slow * target, teacher * target)
    loss.backward()
    changes = motion.frame_differences(target)
    torch.testing.assert_close(loss.detach(), 0.25 * changes.square().mean())
    torch.testing.assert_close(slow.grad, -changes.square().mean())  # faster is better
    assert teacher.grad is None
    mask = torch.zeros(2, 1, 3, 1, 1)
    mask[1] = 1.0
    masked = motion.temporal_difference_loss(0.5 * target, target, stride=2, weight=mask)
    torch.testing.assert_close(masked, 0.25 * motion.frame_differences(target, 2)[1].square().mean())


def test_weights_go_into_other_losses():
    x, s, r = clip(), torch.tensor([0.8, 0.5]), torch.tensor([0.6, 0.3])
    output = torch.zeros_like(x, requires_grad=True)
    weight = motion.motion_weights(x) * motion.motion_emphasis(x)

    def zero(x, s):
        return torch.zeros_like(x)

    def one(x, s):
        return torch.ones_like(x)

    consistency_loss(lambda *_: output, zero, one, x, s, r, huber=0.0, weight=weight).backward()
    # The student's end is 0.2 too high at every position, and moves by -s per unit of its output.
    expected = -2 * 0.2 * s.view(-1, 1, 1, 1, 1) * weight / x.numel()
    torch.testing.assert_close(output.grad, expected.expand_as(x), rtol=1e-4, atol=1e-7)
