"""`vivace doctor --shape`: what a clip takes, what fits, and bad input told in a sentence."""

from __future__ import annotations

import json

import pytest

from vivace.cli.shared import memory
from vivace.cli.shared.options import DType
from vivace.core.errors import ConfigError, ShapeError


def told(capsys, **changes):
    settings = {"model": "tiny", "shape": "5x64x64", "plan": None, "dtype": DType.AUTO, "device_gib": None}
    memory.tell(**settings | changes, as_json=True)
    return json.loads(capsys.readouterr().out)


def test_fits_or_proposes_the_cheapest_that_does(capsys):
    large = told(capsys, device_gib=8.0)
    assert large["proposal"] == "as planned"
    assert {"text_encoder", "transformer", "vae"} == set(large["components"])
    most = {w["way"]: max(w["peaks"].values()) for w in large["ways"]}
    room = (most["as planned"] + most["model_offload"]) / 2 / memory.SPARE / 2**30
    assert told(capsys, device_gib=room)["proposal"] == "model_offload"
    assert told(capsys, device_gib=0.001)["proposal"] is None


def test_bad_shapes(capsys):
    with pytest.raises(ConfigError, match="81x480x832"):
        told(capsys, shape="29x128")
    with pytest.raises(ShapeError, match="4k"):
        told(capsys, shape="6x64x64")
