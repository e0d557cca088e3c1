"""The file, its key, and the sentences of refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from vivace.calibration.artifact import Calibration, Curves, Key, key_of, model_hash
from vivace.core.errors import ConfigError
from vivace.models.describe import describe_pipeline
from vivace.testing import models

KEY = Key(
    model_hash="ab",
    family="f",
    frames=5,
    height=32,
    width=48,
    scheduler="Euler shift=3.0",
    solver="Euler",
    steps=3,
    guidance=5.0,
)


def artefact() -> Calibration:
    curves = Curves(
        steps=[0, 1, 2],
        residual_ratio=[1.0, 0.9, 1 / 3],
        residual_ratio_std=[0.0, 0.1, 0.2],
        time_change=[0.0, 0.2, 0.3],
        first_block_change=[0.0, 0.3, 0.4],
        output_change=[0.0, 0.4, 0.5],
    )
    return Calibration(
        key=KEY,
        prompts=2,
        prompts_sha256="00",
        seed=0,
        vivace="0",
        sigmas=[1.0, 0.7, 0.4, 0.0],
        timesteps=[999.0, 700.0, 400.0],
        gram=torch.eye(6).tolist(),
        curves={"transformer": {"cond": curves}},
    )


def test_round_trip(tmp_path: Path) -> None:
    path = artefact().save(tmp_path / "new" / "c.json")
    again = Calibration.load(path)
    assert again.key == KEY
    assert again.curves["transformer"]["cond"].residual_ratio[2] == pytest.approx(1 / 3, abs=1e-12)
    assert again.to_json() == artefact().to_json()
    assert again.joined("cond", "time_change") == [0.0, 0.2, 0.3]
    with pytest.raises(ConfigError, match="no uncond branch"):
        again.joined("uncond", "time_change")


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"steps": 4}, "steps 3 and not 4"),
        ({"width": 64}, "width 48 and not 64"),
        ({"model_hash": "cd"}, "model hash ab and not cd"),
        ({"scheduler": "Euler shift=5.0"}, "scheduler Euler shift=3.0 and not Euler shift=5.0"),
        ({"guidance": 4.0}, "guidance 5.0 and not 4.0"),
    ],
)
def test_another_key_is_refused_by_name(change: dict, phrase: str) -> None:
    other = dataclasses.replace(KEY, **change)
    assert not artefact().matches(other)
    (sentence,) = artefact().problems(other)
    assert phrase in sentence
    assert "vivace calibrate" in sentence
    assert artefact().problems(KEY) == []


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    with pytest.raises(ConfigError, match="there is no calibration"):
        Calibration.load(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        Calibration.load(path)
    path.write_text('{"format": "other"}')
    with pytest.raises(ConfigError, match="is no calibration"):
        Calibration.load(path)
    data = json.loads(artefact().to_json())
    for change, phrase in (
        ({"version": 99}, "format 99"),
        ({"sigmas": [1.0]}, "damaged"),
        ({"gram": [[1.0]]}, "damaged"),
        ({"key": {}}, "damaged"),
    ):
        path.write_text(json.dumps(data | change))
        with pytest.raises(ConfigError, match=phrase):
            Calibration.load(path)


def test_the_hash_sees_weights_and_not_their_precision() -> None:
    pipe = models.pipeline("wan2.1", layers=2)
    first = model_hash(pipe)
    assert first == model_hash(models.pipeline("wan2.1", layers=2))
    assert first != model_hash(models.pipeline("wan2.1", layers=2, seed=1))
    assert first != model_hash(models.pipeline("wan2.1", layers=3))
    pipe.transformer.to(torch.bfloat16)
    assert first == model_hash(pipe)
    with torch.no_grad():
        for p in pipe.transformer.blocks[1].parameters():
            p.mul_(1.1)
    assert first != model_hash(pipe)


def test_the_key_sees_the_scheduler() -> None:
    pipe = models.pipeline("wan2.1", layers=1)
    model = describe_pipeline(pipe)
    workload = model.workload(frames=5, height=32, width=32, steps=4)
    key = key_of(model, pipe, workload)
    assert (key.frames, key.steps, key.family) == (5, 4, model.family)
    assert "flow_shift=3.0" in key.scheduler
    assert "solver_order=2" in key.solver
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=5.0)
    assert key_of(model, pipe, workload).differences(key)[0].startswith("scheduler")
