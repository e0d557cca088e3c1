"""Distilling a tiny decoder: the loss falls, a run taken up again is the same run, and what is written can be used."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKLWan

from vivace.core.errors import ConfigError
from vivace.models import tiny_decoder
from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.common import Budget, Processes
from vivace.training import decoder as training

SHAPE = ClipShape(frames=5, height=32, width=32, supersample=1)


def teacher() -> training.Teacher:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return training.Teacher(vae)


def trainer(**sizes: int) -> training.DecoderTrainer:
    device = torch.device("cpu")
    bank = training.LatentBank(teacher(), SHAPE, size=4, portion=2, stream=training.STREAM, device=device)
    return training.DecoderTrainer(Processes(0, 1, device), bank, **({"width": 8, "depth": 1} | sizes))


def test_the_loss_falls(tmp_path):
    run = trainer(width=16)
    run.bank.fill()
    torch.manual_seed(0)
    losses = [float(run.step(0.2, 2, 2)) for _ in range(40)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_run_taken_up_again_is_the_same_run(tmp_path):
    options = {"batch": 2, "frames": 2, "renew_every": 2}
    whole = trainer()
    training.fit(whole, Budget(None, 6), tmp_path / "whole.ckpt", **options)
    part = trainer()
    training.fit(part, Budget(None, 6), tmp_path / "part.ckpt", stop_after=3, **options)
    torch.manual_seed(99)
    again = trainer()
    found = training.fit(again, Budget(None, 6), tmp_path / "part.ckpt", **options)
    assert found["steps"] == 6
    assert again.bank.made == whole.bank.made == 10
    assert torch.equal(again.bank.latents, whole.bank.latents)
    for name, value in whole.decoder.state_dict().items():
        assert torch.equal(again.decoder.state_dict()[name], value), name
    for a, b in zip(again.average.values, whole.average.values, strict=True):
        assert torch.equal(a, b)


def test_the_loss_sees_edges_and_flicker():
    torch.manual_seed(0)
    target = torch.rand(1, 3, 4, 16, 16)
    flat = target + 0.1
    noisy = target + 0.1 * torch.randn_like(target).sign()
    loss = training.DecoderLoss()
    assert loss(target, target) == 0.0
    assert loss(flat, target) == pytest.approx(0.1, abs=1e-5)
    assert loss(noisy, target) > 0.2
    flicker = target + 0.1 * torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 4, 1, 1)
    assert loss(flicker, target) > loss(flat, target) + 0.09
    assert training.DecoderLoss(temporal=0.0)(flicker, target) == pytest.approx(0.1, abs=1e-5)


def test_the_command_writes_weights_a_record_and_a_sheet(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "load_vae", lambda name: teacher().vae)
    out = tmp_path / "tiny.safetensors"
    given = "--steps 2 --size 5 32 32 --bank 2 --portion 2 --batch 1 --width 8 --depth 1 --eval-clips 1"
    training.main([*given.split(), "--out", str(out)])
    said = json.loads(out.with_suffix(".json").read_text())
    assert said["steps"] == 2
    assert set(said["psnr"]) == {"to_teacher", "teacher_to_truth", "tiny_to_truth"}
    assert said["bytes"] == out.stat().st_size
    assert out.with_suffix(".png").is_file()
    assert "PSNR to the teacher" in capsys.readouterr().out
    net = tiny_decoder.load(out)
    again = trainer()
    training.fit(again, Budget(None, 2), out.with_suffix(".ckpt"), batch=1, frames=2)
    assert torch.equal(net.exit.weight, again.average.values[-2])


def test_unknown_vaes_and_uneven_banks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no folder of a diffusers VAE"):
        training.load_vae(str(tmp_path))
    with pytest.raises(ConfigError, match="divisor"):
        training.LatentBank(teacher(), SHAPE, size=3, portion=2, stream=0, device=torch.device("cpu"))


def test_a_trainer_as_a_program(capsys) -> None:
    from vivace.core.errors import ConfigError
    from vivace.training.loop import command

    def wrong() -> None:
        raise ConfigError("give another.")

    def stopped() -> None:
        raise KeyboardInterrupt

    for main, code, says in (
        (wrong, 2, "error: give another."),
        (stopped, 130, "goes on from the last step"),
    ):
        with pytest.raises(SystemExit) as end:
            command(main)
        assert end.value.code == code
        assert says in capsys.readouterr().err
