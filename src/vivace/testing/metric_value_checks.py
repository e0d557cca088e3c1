"""Checks of `check_metric` that measure clips and compare what comes out."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from vivace.core.errors import ConfigError, VivaceError
from vivace.evaluation.frames import FrameError
from vivace.evaluation.metrics.base import Better, Context, Scope
from vivace.testing.metric_material import (
    BLURS,
    NOISES,
    Material,
    Values,
    badness,
    blurred,
    check,
    frozen_copy,
    noisy,
    same_tensors,
    trajectories,
    unit,
)

_TABLE = (24, 2)
"""Rows and clips of one prompt in the tables of features that distances are tried on."""


@check("values")
def _values(case: Material) -> Iterator[str]:
    if case.card.scope is Scope.SET:
        if not all(np.isfinite(column).all() for column in case.base.values()):
            yield "features holds values that are not finite."
        return
    if set(case.base) != {s.name for s in case.card.series}:
        yield f"it gives {sorted(case.base)}, and its card names {[s.name for s in case.card.series]}."
        return
    for series in case.card.series:
        column = case.base[series.name]
        if len(column) != len(case.clips):
            yield f"{series.name} has {len(column)} values for {len(case.clips)} clips."
        known = [v for v in column if not math.isnan(v)]
        if len(known) < len(column) and case.card.scope is not Scope.SAMPLE:
            yield f"{series.name} is not a number for a plain clip."
        low, high = series.low, series.high
        if any((low is not None and v < low - 1e-6) or (high is not None and v > high + 1e-6) for v in known):
            yield f"{series.name} leaves its range: {[round(v, 6) for v in known]}."
        if series.binary and any(v not in (0, 1) for v in known):
            yield f"{series.name} is said to be binary and gives {known}."


@check("identity", Scope.PAIR, Scope.LATENT)
def _identity(case: Material) -> Iterator[str]:
    context = replace(case.context, trajectory=case.context.reference_trajectory)
    same = case.run(case.clips, context)
    for series in case.card.series:
        for value, other in zip(same[series.name], case.base[series.name], strict=True):
            best = (
                math.inf
                if series.better is Better.HIGHER and series.high is None
                else series.high
                if series.better is Better.HIGHER
                else series.low
                if series.low is not None
                else value
            )
            if best is not None and not (value == best or abs(value - best) <= case.tolerance):
                yield f"{series.name} of equal clips is {value:.6g}, and the best value is {best:.6g}."
                break
            if badness(series, [value], [value]) > badness(series, [other], [value]):
                yield f"{series.name} rates a damaged clip ({other:.6g}) above an equal one ({value:.6g})."
                break


@check("symmetry", Scope.PAIR)
def _symmetry(case: Material) -> Iterator[str]:
    if case.card.symmetric:
        swapped = case.run(case.clips, replace(case.context, reference=case.damaged))
        if why := case.close(case.base, swapped):
            yield f"it is said to be symmetric, but {why} when the clips change places."


@check("monotone", Scope.PAIR, Scope.SAMPLE)
def _monotone(case: Material) -> Iterator[str]:
    clean = case.run(case.clips, case.context)
    for kind, damage, levels in (("blur", blurred, BLURS), ("noise", noisy, NOISES)):
        if kind not in case.card.sees:
            continue
        runs = [clean, *(case.run(damage(case.clips, level), case.context) for level in levels)]
        rows = {s.name: [badness(s, run[s.name], clean[s.name]) for run in runs] for s in case.card.series}
        if not any(_rises(row) for row in rows.values()):
            told = {name: [float(f"{v:.3g}") for v in row] for name, row in rows.items()}
            yield f"it is said to see {kind}, but no series gets worse at every level: {told}."


def _rises(row: Sequence[float]) -> bool:
    """Never falls by more than a twentieth of the whole way, and ends above its start."""
    if any(math.isnan(v) for v in row) or not row[-1] > row[0]:
        return False
    finite = [v for v in row if math.isfinite(v)]
    slack = 0.05 * (max(finite) - min(finite))
    return all(b >= a - slack for a, b in pairwise(row))


@check("types", Scope.PAIR, Scope.SAMPLE, Scope.SET)
def _types(case: Material) -> Iterator[str]:
    context = case.context
    if context.reference is not None:
        context = replace(context, reference=unit(context.reference))
    if why := case.close(case.base, case.run(unit(case.candidate), context)):
        yield f"uint8 and the same levels as float differ: {why}."


@check("refusal", Scope.PAIR, Scope.SAMPLE, Scope.SET)
def _refusal(case: Material) -> Iterator[str]:
    floats = unit(case.candidate)
    spoilt = floats.clone()
    spoilt[0, 0, 0, 0, 0] = math.nan
    bad = {
        "values in [-1, 1]": floats * 2 - 1,
        "floats in [0, 255]": floats * 255,
        "NaN": spoilt,
        "int64": case.candidate.long(),
        "one clip without a batch": case.candidate[0],
        "channels before the frames": case.candidate.permute(0, 4, 1, 2, 3),
        "no clips": case.candidate[:0],
    }
    for name, clips in bad.items():
        yield from _wanted(case, name, clips, case.context)
        if case.card.scope is Scope.PAIR:
            yield from _wanted(
                case, f"{name} as reference", case.candidate, replace(case.context, reference=clips)
            )
    if case.card.scope is Scope.PAIR:
        yield from _wanted(case, "clips of another length", case.candidate[:, :-1], case.context)
        yield from _wanted(
            case, "no reference", case.candidate, replace(case.context, reference=None), ConfigError
        )


@check("refusal of trajectories", Scope.LATENT)
def _latent_refusal(case: Material) -> Iterator[str]:
    good = trajectories(len(case.clips))[1]
    bad = {
        "NaN": replace(good, latents=good.latents * math.nan),
        "fewer sigmas than latents": replace(good, sigmas=good.sigmas[:-1]),
        "rising sigmas": replace(good, sigmas=good.sigmas[::-1]),
        "latents of another size": replace(good, latents=good.latents[..., :-1]),
    }
    for name, path in bad.items():
        yield from _wanted(case, name, case.clips, replace(case.context, trajectory=path))
    yield from _wanted(case, "no trajectory", case.clips, replace(case.context, trajectory=None), ConfigError)


def _wanted(
    case: Material, name: str, clips: torch.Tensor, context: Context, error: type[VivaceError] = FrameError
) -> Iterator[str]:
    try:
        case.run(clips, context)
    except error as caught:
        if "\n" in str(caught):
            yield f"the refusal of {name} takes more than one line."
    except Exception as caught:
        yield f"{name} raises {type(caught).__name__}, not {error.__name__}."
    else:
        yield f"{name} is measured, not refused."


@check("channels", Scope.PAIR, Scope.SAMPLE, Scope.SET)
def _channels(case: Material) -> Iterator[str]:
    swapped = case.run(case.candidate.flip(-1), case.context)
    differs = case.close(case.base, swapped)
    if "wrong_colour" in case.card.sees and not differs:
        yield "it is said to see wrong_colour, but red and blue can change places unseen."
    if "wrong_colour" in case.card.blind_to and case.card.scope is not Scope.SET:
        # Blind does not mean invariant: a grey value moves a little when the colours do.
        for name, column in case.base.items():
            moves = [abs(a - b) / max(abs(a), 1e-3) for a, b in zip(column, swapped[name], strict=True)]
            if np.median(moves) > 0.5:
                yield f"it is said not to see wrong_colour, but {name} moves when red and blue change places."


@check("batch")
def _batch(case: Material) -> Iterator[str]:
    alone = _joined([case.run(*case.rows([i])) for i in range(len(case.clips))])
    if why := case.close(case.base, alone):
        yield f"a clip's value depends on the clips beside it: {why}, together and alone."


@check("shards")
def _shards(case: Material) -> Iterator[str]:
    count = len(case.clips)
    cuts = [list(range(count))[i * count // 3 : (i + 1) * count // 3] for i in range(3)]
    parts = [case.run(*case.rows(rows), metric=case.metric(device=case.device)) for rows in reversed(cuts)]
    if why := case.close(case.base, _joined(parts[::-1])):
        yield f"three shards differ from one: {why}."


def _joined(parts: Sequence[Values]) -> Values:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


@check("repetition")
def _repetition(case: Material) -> Iterator[str]:
    again = case.run(case.candidate, case.context)
    if not _bitwise(again, case.base):
        yield f"two measurements of the same clips differ ({case.close(case.base, again) or 'in the last digits'})."


def _bitwise(one: Values, two: Values) -> bool:
    return all(np.array_equal(np.asarray(one[n]), np.asarray(two[n]), equal_nan=True) for n in one)


@check("purity")
def _purity(case: Material) -> Iterator[str]:
    for clips in (case.candidate.clone(), unit(case.candidate)):
        before, context = clips.clone(), frozen_copy(case.context)
        given = frozen_copy(context)
        states = _random_states()
        case.run(clips, given)
        if not torch.equal(clips, before):
            yield f"it edits the clips it is given ({clips.dtype})."
        if not same_tensors(given, context):
            yield "it edits the reference, the prompts or the trajectories it is given."
        if states != _random_states():
            yield "it draws from the global random numbers of Python, numpy or torch, or seeds them."


def _random_states() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002  the global state is what is watched
    return (
        random.getstate(),
        numpy_state[1].tobytes(),
        numpy_state[2],
        torch.get_rng_state().numpy().tobytes(),
    )


def _tables(case: Material) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Two tables of one distribution around the metric's own features, rows independent, and the rows' prompts."""
    rows, each = _TABLE
    own = np.array(list(case.base.values())).T
    spread = own.std(axis=0) + 1e-3 * (np.abs(own).mean(axis=0) + 1e-3)
    normal = np.random.default_rng(17).standard_normal((2, rows, own.shape[1]))
    first, second = own.mean(axis=0) + spread * normal
    return first, second, [i // each for i in range(rows)]


@check("distance", Scope.SET)
def _distance(case: Material) -> Iterator[str]:
    first, second, groups = _tables(case)
    try:
        null = case.one.distance(first, second, groups)
    except ConfigError as error:  # more rows are wanted than a check can make
        if "\n" in str(error):
            yield "the refusal of few rows takes more than one line."
        return
    if set(null) != {s.name for s in case.card.series}:
        yield f"distance gives {sorted(null)}, and the card names {[s.name for s in case.card.series]}."
        return
    far = case.one.distance(first, second + 3 * first.std(axis=0), groups)
    equal = case.one.distance(first, first.copy(), groups)
    order = np.random.default_rng(3).permutation(len(first))
    mixed = case.one.distance(first[order], second[order], [groups[i] for i in order])
    again = case.one.distance(first, second, groups)
    for series in case.card.series:
        n, f, e = null[series.name], far[series.name], equal[series.name]
        if not n.value < f.value:
            yield f"{series.name} rates a far set ({f.value:.4g}) no worse than one of the same kind ({n.value:.4g})."
        if abs(e.value) > 0.1 * abs(f.value):
            yield f"{series.name} of a set to itself is {e.value:.4g}, against {f.value:.4g} of a far set."
        for name, value in (("same kind", n), ("far", f)):
            if not value.low <= value.value <= value.high:
                yield (
                    f"{series.name} ({name}) {value.value:.4g} lies outside its interval "
                    f"[{value.low:.4g}, {value.high:.4g}]."
                )
        scale = case.tolerance * max(abs(n.value), 1e-3 * abs(f.value))
        if abs(mixed[series.name].value - n.value) > scale:
            yield f"{series.name} depends on the order of the rows: {n.value:.6g} and {mixed[series.name].value:.6g}."
        if again[series.name] != n:
            yield f"{series.name} differs between two calls with one seed."
        if n.p is not None and n.p < 0.01:
            yield f"{series.name} finds p = {n.p:.3g} for two sets of one kind."
        if f.p is not None and f.p > 0.05:
            yield f"{series.name} finds p = {f.p:.3g} for a set three deviations away."
