"""FVD and JEDi with small networks that the test makes: the interface, not the published weights."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vivace.core.errors import ConfigError, UnavailableError, WeightsError
from vivace.evaluation.damage import DAMAGES
from vivace.evaluation.metrics.base import Context, registry
from vivace.evaluation.metrics.frechet import LEAST_CLIPS
from vivace.evaluation.metrics.video_backbone import SIDE, Fvd, Jedi
from vivace.world import render, sample_scenes


class Statistics(nn.Module):
    """Mean and spread of each colour: (B, 3, T, H, W) to (B, 6)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean(dim=(2, 3, 4)), x.flatten(2).std(dim=2)], dim=1)


class Detector(nn.Module):
    """Takes the arguments of the I3D file that most FVD code uses; only features are of any use."""

    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> torch.Tensor:
        if rescale:
            x = x / 127.5 - 1.0
        if not return_features or resize:
            return torch.zeros(x.shape[0], 2)
        return torch.stack(
            [x.mean(dim=(1, 2, 3, 4)), x.amin(dim=(1, 2, 3, 4)), x.amax(dim=(1, 2, 3, 4))], dim=1
        )


class TwoAnswers(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.mean(), x.sum()


class Frames(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape[0], 3) @ torch.zeros(4, 2)


def saved(network: nn.Module, folder: Path, name: str = "network.pt") -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(network).save(str(folder / name))
    return folder / name


@pytest.fixture
def clips() -> torch.Tensor:
    return render(sample_scenes(list(range(12))), frames=5, height=24, width=32, with_mask=False).video


@pytest.mark.parametrize(("metric", "variable"), [(Fvd, "VIVACE_FVD_I3D"), (Jedi, "VIVACE_JEDI")])
def test_without_a_file_there_is_a_reason_and_no_number(
    metric, variable, monkeypatch, clips, tmp_path
) -> None:
    monkeypatch.delenv(variable, raising=False)
    assert f"set {variable} to a TorchScript" in metric().missing()
    with pytest.raises(UnavailableError, match=variable):
        metric().features(clips, Context())
    monkeypatch.setenv(variable, str(tmp_path / "gone.pt"))
    assert "which is not there" in metric().missing()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"x")
    assert "weights without their network" in metric(file=weights).missing()
    assert metric.card.backbone is None


def test_the_file_of_the_environment_is_used_and_its_hash_is_on_the_card(
    monkeypatch, tmp_path, clips
) -> None:
    file = saved(Statistics(), tmp_path)
    monkeypatch.setenv("VIVACE_JEDI", str(file))
    metric = registry["jedi"]()
    assert metric.missing() == ""
    assert metric.card.backbone is not None
    assert metric.card.backbone.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert metric.features(clips, Context()).shape == (12, 6)
    assert Jedi.card.backbone is None


def test_a_clip_comes_to_the_network_as_it_wants_it(tmp_path) -> None:
    clip = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 10, 20, 3)
    fvd, jedi = Fvd().prepare(clip), Jedi().prepare(clip)
    assert fvd.shape == (1, 3, 9, SIDE, SIDE)
    assert jedi.shape == (1, 3, 16, SIDE, SIDE)
    assert (float(fvd.min()), float(fvd.max())) == pytest.approx((-1.0, 1.0))
    assert jedi[0, :, -1].mean((1, 2)).tolist() == pytest.approx(
        [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rel=1e-4
    )
    # 16 frames of 9: each is there, in order, none is blended.
    seen = (jedi[0, 0, :, 0, 0] * 0.229 + 0.485) * 8
    assert seen.tolist() == pytest.approx(sorted(round(v) for v in seen.tolist()), abs=1e-4)
    assert {round(v) for v in seen.tolist()} == set(range(9))


def test_a_detector_is_asked_for_features_and_scales_nothing(tmp_path, clips) -> None:
    rows = Fvd(file=saved(Detector(), tmp_path)).features(clips, Context())
    assert rows.shape == (12, 3)
    assert rows.min() >= -1
    assert (rows[:, 2] > 0.5).all()


def test_an_exported_program_gives_the_same_rows(tmp_path, clips) -> None:
    example = torch.zeros(1, 3, 5, SIDE, SIDE)
    torch.export.save(torch.export.export(Statistics(), (example,)), str(tmp_path / "network.pt2"))
    scripted = Fvd(file=saved(Statistics(), tmp_path)).features(clips, Context())
    exported = Fvd(file=tmp_path / "network.pt2").features(clips, Context())
    assert exported == pytest.approx(scripted, abs=1e-6)


def test_jedi_of_equal_and_of_damaged_clips(tmp_path, clips) -> None:
    metric = Jedi(file=saved(Statistics(), tmp_path))
    exact, noisy = (metric.features(c, Context()) for c in (clips, DAMAGES["colour_shift"](clips)))
    assert metric.distance(exact, exact, range(12))["jedi"].value == pytest.approx(0.0, abs=1e-9)
    found = metric.distance(exact, noisy, range(12))["jedi"]
    k = [
        [(float(a @ b) / 6) ** 2 for b in np.concatenate([exact, noisy])]
        for a in np.concatenate([exact, noisy])
    ]
    wanted = [
        k[i][j] + k[i + 12][j + 12] - k[i][j + 12] - k[j][i + 12]
        for i in range(12)
        for j in range(12)
        if i != j
    ]
    assert found.value == pytest.approx(100 * np.mean(wanted), rel=1e-9)
    assert found.p is not None
    assert found.p < 0.05


def test_fvd_is_not_given_for_few_clips(tmp_path, clips) -> None:
    metric = Fvd(file=saved(Statistics(), tmp_path))
    rows = metric.features(clips, Context())
    with pytest.raises(ConfigError, match=f"given for {LEAST_CLIPS} or more; use jedi"):
        metric.distance(rows, rows, range(12))
    many = np.random.default_rng(0).normal(size=(LEAST_CLIPS, 6))
    found = metric.distance(many, many + 0.5, [i // 2 for i in range(LEAST_CLIPS)])["fvd"]
    assert found.value == pytest.approx(6 * 0.25, rel=1e-9)
    assert found.n == LEAST_CLIPS
    assert "biased upwards" in found.note


@pytest.mark.parametrize(
    ("network", "says"), [(TwoAnswers(), "returns features"), (Frames(), "cannot take a clip")]
)
def test_a_network_of_another_kind_is_refused(network, says, tmp_path, clips) -> None:
    with pytest.raises(WeightsError, match=says) as caught:
        Jedi(file=saved(network, tmp_path)).features(clips[:1], Context())
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused(tmp_path, clips) -> None:
    (tmp_path / "network.pt").write_bytes(b"not a network")
    with pytest.raises(WeightsError, match="cannot be read as a network"):
        Fvd(file=tmp_path / "network.pt").features(clips[:1], Context())
