"""Comparison of two records: refused unless task, model, metrics and machine are equal, and paired sample by sample.

Imports no torch. What a series is (direction, margin) comes in as data; `series_table` makes it from metric cards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vivace.core.errors import VivaceError
from vivace.evaluation.paired import Paired, judge, paired
from vivace.evaluation.record import Estimate, MetricRef, Record, Samples
from vivace.evaluation.statistics import Interval, plain, ratio_of_medians
from vivace.evaluation.store import Store

SeriesTable = Mapping[str, Mapping[str, Any]]
"""By series: metric, version, title, unit, better, about, group, margin, low, high, binary, blind_to, backbone."""
GROUPS = ("fidelity", "absolute", "distribution")


class ComparisonError(VivaceError, ValueError):
    """Two records cannot be compared; the message names the field that differs and both values."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Record a against record b; every difference is a minus b and every ratio b over a, so that above 1 is cheaper."""

    a: Record
    b: Record
    paired: dict[str, dict[str, Paired]]
    """By group and series."""
    sets: dict[str, tuple[Estimate, Estimate]]
    """Distribution series: both estimates; one number for a whole set has no pairs."""
    cost: dict[str, Interval]
    """`seconds.<stage>`, `flops`, `nfe`, `peak_bytes`; counted values have an interval of no width."""
    prompts: int
    samples: int
    notes: tuple[str, ...]
    series: SeriesTable

    def results(self) -> dict[str, Paired]:
        """All paired results by series."""
        return {name: r for family in self.paired.values() for name, r in family.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        name_a, name_b = names(self.a, self.b)
        return {
            "vivace_comparison": 1,
            "a": {"id": self.a.id, "name": name_a},
            "b": {"id": self.b.id, "name": name_b},
            "task": self.a.task.name,
            "prompts": self.prompts,
            "samples": self.samples,
            "paired": {g: {n: r.to_dict() for n, r in f.items()} for g, f in self.paired.items()},
            "sets": {n: {"a": value(x), "b": value(y)} for n, (x, y) in self.sets.items()},
            "cost": {n: c.to_dict() | {"how": c.how} for n, c in self.cost.items()},
            "notes": list(self.notes),
        }

    def sentences(self) -> list[str]:
        """One sentence for each paired series."""
        name_a, name_b = names(self.a, self.b)
        return [_sentence(name_a, name_b, n, r, self.series.get(n, {})) for n, r in self.results().items()]


def _title(card: Any, series: Any) -> str:
    """The metric's title for its first series; the others are told apart by their own names."""
    if series is card.series[0]:
        return card.title
    words = series.name.replace("_", " ")
    return words[:1].upper() + words[1:]


def series_table(cards: Iterable[Any] | None = None) -> dict[str, dict[str, Any]]:
    """What is known of every series.

    Args:
        cards: metric cards; those of all metrics when not given.
    """
    if cards is None:
        from vivace.evaluation.metrics import base

        cards = base.cards().values()
    return {
        s.name: {
            "metric": card.name,
            "version": card.version,
            "title": _title(card, s),
            "unit": s.unit,
            "better": str(s.better),
            "about": s.about,
            "group": str(card.group),
            "margin": s.margin,
            "low": s.low,
            "high": s.high,
            "binary": s.binary,
            "blind_to": list(card.blind_to),
            "backbone": card.backbone.name if card.backbone else "",
        }
        for card in cards
        for s in card.series
    }


def check_comparable(a: Record, b: Record, *, cross_environment: bool = False) -> list[str]:
    """Whether two records answer the same question on the same machine.

    Args:
        cross_environment: allow different machines; then quality alone can be compared.

    Returns:
        Notes a reader must see.

    Raises:
        ComparisonError: the task, the model or the environment differ.
    """
    fields = {
        "task.name": (a.task.name, b.task.name),
        "task.sha256": (a.task.sha256, b.task.sha256),
        "model.name": (a.model.name, b.model.name),
        "model.pipeline": (a.model.pipeline, b.model.pipeline),
        "model.weights": (a.model.weights, b.model.weights),
        "model.sha256": (a.model.sha256, b.model.sha256),
    }
    floor = "floor" in (a.contender.kind, b.contender.kind)
    if not floor:
        fields["model.dtype"] = (a.model.dtype, b.model.dtype)
    for field, (one, other) in fields.items():
        if one != other:
            raise ComparisonError(
                f"the records differ in {field}: {_show(one)} and {_show(other)}; compare runs of one task and model."
            )
    notes = []
    if floor and a.model.dtype != b.model.dtype:
        notes.append(f"the noise floor was run in another precision: {a.model.dtype} and {b.model.dtype}.")
    if a.environment.get("fingerprint") != b.environment.get("fingerprint"):
        field, one, other = _differing(a.environment, b.environment)
        if not cross_environment:
            raise ComparisonError(
                f"the records differ in {field}: {one} and {other}; compare runs of one machine, or allow "
                "--cross-environment for their quality alone."
            )
        notes.append(
            f"other machines ({field}: {one} and {other}): quality alone is compared, cost is left out."
        )
    return notes


def comparable_series(a: Record, b: Record) -> tuple[dict[str, str], list[str]]:
    """The series both records have from the same metric, version and weights, with their group; notes on the others."""
    if a.quality is None or b.quality is None:
        return {}, []
    notes: list[str] = []
    ours, theirs = _refs(a), _refs(b)
    found: dict[str, str] = {}
    for group in GROUPS:
        one, other = getattr(a.quality, group), getattr(b.quality, group)
        if group != "absolute" and set(one) & set(other) and a.quality.reference != b.quality.reference:
            notes.append(
                f"{group} is left out: quality.reference differs, {_show(a.quality.reference)} and "
                f"{_show(b.quality.reference)}."
            )
            continue
        for name in one:
            if name not in other:
                continue
            if why := _metric_differs(ours.get(name), theirs.get(name)):
                notes.append(f"{name} is left out: {why}.")
            else:
                found[name] = group
    return found, notes


def compare(
    a: Record,
    b: Record,
    store: Store,
    *,
    series: SeriesTable,
    other: Store | None = None,
    cross_environment: bool = False,
    pair_by: str = "sample",
) -> Comparison:
    """Record a (the candidate) against record b (the reference).

    Args:
        store: holds the samples of a, and of b unless `other` does.
        series: see `series_table`.
        pair_by: `sample` (same prompt, same seed), or `prompt` where the seeds differ by design (the seed ceiling).

    Raises:
        ComparisonError: the records do not belong together, share no series, or have no samples in common.
        StoreError: the samples are missing or damaged.
    """
    notes = check_comparable(a, b, cross_environment=cross_environment)
    shared, more = comparable_series(a, b)
    notes += more
    cost, more = compare_cost(a, b)
    notes += more
    sets = {
        n: (a.quality.distribution[n], b.quality.distribution[n])
        for n, g in shared.items()
        if g == "distribution" and a.quality and b.quality
    }
    families: dict[str, dict[str, Paired]] = {}
    prompts = samples = 0
    if any(g != "distribution" for g in shared.values()):
        one, two = store.samples(a), (other or store).samples(b)
        left, right, more = match(one, two, pair_by)
        notes += more
        number = [one.prompt[i] for i in left]
        prompts, samples = len(set(number)), len(left)
        for group in ("fidelity", "absolute"):
            family = {}
            for name in (n for n, g in shared.items() if g == group):
                if name not in one.columns or name not in two.columns:
                    notes.append(f"{name} is left out: its single values were not kept.")
                    continue
                about = series.get(name)
                if about is None:
                    notes.append(f"{name} is of a metric that is not installed: no direction, no margin.")
                elif why := _card_differs(about, _refs(a).get(name)):
                    notes.append(f"{name}: {why}; its margin may not fit.")
                result = paired(
                    [one.columns[name][i] for i in left],
                    [two.columns[name][i] for i in right],
                    number,
                    better=about["better"] if about else "same",
                    margin=about["margin"] if about else None,
                    binary=bool(about and about["binary"]),
                )
                if result.samples:
                    family[name] = result
                else:
                    notes.append(f"{name} is left out: no sample has a finite value on both sides.")
            families[group] = judge(family, reference=b.contender.kind == "exact")
    elif not cost and not sets:
        raise ComparisonError(
            f"{names(a, b)[0]} and {names(a, b)[1]} have nothing in common that was measured; measure both with "
            "the same metrics, or time both."
        )
    families = {g: f for g, f in families.items() if f}
    notes += _disagreements(families)
    return Comparison(
        a=a,
        b=b,
        paired=families,
        sets=sets,
        cost=cost,
        prompts=prompts,
        samples=samples,
        notes=tuple(notes),
        series=series,
    )


def match(one: Samples, two: Samples, pair_by: str = "sample") -> tuple[list[int], list[int], list[str]]:
    """Places of the samples that belong together.

    Raises:
        ComparisonError: none do, or equal ids have other seeds.
    """
    notes = []
    if pair_by == "prompt":
        # The i-th repeat of a prompt here beside the i-th there: only prompt means are used afterwards.
        left, right = _by_turn(one), _by_turn(two)
        notes.append("paired by prompt: the seeds differ by design.")
    else:
        left, right = {s: i for i, s in enumerate(one.ids)}, {s: i for i, s in enumerate(two.ids)}
        for name in left.keys() & right.keys():
            seeds = one.seed[left[name]], two.seed[right[name]]
            if seeds[0] != seeds[1]:
                raise ComparisonError(
                    f"the records differ in the seed of sample {name}: {seeds[0]} and {seeds[1]}; unpaired runs are "
                    "not compared, make both with the task's seeds."
                )
    common = [key for key in left if key in right]
    if not common:
        raise ComparisonError(
            f"the records share no sample: their ids are {one.ids[0] if one.ids else 'none'}, ... and "
            f"{two.ids[0] if two.ids else 'none'}, ...; unpaired runs are not compared."
        )
    if len(common) < max(len(one.ids), len(two.ids)):
        notes.append(f"only {len(common)} samples are in both records, of {len(one.ids)} and {len(two.ids)}.")
    return [left[key] for key in common], [right[key] for key in common], notes


def compare_cost(a: Record, b: Record) -> tuple[dict[str, Interval], list[str]]:
    """Ratios b over a of what both cost, where the machine is the same; notes on what cannot be compared."""
    out: dict[str, Interval] = {}
    notes: list[str] = []
    for name in ("flops", "nfe"):
        if a.counts.get(name) and b.counts.get(name):
            out[name] = counted(b.counts[name] / a.counts[name])
    if a.environment.get("fingerprint") != b.environment.get("fingerprint"):
        return out, notes
    if a.timing and b.timing:
        if a.timing.batch != b.timing.batch:
            notes.append(
                f"seconds are left out: timing.batch differs, {a.timing.batch} and {b.timing.batch}."
            )
        elif a.timing.clock != b.timing.clock:
            notes.append(
                f"seconds are left out: timing.clock differs, {a.timing.clock} and {b.timing.clock}."
            )
        else:
            if b.contender.name not in a.timing.interleaved_with:
                notes.append(
                    "the timed runs did not alternate, so a drift of the machine may be in the speed-up."
                )
            for stage, mine in a.timing.stages.items():
                theirs = b.timing.stages.get(stage)
                if theirs and min(mine.values) > 0 and min(theirs.values) > 0:
                    out[f"seconds.{stage}"] = ratio_of_medians(
                        theirs.values, mine.values, b.timing.clips, a.timing.clips
                    )
    if (mine := peak(a)) and (theirs := peak(b)):
        out["peak_bytes"] = counted(theirs / mine)
    return out, notes


def counted(number: float) -> Interval:
    """A value that was counted, not estimated: no width."""
    return Interval(number, number, number, 1, "counted")


def peak(record: Record) -> int | None:
    """Peak bytes of a record: allocated on a GPU, else the resident set."""
    memory = record.memory
    return (memory.peak_allocated or memory.resident) if memory else None


def value(estimate: Estimate) -> dict[str, Any]:
    """An estimate as the board shows it; the median stands in where every value is infinite."""
    shown = estimate.mean if estimate.mean is not None else estimate.median
    out = {
        "value": None if shown is None else plain(shown),
        "low": plain(estimate.low),
        "high": plain(estimate.high),
        "n": estimate.prompts,
        "p": plain(estimate.p),
        "median": plain(estimate.median),
        "worst": plain(estimate.worst),
        "left_out": estimate.left_out,
    }
    return out | {"samples": estimate.samples, "how": estimate.how}


def names(a: Record, b: Record) -> tuple[str, str]:
    """What to call two records; with their ids where the contenders' names are equal."""
    one, two = a.contender.name, b.contender.name
    return (one, two) if one != two else (f"{one} ({a.id[:6]})", f"{two} ({b.id[:6]})")


def _sentence(a: str, b: str, name: str, r: Paired, about: Mapping[str, Any]) -> str:
    unit = f" {about['unit']}" if about.get("unit") else ""
    d = r.difference
    span = f"[{d.low:.3g}, {d.high:.3g}]" if math.isfinite(d.low) else "without an interval"
    numbers = f"{d.value:+.3g}{unit} {span}, {d.n} prompts"
    limit = f"the margin of {r.margin:g}{unit}" if r.margin is not None else ""
    more = f" About {r.needed} prompts would be enough." if r.needed and r.needed > d.n else ""
    return {
        "better": f"{a} is better than {b} in {name}: {numbers}.",
        "non-inferior": f"{a} is not worse than {b} in {name} by {limit}: {numbers}.",
        "equivalent": f"{a} equals {b} in {name} within {limit}: {numbers}.",
        "worse": f"{a} is worse than {b} in {name}: {numbers}.",
        "inferior": f"{a} is worse than {b} in {name} by more than {limit}: {numbers}.",
        "undecided": f"{a} against {b} in {name} is undecided: {numbers}.{more}",
        "no margin": f"{a} and {b} do not differ significantly in {name}, which has no margin: {numbers}.{more}",
    }[r.verdict]


def _refs(record: Record) -> dict[str, MetricRef]:
    metrics = record.quality.metrics if record.quality else ()
    return {name: ref for ref in metrics for name in ref.series}


def _metric_differs(one: MetricRef | None, two: MetricRef | None) -> str:
    if one is None or two is None:
        return "" if one is two else "only one record says which metric it is of"
    for field in ("name", "version", "backbone", "backbone_sha256"):
        first, second = getattr(one, field), getattr(two, field)
        if first != second:
            return f"metric.{field} differs, {_show(first)} and {_show(second)}"
    return ""


def _card_differs(about: Mapping[str, Any], ref: MetricRef | None) -> str:
    if ref is None or about.get("version") == ref.version:
        return ""
    return f"the records have version {ref.version} of {ref.name} and this Vivace has {about.get('version')}"


def _by_turn(samples: Samples) -> dict[Any, int]:
    seen: dict[int, int] = {}
    out: dict[Any, int] = {}
    for place, prompt in sorted(enumerate(samples.prompt), key=lambda p: samples.k[p[0]]):
        turn = seen[prompt] = seen.get(prompt, -1) + 1
        out[prompt, turn] = place
    return out


def _disagreements(families: Mapping[str, Mapping[str, Paired]]) -> list[str]:
    out = []
    for name, r in ((n, r) for f in families.values() for n, r in f.items()):
        t, b = r.difference, r.bootstrap
        if (
            r.difference.n >= 30
            and math.isfinite(b.low)
            and (t.low > 0 or t.high < 0) != (b.low > 0 or b.high < 0)
        ):
            out.append(
                f"{name}: t interval and bootstrap disagree on whether the difference is 0; trust neither."
            )
        if r.left_out:
            out.append(f"{name}: {r.left_out} samples without a finite difference are left out of the mean.")
    return out


def _differing(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[str, str, str]:
    """The first field that differs between two environments, and both values."""
    for field in ("gpu", "cpu", "device", "cores", "threads", "cuda", "system"):
        if one.get(field) != two.get(field):
            return f"environment.{field}", _show(one.get(field)), _show(two.get(field))
    mine, theirs = one.get("versions") or {}, two.get("versions") or {}
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            return f"environment.versions.{name}", _show(mine.get(name)), _show(theirs.get(name))
    return "environment.fingerprint", _show(one.get("fingerprint")), _show(two.get("fingerprint"))


def _show(thing: Any) -> str:
    text = "nothing" if thing in (None, "") else str(thing)
    return text[:12] if len(text) == 64 else text


__all__ = [
    "Comparison",
    "ComparisonError",
    "check_comparable",
    "comparable_series",
    "compare",
    "compare_cost",
    "counted",
    "match",
    "names",
    "peak",
    "series_table",
    "value",
]
