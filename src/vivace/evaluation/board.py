"""The board: everything a report shows, computed from the records of a store, as plain JSON data.

Nothing is stored that can be computed: speed-ups, paired differences, scores between the anchors, controls and fronts
are made here, within one task, model and machine, and never across. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from vivace.core.errors import UnknownNameError, VivaceError
from vivace.evaluation.board_controls import matched, normalised
from vivace.evaluation.board_fronts import SERIES, fronts
from vivace.evaluation.compare import GROUPS, SeriesTable, compare, compare_cost, series_table, value
from vivace.evaluation.record import Record, Samples, Spread
from vivace.evaluation.statistics import median_interval, plain
from vivace.evaluation.store import Store, newest

VERSION = 1
ORDER = ("exact", "floor", "seed", "steps", "plan", "peer")
Group = tuple[str, ...]
"""Task, environment fingerprint, model name, pipeline, hash and precision: equal for whatever is compared."""


def build(
    store: Store,
    *,
    task: str | None = None,
    title: str = "",
    command: str = "",
    series: SeriesTable | None = None,
    prompts: Mapping[str, Sequence[str]] | None = None,
    front_series: Sequence[str] = SERIES,
    created: str = "",
) -> dict[str, Any]:
    """The board of a store.

    Args:
        task: only this task, with or without its version; all by default.
        command: what to type to make this report again.
        series: see `compare.series_table`; made from the installed metrics by default.
        prompts: texts by task name, for tasks that do not come with Vivace.
        front_series: quality axes of the fronts.
        created: UTC, ISO 8601; now by default.

    Raises:
        UnknownNameError: no record is of that task.
    """
    found, problems = store.scan()
    if task is not None:
        kept = [r for r in found if task in (r.task.name, r.task.name.partition("@")[0])]
        if not kept:
            raise UnknownNameError("task in this store", task, {r.task.name for r in found})
        found = kept
    table = series_table() if series is None else series
    records = _one_hash_per_task(newest(found), problems)
    reader = _Reader(store.path)
    tasks = {r.task.name: _task(r, problems, (prompts or {}).get(r.task.name)) for r in records}
    groups = _groups(records)
    rows: list[dict[str, Any]] = []
    anchors: list[dict[str, Any]] = []
    places: list[dict[str, Any]] = []
    for members in groups.values():
        side = _Side(members, problems)
        rows += [_row(reader, r, side, table, tasks[r.task.name]["texts"], problems) for r in members]
        if side.floor or side.seed:
            anchors.append(_anchor(reader, side))
        places += fronts(reader, members, table, front_series)
    return {
        "vivace_board": VERSION,
        "title": title or "Vivace: what was measured",
        "created": created or datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "series": _series_used(records, table),
        "environments": _environments(records),
        "tasks": [{k: v for k, v in t.items() if k != "texts"} for t in tasks.values()],
        "rows": rows,
        "anchors": anchors,
        "fronts": places,
        "problems": list(dict.fromkeys(problems)),
    }


class _Reader(Store):
    """A store that reads every sample file once."""

    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self._samples: dict[str, Samples] = {}

    def samples(self, record: Record) -> Samples:
        if record.samples not in self._samples:
            self._samples[record.samples] = super().samples(record)
        return self._samples[record.samples]


class _Side:
    """The records of one group that the others are held against."""

    def __init__(self, members: Sequence[Record], problems: list[str]) -> None:
        self.first = members[0]
        self.steps = [r for r in members if r.contender.kind == "steps"]
        self.exact = self._only(members, "exact", problems)
        self.floor = self._only(members, "floor", problems)
        self.seed = self._only(members, "seed", problems)
        if self.exact is None:
            problems.append(
                f"{self.where}: there is no exact run, so there are no speed-ups, shares and differences; add one with "
                "`vivace bench --plan exact`."
            )

    @property
    def where(self) -> str:
        model = self.first.model
        return (
            f"{self.first.task.name} with {model.name} in {model.dtype} on {_label(self.first.environment)}"
        )

    def _only(self, members: Sequence[Record], kind: str, problems: list[str]) -> Record | None:
        found = [r for r in members if r.contender.kind == kind]
        if len(found) > 1:
            names = ", ".join(r.contender.name for r in found)
            problems.append(
                f"{self.where}: several contenders are of kind {kind} ({names}); the newest stands for it."
            )
        return max(found, key=lambda r: (r.created, r.id)) if found else None


def _row(
    store: Store,
    record: Record,
    side: _Side,
    series: SeriesTable,
    texts: Sequence[str],
    problems: list[str],
) -> dict[str, Any]:
    warnings = list(record.warnings)
    exact = side.exact if side.exact is not record else None
    share = speed_up = None
    stages: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    if exact is not None:
        if record.counts.get("flops") and exact.counts.get("flops"):
            share = _exactly(record.counts["flops"] / exact.counts["flops"])
        cost, notes = compare_cost(record, exact)
        stages = {n.partition(".")[2]: c.to_dict() for n, c in cost.items() if n.startswith("seconds.")}
        speed_up = stages.get("total")
        warnings += notes if record.timing else []
        try:
            by = "prompt" if record.contender.kind == "seed" else "sample"
            if record.quality and record.samples and exact.quality and exact.samples:
                against = compare(record, exact, store, series=series, pair_by=by)
                differences = {n: r.to_dict() for n, r in against.paired.get("absolute", {}).items()}
                warnings += against.notes
        except VivaceError as error:
            problems.append(
                f"{record.contender.name} ({record.id}) has no differences to the exact run: {error}"
            )
    scores: dict[str, Any] = {}
    if side.floor and side.seed and record.quality:
        scores, _ = normalised(store, record, side.floor, side.seed)
    control = None
    if record.contender.kind in ("plan", "peer") and record.quality:
        try:
            control, why = matched(store, record, side.steps, exact, series)
        except VivaceError as error:
            why = str(error).rstrip(".")
        if why:
            warnings.append(f"it has no fewer-step control: {why}.")
    return {
        "id": record.id,
        "created": record.created,
        "task": record.task.name,
        "environment": str(record.environment.get("fingerprint", "")),
        "contender": _plain(record.contender.model_dump(mode="python")),
        "model": record.model.model_dump(mode="python"),
        "code": _plain(record.code),
        "counts": _plain(record.counts),
        "counted": record.counted,
        "work_share": share
        or (_exactly(1.0) if record is side.exact and record.counts.get("flops") else None),
        "cost": {n: _stage(s) for n, s in record.timing.stages.items()} if record.timing else {},
        "timing": _timing(record),
        "memory": _plain(record.memory.model_dump(mode="python")) if record.memory else None,
        "energy": _plain(record.energy.model_dump(mode="python")) if record.energy else None,
        "speed_up": speed_up,
        "speed_up_stages": stages,
        "quality": {n: value(e) for g in GROUPS for n, e in getattr(record.quality, g, {}).items()},
        "reference": record.quality.reference if record.quality else "",
        "paired": differences,
        "normalised": scores,
        "matched": control,
        "skipped": dict(record.quality.skipped) if record.quality else {},
        "warnings": list(dict.fromkeys(warnings)),
        "command": record.command,
        "clips": dict(record.clips),
        "samples": _samples(store, record, texts, problems),
    }


def _anchor(store: Store, side: _Side) -> dict[str, Any]:
    def values(record: Record | None) -> dict[str, Any]:
        if record is None or record.quality is None:
            return {}
        return {n: value(e) for g in GROUPS for n, e in getattr(record.quality, g).items()}

    reasons: dict[str, str] = {}
    if side.floor and side.seed:
        _, reasons = normalised(store, side.floor, side.floor, side.seed)
    return {
        "task": side.first.task.name,
        "environment": str(side.first.environment.get("fingerprint", "")),
        "model": side.first.model.name,
        "floor": values(side.floor),
        "seed": values(side.seed),
        "floor_row": side.floor.id if side.floor else None,
        "seed_row": side.seed.id if side.seed else None,
        "not_normalised": reasons,
    }


def _samples(
    store: Store, record: Record, texts: Sequence[str], problems: list[str]
) -> dict[str, Any] | None:
    if not record.samples:
        return None
    try:
        table = store.samples(record)
    except VivaceError as error:
        problems.append(f"{record.contender.name} ({record.id}): {error}")
        return None
    known = {n for g in GROUPS for n in getattr(record.quality, g, {})}
    return {
        "ids": list(table.ids),
        "prompts": [texts[p] if p < len(texts) else f"prompt {p}" for p in table.prompt],
        "columns": {n: [_short(v) for v in c] for n, c in table.columns.items() if n in known},
    }


def _one_hash_per_task(records: Iterable[Record], problems: list[str]) -> list[Record]:
    """A task's name stands for one hash; records of a task that was changed under its name are left out."""
    ordered = list(records)
    latest = {r.task.name: r.task.sha256 for r in sorted(ordered, key=lambda r: (r.created, r.id))}
    problems.extend(
        f"record {r.id} of {r.contender.name} is left out: its task {r.task.name} has the hash {r.task.sha256[:12]} "
        f"and the newest record's {latest[r.task.name][:12]}."
        for r in ordered
        if r.task.sha256 != latest[r.task.name]
    )
    return [r for r in ordered if r.task.sha256 == latest[r.task.name]]


def _task(record: Record, problems: list[str], texts: Sequence[str] | None) -> dict[str, Any]:
    from vivace.evaluation.task import Task

    name = record.task.name
    out: dict[str, Any] = {"name": name, "title": name, "sha256": record.task.sha256, "about": ""}
    fields = ("kind", "model", "per_prompt", "steps", "guidance", "frames", "height", "width", "fps")
    out |= dict.fromkeys(fields) | {"prompts": None, "texts": list(texts or ())}
    try:
        task = Task.load(name)
        same = task.ref.sha256 == record.task.sha256
        out |= {"title": task.title, "about": task.about} | {f: getattr(task, f) for f in fields}
        if not texts and same:
            out["texts"] = list(task.prompt_texts())
        if not same and not texts and not task.needs:
            problems.append(
                f"the task {name} of this Vivace is not the one that was measured: its hash differs."
            )
    except VivaceError:
        problems.append(
            f"the task {name} does not come with this Vivace, so its shape and prompts are not shown."
        )
    out["prompts"] = len(out["texts"]) or None
    return out


def _environments(records: Sequence[Record]) -> list[dict[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for record in records:
        found.setdefault(str(record.environment.get("fingerprint", "")), record.environment)
    labels = [_label(e) for e in found.values()]
    return [
        {
            "fingerprint": fingerprint,
            "label": label if labels.count(label) == 1 else f"{label} ({fingerprint[:6]})",
            "details": _plain({k: v for k, v in details.items() if k != "fingerprint"}),
        }
        for (fingerprint, details), label in zip(found.items(), labels, strict=True)
    ]


def _label(environment: Mapping[str, Any]) -> str:
    torch = (environment.get("versions") or {}).get("torch")
    if environment.get("gpu"):
        machine = str(environment["gpu"])
    else:
        machine = f"{environment.get('cores', '?')}-core {environment.get('cpu', 'processor')}"
    return machine + (f", torch {torch}" if torch else "")


def _series_used(records: Sequence[Record], table: SeriesTable) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for record in records:
        refs = {n: m for m in (record.quality.metrics if record.quality else ()) for n in m.series}
        for group in GROUPS:
            for name in getattr(record.quality, group, {}):
                if name in out:
                    continue
                ref = refs.get(name)
                about = table.get(name)
                out[name] = (
                    _plain(dict(about))
                    if about is not None
                    else {
                        "metric": ref.name if ref else name,
                        "version": ref.version if ref else None,
                        "title": ref.name if ref else name,
                        "unit": "",
                        "better": "same",
                        "about": "Its metric is not installed here.",
                        "group": group,
                        "margin": None,
                        "low": None,
                        "high": None,
                        "binary": False,
                        "blind_to": [],
                        "backbone": ref.backbone if ref else "",
                    }
                )
    return dict(sorted(out.items()))


def _timing(record: Record) -> dict[str, Any] | None:
    if record.timing is None:
        return None
    kept = record.timing.model_dump(mode="python", exclude={"stages", "clips"})
    return _plain(kept)


def _stage(spread: Spread) -> dict[str, Any]:
    if min(spread.values, default=0.0) > 0:
        found = median_interval(spread.values).to_dict()
    else:
        # A stage that some run did not have: a logarithm would not do.
        found = {"value": plain(spread.median), "low": None, "high": None, "n": spread.n}
    return found | {"q1": plain(spread.q1), "q3": plain(spread.q3)}


def _exactly(number: float) -> dict[str, Any]:
    return {"value": plain(number), "low": None, "high": None, "n": 1}


def _groups(records: Sequence[Record]) -> dict[Group, list[Record]]:
    """Records that are held against each other. A noise floor in another precision joins the exact run of the model."""
    out: dict[Group, list[Record]] = {}
    homes = {_group(r)[:-1]: _group(r) for r in sorted(records, key=_order) if r.contender.kind == "exact"}
    for record in sorted(records, key=_order):
        key = _group(record)
        lonely = record.contender.kind == "floor" and not any(
            r.contender.kind == "exact" and _group(r) == key for r in records
        )
        out.setdefault(homes.get(key[:-1], key) if lonely else key, []).append(record)
    return out


def _group(r: Record) -> Group:
    m = r.model
    return r.task.name, str(r.environment.get("fingerprint", "")), m.name, m.pipeline, m.sha256, m.dtype


def _order(record: Record) -> tuple[Any, ...]:
    return (
        *_group(record)[:-1],
        ORDER.index(record.contender.kind),
        -record.counts.get("flops", 0.0),
        record.contender.name,
    )


def _short(number: float) -> float | str | None:
    kept = plain(number)
    return float(f"{kept:.6g}") if isinstance(kept, float) else kept


def _plain(data: Any) -> Any:
    """JSON data without NaN, infinities and tuples."""
    if isinstance(data, Mapping):
        return {str(k): _plain(v) for k, v in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [_plain(v) for v in data]
    return plain(data) if isinstance(data, float) else data


__all__ = ["build"]
