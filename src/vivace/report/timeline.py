"""What each step computed and what it did not, laid out as columns of cells for an inline SVG.

The exact and the fast run share one geometry: equal column width and one scale of seconds, so fewer steps show as a
shorter strip and cheaper steps as shorter bars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vivace.report.units import number, percent, seconds

WIDTH = 1000.0
LEFT, RIGHT, TOP = 64.0, 8.0, 6.0
CELL_HEIGHT, ROW_GAP = 22.0, 5.0
EXPERT_HEIGHT, BAR_HEIGHT, AXIS_HEIGHT = 16.0, 36.0, 18.0
WIDEST_COLUMN = 44.0
COMPUTED, REUSED, SKIPPED = "computed", "reused", "skipped"


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle with a tooltip; `kind` is the CSS class that colours it."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    tip: str = ""


@dataclass(frozen=True, kw_only=True)
class Text:
    x: float
    y: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Everything the template draws for one run; lengths in SVG user units."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    row_labels: tuple[Text, ...]
    ticks: tuple[Text, ...]
    expert_labels: tuple[Text, ...]
    """Where another transformer takes over; empty for models with one."""
    rows: tuple[dict[str, str], ...]
    """The same facts as a table, one row per step and branch."""
    summary: str


def timelines(exact: Mapping[str, Any], fast: Mapping[str, Any]) -> tuple[Timeline, Timeline]:
    """Layouts of two receipts on one scale.  Steps without branches or seconds are drawn empty."""
    runs = [list(receipt.get("steps") or ()) for receipt in (exact, fast)]
    columns = max(1, *(len(steps) for steps in runs))
    column = min(WIDEST_COLUMN, (WIDTH - LEFT - RIGHT) / columns)
    slowest = max((step.get("seconds") or 0.0 for steps in runs for step in steps), default=0.0)
    first, second = (_layout(steps, column, slowest) for steps in runs)
    return first, second


def _layout(steps: Sequence[Mapping[str, Any]], column: float, slowest: float) -> Timeline:
    merged = [_merge_branches(step.get("branches") or ()) for step in steps]
    branches = list(dict.fromkeys(branch for cells in merged for branch in cells))
    experts = [
        ", ".join(dict.fromkeys(c["expert"] for c in cells.values() if c["expert"])) for cells in merged
    ]
    several = len({name for name in experts if name}) > 1
    top = TOP + (EXPERT_HEIGHT if several else 0.0)
    inset = min(2.0, column * 0.1)
    boxes: list[Box] = []
    rows: list[dict[str, str]] = []
    labels = [
        Text(x=LEFT - 10, y=top + row * (CELL_HEIGHT + ROW_GAP) + CELL_HEIGHT / 2, text=branch)
        for row, branch in enumerate(branches)
    ]
    bars_top = top + len(branches) * (CELL_HEIGHT + ROW_GAP) + 4
    if slowest:
        labels.append(Text(x=LEFT - 10, y=bars_top + BAR_HEIGHT / 2, text="seconds"))
    for index, (step, cells) in enumerate(zip(steps, merged, strict=True)):
        x, width = LEFT + index * column + inset, column - 2 * inset
        where = _where(step, index, len(steps))
        for row, branch in enumerate(branches):
            y = top + row * (CELL_HEIGHT + ROW_GAP)
            cell = cells.get(branch)
            if cell is None:
                tip = f"{where}\n{branch}: not requested"
                boxes.append(Box(x=x, y=y, width=width, height=CELL_HEIGHT, kind="absent", tip=tip))
                continue
            tip = f"{where}\n{branch}: {_sentence(cell)}"
            boxes.append(Box(x=x, y=y, width=width, height=CELL_HEIGHT, kind=cell["action"], tip=tip))
            if cell["action"] == REUSED and cell["share"] > 0:
                part = CELL_HEIGHT * cell["share"]
                low = y + CELL_HEIGHT - part
                boxes.append(Box(x=x, y=low, width=width, height=part, kind="part", tip=tip))
            rows.append(_table_row(step, index, branch, cell))
        spent = step.get("seconds")
        if spent and slowest:
            height = max(1.0, BAR_HEIGHT * spent / slowest)
            y = bars_top + BAR_HEIGHT - height
            boxes.append(Box(x=x, y=y, width=width, height=height, kind="seconds", tip=where))
    bottom = bars_top + (BAR_HEIGHT if slowest else 0.0)
    starts = [i for i, name in enumerate(experts) if several and (i == 0 or name != experts[i - 1])]
    return Timeline(
        width=WIDTH,
        height=bottom + AXIS_HEIGHT,
        boxes=tuple(boxes),
        row_labels=tuple(labels),
        ticks=tuple(_step_ticks(len(steps), column, bottom + 14)),
        expert_labels=tuple(Text(x=LEFT + i * column + inset, y=TOP + 8, text=experts[i]) for i in starts),
        rows=tuple(rows),
        summary=_summary(len(steps), merged),
    )


def _merge_branches(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """One cell per branch: a solver of second order or a chunked run calls a branch several times in a step."""
    cells: dict[str, dict[str, Any]] = {}
    for record in records:
        cell = cells.setdefault(
            str(record.get("branch", "cond")),
            {"run": 0.0, "total": 0.0, "actions": [], "by": [], "expert": ""},
        )
        cell["run"] += record.get("blocks_run") or 0
        cell["total"] += record.get("blocks_total") or 0
        cell["actions"].append(record.get("action", COMPUTED))
        cell["by"] += [record["by"]] if record.get("by") and record["by"] not in cell["by"] else []
        cell["expert"] = record.get("expert") or cell["expert"]
    for cell in cells.values():
        kinds = set(cell["actions"])
        cell["action"] = kinds.pop() if len(kinds) == 1 else REUSED
        cell["share"] = cell["run"] / cell["total"] if cell["total"] else float(cell["action"] == COMPUTED)
    return cells


def _sentence(cell: Mapping[str, Any]) -> str:
    by = f" by {', '.join(cell['by'])}" if cell["by"] else ""
    blocks = f", {number(cell['run'])} of {number(cell['total'])} blocks run" if cell["total"] else ""
    verb = {COMPUTED: "computed", REUSED: "reused from cache", SKIPPED: "skipped, network not called"}
    return f"{verb.get(cell['action'], cell['action'])}{by}{blocks}"


def _where(step: Mapping[str, Any], index: int, steps: int) -> str:
    parts = [f"step {step.get('index', index) + 1} of {steps}"]
    if step.get("sigma") is not None:
        parts.append(f"sigma {step['sigma']:.4f}")
    if step.get("timestep") is not None:
        parts.append(f"timestep {number(step['timestep'], 4)}")
    if step.get("seconds") is not None:
        parts.append(seconds(step["seconds"]))
    return " \N{MIDDLE DOT} ".join(parts)


def _table_row(step: Mapping[str, Any], index: int, branch: str, cell: Mapping[str, Any]) -> dict[str, str]:
    return {
        "step": str(step.get("index", index) + 1),
        "sigma": number(step.get("sigma"), 4),
        "timestep": number(step.get("timestep"), 4),
        "seconds": seconds(step.get("seconds")),
        "branch": branch,
        "expert": cell["expert"],
        "action": str(cell["action"]),
        "blocks": f"{number(cell['run'])} / {number(cell['total'])}",
        "by": ", ".join(cell["by"]),
    }


def _step_ticks(steps: int, column: float, y: float) -> list[Text]:
    """Numbers under the columns, thinned so that they never touch."""
    every = next((n for n in (1, 5, 10, 25, 50, 100) if n * column >= 24), 250)
    shown = sorted({0, *range(every - 1, steps, every)}) if steps else []
    return [Text(x=LEFT + (i + 0.5) * column, y=y, text=str(i + 1)) for i in shown]


def _summary(steps: int, merged: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    cells = [cell for branches in merged for cell in branches.values()]
    if not cells:
        return f"{steps} steps; the receipt holds no record of single branches"
    tally = {kind: sum(cell["action"] == kind for cell in cells) for kind in (COMPUTED, REUSED, SKIPPED)}
    run, total = sum(cell["run"] for cell in cells), sum(cell["total"] for cell in cells)
    parts = [f"{tally[COMPUTED]} computed in full"]
    parts += [f"{tally[REUSED]} reused from cache"] if tally[REUSED] else []
    parts += [f"{tally[SKIPPED]} skipped"] if tally[SKIPPED] else []
    share = f"; {percent(run / total)} of the blocks ran" if total else ""
    return f"{steps} steps, {len(cells)} branch evaluations: {', '.join(parts)}{share}"
