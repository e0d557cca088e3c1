"""Plans are data: they survive files, tell all problems at once, and know their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from vivace.core.errors import ConfigError, PlanError, UnknownNameError
from vivace.models.describe import describe_pipeline
from vivace.plans.plan import Plan, preset_names
from vivace.techniques.base import (
    Card,
    Cite,
    Need,
    Paradigm,
    Stage,
    Technique,
    exclusive,
    knob,
    registry,
    shared,
)
from vivace.testing.models import pipeline


def sample(name: str, stage: Stage, **changes) -> Card:
    facts = {
        "paradigm": Paradigm.CACHING,
        "summary": "For the test.",
        "objective": "latency",
        "claims": (exclusive("block.skip"),),
        "cite": Cite("none"),
    }
    return Card(name=name, stage=stage, **facts | changes)


@dataclass(frozen=True, kw_only=True)
class Early(Technique):
    card: ClassVar[Card] = sample("early", Stage.WEIGHTS, claims=(exclusive("linear.weight"),))
    blocks: tuple[int, ...] = (0, 1)
    strength: float = knob(0.5, low=0.0, high=1.0, identity=0.0)

    def claims(self, model):
        sites = frozenset(f"transformer.blocks.{i}" for i in self.blocks)
        return (exclusive("linear.weight", sites),)


@dataclass(frozen=True, kw_only=True)
class Late(Technique):
    card: ClassVar[Card] = sample("late", Stage.CACHE, needs=(Need.GUIDANCE,), packages=("no_such_package",))
    warmup: int = knob(60, low=0, high=99)

    def check(self, model):
        return [self.problem("odd", "does not like Tuesdays.")]


@dataclass(frozen=True, kw_only=True)
class Rival(Technique):
    card: ClassVar[Card] = sample(
        "rival", Stage.CACHE, unsound_with={"mild": "measured: it doubles the noise."}
    )


@dataclass(frozen=True, kw_only=True)
class Mild(Technique):
    card: ClassVar[Card] = sample("mild", Stage.TRAJECTORY, claims=(shared("block.skip"),))


@pytest.fixture(autouse=True)
def _registered():
    for cls in (Early, Late, Rival, Mild):
        registry.add(cls)
    yield
    for name in ("early", "late", "rival", "mild"):
        registry.remove(name)


@pytest.fixture(scope="module")
def model():
    return describe_pipeline(pipeline("wan2.1"))


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_round_trip(tmp_path, ending):
    plan = Plan([Late(warmup=3), Early(blocks=(1, 2))], name="mine", summary="Two things.")
    assert Plan.load(plan.save(tmp_path / f"plan.{ending}")) == plan


def test_order_is_by_stage_and_identity_is_left_out():
    plan = Plan([Mild(), Late(), Early()])
    assert [t.card.name for t in plan.ordered()] == ["early", "late", "mild"]
    assert [t.card.name for t in Plan([Early(strength=0.0), Mild()]).ordered()] == ["mild"]


def test_all_problems_at_once(model):
    with pytest.raises(PlanError) as error:
        Plan([Late(), Rival(), Mild()]).check(model)
    text = str(error.value)
    assert len(error.value.problems) >= 5
    for part in (
        "no_such_package",
        "Tuesdays",
        "late and rival both own block.skip",
        "60 warm-up steps of 50",
        "rival with mild: measured",
    ):
        assert part in text
    assert "\n" not in text


def test_conflicts_are_per_site_and_symmetric(model):
    apart = Plan([Early(blocks=(0,)), Early(blocks=(1,))])
    assert apart.problems(model) == []
    together = Plan([Early(blocks=(0, 1)), Early(blocks=(1,))])
    assert [p.kind for p in together.problems(model)] == ["duplicate"]
    a, b = Late(warmup=1), Rival()
    kinds = [sorted(p.kind for p in Plan(pair).problems(model)) for pair in ((a, b), (b, a))]
    assert kinds[0] == kinds[1]
    assert "conflict" in kinds[0]


def test_presets_load_and_exact_is_empty():
    assert "exact" in preset_names()
    assert Plan.load("exact").ordered() == ()
    for name in preset_names():
        assert Plan.load(name).name == name


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("techniques: [erly]", UnknownNameError, "did you mean early"),
        ("techniques: [{technique: early, strenght: 1}]", ConfigError, "no setting called strenght"),
        ("techniques: [{technique: early, strength: 7}]", ConfigError, "strength must be from 0.0 to 1.0"),
        ("techniques: [{strength: 0.1}]", ConfigError, "names one"),
        ("- early", ConfigError, "list called 'techniques'"),
        ("techniques: [", ConfigError, "not valid YAML in line"),
        ("vivace_plan: 9\ntechniques: []", ConfigError, "version 9"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, error, says):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(error, match=says) as caught:
        Plan.load(str(file))
    assert "\n" not in str(caught.value)


def test_missing_file_and_unknown_preset(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Plan.load(tmp_path / "none.yaml")
    with pytest.raises(UnknownNameError, match="did you mean exact"):
        Plan.load("exat")


def test_explain_and_diff(model):
    plan = Plan([Early()], name="a", summary="One thing.")
    assert "early (blocks=[0, 1], strength=0.5)" in plan.explain(model)
    assert "nothing changed" in Plan([], name="exact").explain()
    assert plan.diff(plan) == []
    other = Plan([Early(strength=0.7), Mild()])
    assert plan.diff(other) == ["~ early.strength: 0.5 -> 0.7", "+ mild"]


@dataclass(frozen=True, kw_only=True)
class Picky(Technique):
    """Serves a model that it was made for."""

    card: ClassVar[Card] = sample("picky", Stage.TRAJECTORY, claims=(exclusive("sampler.solver"),))
    made_for: str = ""

    def missing(self, model):
        return "" if self.made_for == model.name else "was made for another model."


@pytest.fixture
def picky():
    registry.add(Picky)
    yield
    registry.remove("picky")


STAND_IN = """
techniques:
  - {technique: picky, made_for: NAME, optional: true}
  - {technique: mild, unless: picky}
  - early
"""


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_stand_in_survives_a_file(tmp_path, ending, picky):
    source = tmp_path / "source.yaml"
    source.write_text(STAND_IN)
    plan = Plan.load(source)
    again = Plan.load(plan.save(tmp_path / f"plan.{ending}"))
    assert again == plan
    assert again.unless == {"mild": "picky"}
    assert again.optional == {"picky"}


def test_a_stand_in_stays_where_the_other_is_left_out(tmp_path, model, picky):
    source = tmp_path / "plan.yaml"
    source.write_text(STAND_IN)
    plan = Plan.load(source)
    assert [t.card.name for t in plan.fitted(model).techniques] == ["mild", "early"]
    (told,) = plan.check(model)
    assert (told.technique, told.severity) == ("picky", "warning")
    assert "left out" in told.message
    assert "made for another model" in told.message


def test_a_stand_in_goes_where_the_other_stays(tmp_path, model, picky):
    source = tmp_path / "plan.yaml"
    source.write_text(STAND_IN.replace("NAME", f"'{model.name}'"))
    plan = Plan.load(source)
    assert [t.card.name for t in plan.fitted(model).techniques] == ["picky", "early"]
    assert plan.check(model) == []


def test_a_stand_in_that_is_optional_too_goes_in_silence(model, picky):
    plan = Plan([Picky(made_for=model.name), Mild()], optional=("picky", "mild"), unless={"mild": "picky"})
    assert [t.card.name for t in plan.fitted(model).techniques] == ["picky"]
    assert plan.check(model) == []


def test_what_a_stand_in_stands_for_must_be_in_the_plan_to_matter(model):
    plan = Plan([Mild()], unless={"mild": "picky"})
    assert plan.unless == {}
    assert [t.card.name for t in plan.fitted(model).techniques] == ["mild"]


def test_company_goes_where_the_other_is_left_out(tmp_path, model, picky):
    source = tmp_path / "plan.yaml"
    lines = STAND_IN.replace("unless", "beside")
    for made_for, left in (("NAME", ["early"]), (f"'{model.name}'", ["picky", "mild", "early"])):
        source.write_text(lines.replace("NAME", made_for))
        plan = Plan.load(source)
        assert Plan.load(plan.save(tmp_path / "again.yaml")).beside == plan.beside == {"mild": "picky"}
        assert sorted(t.card.name for t in plan.fitted(model).techniques) == sorted(left)


def test_an_unknown_name_after_unless_is_refused(tmp_path):
    source = tmp_path / "plan.yaml"
    source.write_text("techniques: [{technique: mild, unless: erly}]")
    with pytest.raises(UnknownNameError, match="did you mean early"):
        Plan.load(source)


def test_only_techniques_go_into_a_plan():
    with pytest.raises(ConfigError, match="not str"):
        Plan(["early"])
