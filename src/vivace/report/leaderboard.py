"""The leaderboard: one HTML file with the table, the plot and a page for each method, and no need of a network.

Style, script, numbers and clips are inside the file, and a content security policy forbids every request. Clips and
the values of single prompts lie in blocks that are read only when a method's page is opened.
"""

from __future__ import annotations

import base64
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vivace.core.errors import ConfigError, OutputError
from vivace.report import leaderboard_methods as join
from vivace.report.method_page import by_prompt, pairs, row_data, sorted_samples

Board = Mapping[str, Any]
VERSION = 1
"""Version of the board that this page reads."""
SCRIPTS = ("base", "table", "plot", "player", "method", "main")


def page(board: Board, clips: Mapping[str, bytes]) -> str:
    """The page as HTML text.

    Args:
        board: plain JSON data as `vivace.evaluation.board` builds it.
        clips: mp4 file content by its path below the store; what a row names and this does not hold is left out.

    Raises:
        ConfigError: the board has another version, or no row.
    """
    if board.get("vivace_board") != VERSION:
        raise ConfigError(
            f"the board has version {board.get('vivace_board')} and this Vivace reads {VERSION}; build it again."
        )
    if not board["rows"]:
        raise ConfigError("the board has no rows; run `vivace bench` first.")
    used = _used(board, clips)
    places = {path: index for index, path in enumerate(used)}
    series = list(board["series"])
    samples = {row["id"]: by_prompt(row, series) for row in board["rows"]}
    return (
        _environment()
        .get_template("leaderboard.html.j2")
        .render(
            board=board,
            cards=join.headline(board),
            prompts={
                task["name"]: join.prompts_text(
                    task, (row for row in board["rows"] if row["task"] == task["name"])
                )
                for task in board["tasks"]
                if task.get("prompts")
            },
            summary=_summary(board),
            data=_json(_client(board, places)),
            samples={name: _json(found) for name, found in samples.items() if found},
            clips=[base64.b64encode(clips[path]).decode("ascii") for path in used],
            scripts=[f"leaderboard_{name}.js" for name in SCRIPTS],
        )
    )


def write(board: Board, clips: Mapping[str, bytes], path: str | Path) -> Path:
    """Renders to a file, which appears only when complete.  Raises `OutputError` where it cannot be written."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page(board, clips), encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(
            f"cannot write {target}: {reason}; free some space or choose another folder."
        ) from error
    finally:
        if os.path.lexists(partial):
            partial.unlink()
    return target


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("vivace.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def _used(board: Board, clips: Mapping[str, bytes]) -> list[str]:
    """Paths of the clips that some row shows and that are at hand, each once."""
    named = (path for row in board["rows"] for _, path in sorted_samples(row.get("clips") or {}))
    return [path for path in dict.fromkeys(named) if path in clips]


def _client(board: Board, places: Mapping[str, int]) -> dict[str, Any]:
    """Everything the script draws from."""
    methods = join.methods(board)
    for method in methods:
        method["settings"] = pairs(_plan_settings(method["settings"]))
    return {
        "series": board["series"],
        "shown": join.shown_series(board),
        "environments": {
            e["fingerprint"]: {"label": e["label"], "details": pairs(e.get("details") or {})}
            for e in board["environments"]
        },
        "tasks": {task["name"]: task for task in board["tasks"]},
        "models": join.models(board),
        "methods": methods,
        "rows": {row["id"]: row_data(row, places) for row in board["rows"]},
        "anchors": board.get("anchors") or [],
        "fronts": board.get("fronts") or [],
    }


def _plan_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """A plan's own techniques say everything; the version and name of its document only make noise."""
    if "vivace_plan" not in settings:
        return settings
    techniques = settings.get("techniques") or []
    flat: dict[str, Any] = {}
    for item in techniques:
        flat[item.get("technique", "technique")] = {k: v for k, v in item.items() if k != "technique"} or "on"
    return flat


def _summary(board: Board) -> str:
    """The page in one sentence."""
    names = {row["contender"]["name"] for row in board["rows"] if row["contender"]["kind"] not in join.PINNED}
    machines = [e["label"] for e in board["environments"]]
    where = " and ".join(filter(None, (", ".join(machines[:-1]), machines[-1] if machines else "")))
    tasks = f"{len(board['tasks'])} task{'s' if len(board['tasks']) != 1 else ''}"
    ways = f"{len(names)} way{'s' if len(names) != 1 else ''}"
    return (
        f"{ways} to make the same clips faster, against the exact run, on {tasks}"
        f"{', measured on ' + where if where else ''}."
    )


def _json(data: Any) -> str:
    """JSON that may stand inside a script element: no `<`, and infinities as text, because JSON has none."""
    words = json.dumps(_plain(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return words.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _plain(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None if math.isnan(data) else "inf" if data > 0 else "-inf"
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    return [_plain(item) for item in data] if isinstance(data, (list, tuple)) else data
