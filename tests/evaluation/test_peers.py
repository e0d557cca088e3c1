"""Peers as data: names, cards, settings, the text form; and peers that are refused."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

from vivace.core.errors import (
    ConfigError,
    ModelError,
    NoEffectError,
    ShapeError,
    UnavailableError,
    UnknownNameError,
)
from vivace.core.shapes import TokenGrid
from vivace.evaluation.peers import PeerCard, contender_name, get, names, parse, peer_session
from vivace.evaluation.peers.base import Installed, Peer
from vivace.evaluation.peers.fastvideo import TOKENS, RoutedTiles, WindowedTiles, tile_order, window_map
from vivace.models.describe import describe_pipeline
from vivace.techniques.base import Cite, Paradigm
from vivace.testing import models

WANTED = {
    "cache_dit.dbcache",
    "cache_dit.steps_mask",
    "cache_dit.taylorseer",
    "diffusers.faster_cache",
    "diffusers.faster_cache_branchwise",
    "diffusers.first_block_cache",
    "diffusers.mag_cache",
    "diffusers.pab",
    "diffusers.pab_branchwise",
    "diffusers.sea_cache",
    "diffusers.taylorseer",
    "diffusers.taylorseer_lite",
    "fastvideo.sta",
    "fastvideo.vsa",
    "sageattention.int8",
    "torchao.float8_dynamic",
    "torchao.int8_dynamic",
    "torchao.int8_weight_only",
}
GRID = TokenGrid(8, 16, 16)


class Absent(Peer):
    """A peer whose package nobody has."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="nobody.nothing",
        package="no-such-package-anywhere",
        family=Paradigm.CACHING,
        summary="Nothing.",
        knob="",
        sweep=(),
        default={},
        notes=("None.",),
        cite=Cite(title="Nothing"),
    )

    def install(self, pipeline, steps, **settings):
        return Installed(lambda: None)


def test_every_peer_is_found():
    assert set(names()) == WANTED


@pytest.mark.parametrize("name", sorted(WANTED))
def test_the_card_is_whole(name):
    card = get(name).card
    assert card.name == name
    assert card.family in Paradigm
    assert card.notes
    assert all(note.endswith(".") for note in card.notes)
    assert card.summary.endswith(".")
    assert card.cite.title
    assert "steps" not in card.default
    if not card.knob:
        assert card.sweep == ()
        return
    assert card.default[card.knob] is not None
    assert len(card.sweep) >= 3
    assert len(set(card.sweep)) == len(card.sweep)
    if not card.choices:
        assert list(card.sweep) in (sorted(card.sweep), sorted(card.sweep, reverse=True))
    for value in card.sweep:
        assert get(name).settings({card.knob: value})[card.knob] == value


@pytest.mark.parametrize("name", sorted(WANTED))
def test_text_and_settings_are_each_others_inverse(name):
    peer = get(name)
    for value in peer.card.sweep or (None,):
        settings = {} if value is None else {peer.card.knob: value}
        text = contender_name(peer, {**settings, "steps": 30})
        again, read = parse(text)
        assert type(again) is type(peer)
        assert read == {**settings, "steps": 30}
        assert contender_name(again, read) == text


def test_a_name_tells_what_differs_and_no_calibration():
    peer = get("diffusers.mag_cache")
    settings = peer.settings({"max_skip": 5}) | {"ratios": (1.0, 0.9)}
    assert contender_name(peer, settings) == "diffusers.mag_cache@threshold=0.06,max_skip=5"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("diffusers.mag_cache@thresold=0.1", "no setting called thresold; it has"),
        ("diffusers.mag_cache@threshold", "write setting=value"),
        ("diffusers.mag_cache@threshold=high", "must be a number"),
        ("diffusers.mag_cache@threshold=true", "must be a number"),
        ("diffusers.mag_cache@max_skip=2.5", "must be a whole number"),
        ("diffusers.mag_cache@threshold=-1", "from 0.0 to 10.0"),
        ("diffusers.pab@steps=0", "steps must be a whole number"),
        ("cache_dit.steps_mask@policy=brisk", "must be one of slow, medium, fast, ultra"),
        ("cache_dit.dbcache@guided=1", "must be true or false"),
        ("cache_dit.steps_mask@policy=3", "must be a word"),
        ("diffusers.pab@spatial=[1", "is no value"),
    ],
)
def test_wrong_settings_are_told(text, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        parse(text)


def test_a_wrong_name_offers_the_right_one():
    with pytest.raises(UnknownNameError, match=r"diffusers\.mag_cache"):
        parse("diffusers.magcache@threshold=0.1")


def test_an_absent_package_is_a_reason_and_nothing_is_changed():
    pipe = models.pipeline("wan2.1", layers=2)
    peer = Absent()
    assert "pip install no-such-package-anywhere" in peer.missing()
    assert peer.version == ""
    before = dict(vars(pipe.transformer))
    with pytest.raises(UnavailableError, match="no-such-package-anywhere"):
        peer_session(pipe, peer, 4)
    assert dict(vars(pipe.transformer)) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
@pytest.mark.parametrize("name", [n for n in sorted(WANTED) if get(n).card.needs_cuda])
def test_without_a_gpu_there_is_a_reason(name):
    assert get(name).missing()


@pytest.mark.parametrize(
    ("name", "model", "words"),
    [
        ("diffusers.sea_cache", "wan2.1-i2v", "does not tell it the step"),
        ("diffusers.mag_cache", "wan2.2", "two transformers"),
        ("diffusers.taylorseer", "ltx", "knows wan only"),
        ("diffusers.pab", "cogvideox", "knows wan only"),
        ("cache_dit.dbcache", "hunyuan", "knows wan only"),
        ("sageattention.int8", "wan2.1", "64, 96 or 128 channels, not 12"),
        ("fastvideo.vsa", "ltx", "Wan's self-attention only"),
    ],
)
def test_what_a_peer_cannot_act_on_is_refused(name, model, words):
    pipe = models.pipeline(model)
    peer = get(name)
    assert words in peer.refuse(describe_pipeline(pipe))
    if not peer.missing():
        with pytest.raises(ModelError, match=words):
            peer_session(pipe, peer, 4)


def test_a_peer_that_finds_nothing_says_so():
    pipe = models.pipeline("wan2.1", layers=2)
    pipe.transformer.blocks = torch.nn.ModuleList()
    with pytest.raises(NoEffectError, match="found no linear"):
        peer_session(pipe, get("torchao.int8_weight_only"), 4)


def test_tiles_hold_every_token_once_and_neighbours_together():
    order = tile_order(GRID)
    assert sorted(order) == list(range(GRID.video))
    t, rest = np.divmod(order.reshape(-1, TOKENS), GRID.height * GRID.width)
    h, w = np.divmod(rest, GRID.width)
    for axis in (t, h, w):
        assert (np.ptp(axis, axis=1) == 3).all()
    with pytest.raises(ShapeError, match="no whole tiles"):
        tile_order(TokenGrid(7, 16, 16))


@pytest.mark.parametrize("window", [1, 2, 3, 4, 9])
def test_a_window_of_tiles_has_one_size_and_holds_the_tile_itself(window):
    seen = window_map(GRID, window)
    assert seen.shape == (32, 32)
    assert set(seen.sum(1)) == {2 * min(window, 4) ** 2}
    assert seen.diagonal().all()
    assert WindowedTiles(lambda: GRID, lambda: None, window).pairs(2, 3, 2048, 2048) == 2 * 3 * int(
        seen.sum() * TOKENS**2
    )


def test_routed_pairs_count_the_routing():
    kernel = RoutedTiles(lambda: GRID, lambda: None, 0.25)
    assert kernel.kept() == 8
    assert kernel.pairs(1, 1, 2048, 2048) == 2048 * 8 * 64 + 32 * 32
