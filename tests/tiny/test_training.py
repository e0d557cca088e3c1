"""Training runs: they learn, they resume exactly, and their schedule follows the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vivace.core.errors import WeightsError
from vivace.tiny.build import build_pipeline
from vivace.tiny.train import text_to_video, vae
from vivace.tiny.train.clips import ClipBank, ClipShape
from vivace.tiny.train.common import (
    AveragedWeights,
    Budget,
    Processes,
    load_checkpoint,
    warm_cosine,
    warm_linear,
)
from vivace.tiny.train.latents import LatentSet

ALONE = Processes(rank=0, world=1, device=torch.device("cpu"))
SHAPE = ClipShape(frames=5, height=32, width=32, supersample=1)
STAGES = [vae.Stage.parse("0.5:5x16x4"), vae.Stage.parse("1:5x32x2")]


class Interrupted(Exception):
    """Raised in place of a power cut."""


def vae_trainer(small) -> vae.VaeTrainer:
    bank = ClipBank(SHAPE, size=4, portion=2, stream=0, device=ALONE.device)
    return vae.VaeTrainer(ALONE, bank, conv="direct", compile=False, config=small)


def flow_trainer(small) -> text_to_video.FlowTrainer:
    return text_to_video.FlowTrainer(ALONE, build_pipeline(0, small), compile=False)


def latent_set(words: int) -> LatentSet:
    generator = torch.Generator().manual_seed(0)
    return LatentSet(
        torch.randn(4, 8, 2, 4, 4, generator=generator).bfloat16(),
        torch.zeros(4, 2, 4, 4, dtype=torch.uint8),
        torch.randint(3, words, (4, 2, 64), generator=generator).to(torch.int16),
    )


def cut_after(trainer, steps: int):
    """The trainer, raising `Interrupted` at the step after `steps`."""
    original, count = trainer.step, 0

    def step(*arguments):
        nonlocal count
        count += 1
        if count > steps:
            raise Interrupted
        return original(*arguments)

    trainer.step = step
    return trainer


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_vae_training_resumes_exactly(tmp_path: Path, small):
    def fit(trainer, name):
        return vae.fit(trainer, STAGES, Budget(steps=6), tmp_path / name, save_every=0.0)

    whole = vae_trainer(small)
    record = fit(whole, "whole")
    assert record["steps"] == 6
    assert record["curve"][-1][0] == 6
    with pytest.raises(Interrupted):
        fit(cut_after(vae_trainer(small), 4), "cut")
    resumed = vae_trainer(small)
    fit(resumed, "cut")
    assert torch.equal(weights(whole.vae), weights(resumed.vae))
    assert all(torch.equal(a, b) for a, b in zip(whole.average.values, resumed.average.values, strict=True))


def test_flow_training_resumes_exactly(tmp_path: Path, small):
    def fit(trainer, name):
        data = latent_set(len(trainer.pipeline.tokenizer))
        return text_to_video.fit(trainer, data, 3, Budget(steps=5), tmp_path / name, save_every=0.0)

    whole = flow_trainer(small)
    fit(whole, "whole")
    with pytest.raises(Interrupted):
        fit(cut_after(flow_trainer(small), 2), "cut")
    resumed = flow_trainer(small)
    fit(resumed, "cut")
    assert torch.equal(weights(whole.parts), weights(resumed.parts))


def test_the_vae_learns(small):
    trainer = vae_trainer(small)
    trainer.bank.fill()
    errors = [float(trainer.step(STAGES[0], 0.04 + 0.4 * i / 60)[1]) for i in range(60)]
    assert sum(errors[-8:]) < 0.75 * sum(errors[:8]), "the error on objects falls"


def test_the_flow_learns_what_the_text_decides(small):
    """Two clips, two prompts: after some steps the prediction from pure noise depends on the prompt, rightly."""
    trainer = flow_trainer(small)
    data = LatentSet(
        torch.stack([torch.full((8, 2, 4, 4), 1.0), torch.full((8, 2, 4, 4), -1.0)]).bfloat16(),
        torch.zeros(2, 2, 4, 4, dtype=torch.uint8),
        torch.tensor([[[3] + [1] + [0] * 62], [[9] + [1] + [0] * 62]], dtype=torch.int16),
    )
    first = sum(float(trainer.step(data, 8, 0.03)) for _ in range(5))
    for _ in range(90):
        trainer.step(data, 8, 0.2)
    last = sum(float(trainer.step(data, 8, 0.2)) for _ in range(5))
    assert last < 0.5 * first


def test_flow_times_cover_the_range_evenly():
    torch.manual_seed(0)
    loss = text_to_video.FlowLoss(uniform=0.0)
    times = loss.times(4000, ALONE.device)
    assert times.min() > 0
    assert times.max() < 1
    # logit-normal with shift 3: the median is s(1/2) = 0.75, and 68.3 % lie between s(sigmoid(-1)) and s(sigmoid(1))
    assert times.median().item() == pytest.approx(0.75, abs=0.01)
    low, high = (3 * u / (1 + 2 * u) for u in (0.26894, 0.73106))
    assert ((times > low) & (times < high)).float().mean().item() == pytest.approx(0.683, abs=0.01)


def test_the_budget_counts_time_before_an_interruption():
    assert Budget(minutes=1.0, spent=30.0).progress(0) == pytest.approx(0.5, abs=0.01)
    assert Budget(minutes=1.0, spent=90.0).progress(0) == 1.0
    assert Budget(steps=4).progress(1) == 0.25


@pytest.mark.parametrize("schedule", [warm_cosine, warm_linear])
def test_schedules_rise_then_fall_to_zero(schedule):
    factors = [schedule(i / 100) for i in range(101)]
    peak = factors.index(max(factors))
    assert factors[0] > 0
    assert max(factors) == pytest.approx(1.0, abs=0.02)
    assert factors[-1] < 1e-3
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_averages_approach_the_weights_and_can_be_stored():
    layer = torch.nn.Linear(2, 2)
    average = AveragedWeights(layer, decay=0.9)
    target = torch.ones(2, 2)
    with torch.no_grad():
        layer.weight.copy_(target)
    for _ in range(100):
        average.update()
    with torch.no_grad():
        layer.weight.zero_()
    average.store()
    assert torch.allclose(layer.weight, target, atol=1e-3)


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    path = tmp_path / "run.ckpt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match=r"run\.ckpt"):
        load_checkpoint(path, ALONE)
    assert load_checkpoint(tmp_path / "none.ckpt", ALONE) is None
