"""ToCa and DuCa against token selections written out by hand, and their FLOPs against a formula."""

from __future__ import annotations

import pytest
import torch
from modules_by_hand import Steps, cache_by_hand, parts_of, wan_flops

from vivace.core.shapes import TokenGrid
from vivace.techniques.caching.duca import DuCa
from vivace.techniques.caching.fora import Fora
from vivace.techniques.caching.toca import ToCa
from vivace.techniques.caching.tokens import in_space
from vivace.testing.subjects import Subject, distance

FULL = {0, 4, 7}
TOCA = ToCa(interval=4, warmup=1, tail=1, fraction=0.25)
DUCA = DuCa(interval=4, warmup=1, tail=1, fraction=0.25)


def scores_by_hand(values, ages, grid):
    """Influence, age and neighbourhood of every token of one row, in plain Python."""
    norms = [float(v.double().norm()) for v in values]
    mean = sum(norms) / len(norms)
    scores = [n / mean + 0.25 * a for n, a in zip(norms, ages, strict=True)]
    start = grid.text if grid.text_first and len(scores) == grid.tokens else 0
    best = list(scores)
    if len(scores) in (grid.video, grid.tokens):
        for f in range(grid.frames):
            for y in range(0, grid.height, 2):
                for x in range(0, grid.width, 2):
                    cell = [
                        start + (f * grid.height + v) * grid.width + u
                        for v in range(y, min(y + 2, grid.height))
                        for u in range(x, min(x + 2, grid.width))
                    ]
                    best[max(cell, key=scores.__getitem__)] += 0.4
    return best


def refresh_by_hand(pipe, refreshed, choose):
    """Outside FULL attention is reused, and feed-forwards compute what `choose` names where `refreshed(step)`."""
    cache_by_hand(pipe, lambda kind, step: kind == "ffn" or step in FULL)
    steps = Steps(pipe)

    def patch(block, module):
        old, kept, ages = module.forward, {}, {}

        def forward(x):
            key = steps.calls
            if steps.step in FULL:
                kept[key], ages[key] = old(x), torch.ones(x.shape[:2])
                return kept[key]
            if refreshed(steps.step):
                rows = []
                for row in range(x.shape[0]):
                    picked = choose(steps.step, block, kept[key][row], ages[key][row].tolist())
                    out = kept[key][row].clone()
                    out[picked] = old(x[row : row + 1])[0][picked]
                    ages[key][row] += 1
                    ages[key][row][picked] = 1
                    rows.append(out)
                kept[key] = torch.stack(rows)
            return kept[key]

        module.forward = forward

    for block, kind, module in parts_of(pipe.transformer):
        if kind == "ffn":
            patch(block, module)


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "ltx"])
def test_toca_refreshes_the_tokens_with_the_highest_scores(name):
    subject = Subject(name)
    grid = subject.model.grid(subject.workload())

    def choose(step, block, values, ages):
        scores = scores_by_hand(values, ages, grid)
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        return order[: max(1, round(0.25 * len(scores)))]

    refresh_by_hand(subject.pipeline, lambda step: True, choose)
    expected = subject.plain()
    run = Subject(name).run(TOCA)
    assert distance(run.latents, expected) < 1e-4
    assert distance(run.latents, Subject(name).run(Fora(interval=4, warmup=1)).latents) > 1e-4


def test_duca_takes_turns_and_draws_the_same_tokens_for_everybody():
    subject = Subject("wan2.1")

    def choose(step, block, values, ages):
        generator = torch.Generator().manual_seed(step * 65_537 + block)
        return torch.randperm(len(values), generator=generator)[:3].tolist()

    # Steps 1, 3 and 5 reuse all, 2 and 6 refresh.
    refresh_by_hand(subject.pipeline, lambda step: step in (2, 6), choose)
    expected = subject.plain()
    run = Subject("wan2.1").run(DUCA)
    assert distance(run.latents, expected) < 1e-5
    assert run.receipt.techniques[0].effects["tokens_refreshed"] == 2 * 4 * 2 * 3


@pytest.mark.parametrize(("settings", "refreshing"), [(TOCA, 5), (DUCA, 2), (TOCA.replace(fraction=0.0), 0)])
def test_flops_are_the_formula(settings, refreshing):
    subject = Subject("wan2.1")
    cost = wan_flops(subject.pipeline.transformer.config, 12, 16)
    saved = 5 * sum(cost.values()) - refreshing * 3 / 12 * cost["ffn"]
    run = subject.run(settings).receipt
    assert run.flops == pytest.approx(subject.exact().receipt.flops - 2 * 4 * saved)
    assert run.cache_hits == 10


def test_all_tokens_are_the_exact_run_and_none_are_fora():
    subject = Subject("wan2.1")
    assert subject.run(TOCA.replace(fraction=1.0)).latents.equal(subject.exact().latents)
    plain = subject.run(Fora(interval=4, warmup=1)).latents
    assert subject.run(TOCA.replace(fraction=0.0)).latents.equal(plain)
    assert subject.run(DUCA.replace(fraction=0.0)).latents.equal(plain)


def test_all_random_tokens_are_a_feed_forward_in_full():
    other = Subject("wan2.1")
    cache_by_hand(other.pipeline, lambda kind, step: step in FULL or (kind == "ffn" and step in (2, 6)))
    expected = other.plain()
    assert distance(Subject("wan2.1").run(DUCA.replace(fraction=1.0)).latents, expected) < 1e-5


def test_only_the_chosen_tokens_go_through_the_network():
    subject, seen = Subject("wan2.1"), []
    first = subject.pipeline.transformer.blocks[0].ffn.net[0]
    first.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    subject.run(ToCa(interval=8, warmup=1, tail=0, fraction=0.5))
    assert seen == [12, 12] + [6] * 14


def test_the_bonus_goes_to_one_token_of_every_neighbourhood():
    grid = TokenGrid(1, 3, 3, text=2, text_first=True)
    scores = torch.tensor([[5.0, 6.0, 1.0, 2.0, 9.0, 4.0, 3.0, 8.0, 7.0, 0.0, 0.5]])
    found = in_space(scores, grid, 10.0) - scores
    # Cells of the 3 x 3 plane: {1, 2, 4, 3}, {9, 8}, {7, 0} and {0.5}.
    assert found.tolist() == [[0.0, 0.0, 0.0, 0.0, 10.0, 10.0, 0.0, 0.0, 10.0, 0.0, 10.0]]
    assert in_space(scores[:, :5], grid, 10.0).equal(scores[:, :5])
    late = in_space(scores[:, 2:], TokenGrid(1, 3, 3), 10.0)
    assert late.equal(in_space(scores, grid, 10.0)[:, 2:])


def test_hunyuan_has_feed_forwards_of_two_streams():
    run = Subject("hunyuan").run(TOCA)
    assert torch.isfinite(run.latents).all()
    # Two dual blocks with two feed-forwards each, of 12 and 16 tokens; single blocks have none of their own.
    assert run.receipt.techniques[0].effects["tokens_refreshed"] == 5 * 2 * 2 * (3 + 4)
