"""The store keeps what it was given, under its hash, and notices when a file is not what its name says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vivace.core.errors import OutputError
from vivace.core.packed import read_packed, write_packed
from vivace.evaluation.record import Contender, Model, Record, Samples, TaskRef
from vivace.evaluation.store import PACKED, Store, StoreError


def make(name: str = "exact", created: str = "2026-01-01T00:00:00", **more: Any) -> Record:
    values: dict[str, Any] = {
        "created": created,
        "code": {"version": "0", "commit": "c", "dirty": False},
        "contender": Contender(name=name, kind="exact" if name == "exact" else "plan"),
        "model": Model(name="tiny", pipeline="WanPipeline", weights="trained", sha256="w", dtype="float32"),
        "task": TaskRef(name="world-smoke@1", sha256="t"),
        "environment": {"fingerprint": "e1"},
    }
    return Record(**(values | more))


def some(n: int = 3) -> Samples:
    return Samples(
        ids=tuple(f"{i}.0" for i in range(n)),
        prompt=tuple(range(n)),
        k=(0,) * n,
        seed=tuple(range(n)),
        columns={"psnr": (float("inf"), float("nan"), *(20.123456789 + i for i in range(n - 2)))},
    )


def test_a_record_and_its_samples_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = store.add(make(), some())
    record = Store(tmp_path).record(name)
    assert record.id == name
    assert record.contender.name == "exact"
    back = store.samples(record)
    assert back.columns["psnr"][0] == float("inf")
    assert back.columns["psnr"][1] != back.columns["psnr"][1]
    assert back.columns["psnr"][2] == pytest.approx(20.123456789, rel=1e-6)
    assert store.record(name[:6]).id == name


def test_the_same_content_is_kept_once_and_not_rewritten(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = store.add(make(), some())
    file = tmp_path / "records" / f"{name}.json"
    os.utime(file, (1, 1))
    assert store.add(make(), some()) == name
    assert file.stat().st_mtime == 1
    assert store.ids() == [name]
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_settings_that_json_changes_do_not_break_the_name(tmp_path: Path) -> None:
    odd = Contender(name="a", kind="peer", settings={"steps": {10: (1, 2), 9: None, 2: 0.1}, "set": {3}})
    name = Store(tmp_path).add(make(contender=odd))
    assert Store(tmp_path).record(name).contender.settings["steps"]["10"] == [1, 2]


def test_a_changed_record_is_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = store.add(make())
    good = store.add(make("fast"))
    file = tmp_path / "records" / f"{name}.json"
    file.write_text(file.read_text().replace("2026-01", "2027-01"))
    with pytest.raises(StoreError, match=rf"{name}\.json was changed"):
        store.record(name)
    found, problems = store.scan()
    assert [r.id for r in found] == [good]
    assert len(problems) == 1
    assert name in problems[0]
    file.write_text('{"vivace_record": 1')
    with pytest.raises(StoreError, match=rf"{name}\.json is damaged"):
        store.records()
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match=rf"{name}\.json is damaged"):
        store.records()


def test_a_damaged_record_is_mended_by_adding_it_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = store.add(make())
    (tmp_path / "records" / f"{name}.json").write_text("{")
    assert store.add(make()) == name
    assert store.record(name).created == make().created


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_samples_are_noticed(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    record = store.record(store.add(make(), some()))
    file = tmp_path / "samples" / f"{record.samples}.json.gz"
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-9])
    elif damage == "flip":
        file.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    else:
        file.unlink()
    with pytest.raises(StoreError, match=record.samples):
        store.samples(record)


def test_samples_must_fit_together(tmp_path: Path) -> None:
    bad = some().model_copy(update={"columns": {"psnr": (1.0,)}})
    with pytest.raises(StoreError, match="3 ids and 1 values of psnr"):
        Store(tmp_path).add(make(), bad)
    with pytest.raises(StoreError, match="does not hold"):
        Store(tmp_path).add(make(samples="0" * 64))
    with pytest.raises(StoreError, match="given others"):
        Store(tmp_path).add(make(samples="0" * 64), some())
    with pytest.raises(StoreError, match="id twice"):
        Store(tmp_path).add(make(), some().model_copy(update={"ids": ("0.0", "0.0", "1.0")}))
    assert not (tmp_path / "records").exists()


def test_finding(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = store.add(make("fast", "2026-01-01T00:00:00"))
    new = store.add(make("fast", "2026-01-02T00:00:00"))
    other = store.add(make("fast", "2026-01-01T00:00:00", environment={"fingerprint": "e2"}))
    store.add(make("exact"))
    assert [r.id for r in store.find(contender="fast", environment="e1")] == [old, new]
    assert [r.id for r in store.newest(contender="fast", environment="e1")] == [new]
    assert {r.id for r in store.newest(contender="fast")} == {new, other}
    assert len(store.newest()) == 3
    assert store.find(task="nothing@1") == []
    assert [r.contender.name for r in store.find(kind="exact", model="tiny")] == ["exact"]


def test_missing_things_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no folder"):
        Store.existing(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="holds no records"):
        Store.existing(tmp_path)
    with pytest.raises(StoreError, match="no record 'abcd'"):
        Store(tmp_path).record("abcd")
    with pytest.raises(StoreError, match="has no samples"):
        Store(tmp_path).samples(make())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another folder"):
        Store(tmp_path / "file").add(make())


def test_unfinished_files_are_not_records(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = store.add(make())
    (tmp_path / "records" / ".x.json").write_text("{")
    (tmp_path / "records" / f".{name}.json.77.part").write_text("{")
    assert store.ids() == [name]


def test_clips_are_named_by_content(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.add_clip(b"moving")
    assert path == store.add_clip(b"moving")
    assert (tmp_path / path).read_bytes() == b"moving"
    assert (tmp_path / path).parent == store.clips


def test_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, vivace.evaluation.store; print(any(m == 'torch' for m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_files_are_plain_json(tmp_path: Path) -> None:
    name = Store(tmp_path).add(make())
    assert json.loads((tmp_path / "records" / f"{name}.json").read_text())["vivace_record"] == 1


def packed(tmp_path: Path) -> tuple[Store, list[str]]:
    store = Store(tmp_path)
    names = [store.add(make(), some()), *(store.add(make(n)) for n in ("slow", "fast", "faster"))]
    store.pack()
    return store, names


def test_a_packed_store_holds_what_it_held(tmp_path: Path) -> None:
    store, names = packed(tmp_path)
    assert not (tmp_path / "records").exists()
    for found in (store, Store.existing(tmp_path)):
        assert found.ids() == sorted(names)
        assert {r.id for r in found.records()} == set(names)
        assert found.scan()[1] == []
        assert found.record(names[1][:6]).contender.name == "slow"
        assert found.samples(found.record(names[0])).ids == some().ids
        assert names[0] in found
        assert "0" * 16 not in found


def test_a_packed_store_grows_and_is_packed_again(tmp_path: Path) -> None:
    store, names = packed(tmp_path)
    later = store.add(make("later"))
    assert (tmp_path / "records" / f"{later}.json").is_file()
    assert store.ids() == sorted([*names, later])
    assert store.add(make("slow")) == names[1]
    assert len(store.records()) == 5
    store.pack()
    assert Store(tmp_path).ids() == sorted([*names, later])


@pytest.mark.parametrize("damage", ["cut", "changed", "renamed"])
def test_damage_to_a_packed_file_is_noticed(tmp_path: Path, damage: str) -> None:
    store, names = packed(tmp_path)
    file = tmp_path / PACKED
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-30])
    else:
        documents = read_packed(file)
        if damage == "changed":
            documents[names[1]]["created"] = "2027"
        else:
            documents["0" * 16] = documents.pop(names[1])
        write_packed(file, documents)
    with pytest.raises(StoreError, match=r"records\.jsonl\.xz"):
        store.records()
    assert len(store.scan()[1]) == 1


def test_a_damaged_record_is_not_packed_away(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = store.add(make())
    file = tmp_path / "records" / f"{name}.json"
    file.write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        store.pack()
    assert file.is_file()
    assert not (tmp_path / PACKED).exists()


def test_stores_are_packed_by_a_command(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    name = store.add(make())

    def run(*names: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vivace.evaluation.store", *names]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "1 records in" in run(str(store.path)).stdout
    assert Store(store.path).ids() == [name]
    refused = run(str(tmp_path / "nowhere"))
    assert refused.returncode == 2
    assert "there is no folder" in refused.stderr
