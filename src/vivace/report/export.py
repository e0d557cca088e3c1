"""A board as Markdown for people, and as one long table (CSV, Parquet) for programs.

The long table has one line for each number: which record, which quantity, its value, its interval, and what it was
compared with. Units are base units (seconds, bytes, FLOPs) and no number is rounded.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vivace.core.errors import OutputError, UnavailableError
from vivace.report import units
from vivace.report.leaderboard_methods import PINNED, prompts_text, shown_series, title_of
from vivace.report.leaderboard_values import main, p_text, text

Board = Mapping[str, Any]
COLUMNS: dict[str, type] = {
    "record": str, "task": str, "environment": str, "environment_label": str, "model": str, "dtype": str,
    "contender": str, "kind": str, "family": str, "group": str, "knob": str, "package": str, "package_version": str,
    "section": str, "quantity": str, "unit": str, "better": str, "value": float, "low": float, "high": float, "n": int,
    "against": str, "verdict": str, "margin": float, "p": float, "p_holm": float, "needed_prompts": float, "note": str,
}  # fmt: skip
"""Column names of the long table and what they hold; an empty cell means unknown."""
_COUNT_UNITS = {"flops": "FLOP", "flops_dense": "FLOP"}


def markdown(board: Board) -> str:
    """The board as Markdown: one table for each task and environment, every estimate with its 95 % interval."""
    labels = {e["fingerprint"]: e["label"] for e in board["environments"]}
    tasks = {t["name"]: t for t in board["tasks"]}
    parts = [f"# {board['title']}", f"Made {board['created']}."]
    if board.get("command"):
        parts.append(f"```\n{board['command']}\n```")
    parts.append(
        "Brackets are 95 % intervals; the unit of analysis is the prompt. Speed-ups are ratios of medians to the exact "
        "run of the same task on the same machine. The verdict is about the paired difference to the exact run, "
        "against the margin that was stated before."
    )
    places = dict.fromkeys((row["task"], row["environment"], row["model"]["name"]) for row in board["rows"])
    for task, environment, model in places:
        rows = [
            r
            for r in board["rows"]
            if (r["task"], r["environment"], r["model"]["name"]) == (task, environment, model)
        ]
        parts.append(f"## {task} on {labels.get(environment, environment)}")
        parts.append(_shape(tasks.get(task, {}), model, rows))
        parts.append(_table(board, rows))
        parts += _anchors(board, task, environment)
        parts += _skipped(rows)
    if board.get("problems"):
        parts.append("## Left out\n\n" + "\n".join(f"- {_cell(text)}" for text in board["problems"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def csv_rows(board: Board) -> list[dict[str, Any]]:
    """The long table: one dict with the keys of `COLUMNS` for each number of the board; None is unknown."""
    labels = {e["fingerprint"]: e["label"] for e in board["environments"]}
    return [
        dict.fromkeys(COLUMNS) | _who(row, labels) | line
        for row in board["rows"]
        for line in _lines(row, board["series"])
    ]


def csv_text(board: Board) -> str:
    """The long table as CSV with a header line."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(csv_rows(board))
    return out.getvalue()


def write_csv(board: Board, path: str | Path) -> Path:
    """Writes the long table as CSV.  Raises `OutputError` where it cannot be written."""
    target = Path(path)
    try:
        target.write_text(csv_text(board), encoding="utf-8")
    except OSError as error:
        raise _unwritten(target, error) from error
    return target


def parquet_bytes(board: Board) -> bytes:
    """The long table as a Parquet file, typed by `COLUMNS`.

    Raises:
        UnavailableError: pyarrow is absent.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UnavailableError("a Parquet file needs pyarrow; pip install 'vivace[eval]'.") from error
    kinds = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64()}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(csv_rows(board), schema=schema), out)
    return out.getvalue()


def write_parquet(board: Board, path: str | Path) -> Path:
    """Writes the long table as Parquet.

    Raises:
        UnavailableError: pyarrow is absent.
        OutputError: the file cannot be written.
    """
    target, data = Path(path), parquet_bytes(board)
    try:
        target.write_bytes(data)
    except OSError as error:
        raise _unwritten(target, error) from error
    return target


def _unwritten(target: Path, error: OSError) -> OutputError:
    reason = (error.strerror or str(error)).lower()
    return OutputError(f"cannot write {target}: {reason}; free some space or choose another folder.")


def _who(row: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    contender, model = row["contender"], row["model"]
    keys = ("kind", "family", "group", "knob", "package", "package_version")
    return {
        "record": row["id"],
        "task": row["task"],
        "environment": row["environment"],
        "environment_label": labels.get(row["environment"], ""),
        "model": model["name"],
        "dtype": model.get("dtype"),
        "contender": contender["name"],
        **{key: contender.get(key) or None for key in keys},
    }


def _lines(row: Mapping[str, Any], series: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The numbers of one row."""
    for name, count in (row.get("counts") or {}).items():
        yield {"section": "count", "quantity": name, "unit": _COUNT_UNITS.get(name), "value": _float(count)}
    if row.get("work_share"):
        yield {
            "section": "cost",
            "quantity": "work_share",
            "better": "lower",
            "against": "exact",
            **_value(row["work_share"]),
        }
    for stage, value in (row.get("cost") or {}).items():
        if value:
            yield {
                "section": "cost",
                "quantity": f"seconds.{stage}",
                "unit": "s",
                "better": "lower",
                **_value(value),
            }
    if row.get("speed_up"):
        yield {
            "section": "cost",
            "quantity": "speed_up",
            "better": "higher",
            "against": "exact",
            **_value(row["speed_up"]),
        }
    for section, unit in (("memory", "B"), ("energy", None)):
        for name, number in (row.get(section) or {}).items():
            if isinstance(number, (int, float)):
                yield {
                    "section": section,
                    "quantity": name,
                    "unit": unit,
                    "better": "lower",
                    "value": _float(number),
                }
    for name, value in (row.get("quality") or {}).items():
        yield {
            "section": "quality",
            "quantity": name,
            **_facts(series, name),
            **_value(value),
            "p": value.get("p"),
        }
    for name, pair in (row.get("paired") or {}).items():
        yield {
            "section": "paired",
            "quantity": name,
            **_facts(series, name),
            "against": "exact",
            **_pair(pair),
        }
    for name, value in (row.get("normalised") or {}).items():
        yield {"section": "normalised", "quantity": name, "better": "higher", **_value(value)}
    if matched := row.get("matched"):
        for name, pair in (matched.get("paired") or {}).items():
            facts = {
                "section": "matched",
                "against": matched["contender"],
                "note": f"matched by {matched['by']}",
            }
            yield {"quantity": name, **facts, **_facts(series, name), **_pair(pair)}


def _ratio(name: str, better: str, value: Mapping[str, Any]) -> dict[str, Any]:
    return {"section": "cost", "quantity": name, "better": better, "against": "exact", **_value(value)}


def _facts(series: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    known = series.get(name, {})
    return {"unit": known.get("unit") or None, "better": known.get("better")}


def _value(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _float(value.get(key)) for key in ("value", "low", "high")} | {"n": value.get("n")}


def _pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_value(pair.get("difference") or {}),
        **{key: pair.get(key) for key in ("verdict", "margin", "p", "p_holm")},
        "needed_prompts": _float(pair.get("needed")),
    }


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _shape(task: Mapping[str, Any], model: str, rows: list[Mapping[str, Any]]) -> str:
    if not task:
        return f"Model {model}."
    clips = "1 clip" if task.get("per_prompt") == 1 else f"{task.get('per_prompt')} clips"
    facts = [
        f"Model {model}",
        f"{prompts_text(task, rows)} prompts, {clips} each" if task.get("prompts") else "",
        f"exact run of {task.get('steps')} steps, guidance {task.get('guidance')}"
        if task.get("steps")
        else "",
        f"{task.get('frames')} frames of {task.get('height')}x{task.get('width')}"
        if task.get("frames")
        else "",
    ]
    return "; ".join(fact for fact in facts if fact) + "."


def _table(board: Board, rows: list[Mapping[str, Any]]) -> str:
    measured = {name for row in rows for name in row.get("quality") or {}}
    names = [name for name in shown_series(board) if name in measured]
    judged = [name for name in names if any(name in (row.get("paired") or {}) for row in rows)]
    matched = next((n for n in names if any(n in _matched(row) for row in rows)), None)
    heads = ["Contender", "NFE", "Work", "Seconds", "Speed-up", "Peak memory"]
    heads += [_head(board["series"][name]) for name in names]
    heads += [f"{board['series'][name]['title']} against exact" for name in judged]
    heads += [f"{board['series'][matched]['title']} against fewer steps at equal FLOPs"] if matched else []
    ordered = sorted(rows, key=lambda row: (row["contender"]["kind"] not in PINNED, -_speed(row)))
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in ordered:
        counts, memory, cost = row.get("counts") or {}, row.get("memory") or {}, row.get("cost") or {}
        line = [
            _name(row["contender"]),
            units.number(counts.get("nfe")),
            units.percent((row.get("work_share") or {}).get("value")),
            text(cost.get("total"), "s"),
            text(row.get("speed_up"), units.TIMES),
            units.size(memory.get("peak_allocated") or memory.get("resident")),
        ]
        line += [text((row.get("quality") or {}).get(name)) for name in names]
        line += [_against((row.get("paired") or {}).get(name)) for name in judged]
        if matched:
            pair = _matched(row).get(matched)
            line.append(f"{_against(pair)} ({row['matched']['contender']})" if pair else units.MISSING)
        lines.append(line)
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _name(contender: Mapping[str, Any]) -> str:
    title, subtitle = title_of(contender)
    return f"**{title}** ({subtitle})" if contender["kind"] in PINNED else f"{title} ({subtitle})"


def _head(series: Mapping[str, Any]) -> str:
    arrow = {"higher": "\N{UPWARDS ARROW}", "lower": "\N{DOWNWARDS ARROW}"}.get(series["better"], "=")
    return f"{series['title']}{' (' + series['unit'] + ')' if series['unit'] else ''} {arrow}"


def _against(pair: Mapping[str, Any] | None) -> str:
    if not pair:
        return units.MISSING
    verdict = pair.get("verdict", "")
    holm = f", Holm p {p_text(pair['p_holm'])}" if pair.get("p_holm") is not None else ""
    return f"{text(pair.get('difference'), signed=True)} {verdict}{holm}"


def _matched(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return (row.get("matched") or {}).get("paired") or {}


def _speed(row: Mapping[str, Any]) -> float:
    return (row.get("speed_up") or {}).get("value") or 0.0


def _anchors(board: Board, task: str, environment: str) -> list[str]:
    out = []
    for anchor in board.get("anchors") or ():
        if (anchor["task"], anchor["environment"]) != (task, environment):
            continue
        for key, words in (("floor", "Noise floor"), ("seed", "Seed ceiling")):
            named = [
                f"{board['series'][n]['title']} {main(v)}"
                for n, v in (anchor.get(key) or {}).items()
                if n in board["series"]
            ]
            out += [f"{words}: {', '.join(named)}."] if named else []
    return out


def _skipped(rows: list[Mapping[str, Any]]) -> list[str]:
    reasons = {name: why for row in rows for name, why in (row.get("skipped") or {}).items()}
    return (
        ["Not measured: " + " ".join(f"{n} ({w.rstrip('.')})." for n, w in reasons.items())]
        if reasons
        else []
    )


def _cell(words: str) -> str:
    return str(words).replace("|", "\\|").replace("\n", " ")
