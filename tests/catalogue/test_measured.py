"""Our measurements beside the claims: the newest record, alone before together, ratios only of like with like."""

from __future__ import annotations

import json

import pytest

from vivace import catalogue
from vivace.core.errors import ConfigError
from vivace.core.packed import write_packed

TASK = {"name": "world-smoke@1", "sha256": "t"}
MODEL = {"name": "tiny", "weights": "trained"}


def record(
    name, *, kind="plan", techniques=(), created="2026-11-24T10:00:00", seconds=8.0, flops=100.0, **more
):
    return {
        "vivace_record": 1,
        "created": created,
        "contender": {"name": name, "kind": kind, "techniques": list(techniques)},
        "task": TASK,
        "model": MODEL,
        "environment": {"fingerprint": "here", "gpu": "A card"},
        "counts": {"flops": flops, "nfe": 40},
        "timing": {"stages": {"total": {"median": seconds}}, "batch": 2},
        "quality": {"fidelity": {"psnr": {"mean": 31.5}}, "absolute": {"attributes": {"mean": 0.9}}},
        **more,
    }


@pytest.fixture
def store(tmp_path):
    def write(**records):
        folder = tmp_path / "run" / "records"
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in records.items():
            (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
        return tmp_path

    return write


def test_figures_come_from_two_like_records(store):
    folder = store(
        aa=record("exact", kind="exact", seconds=16.0, flops=400.0),
        bb=record("mine", techniques=["radial"]),
    )
    found = catalogue.newest_record("radial", folder)
    assert found is not None
    assert found.id == "bb"
    assert found.task == "world-smoke@1"
    assert found.environment == "A card"
    assert found.figures["speed_up"] == pytest.approx(2.0)
    assert found.figures["work_share"] == pytest.approx(0.25)
    assert found.figures["seconds"] == pytest.approx(4.0)
    assert found.figures["psnr"] == 31.5
    assert "2.00 times faster" in found.words
    assert "25% of its work" in found.words


@pytest.mark.parametrize(
    "other",
    [
        {"environment": {"fingerprint": "elsewhere"}},
        {"task": {"name": "world-smoke@1", "sha256": "changed"}},
        {"model": {"name": "another"}},
    ],
)
def test_unlike_records_are_never_divided(store, other):
    folder = store(
        aa=record("exact", kind="exact", seconds=16.0, **other), bb=record("mine", techniques=["radial"])
    )
    found = catalogue.newest_record("radial", folder)
    assert found is not None
    assert "speed_up" not in found.figures
    assert "work_share" not in found.figures


def test_newest_alone_before_newest_together(store):
    folder = store(
        old=record("a", techniques=["radial"], created="2026-01-01T00:00:00"),
        new=record("b", techniques=["radial"], created="2026-02-01T00:00:00"),
        both=record("c", techniques=["radial", "int8_linear"], created="2026-03-01T00:00:00"),
    )
    radial, int8 = (catalogue.newest_record(n, folder) for n in ("radial", "int8_linear"))
    assert radial is not None
    assert radial.id == "new"
    assert radial.others == ()
    assert int8 is not None
    assert int8.others == ("radial",)


def test_peers_are_found_whatever_the_knobs(store):
    folder = store(
        p=record("diffusers.mag_cache@threshold=0.1,steps=30", kind="peer"),
        q=record("diffusers.mag_cache_other@threshold=0.1", kind="peer", created="2027-01-01T00:00:00"),
    )
    found = catalogue.newest_record("diffusers.mag_cache", folder)
    assert found is not None
    assert found.id == "p"
    (measured,) = catalogue.measurements(catalogue.method("magcache"), catalogue.read_records(folder))
    assert measured.contender == "diffusers.mag_cache@threshold=0.1,steps=30"


def test_nothing_measured(store, tmp_path):
    assert catalogue.newest_record("radial", store()) is None
    assert catalogue.newest_record("radial", tmp_path / "nowhere") is None


def test_infinite_and_missing_figures_are_left_out(store):
    folder = store(
        a=record("m", techniques=["radial"], quality={"fidelity": {"psnr": {"mean": float("inf")}}})
    )
    found = catalogue.newest_record("radial", folder)
    assert found is not None
    assert "psnr" not in found.figures


@pytest.mark.parametrize("text", ["{", "[]", '{"created": "x"}'])
def test_damaged_records_are_named(store, text):
    folder = store()
    (folder / "run" / "records" / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.json"):
        catalogue.read_records(folder)


def test_packed_records_are_read_like_others(store):
    folder = store(aa=record("exact", kind="exact", seconds=16.0, flops=400.0))
    (folder / "other").mkdir()
    write_packed(folder / "other" / "records.jsonl.xz", {"bb": record("mine", techniques=["radial"])})
    found = catalogue.newest_record("radial", folder)
    assert found is not None
    assert (found.id, found.figures["speed_up"]) == ("bb", pytest.approx(2.0))
    (folder / "other" / "records.jsonl.xz").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"records\.jsonl\.xz is damaged"):
        catalogue.read_records(folder)
