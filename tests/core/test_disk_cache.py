"""The folder of files: whole or absent, within its size, whoever else writes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from vivace.core.disk_cache import DiskCache


def test_reads_what_was_written(tmp_path):
    cache = DiskCache(tmp_path / "deep" / "folder", 1000)
    assert cache.read("ab").data is None
    assert cache.write("ab", b"hello") == 0
    assert cache.read("ab").data == b"hello"
    assert cache.size() == 5 + 32


@pytest.mark.parametrize("harm", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"x" + b[41:]])
def test_damage_is_seen_and_removed(tmp_path, harm):
    cache = DiskCache(tmp_path, 1000)
    cache.write("ab", b"hello world")
    cache.path("ab").write_bytes(harm(cache.path("ab").read_bytes()))
    found = cache.read("ab")
    assert found.data is None
    assert found.damaged
    assert not cache.path("ab").exists()


def test_least_recently_used_leave_first(tmp_path):
    cache = DiskCache(tmp_path, 3 * 100)
    for i, key in enumerate("abc"):
        cache.write(key, bytes(60))
        os.utime(cache.path(key), (i + 1, i + 1))
    cache.read("a")
    assert cache.write("d", bytes(60)) == 1
    assert [k for k in "abcd" if cache.read(k).data is not None] == ["a", "c", "d"]


def test_what_is_larger_than_the_limit_drives_nothing_out(tmp_path):
    cache = DiskCache(tmp_path, 100)
    cache.write("a", bytes(50))
    assert cache.write("b", bytes(100)) == 0
    assert cache.read("a").data is not None
    assert cache.read("b").data is None


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path, 1000)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.write("a", b"x")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_goes_in_time(tmp_path):
    cache = DiskCache(tmp_path, 1000)
    for name, age in (("old.part", 7200), ("new.part", 0)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    cache.write("a", b"x")
    assert {p.name for p in tmp_path.iterdir()} == {"new.part", "a.bin"}


def test_several_processes_at_once(tmp_path):
    """Four processes write, read and drive each other's files out: every read is whole, nobody fails."""
    code = """
import sys
from pathlib import Path
from vivace.core.disk_cache import DiskCache
cache = DiskCache(Path(sys.argv[1]), 20_000)
bad = hits = 0
for i in range(150):
    key = f"{i % 7:02x}"
    want = key.encode() * 2000
    found = cache.read(key)
    bad += bool(found.damaged) or found.data not in (None, want)
    hits += found.data is not None
    cache.write(key, want)
print(bad, hits)
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    results = [p.communicate(timeout=60)[0].split() for p in running]
    assert all(p.returncode == 0 for p in running)
    assert all(bad == "0" for bad, _ in results)
    assert sum(int(hits) for _, hits in results) > 0
    assert DiskCache(tmp_path, 20_000).size() <= 20_000
    assert not list(tmp_path.glob("*.part"))
