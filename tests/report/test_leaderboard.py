"""The leaderboard's text: one file, nothing loaded, everything joined rightly; and the command that writes it."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import board_fixture as fixture
import pytest

from vivace.core.errors import ConfigError, OutputError
from vivace.report import export, leaderboard, units
from vivace.report import leaderboard_methods as join
from vivace.report.leaderboard_values import interval, p_text, text
from vivace.report.leaderboard_values import main as value_text
from vivace.report.method_page import by_prompt, pairs


@pytest.fixture(scope="module")
def html() -> str:
    return leaderboard.page(fixture.board(), fixture.clips())


@pytest.fixture
def board() -> dict[str, Any]:
    """A board that a test may change."""
    return copy.deepcopy(fixture.board())


def block(html: str, name: str) -> Any:
    """The JSON of one of the page's data blocks."""
    found = re.search(
        rf'<script type="application/json" id="{re.escape(name)}">(.*?)</script>', html, re.DOTALL
    )
    assert found, name
    return json.loads(found.group(1), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


class Links(HTMLParser):
    """Everything that could make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset", "poster", "data", "action") and value:
                self.found.append(value)


def test_it_is_one_file_that_loads_nothing(html: str) -> None:
    links = Links()
    links.feed(html)
    assert set(links.found) == {"data:,"} | {x for x in links.found if x.startswith("#/method/")}
    assert "default-src 'none'" in html
    assert not re.search(
        r"""@import|url\((?!#)|\bfetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)""", html
    )


def test_text_of_others_is_never_markup(html: str) -> None:
    assert fixture.SHOWN[1] not in html
    row = fixture.board()["rows"][0]["id"]
    assert block(html, f"samples-{row}")["prompts"][1] == fixture.SHOWN[1]


def test_each_clip_is_in_the_page_once(html: str) -> None:
    assert len(re.findall(r'id="clip-\d+"', html)) == len(fixture.clips()) == 12
    rows = block(html, "data")["rows"].values()
    assert sorted({index for row in rows for index in row["clips"].values()}) == list(range(12))


def test_clips_that_are_not_given_are_left_out() -> None:
    some = dict(list(fixture.clips().items())[:2])
    html = leaderboard.page(fixture.board(), some)
    assert len(re.findall(r'id="clip-\d+"', html)) == 2
    assert sum(len(row["clips"]) for row in block(html, "data")["rows"].values()) == 2
    assert len(html) < len(leaderboard.page(fixture.board(), fixture.clips()))


def test_a_method_is_joined_over_tasks_and_machines_but_not_over_models() -> None:
    found = {m["id"]: m for m in join.methods(fixture.board())}
    assert len(found) == len(fixture.CONTENDERS) + 3
    assert len(found["fast"]["rows"]) == 2
    assert len(found["wan2.1-1.3b/fast"]["rows"]) == 1
    assert found["fast"]["model"] != found["wan2.1-1.3b/fast"]["model"]
    first, second = join.models(fixture.board())
    assert first["name"] == "tiny"
    assert [(s["task"], s["environment"]) for s in first["quality"]] == [(fixture.QUALITY, fixture.GPU)]
    assert {s["environment"] for s in first["time"]} == {fixture.GPU, fixture.CPU}
    assert second["label"] == "wan2.1-1.3b (random weights)"
    assert second["quality"] == []


def test_values_by_prompt_are_means_of_a_prompts_clips(board: dict[str, Any]) -> None:
    row = board["rows"][1]
    row["samples"] = {
        "ids": ["0.0", "0.1", "7.0", "7.1", "9.0"],
        "prompts": ["a", "a", "b", "b", "c"],
        "columns": {
            "psnr": [30.0, 32.0, "inf", 40.0, "inf"],
            "jod": [None, None, 9.0, None, 8.0],
            "other": [1.0] * 5,
        },
    }
    found = by_prompt(row, ["psnr", "jod"])
    assert found == {
        "keys": ["0", "7", "9"],
        "prompts": ["a", "b", "c"],
        "columns": {"psnr": [31.0, 40.0, "inf"], "jod": [None, 9.0, 8.0]},
    }


def test_headline_is_the_fastest_that_passes_and_says_so(board: dict[str, Any]) -> None:
    card = join.headline(board)[0]
    judged = [
        r for r in board["rows"] if r["quality"] and r["contender"]["kind"] in ("plan", "peer", "steps")
    ]
    passed = [r for r in judged if r["paired"]["attributes"]["verdict"] in join.PASSED]
    assert 0 < len(passed) < len(judged)
    best = max(passed, key=lambda r: r["speed_up"]["value"])
    assert (card["method"], card["value"]) == (
        best["contender"]["name"],
        units.factor(best["speed_up"]["value"]),
    )
    for row in judged:
        row["paired"]["attributes"]["verdict"] = "undecided"
    assert join.headline(board)[0]["value"] == "none"


def test_without_times_the_headline_is_the_least_work(board: dict[str, Any]) -> None:
    for row in board["rows"]:
        row["speed_up"] = None
    passed = [
        r
        for r in board["rows"]
        if r["quality"]
        and r["contender"]["kind"] in ("plan", "peer", "steps")
        and r["work_share"]
        and r["paired"]["attributes"]["verdict"] in join.PASSED
    ]
    best = min(passed, key=lambda r: r["work_share"]["value"])
    card = join.headline(board)[0]
    assert (card["label"], card["method"]) == ("Least work that is not inferior", best["contender"]["name"])
    assert card["value"] == units.percent(best["work_share"]["value"])
    assert "nothing was timed" in card["note"]


def _limited(board: dict[str, Any], prompts: int) -> None:
    """The board of a bench with a limit: the quality task's rows hold fewer prompts than the task."""
    for row in board["rows"]:
        if row["task"] == fixture.QUALITY and row["samples"]:
            kept = prompts * fixture.PER_PROMPT
            columns = {n: v[:kept] for n, v in row["samples"]["columns"].items()}
            row["samples"] |= {n: row["samples"][n][:kept] for n in ("ids", "prompts")} | {"columns": columns}


def test_prompts_are_those_that_were_measured(board: dict[str, Any]) -> None:
    card = next(c for c in join.headline(board) if c["label"] == "Prompts")
    assert card["value"] == "40"
    assert card["note"].startswith("on world-short@1, 2 clips each")
    assert "<dd>40, 2 clips each</dd>" in leaderboard.page(board, {})
    _limited(board, 6)
    card = next(c for c in join.headline(board) if c["label"] == "Prompts")
    assert card["value"] == "6"
    assert card["note"].startswith("of the 40 of world-short@1, 2 clips each")
    html = leaderboard.page(board, {})
    assert "<dd>6 of 40, 2 clips each</dd>" in html
    assert "<dd>16, 1 clip each</dd>" in html
    assert "; 6 of 40 prompts, 2 clips each; " in export.markdown(board)
    assert "; 16 prompts, 1 clip each; " in export.markdown(board)


def test_the_summary_counts_one_way_as_one(board: dict[str, Any]) -> None:
    assert f"{fixture.RIVALS} ways to make" in leaderboard.page(board, {})
    names = {r["contender"]["name"] for r in board["rows"] if r["contender"]["kind"] in join.PINNED}
    board["rows"] = [r for r in board["rows"] if r["contender"]["name"] in names | {"fast"}]
    html = leaderboard.page(board, {})
    assert "1 way to make" in html
    assert "1 ways" not in html


def test_not_a_number_is_no_value(board: dict[str, Any]) -> None:
    board["rows"][1]["quality"]["psnr"] = {"value": math.nan, "low": -math.inf, "high": math.inf, "n": 0}
    row = block(leaderboard.page(board, {}), "data")["rows"][board["rows"][1]["id"]]
    assert row["quality"]["psnr"] == {"value": None, "low": "-inf", "high": "inf", "n": 0}


def test_a_bare_board_still_makes_a_page(board: dict[str, Any]) -> None:
    row = board["rows"][0]
    for key in ("quality", "paired", "normalised", "skipped", "counts", "cost", "clips"):
        row[key] = {}
    for key in ("timing", "memory", "energy", "speed_up", "matched", "samples", "work_share"):
        row[key] = None
    task = dict.fromkeys(board["tasks"][0]) | {"name": fixture.QUALITY, "sha256": "0" * 64, "about": ""}
    board |= {
        "rows": [row],
        "tasks": [task],
        "anchors": [],
        "fronts": [],
        "series": {},
        "problems": [],
        "command": "",
    }
    assert block(leaderboard.page(board, {}), "data")["models"][0]["quality"] == []


@pytest.mark.parametrize(
    ("change", "says"), [({"vivace_board": 2}, "build it again"), ({"rows": []}, "vivace bench")]
)
def test_a_board_that_cannot_be_shown_is_refused(
    board: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        leaderboard.page(board | change, {})


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another folder"):
        leaderboard.write(fixture.board(), {}, tmp_path / "file" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        ({"value": 30.8168, "low": 30.36, "high": 31.27}, "dB", "30.8 dB [30.4, 31.3]"),
        ({"value": 0.9553, "low": 0.9436, "high": 0.967}, "", "0.955 [0.944, 0.967]"),
        (
            {"value": 4.731, "low": 4.66, "high": 4.81},
            units.TIMES,
            "4.73\N{MULTIPLICATION SIGN} [4.66, 4.81]",
        ),
        ({"value": 0.152, "low": None, "high": None}, "", "0.152"),
        ({"value": "inf", "low": None, "high": None}, "dB", "\N{INFINITY}"),
        (
            {"value": -0.0301, "low": "-inf", "high": 0.1},
            "",
            "\N{MINUS SIGN}0.0301 [\N{MINUS SIGN}\N{INFINITY}, 0.1000]",
        ),
        ({"value": None, "low": None, "high": None}, "dB", units.MISSING),
        ({"value": -0.0001, "low": -0.03, "high": 0.03}, "", "0.00 [\N{MINUS SIGN}0.03, 0.03]"),
        (None, "", units.MISSING),
    ],
)
def test_a_value_has_the_digits_that_its_interval_bears(value: Any, unit: str, said: str) -> None:
    assert text(value, unit).replace(units.SPACE, " ") == said


def test_differences_carry_their_sign() -> None:
    pair = {"value": 0.0124, "low": -0.0008, "high": 0.0256}
    assert value_text(pair, signed=True) == "+0.012"
    assert interval(pair, signed=True) == "[\N{MINUS SIGN}0.001, +0.026]"
    assert [p_text(p) for p in (None, 0.0002, 0.0312, 0.4)] == [units.MISSING, "< 0.001", "0.031", "0.40"]


def test_settings_are_flat_words() -> None:
    plan = {
        "few_steps": {"steps": 10},
        "list": [{"technique": "x", "low": 0.25}, {"technique": "y"}],
        "on": True,
    }
    assert pairs(plan) == [("few_steps.steps", "10"), ("x.low", "0.25"), ("y", "on"), ("on", "yes")]
