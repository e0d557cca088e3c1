"""Weight bytes by format: what is built has the bytes that are predicted, and a forward is measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vivace.models.known import KNOWN


@pytest.fixture
def script(monkeypatch, pytestconfig):
    import importlib

    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    module = importlib.import_module("weight_memory")
    known = KNOWN["wan2.1-1.3b"]
    small = {
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "ffn_dim": 320,
        "text_dim": 64,
    }
    tiny = replace(known, transformer={**known.transformer, **small})
    monkeypatch.setattr(module, "KNOWN", {**KNOWN, "small": tiny})
    return module


FORMATS = "bf16,int8,int8/int8,int4@32,nvfp4,mxfp8"


def test_a_block_stands_for_all(script, tmp_path) -> None:
    made = script.main(["--model", "small", "--formats", FORMATS, "--out", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(made))
    sizes = {name: row["weights_bytes"] for name, row in made["formats"].items()}
    assert sizes == {name: row["predicted_weights_bytes"] for name, row in made["formats"].items()}
    assert sizes["bf16"] > sizes["int8"] == sizes["int8/int8"] > sizes["int4@32"]


def test_a_forward_is_measured(script) -> None:
    made = script.main(
        [
            "--model",
            "small",
            "--formats",
            "bf16,int8,mxfp4",
            "--forward",
            "--shape",
            "9x64x64",
            "--layers",
            "2",
        ]
    )
    assert made["layers"] == 2
    # The table of rotary factors, which loading leaves in its own type, is the same in every format.
    off = {row["weights_bytes"] - row["predicted_weights_bytes"] for row in made["formats"].values()}
    assert len(off) == 1
    for row in made["formats"].values():
        assert row["weights_bytes"] == row["tensors_bytes"]
        assert row["finite"]
        assert row["peak_bytes"] > row["weights_bytes"]
    exact = made["formats"]["bf16"]
    assert exact["peak_bytes"] - off.pop() == pytest.approx(exact["predicted_peak_bytes"], rel=0.1)


@pytest.mark.parametrize("wrong", [["--formats", "int3"], ["--shape", "81x480"], ["--layers", "0"]])
def test_wrong_words_are_told(script, wrong) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--model", "small", *wrong])
    assert stop.value.code == 2
