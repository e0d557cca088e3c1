"""Every registered metric keeps the contract; and the contract catches metrics with one seeded fault each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from vivace.core.errors import ConfigError, UnknownNameError
from vivace.evaluation.metrics.base import (
    Better,
    Context,
    Group,
    Metric,
    MetricCard,
    PairMetric,
    SampleMetric,
    Scope,
    Series,
    SetMetric,
    SetValue,
    registry,
)
from vivace.testing import check_metric
from vivace.testing.metric_checks import metric_checks
from vivace.testing.metric_material import rendered

SLOW = (3, 3, 32, 32)
"""Clips, frames, height and width for metrics with networks."""
VERIFIED = (3, 9, 32, 32)
"""The same for metrics of the world's verifier, which wants squares, and frames enough for a motion."""


@pytest.mark.parametrize("name", list(registry))
def test_registered_metrics_keep_the_contract(name: str) -> None:
    metric = registry[name]
    slow = metric.card.backbone is not None or name == "cvvdp"
    shape = VERIFIED if name in ("attributes", "verifier_distance") else SLOW if slow else None
    clips, prompts = rendered(*shape) if shape else (None, ())
    assert check_metric(metric, clips=clips, prompts=prompts) == []
    if why := metric().missing():
        pytest.skip(f"card and refusal are right; not measured: {why}")


def card(scope: Scope, group: Group, **fields) -> MetricCard:
    plain = {
        "name": "plain",
        "version": 1,
        "title": "Plain",
        "scope": scope,
        "group": group,
        "series": (Series(name="plain", better=Better.LOWER, low=0.0, about="A number."),),
        "convention": "As the test says.",
    }
    return MetricCard(**(plain | fields))


class Distance(PairMetric):
    """Mean absolute difference: a sound metric, which the broken ones inherit."""

    card = card(
        Scope.PAIR,
        Group.FIDELITY,
        sees=("blur", "noise", "wrong_colour"),
        packages=("numpy",),
        symmetric=True,
    )

    def pair(self, reference: torch.Tensor, clips: torch.Tensor) -> dict[str, list[float]]:
        return {"plain": (reference - clips).abs().mean(dim=(1, 2, 3, 4)).tolist()}


class Contrast(SampleMetric):
    """Standard deviation of the levels: a sound metric of single clips."""

    card = card(
        Scope.SAMPLE,
        Group.ABSOLUTE,
        series=(Series(name="plain", better=Better.SAME, low=0.0, high=1.0, about="A number."),),
        sees=("blur",),
    )

    def sample(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        return {"plain": clips.flatten(1).std(dim=1).tolist()}


class Means(SetMetric):
    """Squared distance of mean features, less its bias, with a sign-flip p: a sound metric of sets."""

    card = card(
        Scope.SET,
        Group.DISTRIBUTION,
        series=(Series(name="plain", better=Better.LOWER, about="A number."),),
        symmetric=True,
    )

    def embed(self, clips: torch.Tensor, context: Context) -> np.ndarray:
        return clips.mean(dim=(1, 2, 3)).double().cpu().numpy()

    def distance(
        self, reference: np.ndarray, candidate: np.ndarray, groups: Sequence[int], seed: int = 0
    ) -> dict[str, SetValue]:
        rng, each = np.random.default_rng(seed), candidate - reference

        def value(rows: np.ndarray) -> float:
            mean = rows.mean(axis=0)
            return float(mean @ mean - rows.var(axis=0, ddof=1).sum() / len(rows))

        names = np.unique(groups)
        rows = [np.flatnonzero(np.asarray(groups) == name) for name in names]
        draws = [
            value(each[np.concatenate([rows[i] for i in rng.integers(0, len(names), len(names))])])
            for _ in range(99)
        ]
        flips = [value(each * rng.choice([-1.0, 1.0], (len(each), 1))) for _ in range(99)]
        own = value(each)
        low, high = np.quantile(draws, [0.025, 0.975])
        p = (1 + sum(f >= own for f in flips)) / 100
        return {"plain": SetValue(own, min(low, own), max(high, own), p, len(each))}


@pytest.mark.parametrize("metric", [Distance, Contrast, Means])
def test_sound_metrics_pass(metric: type[Metric]) -> None:
    assert check_metric(metric) == []


class Untitled(Distance):
    card = replace(Distance.card, title=" ", version=0)


class WrongScope(Contrast):
    card = replace(Contrast.card, scope=Scope.PAIR)


class Imaginative(Distance):
    card = replace(Distance.card, sees=("ugliness",))


class BadMargin(Distance):
    card = replace(Distance.card, series=(replace(Distance.card.series[0], margin=-0.1, low=2.0, high=1.0),))


class WrongSide(Distance):
    """A similarity whose card says that lower is better."""

    def pair(self, reference, clips):
        return {"plain": [1 / (1 + v) for v in super().pair(reference, clips)["plain"]]}


class Lopsided(Distance):
    def pair(self, reference, clips):
        return {"plain": (reference.square() * (reference - clips).abs()).mean(dim=(1, 2, 3, 4)).tolist()}


class BlindToNoise(Distance):
    """Sees the mean of each frame only, so independent noise all but cancels and blur leaves no trace."""

    def pair(self, reference, clips):
        return {"plain": (reference - clips).mean(dim=(2, 3, 4)).abs().amax(dim=1).round(decimals=1).tolist()}


class Grey(Distance):
    """Says that it sees colours, and takes the mean over them first."""

    def pair(self, reference, clips):
        return super().pair(reference.mean(-1, keepdim=True), clips.mean(-1, keepdim=True))


class BatchMean(Distance):
    """Normalises by the batch: a clip's value depends on its batch mates."""

    def pair(self, reference, clips):
        return {"plain": [v / (1e-6 + float(clips.std())) for v in super().pair(reference, clips)["plain"]]}


class Counting(Distance):
    """Carries a state from call to call."""

    calls = 0

    def pair(self, reference, clips):
        self.calls += 1
        return {"plain": [v * (1 + 0.01 * self.calls) for v in super().pair(reference, clips)["plain"]]}


class Lenient(Distance):
    """Takes whatever it is given: integers are scaled, every range is measured."""

    def measure(self, clips, context):
        self.require()
        first, second = (torch.nan_to_num(x.float()) for x in (context.reference, clips))
        return self.pair(first / 255, second / 255)


class Overflowing(Distance):
    """Subtracts in the type that came: uint8 wraps around."""

    def measure(self, clips, context):
        super().measure(clips, context)
        reference, scale = context.reference, 255 if clips.dtype == torch.uint8 else 1
        difference = (reference - clips).float().abs() / scale
        return {"plain": difference.mean(dim=(1, 2, 3, 4)).tolist()}


class Editing(Distance):
    """Works in place on what it was given."""

    def measure(self, clips, context):
        values = super().measure(clips, context)
        clips.clamp_(max=0.5 if clips.is_floating_point() else 127)
        return values


class Seeding(Distance):
    def pair(self, reference, clips):
        torch.manual_seed(0)
        return super().pair(reference, clips)


class Drawing(Distance):
    def pair(self, reference, clips):
        return {"plain": [v + 1e-3 * random.random() for v in super().pair(reference, clips)["plain"]]}


class Zero(Distance):
    """Answers with zeros where it cannot run."""

    def measure(self, clips, context):
        return {"plain": [0.0] * len(clips)} if self.missing() else super().measure(clips, context)


class Silent(Distance):
    """Says that it can run when its package is absent."""

    def missing(self):
        return ""


class Renamed(Distance):
    def pair(self, reference, clips):
        return {"other": super().pair(reference, clips)["plain"]}


class OutOfRange(Contrast):
    def sample(self, clips, context):
        return {"plain": [v * 100 for v in super().sample(clips, context)["plain"]]}


class BatchFeatures(Means):
    def embed(self, clips, context):
        table = super().embed(clips, context)
        return table - table.mean(axis=0)


class Biased(Means):
    """Of a set to itself it is as far as the variance."""

    def distance(self, reference, candidate, groups, seed=0):
        (value,) = super().distance(reference, candidate, groups, seed).values()
        bias = float(100 * (reference.var(axis=0).sum() + candidate.var(axis=0).sum()))
        return {
            "plain": replace(value, value=value.value + bias, low=value.low + bias, high=value.high + bias)
        }


class NarrowInterval(Means):
    def distance(self, reference, candidate, groups, seed=0):
        (value,) = super().distance(reference, candidate, groups, seed).values()
        return {"plain": replace(value, low=value.value + 1, high=value.value + 2)}


class FirstRows(Means):
    """Looks at the first half of the rows alone."""

    def distance(self, reference, candidate, groups, seed=0):
        half = len(reference) // 2
        return super().distance(reference[:half], candidate[:half], groups[:half], seed)


class AlwaysSignificant(Means):
    def distance(self, reference, candidate, groups, seed=0):
        return {"plain": replace(super().distance(reference, candidate, groups, seed)["plain"], p=0.001)}


FAULTS: list[tuple[type[Metric], str, str]] = [
    (Untitled, "card", "no title"),
    (WrongScope, "card", "another scope"),
    (Imaginative, "card", "no damage is called ['ugliness']"),
    (BadMargin, "card", "margin"),
    (WrongSide, "identity", "the best value is 0"),
    (WrongSide, "monotone", "blur"),
    (Lopsided, "symmetry", "change places"),
    (BlindToNoise, "monotone", "no series gets worse"),
    (Grey, "channels", "unseen"),
    (BatchMean, "batch", "beside it"),
    (BatchMean, "shards", "three shards"),
    (Counting, "repetition", "differ"),
    (Lenient, "refusal", "NaN is measured"),
    (Overflowing, "types", "uint8 and the same levels as float differ"),
    (Editing, "purity", "edits the clips"),
    (Seeding, "purity", "random numbers"),
    (Drawing, "purity", "random numbers"),
    (Zero, "missing", "answers"),
    (Silent, "missing", "numpy is not installed"),
    (Renamed, "values", "its card names"),
    (OutOfRange, "values", "leaves its range"),
    (BatchFeatures, "batch", "beside it"),
    (Biased, "distance", "to itself"),
    (NarrowInterval, "distance", "outside its interval"),
    (FirstRows, "distance", "order of the rows"),
    (AlwaysSignificant, "distance", "two sets of one kind"),
]


@pytest.mark.parametrize(
    ("metric", "check", "words"), FAULTS, ids=[f"{m.__name__}-{c}" for m, c, _ in FAULTS]
)
def test_a_seeded_fault_is_caught_by_its_check(metric: type[Metric], check: str, words: str) -> None:
    found = check_metric(metric, only=[check])
    assert any(words in sentence for sentence in found), found
    assert all(sentence.startswith(f"{check}: ") for sentence in found)


def test_every_check_is_shown_to_catch_something() -> None:
    assert set(metric_checks()) - {check for _, check, _ in FAULTS} == {"refusal of trajectories"}


def test_latents_that_are_not_numbers_must_be_refused() -> None:
    latent_error = registry["latent_error"]

    class Careless(latent_error):
        def measure(self, clips, context):
            count = context.trajectory.latents.shape[1]
            return {series.name: [0.0] * count for series in self.card.series}

    found = check_metric(Careless, only=["refusal of trajectories"])
    assert any("NaN is measured" in sentence for sentence in found)


def test_a_metric_that_raises_is_reported_and_the_other_checks_go_on() -> None:
    class Broken(Distance):
        def pair(self, reference, clips):
            raise ZeroDivisionError("oh")

    found = check_metric(Broken)
    assert "batch: raised ZeroDivisionError (oh)." in found
    assert "symmetry: raised ZeroDivisionError (oh)." in found


def test_a_class_without_a_card_and_wrong_arguments() -> None:
    assert check_metric(Metric) == ["card: the class has none."]
    with pytest.raises(UnknownNameError, match="check of metrics"):
        check_metric(Distance, only=["colour"])
    with pytest.raises(ConfigError, match="three clips"):
        check_metric(Distance, clips=torch.zeros((2, 2, 8, 8, 3), dtype=torch.uint8))
