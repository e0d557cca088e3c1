"""One contender over all its rows: the join that the leaderboard, the plot and the method pages share.

A board has a row for every contender, task and environment. A reader asks about a method, so rows of the same
contender on the same model are joined; which task and which machine a column is taken from is a `source`, and the page
always names it. Rows of different models are never joined and never ranked together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

Board = Mapping[str, Any]
PINNED = ("exact", "floor", "seed")
"""Kinds that are no competitors: the baseline and the two anchors."""
FAVOURITES = ("attributes", "jod", "psnr", "lpips_alex")
"""Series that are shown first where a board has them."""
PASSED = ("better", "non-inferior", "equivalent")
"""Verdicts that say that no loss above the margin is left."""


def models(board: Board) -> list[dict[str, Any]]:
    """The models of the board, the one with most rows first, each with the sources of its quality and time columns.

    Returns:
        `id`, `name`, `label`, `weights`, `dtypes`, and `quality` and `time`: lists of `{task, environment, count}`,
        the default first.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in board["rows"]:
        found.setdefault(_model_key(row), []).append(row)
    prompts = {task["name"]: task.get("prompts") or 0 for task in board["tasks"]}
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    names = [rows[0]["model"]["name"] for _, rows in ordered]
    out = []
    for key, rows in ordered:
        model = rows[0]["model"]
        quality = _sources((r for r in rows if r.get("quality")), prompts, None)
        time = _sources(
            (r for r in rows if (r.get("cost") or {}).get("total")), prompts, quality[0] if quality else None
        )
        random = " (random weights)" if model.get("weights") == "random" else ""
        twin = f" {model.get('sha256', '')[:6]}" if names.count(model["name"]) > 1 else ""
        out.append(
            {
                "id": key,
                "name": model["name"],
                "label": f"{model['name']}{twin}{random}",
                "pipeline": model.get("pipeline", ""),
                "weights": model.get("weights", ""),
                "sha256": model.get("sha256", ""),
                "dtypes": sorted({r["model"].get("dtype", "") for r in rows} - {""}),
                "quality": quality,
                "time": time,
            }
        )
    return out


def methods(board: Board) -> list[dict[str, Any]]:
    """Every contender of every model once, with the ids of its rows.

    `id` is the contender's name, and `model/name` for all but the first model: it stands in the address of its page.
    """
    order = [model["id"] for model in models(board)]
    names = {model["id"]: model["name"] for model in models(board)}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in board["rows"]:
        contender, model = row["contender"], _model_key(row)
        entry = found.get((model, contender["name"]))
        if entry is None:
            name = contender["name"]
            title, subtitle = title_of(contender)
            entry = found[model, name] = {
                "id": name if model == order[0] else f"{names[model]}/{name}",
                "model": model,
                "name": name,
                "title": title,
                "subtitle": subtitle,
                "kind": contender["kind"],
                "family": contender.get("family") or "",
                "group": contender.get("group") or name,
                "knob": contender.get("knob") or "",
                "package": contender.get("package") or "",
                "package_version": contender.get("package_version") or "",
                "techniques": list(contender.get("techniques") or ()),
                "settings": contender.get("settings") or {},
                "notes": [],
                "rows": [],
            }
        entry["notes"] += [n for n in contender.get("notes") or () if n not in entry["notes"]]
        entry["rows"].append(row["id"])
    return list(found.values())


def title_of(contender: Mapping[str, Any]) -> tuple[str, str]:
    """What to call a contender in large and in small letters."""
    name, kind = contender["name"], contender["kind"]
    if kind in PINNED:
        words = {
            "exact": ("exact", "the task's baseline"),
            "floor": ("noise floor", "exact again, another kernel"),
            "seed": ("seed ceiling", "exact with other noise"),
        }
        return (contender.get("label") or words[kind][0], words[kind][1])
    if kind == "steps":
        steps = name.partition("=")[2] or (contender.get("settings") or {}).get("steps", "")
        return contender.get("label") or f"exact, {steps} steps", "fewer steps, the control"
    base, _, knob = name.partition("@")
    if base.endswith((".yaml", ".yml", ".json")):
        base = PurePath(base).stem
    title = contender.get("label") or (base.rpartition(".")[2] if kind == "peer" else base)
    package = " ".join(p for p in (contender.get("package"), contender.get("package_version")) if p)
    parts = (contender.get("knob") or knob, package or ("plan" if kind == "plan" else ""))
    return title, ", ".join(p for p in parts if p)


def shown_series(board: Board) -> list[str]:
    """The three or four series of the quality columns to begin with: favourites, else the first of each group."""
    measured = {name for row in board["rows"] for name in row.get("quality") or {}}
    named = [name for name in board["series"] if name in measured]
    if first := [name for name in FAVOURITES if name in named]:
        return first[:3]
    groups: dict[str, list[str]] = {}
    for name in named:
        groups.setdefault(board["series"][name]["group"], []).append(name)
    return [name for group in groups.values() for name in group[:2]][:4]


def headline(board: Board) -> list[dict[str, str]]:
    """What a reader looks for first, of the first model: `label`, `value`, `note` and the `method` it is about.

    Wall time and quality may come from different machines; the note says which.
    """
    from vivace.report import units
    from vivace.report.leaderboard_values import text

    found = models(board)
    if not found or not found[0]["quality"]:
        return []
    model = found[0]
    judge = next((s for s in shown_series(board) if board["series"][s].get("margin") is not None), None)
    quality = _at(board, model, model["quality"][0])
    time = _at(board, model, model["time"][0]) if model["time"] else {}
    rivals = [name for name, row in quality.items() if row["contender"]["kind"] in ("plan", "peer", "steps")]
    cards = []

    def speed(name: str) -> float:
        return ((time.get(name) or {}).get("speed_up") or {}).get("value") or 0.0

    if judge:
        series = board["series"][judge]
        passed = [n for n in rivals if _verdict(quality[n], judge) in PASSED and speed(n) > 0]
        label = "Fastest that is not inferior"
        if best := max(passed, key=speed, default=None):
            title = title_of(quality[best]["contender"])[0]
            found_speed = text(time[best]["speed_up"], units.TIMES)
            cards.append(
                {
                    "label": label,
                    "value": units.factor(speed(best)),
                    "note": f"{title}: {found_speed}; {series['title'].lower()} within {series['margin']:g} of exact",
                    "method": best,
                }
            )
        elif spared := {
            n: quality[n]["work_share"]["value"]
            for n in rivals
            # Where nothing was timed, the work is what can be compared.
            if not any(map(speed, rivals))
            and quality[n]["work_share"]
            and _verdict(quality[n], judge) in PASSED
        }:
            best = min(spared, key=spared.__getitem__)
            title = title_of(quality[best]["contender"])[0]
            cards.append(
                {
                    "label": "Least work that is not inferior",
                    "value": units.percent(spared[best]),
                    "note": f"{title}: {series['title'].lower()} within {series['margin']:g} of exact; "
                    "nothing was timed",
                    "method": best,
                }
            )
        elif rivals:
            cards.append(
                {
                    "label": label,
                    "value": "none",
                    "note": f"no {series['title'].lower()} is shown to stay within {series['margin']:g} of exact",
                    "method": "",
                }
            )
    fidelity = next((s for s in shown_series(board) if board["series"][s]["group"] == "fidelity"), None)
    if fidelity:
        series = board["series"][fidelity]
        sign = -1 if series["better"] == "lower" else 1
        quick = [n for n in rivals if speed(n) >= 2 and _number(quality[n], fidelity) is not None]
        if near := max(quick, key=lambda n: sign * (_number(quality[n], fidelity) or 0), default=None):
            unit = f"{units.SPACE}{series['unit']}" if series["unit"] else ""
            title = title_of(quality[near]["contender"])[0]
            cards.append(
                {
                    "label": f"Nearest to exact at 2{units.TIMES} or more",
                    "value": units.number(_number(quality[near], fidelity)) + unit,
                    "note": f"{title}: {series['title']}, {units.factor(speed(near))}",
                    "method": near,
                }
            )
    kinds = [row["contender"]["kind"] for row in quality.values()]
    parts = [
        (kinds.count(k), w) for k, w in (("plan", "plan"), ("peer", "peer"), ("steps", "fewer-step control"))
    ]
    counts = ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in parts if n)
    cards.append({"label": "Contenders", "value": str(len(rivals)), "note": counts, "method": ""})
    task = next((t for t in board["tasks"] if t["name"] == model["quality"][0]["task"]), None)
    if task and task.get("prompts"):
        made = measured_prompts(quality.values()) or task["prompts"]
        where = (
            f"on {task['name']}" if made >= task["prompts"] else f"of the {task['prompts']} of {task['name']}"
        )
        cards.append(
            {
                "label": "Prompts",
                "value": units.number(made),
                "note": f"{where}, {_clips(task)} each; the prompt is the unit of every interval",
                "method": "",
            }
        )
    return cards


def measured_prompts(rows: Iterable[Mapping[str, Any]]) -> int | None:
    """Of how many prompts clips were measured: the most of any row; None where no row keeps its samples.

    A bench with a limit measures fewer than its task has.
    """
    ids = (row["samples"]["ids"] for row in rows if row.get("samples"))
    return max((len({i.partition(".")[0] for i in found}) for found in ids), default=0) or None


def prompts_text(task: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> str:
    """`16`, or `6 of 16` where the rows measured fewer prompts than their task has."""
    made = measured_prompts(rows)
    return f"{made} of {task['prompts']}" if made and made < task["prompts"] else str(task["prompts"])


def _clips(task: Mapping[str, Any]) -> str:
    count = task.get("per_prompt") or 1
    return "one clip" if count == 1 else f"{count} clips"


def _at(board: Board, model: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Rows of a model at one source by contender name."""
    return {
        row["contender"]["name"]: row
        for row in board["rows"]
        if _model_key(row) == model["id"]
        and (row["task"], row["environment"]) == (source["task"], source["environment"])
    }


def _number(row: Mapping[str, Any], series: str) -> float | None:
    value = ((row.get("quality") or {}).get(series) or {}).get("value")
    return value if isinstance(value, (int, float)) else None


def _verdict(row: Mapping[str, Any], series: str) -> str:
    return ((row.get("paired") or {}).get(series) or {}).get("verdict", "")


def _sources(
    rows: Iterable[Mapping[str, Any]], prompts: Mapping[str, int], wanted: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Pairs of task and environment with the number of contenders there, the most telling first."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        place = (row["task"], row["environment"])
        counts[place] = counts.get(place, 0) + 1

    def rank(item: tuple[tuple[str, str], int]) -> tuple[int, int, int]:
        (task, environment), count = item
        same = wanted is not None and (task, environment) == (wanted["task"], wanted["environment"])
        return -count, -int(same), -prompts.get(task, 0)

    ordered: Sequence[tuple[tuple[str, str], int]] = sorted(counts.items(), key=rank)
    return [{"task": t, "environment": e, "count": n} for (t, e), n in ordered]


def _model_key(row: Mapping[str, Any]) -> str:
    model = row["model"]
    return (
        ":".join(str(model.get(k) or "") for k in ("name", "pipeline", "weights"))
        + f":{str(model.get('sha256') or '')[:16]}"
    )
