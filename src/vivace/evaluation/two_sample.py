"""Do two sets of clips come from one distribution?  Kernel and energy distances of *paired* tables of features.

Row i of both tables has the same prompt, seed and noise, so the rows of a pair depend on each other, and so do the
clips of one prompt. Everything here rests on one N x N matrix of pairs,

    h[i, j] = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j) = <f(x_i) - f(y_i), f(x_j) - f(y_j)>,

with f the kernel's feature map. Its mean over pairs of clips of *different* prompts is an unbiased estimate of the
squared distance (the U-statistic of Gretton et al., JMLR 13, 2012, eq. 4, which never compares x_i with y_i), and it is
exactly 0 for equal tables. Exchanging the labels of pair i turns the sign of row and column i: a permutation test
costs no new kernel values. Tables without pairs: `mmd2` and `energy_distance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vivace.core.errors import ConfigError

if TYPE_CHECKING:
    from vivace.evaluation.metrics.base import SetValue

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From tables (N, D) and (M, D) to values (N, M)."""

DEGREE = 3
DRAWS = 2000
FLIPS = 999
LEVEL = 0.95
CLIP = 5.0
PROCEDURE = (
    "mean over pairs of clips of different prompts, a clip never with its own reference; cluster bootstrap over "
    "prompts; p by exchanging the labels of whole prompts."
)
"""What `compare_sets` does, for the convention of a metric's card."""
IQR_OF_NORMAL = 1.349
"""Interquartile range of a normal variable, in standard deviations."""


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)^3, the kernel of KID (Binkowski et al., arXiv:1801.01401, section 4)."""
    return (x @ y.T / x.shape[1] + 1.0) ** DEGREE


def distance_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """-|x - y|: its squared distance is the energy distance (Sejdinovic et al., Ann. Stat. 41, 2013, theorem 22)."""
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2.0 * (x @ y.T)
    return -np.sqrt(squares.clip(min=0.0))


def pairs(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> np.ndarray:
    """The matrix h (N, N) of two paired tables (N, D); symmetric. See the module's text."""
    cross, first, second = kernel(x, y), kernel(x, x), kernel(y, y)
    h = first + second - cross - cross.T
    # What rounding leaves of equal clips is nothing, and depends on the machine.
    size = np.abs(first) + np.abs(second) + np.abs(cross) + np.abs(cross.T)
    h = np.where(np.abs(h) <= 1e-13 * size, 0.0, h)
    return (h + h.T) / 2.0


def mmd2(x: np.ndarray, y: np.ndarray, kernel: Kernel = polynomial_kernel) -> float:
    """Unbiased squared distance of *unpaired* tables (N, D), (M, D) (Gretton et al. 2012, eq. 3).

    Use it for sets that share no prompts and seeds; for paired tables it is biased, because x_i and y_i are alike.

    Raises:
        ConfigError: a table has fewer than two rows, widths differ, or a value is not finite.
    """
    x, y = _table(x, "the first table"), _table(y, "the second table")
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ConfigError(
            f"give two tables of one width with two rows or more each, not {x.shape} and {y.shape}."
        )
    own = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(own[0] + own[1] - 2.0 * kernel(x, y).mean())


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """2 E|X-Y| - E|X-X'| - E|Y-Y'| of unpaired tables, unbiased (Szekely and Rizzo, J. Stat. Plan. Inf. 143, 2013).

    Raises:
        ConfigError: as `mmd2`.
    """
    return mmd2(x, y, distance_kernel)


@dataclass(frozen=True)
class Scaling:
    """(features - `centre`) / `spread`, clipped to +-`clip`. `centre` and `spread` are (D,)."""

    centre: np.ndarray
    spread: np.ndarray
    clip: float = CLIP

    def __call__(self, table: np.ndarray) -> np.ndarray:
        return ((table - self.centre) / self.spread).clip(-self.clip, self.clip)


def robust_scaling(table: np.ndarray, floor: np.ndarray | float, clip: float = CLIP) -> Scaling:
    """Median and interquartile range (as a normal's standard deviation) of a table (N, D).

    Scale by both sets together: with a scale from one of them the test rejects too often where N is small, since that
    set fits its own scale. A metric with known units does better with fixed numbers.

    Args:
        table: rows of both sets.
        floor: the least spread, (D,) or one number, positive. A feature that is constant in the table would otherwise
            turn the smallest departure into an infinite one.
        clip: largest scaled value.
    """
    low, middle, high = np.quantile(table, (0.25, 0.5, 0.75), axis=0)
    return Scaling(middle, np.maximum((high - low) / IQR_OF_NORMAL, floor), clip)


def paired_tables(
    reference: np.ndarray, candidate: np.ndarray, groups: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both tables in float64 and the groups numbered from 0, checked.

    Raises:
        ConfigError: shapes or lengths differ, a value is not finite, or all clips are of one prompt.
    """
    x, y = _table(reference, "the reference's features"), _table(candidate, "the candidate's features")
    if x.shape != y.shape or len(groups) != len(x):
        raise ConfigError(
            f"give paired tables (N, D) and N groups, not {x.shape}, {y.shape} and {len(groups)} groups; "
            "measure both contenders on the same clips."
        )
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
    if not len(numbers) or numbers.max() < 1:
        raise ConfigError("a distance of sets needs clips of two prompts or more; add prompts to the task.")
    return x, y, numbers


def compare_sets(
    h: np.ndarray, groups: np.ndarray, seed: int = 0, *, draws: int = DRAWS, flips: int = FLIPS
) -> SetValue:
    """The squared distance with a 95 % interval and a p of "both sets have one distribution".

    Args:
        h: the matrix of `pairs`.
        groups: (N,) numbers from 0; clips of one prompt share a number.
        seed: of the bootstrap and of the flips.
        draws: of the cluster bootstrap over prompts (percentiles). A prompt drawn twice is not compared with itself.
        flips: exchanges of the labels of all pairs of a prompt at once. Whole prompts are exchanged, since clips of one
            prompt may all have changed for one reason; all exchanges are tried where there are no more than `flips`.

    The test is one-sided and exact for any N where the pair (x, y) is as likely as (y, x); the least p is
    1 / (flips + 1). A small p says that there is a difference, the value and the anchors say whether it matters.
    """
    whole = int(groups.max()) + 1
    members = np.zeros((whole, len(groups)))
    members[groups, np.arange(len(groups))] = 1.0
    sums = members @ h @ members.T
    counts = np.outer(members.sum(1), members.sum(1))
    np.fill_diagonal(sums, 0.0)
    np.fill_diagonal(counts, 0.0)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(whole, np.full(whole, 1.0 / whole), draws).astype(np.float64)
    total = ((weights @ counts) * weights).sum(1)
    sampled = ((weights @ sums) * weights).sum(1)[total > 0] / total[total > 0]
    signs = _signs(whole, flips, rng)
    return _value(sums.sum() / counts.sum(), sampled, ((signs @ sums) * signs).sum(1) / counts.sum(), len(h))


def compare_within(
    h: np.ndarray, groups: np.ndarray, seed: int = 0, *, draws: int = DRAWS, flips: int = FLIPS
) -> SetValue | None:
    """As `compare_sets`, for the squared distance given the prompt: the mean over prompts of each prompt's own.

    It sees what cancels over all prompts, such as left exchanged for right. It compares different clips of one prompt,
    so it is None where no prompt has two. Labels are exchanged pair by pair: clips of one prompt with different noise
    are independent, given the prompt.
    """
    same = groups[:, None] == groups[None]
    np.fill_diagonal(same, False)
    number = same.sum(1)  # other clips of the same prompt
    if not number.any():
        return None
    share = np.where(same, 1.0 / np.maximum((number + 1) * number, 1)[:, None], 0.0) * h
    repeated = np.unique(groups[number > 0])
    each = np.array([share[groups == g].sum() for g in repeated])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(each), (draws, len(each)))
    signs = _signs(len(h), flips, rng)
    flipped = ((signs @ share) * signs).sum(1) / len(each)
    return _value(float(each.mean()), each[drawn].mean(1), flipped, int((number > 0).sum()))


def _signs(count: int, flips: int, rng: np.random.Generator) -> np.ndarray:
    """Signs (flips, count); every different one, 2^(count - 1) of them, if those are fewer."""
    if count <= 20 and 2 ** (count - 1) <= flips + 1:
        numbers = np.arange(1, 2 ** (count - 1))  # 0, no exchange at all, is the observation itself
        bits = (numbers[:, None] >> np.arange(count)) & 1
    else:
        bits = rng.integers(0, 2, (flips, count))
    return 1.0 - 2.0 * bits


def _value(value: float, sampled: np.ndarray, flipped: np.ndarray, n: int) -> SetValue:
    from vivace.evaluation.metrics.base import SetValue

    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(sampled, (tail, 1.0 - tail)) if len(sampled) else (value, value)
    # Rounding must not make an exchange that changes nothing look smaller than the observation.
    slack = 1e-9 * max(abs(value), float(np.abs(flipped).max(initial=0.0)))
    p = (1 + int((flipped >= value - slack).sum())) / (1 + len(flipped))
    return SetValue(float(value), float(min(low, value)), float(max(high, value)), p, n)


def _table(values: np.ndarray, name: str) -> np.ndarray:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ConfigError(f"{name} must be a table (N, D) with nothing empty, not {table.shape}.")
    if not np.isfinite(table).all():
        raise ConfigError(f"{name} hold values that are not finite; look for broken clips.")
    return table


__all__ = [
    "Kernel",
    "Scaling",
    "compare_sets",
    "compare_within",
    "distance_kernel",
    "energy_distance",
    "mmd2",
    "paired_tables",
    "pairs",
    "polynomial_kernel",
    "robust_scaling",
]
