"""What a technique says about itself: card, configuration, knobs, refusals. Nothing here runs a model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

from vivace.core.errors import ConfigError, PlanError
from vivace.models.adapter import Need
from vivace.plans.plan import Plan
from vivace.techniques.base import Card, Claim, Mode, Paradigm, Problem, Stage, Technique
from vivace.testing.case import Case, ContractViolation, NotApplicable, check, expect
from vivace.testing.fingerprints import differences, fingerprint, generators, process_settings


@check
def check_card_is_complete(case: Case) -> None:
    """The card says what the method is, where it comes from and what it touches."""
    card = getattr(case.technique, "card", None)
    if not isinstance(card, Card):
        raise ContractViolation("has no Card; give the class a `card`")
    expect(re.fullmatch(r"[a-z][a-z0-9_]*", card.name), f"the name {card.name!r} is not in snake_case")
    expect(
        isinstance(card.paradigm, Paradigm), f"paradigm {card.paradigm!r} is none of the survey's families"
    )
    expect(isinstance(card.stage, Stage), f"stage {card.stage!r} is no Stage")
    expect(card.claims, "claims nothing: a technique that changes nothing is none")
    expect(all(isinstance(c, Claim) for c in card.claims), "the claims are no Claims")
    for field in ("summary", "objective"):
        expect(getattr(card, field).strip(), f"the card's {field} is empty")
    expect(card.cite.title.strip(), "the card cites nothing")
    expect(all(isinstance(n, Need) for n in card.needs), "the needs are no Needs")
    expect(all(r.strip() for r in card.unsound_with.values()), "an unsound pair has no reason")
    expect(card.fidelity is None or card.fidelity > 0.0, "a declared fidelity is a positive bound")
    expect((case.technique.__doc__ or "").strip(), "the class has no docstring")
    expect(isinstance(case.technique.version, int), "the version is no integer")


@check
def check_config_is_data(case: Case) -> None:
    """Settings are frozen, hashable, plain, and come back from JSON equal."""
    parameters: Any = getattr(case.technique, "__dataclass_params__", None)
    expect(parameters is not None and parameters.frozen, "is no frozen dataclass")
    case.main.to_dict()  # raises with a sentence when a value is no plain data
    for label, technique in {**case.variants(), **case.identities()}.items():
        names = [f.name for f in dataclasses.fields(technique)]
        for name in names or ["anything"]:
            try:
                setattr(technique, name, None)
            except dataclasses.FrozenInstanceError:
                continue
            raise ContractViolation(f"{name} can be assigned after construction")
        data = json.loads(json.dumps(technique.to_dict()))
        expect(
            {"_type", "_version", *names} == set(data), f"{label}: to_dict does not hold exactly the fields"
        )
        again = case.technique.from_dict(data)
        expect(again == technique, f"{label}: does not come back from JSON equal")
        expect(hash(again) == hash(technique), f"{label}: equal settings have different hashes")


@check
def check_knobs_have_ranges(case: Case) -> None:
    """Defaults and identity values lie in their ranges; values outside are refused with a sentence."""
    for field, knob in case.technique.knobs().items():
        values = {"value of the example": getattr(case.main, field)}
        if knob.has_identity:
            values["identity"] = knob.identity
        for label, value in values.items():
            expect(
                knob.complaint(value) is None, f"the {label} of {field}, {value!r}, is out of its own range"
            )
        for end in knob.ends:
            expect(knob.complaint(end) is None, f"the end {end!r} of {field} is out of its own range")
        wrong: list[Any] = ["no such choice"] if knob.choices else []
        if knob.low is not None:
            wrong.append(knob.low - 1)
        if knob.high is not None:
            wrong.append(knob.high + 1)
        if wrong and not knob.choices:
            wrong.append(math.nan)
        for value in wrong:
            _refused(case.main, field, value)
        if knob.monotone:
            counts = ("nfe", "blocks_run", "attention_pairs", "flops")
            expect(knob.monotone in counts, f"{field} is monotone in {knob.monotone!r}, which is no count")
    try:
        case.technique.from_dict(case.main.to_dict() | {"no_such_setting": 1})
    except ConfigError:
        return
    raise ContractViolation("a setting it does not have is accepted from a file")


def _refused(technique: Technique, field: str, value: Any) -> None:
    try:
        technique.replace(**{field: value})
    except ConfigError as error:
        expect(field in str(error), f"the refusal of {field}={value!r} does not name the field: {error}")
        return
    raise ContractViolation(f"{field}={value!r} is out of range and accepted")


@check
def check_construction_does_nothing(case: Case) -> None:
    """Building settings stores exactly the fields, and changes neither a model nor the process."""
    subject = case.subject()
    before, settings, state = fingerprint(subject.pipeline), case.world.settings, generators()
    for label, technique in case.variants().items():
        names = {f.name for f in dataclasses.fields(technique)}
        extra = set(getattr(technique, "__dict__", {})) - names
        expect(not extra, f"{label}: construction stores {', '.join(sorted(extra))} beside the fields")
    again = case.technique.from_dict(case.main.to_dict())
    expect(again == case.main, "construction changes the values it is given")
    changed = differences(before, fingerprint(subject.pipeline)) or case.world.changes()
    changed = changed or differences(settings, process_settings()) or differences(state, generators())
    expect(not changed, f"construction has side effects: {changed}")


@check
def check_questions_are_pure(case: Case) -> None:
    """`check`, `claims` and `estimate` need a description only, and give the same answer twice."""
    subject = case.subject()
    base, workload = subject.base_estimate(), subject.workload()
    before = fingerprint(subject.pipeline)
    for label, technique in case.variants().items():
        answers = [
            (technique.check(subject.model), technique.claims(subject.model),
             technique.estimate(subject.model, workload, base))
            for _ in range(2)
        ]  # fmt: skip
        expect(answers[0] == answers[1], f"{label}: two equal questions get different answers")
        problems, claims, _ = answers[0]
        expect(
            all(isinstance(p, Problem) for p in problems),
            f"{label}: check gives something else than Problems",
        )
        expect(claims, f"{label}: claims nothing on this model")
        resources = {c.resource for c in case.technique.card.claims}
        extra = {c.resource for c in claims} - resources
        expect(not extra, f"{label}: claims {', '.join(sorted(extra))}, which the card does not")
    changed = differences(before, fingerprint(subject.pipeline))
    expect(not changed, f"asking changed the pipeline: {changed}")


@check
def check_refusals_are_symmetric(case: Case) -> None:
    """A plan with a rival is refused in both orders alike, from the description, before anything is touched."""
    rival = _rival(case)
    orders = ([case.main, rival], [rival, case.main])
    refusals = [sorted(str(p) for p in Plan(o).problems(case.model) if p.kind == "conflict") for o in orders]
    expect(refusals[0] == refusals[1], "a conflict depends on the order of the plan")
    exclusive = [c for c in case.main.claims(case.model) if c.mode is Mode.EXCLUSIVE]
    expect(bool(refusals[0]) == bool(exclusive), "an exclusive claim of its own is not defended")
    doubled = Plan([case.main, case.main]).problems(case.model)
    expect(any(p.kind == "duplicate" for p in doubled), "the same technique twice is not refused")
    if case.technique.card.needs:
        bare = dataclasses.replace(case.model, offers=frozenset())
        unmet = [p for p in Plan([case.main]).problems(bare) if p.kind == "need"]
        expect(unmet and unmet[0].severity == "error", "a model without what it needs is not refused")
    subject = case.subject()
    before = fingerprint(subject.pipeline)
    try:
        subject.open(case.main, case.main).close()
    except PlanError:
        changed = differences(before, fingerprint(subject.pipeline))
        expect(not changed, f"a refused plan changed the pipeline: {changed}")
        return
    raise NotApplicable("the plan of two of these is not refused on the pipeline")


def _rival(case: Case) -> Technique:
    """A technique that wants for itself everything the case's technique claims."""
    claims = tuple(dataclasses.replace(c, mode=Mode.EXCLUSIVE) for c in case.technique.card.claims)
    card = dataclasses.replace(
        case.technique.card, name="contract_rival", claims=claims, needs=(), packages=()
    )

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Rival(Technique):
        """Never applied."""

    Rival.card = card
    return Rival()
