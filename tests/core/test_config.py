"""Configurations are frozen, validated and survive JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import pytest

from vivace.core.config import Config, knob
from vivace.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sample(Config):
    version = 2
    threshold: float = knob(0.1, low=0.0, high=1.0, identity=0.0)
    mode: str = knob("a", choices=("a", "b"))
    layers: tuple[int, ...] = (1, 2)


def test_round_trip_through_json():
    config = Sample(threshold=0.3, layers=[4, 5])
    data = json.loads(json.dumps(config.to_dict()))
    assert data["_type"] == "Sample"
    assert data["_version"] == 2
    assert Sample.from_dict(data) == config
    assert hash(config) == hash(Sample.from_dict(data))


@pytest.mark.parametrize(
    "values",
    [
        {"threshold": 1.5},
        {"threshold": float("nan")},
        {"threshold": "high"},
        {"threshold": True},
        {"mode": "c"},
    ],
)
def test_out_of_range_is_one_sentence(values):
    with pytest.raises(ConfigError, match=r"^Sample: (threshold|mode) must be .*\.$"):
        Sample(**values)


def test_unknown_field_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"thresh.*it has threshold, mode, layers"):
        Sample.from_dict({"thresh": 1})


def test_newer_file_is_refused():
    with pytest.raises(ConfigError, match="update Vivace"):
        Sample.from_dict({"_version": 3})


def test_frozen_and_plain():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sample().threshold = 0.2
    with pytest.raises(ConfigError, match="plain values"):
        Sample(layers=(object(),)).to_dict()


def test_knob_ends():
    knobs = Sample.knobs()
    assert knobs["threshold"].ends == (0.0, 1.0)
    assert knobs["mode"].ends == ("a", "b")
    assert knobs["threshold"].has_identity
    assert not knobs["mode"].has_identity
