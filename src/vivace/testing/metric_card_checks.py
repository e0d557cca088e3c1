"""Checks of `check_metric` that measure nothing: the card, and how a metric refuses that cannot run."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from vivace.core.errors import UnavailableError
from vivace.evaluation.damage import DAMAGES
from vivace.evaluation.metrics.base import Group, Metric, PairMetric, SampleMetric, Scope, SetMetric
from vivace.testing.metric_material import Material, check

_GROUPS = {
    Scope.PAIR: Group.FIDELITY,
    Scope.LATENT: Group.FIDELITY,
    Scope.SAMPLE: Group.ABSOLUTE,
    Scope.SET: Group.DISTRIBUTION,
}


@check("card", measures=False)
def _card(case: Material) -> Iterator[str]:
    card, names = case.card, [s.name for s in case.card.series]
    if not re.fullmatch(r"[a-z][a-z0-9_]*", card.name):
        yield f"the name '{card.name}' is not in lower case with underscores."
    if case.metric.registry_name() != card.name:
        yield f"the registry calls it '{case.metric.registry_name()}' and the card '{card.name}'."
    if card.version < 1:
        yield "the version is below 1."
    for field in ("title", "convention"):
        if not getattr(card, field).strip():
            yield f"the card has no {field}."
    if not names or len(set(names)) != len(names):
        yield f"the names of the series are not there or not unique: {names}."
    for series in card.series:
        if not series.about.strip():
            yield f"the series {series.name} does not say what it is."
        if series.margin is not None and not series.margin > 0:
            yield f"the margin of {series.name} is not positive."
        if series.low is not None and series.high is not None and not series.low < series.high:
            yield f"the range of {series.name} is empty."
        if series.binary and (series.low not in (None, 0) or series.high not in (None, 1)):
            yield f"{series.name} is binary and has another range than [0, 1]."
    if twice := set(card.sees) & set(card.blind_to):
        yield f"it both sees and does not see {sorted(twice)}."
    if unknown := set(card.sees) - set(DAMAGES):
        yield f"no damage is called {sorted(unknown)}."
    if card.group is not _GROUPS[card.scope]:
        yield f"a {card.scope} metric belongs to the group {_GROUPS[card.scope]}, not {card.group}."
    if card.symmetric and card.scope not in (Scope.PAIR, Scope.SET):
        yield f"a {card.scope} metric compares nothing and cannot be symmetric."
    bases = {Scope.PAIR: PairMetric, Scope.SAMPLE: SampleMetric, Scope.SET: SetMetric}
    if any(issubclass(case.metric, base) and card.scope is not scope for scope, base in bases.items()):
        yield f"the card says {card.scope}, and the class is of another scope."
    wanted = ("features", "distance") if card.scope is Scope.SET else ("measure",)
    for method in wanted:
        if getattr(case.metric, method) is getattr(Metric, method):
            yield f"a {card.scope} metric needs the method {method}."
    # A backbone that the user brings has no hash before it is there.
    named = card.backbone is None or (card.backbone.sha256 == "" and bool(case.one.missing()))
    if card.backbone and not named and not re.fullmatch(r"[0-9a-f]{64}", card.backbone.sha256):
        yield "the backbone's sha256 is not 64 hexadecimal digits."
    if card.backbone and not (card.backbone.licence and card.backbone.source):
        yield "the backbone names no licence or no source."


@check("missing", measures=False)
def _missing(case: Material) -> Iterator[str]:
    def refused(metric: Metric, why: str) -> Iterator[str]:
        if "\n" in why or len(why) < 15 or not why.rstrip().endswith("."):
            yield f"the reason '{why}' is not one sentence that says what to do."
        try:
            given = (metric.features if case.card.scope is Scope.SET else metric.measure)(
                case.candidate, case.context
            )
        except UnavailableError:
            return
        except Exception as error:
            yield f"it cannot run and raises {type(error).__name__} in place of UnavailableError."
        else:
            yield f"it cannot run and answers {str(given)[:60]} in place of raising UnavailableError."

    why = "The check hides what this metric needs; install it."
    absent = type(case.metric.__name__, (case.metric,), {"missing": lambda self: why})
    yield from refused(absent(device=case.device), why)
    for package in case.card.packages:
        with _hidden(package):
            metric = case.metric(device=case.device)
            if not (told := metric.missing()):
                yield f"missing() says nothing when {package} is not installed."
            else:
                yield from refused(metric, told)
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, {"VIVACE_CACHE": empty}):
        metric = case.metric(device=case.device)
        if told := metric.missing():
            yield from refused(metric, told)
    if told := case.one.missing():
        yield from refused(case.one, told)


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Looks as if a package were not installed."""
    real, top = importlib.util.find_spec, package.partition(".")[0]

    def find(name: str, *rest: Any) -> Any:
        return None if name.partition(".")[0] == top else real(name, *rest)

    with mock.patch.object(importlib.util, "find_spec", find):
        yield
