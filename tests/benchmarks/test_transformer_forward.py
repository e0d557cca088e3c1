"""The benchmark of a whole forward: its arithmetic by hand, and a tiny run of its one path on the CPU."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.spec import Routes

FOLDER = Path(__file__).parents[2] / "benchmarks" / "kernels"
OURS = ("transformer", "parts", "harness")


@pytest.fixture
def modules(monkeypatch) -> Any:
    """`load(name)`: a module of the folder as the script itself imports it; gone again afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    kept = {name: sys.modules.pop(name) for name in OURS if name in sys.modules}
    yield importlib.import_module
    for name in OURS:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


def test_amdahl(modules) -> None:
    parts = modules("parts")
    # 10 s, 6 of them attention, at a tenth: 4.6 s are left.
    found = parts.compare(total=10.0, attention=6.0, density=0.1, sparse=1.0, took=5.0)
    assert found["speedup"] == 2.0
    assert found["ideal"] == pytest.approx(10.0 / 4.6)
    assert found["with_kernel"] == 2.0
    assert found["of_ideal"] == pytest.approx(0.92)
    assert found["of_kernel"] == 1.0
    assert found["attention_share"] == 0.6
    assert found["within"]
    assert not parts.compare(10.0, 6.0, 0.1, 1.0, took=5.2)["within"]


def test_text_is_dense(modules) -> None:
    share = modules("parts").with_text
    seen = 0.25 * 80 * 80 + 2 * 80 * 20 + 20 * 20
    assert share(0.25, 80, 20) == pytest.approx(seen / 100**2)
    assert share(0.1, 500, 0) == pytest.approx(0.1)


def test_layers_are_shortened_in_proportion(modules) -> None:
    shortened = modules("parts").shortened
    assert shortened({"a": 20, "b": 40}, 6) == {"a": 2, "b": 4}
    assert shortened({"a": 20, "b": 40}, 1) == {"a": 1, "b": 0}
    assert shortened({"a": 30}, 7) == {"a": 7}


def test_a_part_is_timed_without_the_parts_inside(modules) -> None:
    parts = modules("parts").Parts("cpu")
    inner = parts.wrap("inner", lambda: time.sleep(0.02))

    def work() -> int:
        time.sleep(0.01)
        inner()
        inner()
        return 7

    start = time.perf_counter()
    assert parts.wrap(lambda: "outer", work)() == 7
    whole = time.perf_counter() - start
    spent = parts.seconds(2)
    assert spent["inner"] >= 0.02
    assert spent["outer"] >= 0.005
    assert spent["inner"] + spent["outer"] <= whole / 2 + 1e-6
    assert spent["inner"] + spent["outer"] == pytest.approx(whole / 2, abs=0.005)


def test_pairs_of_lists_are_counted_one_by_one(modules) -> None:
    keep = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    sizes = torch.tensor([8, 8, 3, 5], dtype=torch.int32)
    routes = Routes.of_mask(keep, sizes[None, None], 8)
    hand = sum(float(sizes[i] * sizes[j]) for h, i, j in np.ndindex(3, 4, 4) if keep[0, h, i, j])
    slots = 64.0 * float(keep.sum())
    assert modules("parts").listed_pairs([(routes, sizes, 3), (routes, sizes, 3)]) == (2 * hand, 2 * slots)
    full = Routes.of_mask(keep[:, :1], None, 8)
    once = sum(64.0 for i, j in np.ndindex(4, 4) if keep[0, 0, i, j])
    assert modules("parts").listed_pairs([(full, torch.full((4,), 8), 3)]) == (3 * once, 3 * once)


@pytest.mark.parametrize("block", [64, 128])
def test_methods_are_told_the_density(modules, block) -> None:
    """At a real grid every method that can be told keeps a tenth, and static patterns come near."""
    grid = TokenGrid(21, 30, 52)
    found = modules("parts").techniques(grid, block, 0.1)
    vsa = found[f"vsa, {block}"]
    blocks = vsa.layout(grid).video_blocks
    assert vsa.top == math.ceil(0.1 * blocks)
    for name in ("sliding_tile", "radial"):
        assert found[f"{name}, {block}"].block_map(grid).density == pytest.approx(0.1, rel=0.5)


@pytest.mark.parametrize("shape", ["wan1.3b", pytest.param("hunyuan", marks=pytest.mark.slow)])
def test_a_tiny_run(modules, shape, tmp_path) -> None:
    out = tmp_path / "record.json"
    options = "--tiny --device cpu --layers 2 --block 64 --steps 2 --rounds 2 --only vsa, --only radial"
    modules("transformer").main(["--shape", shape, "--out", str(out), *options.split()])
    record = json.loads(out.read_text())
    assert record["layers"] == 2 < record["layers_of_the_model"]
    assert "fingerprint" in record["environment"]
    rows = record["contenders"]
    assert set(rows) == {"exact, default", "vsa, 64", "radial, 64"}
    # No cuDNN on a processor; that is said and not passed over.
    assert [x["what"] for x in record["left_out"]] == ["exact, cudnn"]
    assert all(row["agrees"] for row in rows.values())
    vsa = rows["vsa, 64"]
    assert vsa["density_with_padding"] >= vsa["density"] > 0.0
    assert {"arrange", "means", "scores", "select", "attend", "restore"} <= set(vsa["parts"])
    assert set(vsa["times"]) == {"eager", "eager, counted", "compiled", "compiled, counted"}
    assert set(vsa["against"]) == {f"{way}, exact, default" for way in vsa["times"]}
    for way, found in vsa["against"].items():
        total = rows["exact, default"]["times"][way.split(",")[0]]["seconds"]
        took = vsa["times"][way.removesuffix(", exact, default")]["seconds"]
        assert found["speedup"] == pytest.approx(total / took)


@pytest.mark.parametrize("wrong", [["--density", "0"], ["--rounds", "0"], ["--shape", "none"]])
def test_bad_input_is_told(modules, wrong, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        modules("transformer").main(["--tiny", "--device", "cpu", *wrong])
    assert end.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_contender_that_is_none_is_refused_before_anything_runs(modules, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        modules("transformer").main(["--tiny", "--device", "cpu", "--block", "64", "--only", "nothing"])
    assert stopped.value.code == 2
    assert "begins with nothing" in capsys.readouterr().err
