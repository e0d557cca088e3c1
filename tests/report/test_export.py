"""Markdown and the long table say what the board says, with every interval."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

import board_fixture as fixture
import pytest

from vivace.core.errors import OutputError, UnavailableError
from vivace.report import export


def rows_of(table: list[dict[str, Any]], **wanted: str) -> list[dict[str, Any]]:
    return [row for row in table if all(row[key] == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    return export.csv_rows(fixture.board())


def test_the_long_table_holds_every_number_unrounded(table: list[dict[str, Any]]) -> None:
    board = fixture.board()
    assert all(list(row) == list(export.COLUMNS) for row in table)
    quality = sum(len(row["quality"]) for row in board["rows"])
    assert len(rows_of(table, section="quality")) == quality
    (line,) = rows_of(table, contender="fast", section="quality", quantity="psnr")
    value = next(r for r in board["rows"] if r["contender"]["name"] == "fast")["quality"]["psnr"]
    assert (line["value"], line["low"], line["high"]) == (value["value"], value["low"], value["high"])
    assert (line["unit"], line["better"], line["environment_label"]) == (
        "dB",
        "higher",
        "Example GPU 80GB, torch 2.11",
    )
    (pair,) = rows_of(table, contender="fast", section="matched", quantity="attributes")
    assert pair["against"] == "steps=8"
    assert {row["section"] for row in table} >= {"count", "cost", "memory", "energy", "paired", "normalised"}


def test_csv_reads_back(table: list[dict[str, Any]]) -> None:
    read = list(csv.DictReader(io.StringIO(export.csv_text(fixture.board()))))
    assert len(read) == len(table)
    for line, row in zip(read, table, strict=True):
        assert line["contender"] == row["contender"]
        assert line["value"] == ("" if row["value"] is None else repr(row["value"]))


def test_parquet_reads_back_with_types(table: list[dict[str, Any]], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    read = parquet.read_table(export.write_parquet(fixture.board(), tmp_path / "report.parquet"))
    assert read.num_rows == len(table)
    assert str(read.schema.field("value").type) == "double"
    assert read.column("value").to_pylist() == [row["value"] for row in table]


def test_without_pyarrow_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnavailableError, match="pip install"):
        export.write_parquet(fixture.board(), tmp_path / "report.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [export.write_csv, export.write_parquet])
def test_a_folder_that_is_not_there_is_one_sentence(write: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="choose another folder"):
        write(fixture.board(), tmp_path / "nowhere" / "report")


def test_markdown_has_a_table_for_each_place_and_its_anchors() -> None:
    words = export.markdown(fixture.board()).replace("\N{NO-BREAK SPACE}", " ")
    heads = [line for line in words.splitlines() if line.startswith("## ")]
    assert heads == [
        "## world-short@1 on Example GPU 80GB, torch 2.11",
        "## world-smoke@1 on 2-core Example CPU, torch 2.13",
        "## speed-wan1.3b-480p@1 on Example GPU 80GB, torch 2.11",
        "## Left out",
    ]
    lines = [line for line in words.splitlines() if line.startswith("|")]
    for line in lines:
        assert line.count("|") in {first.count("|") for first in lines if first.startswith("| Contender")}
    fast = next(line for line in lines if line.startswith("| fast"))
    assert "15.2 %" in fast
    assert "4.73\N{MULTIPLICATION SIGN} [4.66, 4.81]" in fast
    assert "(steps=8)" in fast
    assert next(i for i, line in enumerate(lines) if "**exact**" in line) == 2
    assert "Noise floor: Attribute accuracy 0.950" in words
    assert "fvd (FVD needs the I3D weights" in words


def test_a_bar_in_a_name_does_not_break_the_table() -> None:
    board = dict(fixture.board())
    row = dict(board["rows"][4])
    row["contender"] = dict(row["contender"], label="a | b")
    board["rows"] = [board["rows"][0], row]
    lines = export.markdown(board).splitlines()
    head = next(line for line in lines if line.startswith("| Contender"))
    line = next(line for line in lines if "a \\| b" in line)
    assert line.replace("\\|", "").count("|") == head.count("|")
