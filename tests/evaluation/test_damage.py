"""A damaged clip is ranked worse by the right metric, and the cards are right about what a metric does not see.

The clips are real renders of the world. Which metric is the right one:

- freeze, stutter: the share of duplicate frames; freeze also dynamic degree.
- flicker: the second difference of the brightness.        - blur: sharpness.
- colour shift: a constant tint leaves no trace in a clip by itself, so it takes a pair: PSNR to the exact clip.
  A tint that grows is seen alone: colour drift.
- shuffle: warp error, the difference that motion does not explain.
- reversal, wrong motion, wrong colour, another prompt's clip: every frame is a good one, so only what the prompt says
  can tell: attribute accuracy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from vivace.core.errors import ConfigError
from vivace.evaluation.damage import DAMAGES
from vivace.evaluation.metrics.attributes import Attributes
from vivace.evaluation.metrics.base import Context, Metric
from vivace.evaluation.metrics.drift import Drift
from vivace.evaluation.metrics.dynamic_degree import DynamicDegree
from vivace.evaluation.metrics.flicker import Flicker
from vivace.evaluation.metrics.frozen import Frozen
from vivace.evaluation.metrics.psnr import Psnr
from vivace.evaluation.metrics.sharpness import Sharpness
from vivace.evaluation.metrics.ssim import Ssim
from vivace.evaluation.metrics.subject_consistency import SubjectConsistency
from vivace.evaluation.metrics.vbench_like import VBenchLike, VBenchLikeSubject
from vivace.evaluation.metrics.warp_error import WarpError
from vivace.world import Attributes as WorldAttributes
from vivace.world import Scene, caption, parse_prompt, render, sample_scenes
from vivace.world.splits import VALIDATION

DIRECTED = {"slide_left": 3, "slide_right": 3, "approach": 1, "recede": 1}
"""How many clips there are of each motion: those that have a direction, so that there is one to get wrong."""
FRAMES = 29
SHORT = (6, 15)
"""Clips and frames for all metrics but the verifier, which wants the whole clip."""
DEEP = (3, 11)
"""The same for metrics with a large network."""

Measure = Callable[[type[Metric], str, str], np.ndarray]


@pytest.fixture(scope="module")
def scenes() -> tuple[torch.Tensor, tuple[str, ...]]:
    """Clips uint8 (8, 29, 128, 128, 3) and their prompts, which state everything."""
    left, found = dict(DIRECTED), []
    for scene in sample_scenes(VALIDATION[:200]):
        motion = scene.attributes.motion
        if left.get(str(motion), 0):
            left[str(motion)] -= 1
            found.append(scene)
    video = render(found, frames=FRAMES, height=128, width=128, supersample=1).video
    assert len(video) == sum(DIRECTED.values())
    return video, tuple(in_words(s) for s in found)


def in_words(scene: Scene) -> str:
    """A caption of the scene that leaves nothing out that the damages touch."""
    captions = (caption(scene.attributes, seed) for seed in range(1000))
    return next(text for text in captions if states_all(parse_prompt(text)))


def states_all(said: WorldAttributes) -> bool:
    return None not in (said.motion, said.camera, said.floor) and all(spec.colour for spec in said.objects)


@pytest.fixture(scope="module")
def measure(scenes) -> Measure:
    """(metric, series, damage) -> one value a clip; every pair of metric and damage is measured once."""
    video, prompts = scenes
    known: dict[tuple[str, str], dict[str, list[float]]] = {}
    made: dict[str, Metric] = {}

    def values(cls: type[Metric], series: str, damage: str = "") -> np.ndarray:
        metric = made.setdefault(cls.card.name, cls())
        if why := metric.missing():
            pytest.skip(why)
        clips, texts = video, prompts
        if cls is not Attributes:
            count, frames = DEEP if metric.card.backbone else SHORT
            clips, texts = video[:count, :frames], prompts[:count]
        key = (cls.card.name, damage)
        if key not in known:
            known[key] = metric.measure(DAMAGES[damage](clips) if damage else clips, Context(prompts=texts))
        return np.array(known[key][series])

    return values


def is_worse(clean: np.ndarray, damaged: np.ndarray, sign: float) -> bool:
    """Whether the damaged clips lie on the worse side, by a one-sided sign test of pairs at 5 %."""
    difference = (damaged - clean) * sign
    worse, moved = int((difference > 0.0).sum()), int((difference != 0.0).sum())
    return moved > 0 and float(stats.binomtest(worse, moved, alternative="greater").pvalue) < 0.05


RIGHT = [
    # damage, metric, series, the worse side
    ("freeze", Frozen, "frozen", +1),
    ("freeze", DynamicDegree, "flow_magnitude", -1),
    ("freeze", Attributes, "attribute_motion", -1),
    ("stutter", Frozen, "duplicates", +1),
    ("flicker", Flicker, "flicker", +1),
    ("blur", Sharpness, "sharpness", -1),
    ("noise", Sharpness, "sharpness", +1),
    ("colour_drift", Drift, "colour_drift", +1),
    ("shuffle", WarpError, "warp_error", +1),
    ("warp_jitter", WarpError, "warp_error", +1),
    ("reverse", Attributes, "attributes", -1),
    ("wrong_motion", Attributes, "attributes", -1),
    ("there_and_back", Attributes, "attributes", -1),
    ("wrong_colour", Attributes, "attribute_colour", -1),
    ("wrong_clip", Attributes, "attributes", -1),
]


@pytest.mark.parametrize(("damage", "metric", "series", "sign"), RIGHT)
def test_the_right_metric_ranks_damaged_clips_worse(
    measure: Measure, damage: str, metric: type[Metric], series: str, sign: float
) -> None:
    assert is_worse(measure(metric, series, ""), measure(metric, series, damage), sign)


@pytest.mark.parametrize("damage", ["colour_shift", "blur", "noise", "shuffle"])
def test_pairs_rank_it_by_strength(scenes, damage: str) -> None:
    """Against the exact clip: PSNR sees a constant tint, which no metric of one clip can; more damage scores lower."""
    exact = scenes[0][:3, ::4]
    full = DAMAGES[damage].strength
    kinds = [exact, *(DAMAGES[damage](exact, full * part) for part in (0.4, 1.0))]
    for metric, series in ((Psnr(), "psnr"), (Ssim(), "ssim")):
        rows = [metric.measure(clips, Context(reference=exact))[series] for clips in kinds]
        assert all(a > b > c for a, b, c in zip(*rows, strict=True)), (series, rows)


def test_the_verifier_is_right_on_what_is_not_damaged(measure: Measure) -> None:
    assert measure(Attributes, "attributes", "").mean() > 0.97


# -- what the cards say -------------------------------------------------------------------------------------------

# Metric, series that the card's `sees` and `blind_to` speak of, worse side (0: either), and the share of the clean
# value that counts as seen; of the duplicates, of which clean clips have none, the share of the frames.
CARDS = [
    (Attributes, "attributes", -1, 0.05),
    (DynamicDegree, "flow_magnitude", 0, 0.10),
    (WarpError, "warp_error", +1, 0.25),
    (Flicker, "flicker", +1, 1.0),
    (Frozen, "duplicates", +1, 0.10),
    (Sharpness, "sharpness", 0, 0.10),
    (Drift, "colour_drift", +1, 0.25),
    (SubjectConsistency, "subject_consistency", -1, 0.01),
    (VBenchLike, "like_temporal_flickering", -1, 0.01),
]


@pytest.mark.parametrize(("metric", "series", "sign", "seen"), CARDS)
def test_cards_name_what_is_seen_and_what_is_not(
    measure: Measure, metric: type[Metric], series: str, sign: float, seen: float
) -> None:
    clean = measure(metric, series, "").mean()
    scale = clean if metric is not Frozen else 1.0
    changes = {
        damage: (measure(metric, series, damage).mean() - clean) / scale
        for damage in (*metric.card.sees, *metric.card.blind_to)
    }
    worse = {name: abs(change) if sign == 0 else change * sign for name, change in changes.items()}
    assert {name for name, change in worse.items() if change > seen} == set(metric.card.sees), changes


def test_freezing_improves_every_consistency_score(measure: Measure) -> None:
    for metric, series in (
        (SubjectConsistency, "subject_consistency"),
        (VBenchLike, "like_temporal_flickering"),
        (VBenchLike, "like_motion_smoothness"),
        (Flicker, "vbench_flicker"),
    ):
        frozen = measure(metric, series, "freeze")
        assert (frozen > measure(metric, series, "")).all()
        assert frozen == pytest.approx(1.0, abs=1e-6)
    assert (measure(WarpError, "warp_error", "freeze") < 1e-4).all()


def test_the_same_formula_has_the_same_card(measure: Measure) -> None:
    one, two = SubjectConsistency.card, VBenchLikeSubject.card
    assert (one.sees, one.blind_to) == (two.sees, two.blind_to)
    own = measure(VBenchLikeSubject, "like_subject_consistency", "")
    assert np.array_equal(own, measure(SubjectConsistency, "subject_consistency", ""))


def test_blur_and_stutter_improve_them_too(measure: Measure) -> None:
    for damage in ("blur", "stutter"):
        assert measure(WarpError, "warp_error", damage).mean() < measure(WarpError, "warp_error", "").mean()
        clean = measure(VBenchLike, "like_temporal_flickering", "").mean()
        assert measure(VBenchLike, "like_temporal_flickering", damage).mean() > clean


# -- the damages themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(DAMAGES))
def test_every_damage_keeps_shape_type_and_the_original(name: str) -> None:
    clips = torch.randint(0, 256, (2, 9, 24, 32, 3), generator=torch.Generator().manual_seed(1)).byte()
    before = clips.clone()
    damaged = DAMAGES[name](clips)
    assert damaged.shape == clips.shape
    assert damaged.dtype == torch.uint8
    assert torch.equal(clips, before)
    assert not torch.equal(damaged, clips)
    assert torch.equal(DAMAGES[name](clips), damaged)
    as_float = DAMAGES[name](clips.float() / 255.0)
    assert as_float.min() >= 0.0
    assert as_float.max() <= 1.0
    assert (as_float * 255.0 - damaged.float()).abs().max() <= 0.51
    if name != "wrong_clip":
        assert torch.equal(DAMAGES[name](clips[1:]), damaged[1:])


def test_damages_do_what_they_say() -> None:
    clip = torch.arange(8, dtype=torch.uint8).reshape(1, 8, 1, 1, 1).expand(1, 8, 4, 4, 3)

    def order(name: str, strength: float | None = None) -> list[int]:
        return DAMAGES[name](clip, strength)[0, :, 0, 0, 0].tolist()

    assert order("freeze") == [0] * 8
    assert order("freeze", 0.5) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert order("stutter") == [0, 0, 2, 2, 4, 4, 6, 6]
    assert order("stutter", 3) == [0, 0, 0, 3, 3, 3, 6, 6]
    assert order("reverse") == [7, 6, 5, 4, 3, 2, 1, 0]
    assert sorted(order("shuffle")) == list(range(8))
    assert order("shuffle", 0.0) == list(range(8))
    back = order("there_and_back")
    assert (back[0], max(back), back[-1]) == (0, 7, 0)
    red = torch.tensor([200, 10, 30], dtype=torch.uint8).expand(1, 1, 2, 2, 3)
    assert DAMAGES["wrong_colour"](red)[0, 0, 0, 0].tolist() == [30, 200, 10]
    grey = torch.full((1, 2, 2, 2, 3), 100, dtype=torch.uint8)
    assert torch.equal(DAMAGES["wrong_colour"](grey), grey)
    assert DAMAGES["flicker"](grey)[0, :, 0, 0, 0].tolist() == [108, 92]
    assert DAMAGES["colour_drift"](grey)[0, :, 0, 0].tolist() == [[100, 100, 100], [130, 100, 70]]


def test_strength_shape_and_type_are_checked() -> None:
    clip = torch.zeros(1, 2, 4, 4, 3)
    with pytest.raises(ConfigError, match="share of the clip"):
        DAMAGES["freeze"](clip, 1.5)
    with pytest.raises(ConfigError, match=r"\(B, T, H, W, 3\)"):
        DAMAGES["blur"](clip[0])
    with pytest.raises(ConfigError, match="int64"):
        DAMAGES["blur"](clip.long())
