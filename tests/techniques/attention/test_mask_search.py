"""The search of per-head masks: errors against loops, the choice against brute force, and a whole search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from vivace import Plan, accelerate
from vivace.core.errors import ConfigError, PlanError
from vivace.core.shapes import TokenGrid
from vivace.models.describe import describe_pipeline
from vivace.plans.mask_searching import search_masks
from vivace.techniques.attention.head_patterns import head_map
from vivace.techniques.attention.mask_file import MaskFile, choose
from vivace.techniques.attention.mask_search import MaskErrors
from vivace.techniques.attention.sliding_tile import SlidingTile
from vivace.techniques.attention.sparse_vdit import SparseVDiT
from vivace.testing import models

DENSITIES = (1.0, 0.5, 0.3, 0.1)
PATTERNS = ("full", "multi_diagonal:0.3", "diagonal:0.2", "stripe:1", "skip")


def random_errors(seed, heads=4):
    """Errors that mostly, but not always, grow as the pattern gets sparser."""
    random = np.random.default_rng(seed)
    errors = np.cumsum(random.random((heads, 3)), axis=1) * random.uniform(0.2, 1.0, (heads, 1))
    errors[:, 1] *= random.uniform(0.3, 1.0, heads)
    return np.concatenate([np.zeros((heads, 1)), errors], axis=1)


# -- choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 10.0])
def test_under_a_threshold_each_head_gets_its_sparsest_fit(seed, threshold) -> None:
    errors = random_errors(seed)
    for head, got in zip(errors, choose(errors, DENSITIES, threshold), strict=True):
        fits = [i for i in range(4) if head[i] <= threshold]
        assert got == min(fits, key=lambda i: DENSITIES[i])


def test_without_a_fit_a_head_gets_its_least_error() -> None:
    assert choose(np.array([[0.5, 0.4, 0.9]]), (1.0, 0.5, 0.1), 0.2).tolist() == [1]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0.15, 0.3, 0.5, 0.8])
def test_a_budget_is_met_with_the_least_error_for_what_is_visited(seed, budget) -> None:
    errors, share = random_errors(seed), np.array(DENSITIES)
    got = choose(errors, DENSITIES, density=budget)
    visited, made = share[got].mean(), errors[range(4), got].sum()
    assert visited <= budget + 1e-9
    # The greedy walk stops on the lower convex hull: no assignment is better in both.
    for other in itertools.product(range(4), repeat=4):
        cost, error = share[list(other)].mean(), errors[range(4), other].sum()
        assert not (cost <= visited + 1e-12 and error < made - 1e-9)


def test_a_budget_of_everything_changes_nothing_and_one_of_nothing_takes_the_sparsest() -> None:
    errors = random_errors(1)
    assert choose(errors, DENSITIES, density=1.0).tolist() == [0] * 4
    assert choose(errors, DENSITIES, density=0.01).tolist() == [3] * 4


# -- errors -----------------------------------------------------------------------------------------------------------


def by_loops(q, k, v, seen, rows, hidden):
    """|out - dense| / |dense| of every head in float64, one query at a time, mean over the batch."""
    b, s, h, d = q.shape
    out = np.zeros((b, h))
    for i, head in itertools.product(range(b), range(h)):
        missed = size = 0.0
        for row in rows:

            def attend(keys, i=i, head=head, row=row):
                logits = np.array([q[i, row, head] @ k[i, j, head] / math.sqrt(d) for j in keys])
                weights = np.exp(logits - logits.max())
                return weights @ v[i, keys, head] / weights.sum()

            keys = [j for j in range(s) if not hidden[i, j]]
            dense, sparse = attend(keys), attend([j for j in keys if seen[row, j]])
            missed, size = missed + ((sparse - dense) ** 2).sum(), size + (dense**2).sum()
        out[i, head] = math.sqrt(missed / size)
    return out.mean(0)


@pytest.mark.parametrize("masked", [False, True])
def test_errors_are_those_of_loops(masked, monkeypatch) -> None:
    monkeypatch.setattr(
        "vivace.techniques.attention.mask_search.AT_ONCE", 3 * 2 * 2 * 29
    )  # three queries at a time
    grid = TokenGrid(3, 2, 4, text=5)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, grid.tokens, 2, 4, generator=generator) * 1.5 for _ in range(3))
    hidden = np.zeros((2, grid.tokens), dtype=bool)
    hidden[1, -3:] = masked
    mask = torch.from_numpy(~hidden)[:, None, None] if masked else None
    recorder = MaskErrors(patterns=PATTERNS, block=64, rows=7)
    prepared = recorder.prepare(grid, "cpu")
    got = recorder.measure(q, k, v, mask, prepared)
    assert got.shape == (2, len(PATTERNS))
    rows = prepared.rows.tolist()
    assert len(set(rows)) == 7
    assert max(rows) < grid.video
    for i, pattern in enumerate(PATTERNS):
        seen = head_map(grid, pattern, 64).token_mask()[0]
        want = by_loops(*(x.double().numpy() for x in (q, k, v)), seen, rows, hidden)
        assert got[:, i].tolist() == pytest.approx(want.tolist(), rel=1e-4, abs=1e-5)
    assert got[:, 0].abs().max() < 1e-6


# -- a whole search ---------------------------------------------------------------------------------------------------

CALL = models.call("wan2.1") | {"num_inference_steps": 3}


def test_a_search_leaves_the_run_exact_and_its_file_comes_back(tmp_path) -> None:
    pipe = models.pipeline("wan2.1")
    before = pipe(prompt="a", generator=torch.Generator().manual_seed(0), output_type="latent", **CALL).frames
    recorder = MaskErrors(patterns=PATTERNS)
    with accelerate(pipe, Plan([recorder])) as session:
        latents = session("a", seed=0, output_type="latent", **CALL).raw.frames
    assert torch.allclose(latents, before, atol=1e-5)

    made = search_masks(pipe, ["a red ball", "a cone"], PATTERNS, every=2, **CALL)
    assert MaskFile.load(made.save(tmp_path / "deep" / "masks.json")).shape() == {"transformer": [2] * 4}
    assert made.prompts == 2
    assert made.key.steps == 3
    errors = np.array(made.errors["transformer"])
    assert np.abs(errors[..., 0]).max() < 1e-5
    assert errors[..., 1:].min() > 1e-3
    assert list(made.densities) == pytest.approx(
        [head_map(TokenGrid(3, 2, 2), p, 128).token_mask().mean() for p in PATTERNS]
    )


def test_two_experts_are_measured_apart() -> None:
    made = search_masks(models.pipeline("wan2.2"), ["a"], ("full", "skip"), **models.call("wan2.2"))
    first, second = (np.array(made.errors[e]) for e in ("transformer", "transformer_2"))
    assert first.shape == second.shape == (4, 2, 2)
    assert not np.allclose(first[..., 1], second[..., 1])


def test_tighter_thresholds_of_a_real_file_come_closer_to_the_exact_run(tmp_path) -> None:
    pipe = models.pipeline("wan2.1")
    made = search_masks(pipe, ["a red sphere"], PATTERNS, **CALL)
    file = str(made.save(tmp_path / "masks.json"))
    middle = float(np.median(np.array(made.errors["transformer"])[..., 1:]))

    def run(*techniques):
        with accelerate(models.pipeline("wan2.1"), Plan(techniques)) as session:
            out = session("a red sphere", seed=3, output_type="latent", **CALL)
        return torch.as_tensor(out.raw.frames), out.receipt.attention_pairs

    exact, dense = run()
    distances, pairs = [], []
    for threshold in (1e-4, middle, 1.0):
        latents, visited = run(SparseVDiT(file=file, threshold=threshold))
        distances.append(float((latents - exact).norm() / exact.norm()))
        pairs.append(visited)
    assert distances[0] < 1e-5 < distances[1] < distances[2]
    assert dense == pairs[0] > pairs[1] > pairs[2]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_files_that_do_not_fit_are_refused_with_a_sentence(tmp_path) -> None:
    pipe = models.pipeline("wan2.1")
    model = describe_pipeline(pipe)
    file = str(search_masks(pipe, ["a"], PATTERNS, **CALL).save(tmp_path / "masks.json"))

    def told(technique, model=model):
        return "; ".join(str(p) for p in Plan([technique]).problems(model) if p.severity == "error")

    assert told(SparseVDiT(file=file)) == ""
    assert "search_masks" in told(SparseVDiT(file=str(tmp_path / "none.json")))
    assert "holds the pattern full" in told(SlidingTile(file=file))
    assert "is not for 2 layers of 2 heads" in told(
        SparseVDiT(file=file), describe_pipeline(models.pipeline("wan2.1", layers=2))
    )
    assert "was made for the family" in told(SparseVDiT(file=file), describe_pipeline(models.pipeline("ltx")))
    (tmp_path / "bad.json").write_text('{"format": "vivace-masks", "version": 1, "patterns": ["full"]}')
    assert "is damaged" in told(SparseVDiT(file=str(tmp_path / "bad.json")))
    with pytest.raises(PlanError, match="other weights"):
        accelerate(models.pipeline("wan2.1", seed=1), Plan([SparseVDiT(file=file)]))
    with pytest.raises(ConfigError, match="at least one prompt"):
        search_masks(pipe, [], PATTERNS)
    with pytest.raises(ConfigError, match="is no pattern"):
        search_masks(pipe, ["a"], ["dense"])
