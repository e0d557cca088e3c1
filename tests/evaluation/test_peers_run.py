"""Peers at work on real small pipelines: they act, are counted as the arithmetic says, and leave nothing behind."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

import vivace
from vivace.core.errors import ConfigError, SessionError
from vivace.evaluation.peers import get, names, peer_session
from vivace.evaluation.peers.diffusers_block import calibrate, skipped
from vivace.plans.plan import Plan
from vivace.plans.session import Session
from vivace.testing import models
from vivace.testing.fingerprints import World, differences, fingerprint, generators, process_settings

STEPS, LAYERS = 8, 3
PROMPTS, SEEDS = ["a red ball", "x"], [1, 2]
CALL = {k: v for k, v in models.call("wan2.1").items() if k != "num_inference_steps"} | {
    "output_type": "latent"
}
FLAT = (1.0,) * STEPS
"""Ratios that never add up to an error: MagCache then skips as often as it may."""
STRONG = {
    "diffusers.first_block_cache": {"threshold": 0.9},
    "diffusers.mag_cache": {"threshold": 0.5, "ratios": FLAT},
    "diffusers.sea_cache": {"threshold": 2.0},
    "diffusers.taylorseer": {"interval": 3, "start": 2},
    "diffusers.taylorseer_lite": {"interval": 3, "start": 2},
    "cache_dit.dbcache": {"threshold": 0.9, "warmup": 2},
    "cache_dit.taylorseer": {"threshold": 0.9, "warmup": 2},
}
"""Settings with which a peer surely acts on random weights."""
HERE = [name for name in names() if not get(name).missing()]
CACHES = [name for name in HERE if not name.startswith("torchao")]


@pytest.fixture(scope="module")
def pipe():
    return models.pipeline("wan2.1", layers=LAYERS)


@pytest.fixture(scope="module")
def exact(pipe):
    return run_exact(pipe)


def run_exact(pipe):
    with Session(pipe, Plan()) as session:
        return session(PROMPTS, seed=SEEDS, num_inference_steps=STEPS, **CALL)


def opened(pipe, name, **changes):
    return peer_session(pipe, get(name), STEPS, STRONG.get(name, {}) | changes)


def latents(out):
    return out.raw.frames


def block_flops(rows: int) -> int:
    """One block of the tiny Wan by hand: 12 tokens (3 x 2 x 2) of 24 channels, 16 text tokens, 48 hidden units."""
    s, c, text, ffn = 12, 24, 16, 48
    attention = 4 * 2 * s * c * c + 4 * s * s * c
    cross = 2 * 2 * s * c * c + 2 * 2 * text * c * c + 4 * s * text * c
    return rows * (attention + cross + 2 * 2 * s * c * ffn)


def self_attention_flops(rows: int) -> int:
    s, c = 12, 24
    return rows * (4 * 2 * s * c * c + 4 * s * s * c)


@pytest.mark.parametrize("name", HERE)
def test_it_acts_repeats_itself_and_leaves_nothing_behind(pipe, exact, name):
    before, settings, drawn = fingerprint(pipe), process_settings(), generators()
    order = list(pipe.transformer.state_dict())
    world = World()
    world.watch(pipe)
    with opened(pipe, name) as session:
        first = session(PROMPTS, seed=SEEDS, **CALL)
        second = session(PROMPTS, seed=SEEDS, **CALL)
    assert session.peer.acted(first.receipt)
    assert not first.receipt.warnings
    assert not torch.equal(latents(first), latents(exact))
    assert torch.equal(latents(first), latents(second))
    assert first.receipt.counts == second.receipt.counts
    record = first.receipt.techniques[0]
    assert (record.name, record.settings["steps"]) == (name, STEPS)
    assert record.effects["hits"] == first.receipt.cache_hits
    assert differences(before, fingerprint(pipe)) == ""
    assert world.changes() == ""
    assert process_settings() == settings
    assert generators() == drawn
    assert list(pipe.transformer.state_dict()) == order
    if name in CACHES:
        assert first.receipt.cache_hits > 0
        assert first.receipt.flops < exact.receipt.flops
        assert first.receipt.flops_dense == exact.receipt.flops
    else:
        assert first.receipt.flops == exact.receipt.flops
        assert first.receipt.weight_bytes < exact.receipt.weight_bytes


def test_the_exact_run_is_the_same_after_all_of_them(pipe, exact):
    again = run_exact(pipe)
    assert torch.equal(latents(again), latents(exact))
    assert again.receipt.counts == exact.receipt.counts


class Stop(Exception):
    """A run is broken off."""


def stop(pipeline, step, timestep, tensors):
    if step == 5:
        raise Stop
    return tensors


@pytest.mark.parametrize("name", CACHES)
def test_a_broken_off_run_does_not_touch_the_next(pipe, name):
    with opened(pipe, name) as session:
        clean = session(PROMPTS, seed=SEEDS, **CALL)
        with pytest.raises(Stop):
            session(PROMPTS, seed=[5, 6], callback_on_step_end=stop, **CALL)
        again = session(PROMPTS, seed=SEEDS, **CALL)
    assert torch.equal(latents(clean), latents(again))
    assert clean.receipt.counts == again.receipt.counts


@pytest.mark.parametrize(
    "name", ["diffusers.first_block_cache", "diffusers.mag_cache", "diffusers.taylorseer"]
)
def test_a_smaller_batch_after_a_broken_off_run(pipe, name):
    """What a library remembers of the broken run has the wrong shape: it would crash, or add nothing and only warn."""
    with opened(pipe, name) as session:
        clean = session("x", seed=1, **CALL)
        with pytest.raises(Stop):
            session(PROMPTS, seed=[5, 6], callback_on_step_end=stop, **CALL)
        again = session("x", seed=1, **CALL)
    assert torch.equal(latents(clean), latents(again))


@pytest.mark.parametrize("name", CACHES)
def test_guidance_branches_are_kept_apart_where_the_card_says_so(pipe, name):
    """With equal prompts on both branches guidance cancels out, unless one branch is answered with the other's past."""
    prompt = PROMPTS[:1]
    with opened(pipe, name) as session:
        guided = session(prompt, seed=3, negative_prompt=prompt, **CALL)
    parity = {"guided": False} if name.startswith("cache_dit") else {}
    with opened(pipe, name, **parity) as session:
        unguided = session(prompt, seed=3, **CALL | {"guidance_scale": 1.0})
    assert torch.equal(latents(guided), latents(unguided)) == get(name).card.branches_apart


@pytest.mark.parametrize(
    "name", [n for n in HERE if not get(n).card.batch_coupled and n != "torchao.int8_dynamic"]
)
def test_clips_of_a_batch_are_independent(pipe, name):
    # int8 activations are left out: their rounding turns differences of 1e-7 between batch sizes into whole steps.
    with opened(pipe, name) as session:
        batch = latents(session(PROMPTS, seed=SEEDS, **CALL))
        for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
            alone = latents(session(prompt, seed=seed, **CALL))
            assert (alone[0] - batch[i]).norm() < 1e-4 * batch[i].norm()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("diffusers.first_block_cache", {"threshold": 0.2}),
        ("diffusers.sea_cache", {"threshold": 0.1}),
        ("cache_dit.dbcache", {"threshold": 0.2, "warmup": 2}),
        ("cache_dit.taylorseer", {"threshold": 0.2, "warmup": 2}),
    ],
)
def test_coupled_peers_take_one_decision_for_the_whole_batch(name, settings):
    """Two clips that skip differently alone: together one of them gets the other's decision."""
    assert get(name).card.batch_coupled
    noise = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    noise[1] *= 30.0
    # Depth and steps are those the thresholds were found for.
    with peer_session(models.pipeline("wan2.1", layers=4), get(name), 10, settings) as session:
        alone = [session("x", latents=z[None].clone(), **CALL) for z in noise]
        both = session(["x", "x"], latents=noise.clone(), **CALL)
    assert skipped(alone[0].receipt) != skipped(alone[1].receipt)
    moved = [(latents(o)[0] - latents(both)[i]).norm() / latents(o).norm() for i, o in enumerate(alone)]
    assert max(moved) > 1e-3


# -- counted as the arithmetic says ---------------------------------------------------------------------------------


def test_the_exact_run_is_counted_as_by_hand(exact):
    outside = exact.receipt.flops - 2 * STEPS * LAYERS * block_flops(2)
    assert 0 < outside < 0.5 * exact.receipt.flops
    assert outside == pytest.approx(2 * STEPS * round(outside / (2 * STEPS)))


def test_a_steps_mask_is_counted_step_by_step(pipe, exact):
    from vivace.evaluation.peers.cache_dit import mask

    computed = mask("fast", STEPS)
    left_out = tuple(i for i, run in enumerate(computed) if not run)
    with opened(pipe, "cache_dit.steps_mask", policy="fast") as session:
        receipt = session(PROMPTS, seed=SEEDS, **CALL).receipt
    assert skipped(receipt) == {"cond": left_out, "uncond": left_out}
    assert receipt.flops == exact.receipt.flops - 2 * len(left_out) * (LAYERS - 1) * block_flops(2)
    assert receipt.cache_hits == 2 * len(left_out)
    assert receipt.nfe == receipt.nfe_requested == 2 * STEPS


def test_mag_cache_skips_as_its_budget_allows(pipe, exact):
    with opened(pipe, "diffusers.mag_cache", max_skip=3, retention=0.2) as session:
        receipt = session(PROMPTS, seed=SEEDS, **CALL).receipt
    left_out = (2, 3, 4, 6, 7)  # two kept steps, then three skips and one computed step in turn
    assert skipped(receipt) == {"cond": left_out, "uncond": left_out}
    assert receipt.flops == exact.receipt.flops - 2 * len(left_out) * LAYERS * block_flops(2)


def test_taylorseer_leaves_out_the_modules_within_the_blocks(pipe, exact):
    with opened(pipe, "diffusers.taylorseer", interval=3, start=2) as session:
        receipt = session(PROMPTS, seed=SEEDS, **CALL).receipt
    predicted = [i for i in range(STEPS) if i >= 2 and (i - 3) % 3]
    assert receipt.flops == exact.receipt.flops - 2 * len(predicted) * LAYERS * block_flops(2)
    assert receipt.blocks_run == receipt.blocks_total
    assert receipt.cache_hits == 2 * len(predicted)


def test_stock_pab_answers_the_unconditional_branch_with_the_conditional_one(pipe, exact):
    # cross=1 never reuses cross-attention, so that what is missing is self-attention alone.
    with opened(pipe, "diffusers.pab", spatial=2, cross=1, early=1000, late=0) as session:
        session(PROMPTS, seed=SEEDS, **CALL)
        cond, uncond = session.meter.spent[::2], session.meter.spent[1::2]
    full = max(cond)
    assert cond == [full] * STEPS
    saved = {round(full - cost) for cost in uncond[1:]}
    assert saved == {LAYERS * self_attention_flops(2)}
    with opened(pipe, "diffusers.pab_branchwise", spatial=2, cross=1, early=1000, late=0) as session:
        session(PROMPTS, seed=SEEDS, **CALL)
        cond, uncond = session.meter.spent[::2], session.meter.spent[1::2]
    assert cond == uncond
    assert cond[2:] == [full, full - LAYERS * self_attention_flops(2)] * (STEPS // 2 - 1)


def test_the_branchwise_caches_stay_nearer_to_the_exact_run(pipe, exact):
    for name in ("diffusers.pab", "diffusers.faster_cache"):
        shares, errors = [], []
        for variant in (name, f"{name}_branchwise"):
            with opened(pipe, variant) as session:
                out = session(PROMPTS, seed=SEEDS, **CALL)
            shares.append(out.receipt.flops)
            errors.append(float((latents(out) - latents(exact)).norm()))
        assert shares[0] == pytest.approx(shares[1], rel=0.06)
        assert errors[1] < 0.5 * errors[0]


# -- the session ----------------------------------------------------------------------------------------------------


def test_another_number_of_steps_is_refused(pipe):
    with (
        opened(pipe, "diffusers.pab") as session,
        pytest.raises(ConfigError, match="was set up for 8 steps; open another session for 9"),
    ):
        session("x", num_inference_steps=9, **CALL)


def test_steps_among_the_settings_win(pipe):
    with peer_session(pipe, get("diffusers.pab"), 50, {"steps": 3}) as session:
        assert session("x", **CALL).receipt.nfe == 6


def test_peers_within_the_blocks_refuse_compiled_blocks(pipe):
    with pytest.raises(ConfigError, match="works inside the blocks"):
        peer_session(pipe, get("diffusers.taylorseer"), STEPS, compile_backend="eager")


def test_a_peer_over_compiled_blocks_is_counted_alike(pipe):
    receipts, settings = [], {"threshold": 0.5, "ratios": (1.0,) * 4, "max_skip": 1}
    for backend in (None, "eager"):
        with peer_session(pipe, get("diffusers.mag_cache"), 4, settings, compile_backend=backend) as session:
            session(PROMPTS, seed=SEEDS, **CALL)
            receipts.append(session(PROMPTS, seed=SEEDS, **CALL).receipt)
    assert receipts[0].counts == receipts[1].counts


def test_a_failed_installation_leaves_nothing_behind(pipe, monkeypatch):
    before = fingerprint(pipe)
    peer = get("diffusers.pab")
    install = type(peer).install

    def half(self, pipeline, steps, **settings):
        install(self, pipeline, steps, **settings)
        raise RuntimeError("half way")

    monkeypatch.setattr(type(peer), "install", half)
    with pytest.raises(RuntimeError, match="half way"):
        peer_session(pipe, peer, STEPS)
    assert differences(before, fingerprint(pipe)) == ""
    with Session(pipe, Plan()) as session:
        assert session("x", num_inference_steps=2, **CALL).receipt.completed


def test_one_session_at_a_time_and_closing_twice_is_harmless(pipe):
    session = opened(pipe, "diffusers.mag_cache")
    with pytest.raises(SessionError):
        opened(pipe, "diffusers.pab")
    session.close()
    session.close()
    with contextlib.suppress(SessionError), session:
        pass


def test_without_counters_the_clip_is_the_same(pipe):
    settings = STRONG["diffusers.mag_cache"]
    outs = []
    for counters in (True, False):
        with peer_session(pipe, get("diffusers.mag_cache"), STEPS, settings, counters=counters) as session:
            outs.append(session(PROMPTS, seed=SEEDS, **CALL))
    assert torch.equal(latents(outs[0]), latents(outs[1]))
    assert outs[1].receipt.flops == 0
    assert not outs[1].receipt.warnings


def test_mag_cache_calibrates_itself_on_both_branches(pipe):
    before = fingerprint(pipe)
    ratios = calibrate(pipe, STEPS, prompt=PROMPTS, seed=SEEDS, **CALL)
    assert differences(before, fingerprint(pipe)) == ""
    assert len(ratios) == STEPS
    assert ratios[0] == 1.0
    one = calibrate(pipe, STEPS, prompt=PROMPTS, seed=SEEDS, **CALL | {"guidance_scale": 1.0})
    assert ratios != one  # the unconditional branch has its part
    with peer_session(pipe, get("diffusers.mag_cache"), STEPS, call=CALL) as session:
        assert len(session.settings["ratios"]) == STEPS
        again = session.settings["ratios"]
    with peer_session(pipe, get("diffusers.mag_cache"), STEPS, call=CALL) as session:
        assert session.settings["ratios"] is again
    with pytest.raises(ConfigError, match="one ratio for each of 8 steps and has 3"):
        opened(pipe, "diffusers.mag_cache", ratios=(1.0, 1.0, 1.0))


# -- the embedded model ---------------------------------------------------------------------------------------------


@functools.cache
def embedded():
    return vivace.load("tiny")


@pytest.mark.parametrize(
    ("name", "settings"),
    [("diffusers.taylorseer", {"interval": 2, "start": 5}), ("diffusers.sea_cache", {"threshold": 0.3})],
)
def test_it_acts_on_the_embedded_model(name, settings):
    pipe, prompt = embedded(), "a small red sphere rolls to the left"
    call = {"num_frames": 9, "height": 64, "width": 64, "output_type": "latent"}
    with Session(pipe, Plan()) as session:
        exact = session(prompt, seed=4, num_inference_steps=12, **call)
    before = fingerprint(pipe)
    with peer_session(pipe, get(name), 12, settings) as session:
        out = session(prompt, seed=4, **call)
    error = (latents(out) - latents(exact)).norm() / latents(exact).norm()
    assert 0 < error < 0.5
    assert out.receipt.compute_share < 0.85
    assert out.receipt.flops_dense == exact.receipt.flops
    assert differences(before, fingerprint(pipe)) == ""


# -- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["sageattention.int8", "fastvideo.vsa", "fastvideo.sta", "torchao.float8_dynamic"]
)
def test_gpu_peers_act_on_the_embedded_model(name):
    peer = get(name)
    if reason := peer.missing():
        pytest.skip(reason)
    pipe = vivace.load("tiny", device="cuda")
    prompt, call = "a small red sphere rolls to the left", {"output_type": "latent"}
    with Session(pipe, Plan()) as session:
        exact = session(prompt, seed=4, num_inference_steps=10, **call)
    before = fingerprint(pipe)
    whole = {"fastvideo.vsa": {"keep": 1.0}, "fastvideo.sta": {"window": 4}}
    for settings, bound in ((whole.get(name, {}), 0.1), ({}, 1.5)):
        with peer_session(pipe, peer, 10, settings) as session:
            out = session(prompt, seed=4, **call)
        assert peer.acted(out.receipt)
        assert 0 < (latents(out) - latents(exact)).norm() / latents(exact).norm() < bound
    if name.startswith("fastvideo"):
        assert out.receipt.compute_share < 0.75
    assert differences(before, fingerprint(pipe)) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 2, 3])
def test_windowed_tiles_equal_masked_attention(window):
    from vivace.core.shapes import TokenGrid
    from vivace.evaluation.peers.fastvideo import TOKENS, WindowedTiles, tile_order, window_map

    if reason := get("fastvideo.sta").missing():
        pytest.skip(reason)
    grid = TokenGrid(8, 16, 16)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, grid.video, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = WindowedTiles(lambda: grid, lambda: None, window)(q, k, v)
    tile = torch.empty(grid.video, dtype=torch.long)
    tile[torch.from_numpy(tile_order(grid))] = torch.arange(grid.video) // TOKENS
    seen = torch.from_numpy(window_map(grid, window))[tile][:, tile].cuda()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.float().transpose(1, 2) for x in (q, k, v)), attn_mask=seen
    ).transpose(1, 2)
    assert (out.float() - wanted).abs().max() < 2e-2
