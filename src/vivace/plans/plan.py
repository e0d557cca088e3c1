"""A plan: techniques and call settings as data, checked against a model before anything is loaded."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vivace.core.errors import ConfigError, PlanError, UnknownNameError
from vivace.models.adapter import ModelDescription, Need
from vivace.techniques.base import Problem, Technique, registry

VERSION = 1

_NEED_HELP = {
    Need.ORDERED_BLOCKS: "an ordered list of transformer blocks",
    Need.ATTENTION_SITES: "attention layers it can address",
    Need.TOKEN_GRID: "a token grid it can read",
    Need.LINEAR_SITES: "linear layers it can address",
    Need.GUIDANCE: "classifier-free guidance with two branches",
    Need.FLOW_SCHEDULER: "a flow-matching scheduler",
    Need.WHOLE_CLIP_DECODE: "a VAE that Vivace can decode in one pass",
}


@dataclass(frozen=True)
class Plan:
    """Techniques to apply, in no particular order: stages decide the order.

    Args:
        techniques: the techniques; none means the exact run.
        name: shown in receipts and reports.
        summary: one sentence for people.
        optional: names of techniques that are left out, with a warning, on a model that lacks what they need.
        unless: technique -> another one that takes its place: the first is left out where the other stays.
        beside: technique -> another one that it belongs to: the first is left out where the other is.
    """

    techniques: tuple[Technique, ...] = ()
    name: str = "custom"
    summary: str = field(default="", compare=False)
    optional: frozenset[str] = frozenset()
    unless: Mapping[str, str] = field(default_factory=dict, hash=False)
    beside: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __init__(
        self,
        techniques: Iterable[Technique] = (),
        name: str = "custom",
        summary: str = "",
        optional: Iterable[str] = (),
        unless: Mapping[str, str] | None = None,
        beside: Mapping[str, str] | None = None,
    ) -> None:
        items = tuple(techniques)
        if wrong := [t for t in items if not isinstance(t, Technique)]:
            raise ConfigError(f"a plan holds techniques, not {type(wrong[0]).__name__}.")
        object.__setattr__(self, "techniques", items)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "summary", summary)
        names = {t.card.name for t in items}
        object.__setattr__(self, "optional", frozenset(optional) & names)
        for relation, pairs in (("unless", unless), ("beside", beside)):
            kept = {a: b for a, b in dict(pairs or {}).items() if {a, b} <= names}
            object.__setattr__(self, relation, kept)

    def fitted(self, model: ModelDescription) -> Plan:
        """The plan without the optional techniques that the model cannot serve, their company, and idle stand-ins."""
        kept = [t for t in self.techniques if t.card.name not in self.optional or not self._needs(t, model)]
        for _ in self.beside:  # what is left out may have company itself
            names = {t.card.name for t in kept}
            kept = [t for t in kept if self.beside.get(t.card.name, t.card.name) in names]
        names = {t.card.name for t in kept}
        kept = [t for t in kept if self.unless.get(t.card.name) not in names]
        return replace(self, techniques=kept)

    def ordered(self) -> tuple[Technique, ...]:
        """Techniques in the order of application; ones that stand at identity are left out."""
        active = (t for t in self.techniques if not t.is_identity)
        return tuple(sorted(active, key=lambda t: (t.card.stage.number, t.within_stage, t.card.name)))

    # -- files ------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | Path) -> Plan:
        """A preset by name, or a YAML or JSON file by path.

        Raises:
            UnknownNameError: no preset and no file of that name.
            ConfigError: the file is damaged, or a setting in it is wrong.
        """
        text = str(source)
        if isinstance(source, str) and "/" not in text and not text.endswith((".yaml", ".yml", ".json")):
            presets = preset_names()
            if text not in presets:
                raise UnknownNameError("plan", text, presets, "A file needs its ending: .yaml or .json.")
            file = resources.files("vivace.plans").joinpath("presets", f"{text}.yaml")
            return cls.from_dict(_parse(file.read_text(encoding="utf-8"), text), default_name=text)
        path = Path(source)
        try:
            content = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the plan file {path} cannot be read: {error.strerror or error}.") from None
        return cls.from_dict(_parse(content, str(path)), default_name=path.stem)

    def save(self, path: str | Path) -> Path:
        """Write YAML (or JSON by the file's ending); `Plan.load` gives an equal plan back."""
        import json

        path, data = Path(path), self.to_dict()
        text = json.dumps(data, indent=2) if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
        path.write_text(text, encoding="utf-8")
        return path

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        items = []
        for technique in self.techniques:
            values = technique.to_dict()
            item = {"technique": values.pop("_type"), "version": values.pop("_version"), **values}
            if technique.card.name in self.optional:
                item["optional"] = True
            for relation, pairs in (("unless", self.unless), ("beside", self.beside)):
                if other := pairs.get(technique.card.name):
                    item[relation] = other
            items.append(item)
        return {"vivace_plan": VERSION, "name": self.name, "summary": self.summary, "techniques": items}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], default_name: str = "custom") -> Plan:
        """Inverse of `to_dict`.

        Raises:
            ConfigError, UnknownNameError: see `load`.
        """
        if not isinstance(data, Mapping) or "techniques" not in data:
            raise ConfigError(
                "a plan file has a list called 'techniques'; see `vivace plan show fast` for one."
            )
        if data.get("vivace_plan", VERSION) > VERSION:
            raise ConfigError(
                f"the plan has version {data['vivace_plan']}, this Vivace reads {VERSION}; update it."
            )
        techniques, optional = [], set()
        relations: dict[str, dict[str, str]] = {"unless": {}, "beside": {}}
        for item in data["techniques"] or ():
            item = {"technique": item} if isinstance(item, str) else dict(item)
            if "technique" not in item:
                raise ConfigError(
                    "every entry under 'techniques' names one: `- technique: first_block_cache`."
                )
            found = registry[item.pop("technique")]
            version = item.pop("version", found.version)
            if item.pop("optional", False):
                optional.add(found.card.name)
            for relation, pairs in relations.items():
                if other := item.pop(relation, ""):
                    pairs[found.card.name] = registry[other].card.name
            techniques.append(found.from_dict(item | {"_version": version}))
        return cls(techniques, data.get("name", default_name), data.get("summary", ""), optional, **relations)

    # -- checks -----------------------------------------------------------------------------------------------

    def problems(self, model: ModelDescription) -> list[Problem]:
        """Everything that speaks against running this plan on this model: errors and warnings, none left out."""
        items = self.fitted(model).ordered()
        found: list[Problem] = []
        for technique in self.ordered():
            why = "; ".join(p.message for p in self._needs(technique, model))
            # A stand-in that is not needed is no loss, and nothing is said of it.
            if why and technique not in items and technique.card.name in self.optional:
                found.append(technique.problem("left out", f"is left out: it {why}", "warning"))
        for name in sorted({t.card.name for t in items}):
            group = [t for t in items if t.card.name == name]
            if len(set(group)) < len(group) or not _disjoint(group, model):
                found.append(Problem(name, "duplicate", "is in the plan twice; keep one."))
        for technique in items:
            found += self._needs(technique, model)
        usable = [t for t in items if not any(p.technique == t.card.name and p.kind == "need" for p in found)]
        for i, technique in enumerate(usable):
            found += technique.check(model)
            found += technique.check_beside(model, (*usable[:i], *usable[i + 1 :]))
        for a, b in itertools.combinations(usable, 2):
            if a.card.name != b.card.name:
                found += _conflicts(a, b, model)
        found += self._pointless(usable, model)
        return found

    def check(self, model: ModelDescription) -> list[Problem]:
        """As `problems`; returns the warnings.

        Raises:
            PlanError: with all errors at once.
        """
        found = self.problems(model)
        if errors := [p for p in found if p.severity == "error"]:
            raise PlanError(errors)
        return found

    @staticmethod
    def _needs(technique: Technique, model: ModelDescription) -> list[Problem]:
        out = []
        if missing := [n for n in technique.card.needs if n not in model.offers]:
            wants = " and ".join(_NEED_HELP[n] for n in missing)
            why = (
                f"Vivace has no adapter for {model.experts[0].class_name if model.experts else model.pipeline_class}"
                if not model.family
                else f"{model.name} does not offer that"
            )
            out.append(technique.problem("need", f"needs {wants}, and {why}."))
        if why := technique.missing(model):
            out.append(technique.problem("need", why))
        missing_packages = (p for p in technique.card.packages if importlib.util.find_spec(p) is None)
        out += [
            technique.problem("package", f"needs the package {p}: pip install {p}") for p in missing_packages
        ]
        return out

    def steps(self, model: ModelDescription) -> int:
        """Number of solver steps this plan makes by default on a model."""
        settings = (getattr(t, "steps", None) for t in self.fitted(model).ordered())
        own = [s for s in settings if isinstance(s, int)]
        return own[-1] if own else int(model.defaults.get("num_inference_steps", 50))

    def _pointless(self, items: Iterable[Technique], model: ModelDescription) -> list[Problem]:
        steps = self.steps(model)
        out = []
        for technique in items:
            warmup = getattr(technique, "warmup", 0)
            if isinstance(warmup, int) and warmup >= steps:
                out.append(
                    technique.problem(
                        "pointless",
                        f"{warmup} warm-up steps of {steps}: it can never act; "
                        f"lower warmup below {steps} or leave it out.",
                    )
                )
        return out

    # -- words ------------------------------------------------------------------------------------------------

    def explain(self, model: ModelDescription | None = None) -> str:
        """The plan in words, in the order of application."""
        if not self.ordered():
            return f"{self.name}: the exact run, nothing changed."
        lines = [f"{self.name}: {self.summary}".rstrip(": ")]
        for t in self.ordered():
            settings = ", ".join(f"{k}={v}" for k, v in t.to_dict().items() if not k.startswith("_"))
            lines.append(f"  {t.card.stage.value:<14} {t.card.name} ({settings})")
            lines.append(f"  {'':<14} {t.card.summary} [{t.card.cite}]")
        if model is not None:
            lines += [f"  {p.severity}: {p}" for p in self.problems(model)] or ["  no problem found."]
        return "\n".join(lines)

    def diff(self, other: Plan) -> list[str]:
        """What changes from this plan to `other`, a line each; empty when both do the same."""
        mine = {t.card.name: t.to_dict() for t in self.ordered()}
        theirs = {t.card.name: t.to_dict() for t in other.ordered()}
        out = [f"- {n}" for n in mine if n not in theirs] + [f"+ {n}" for n in theirs if n not in mine]
        for name in mine:
            for key, value in mine[name].items():
                if name in theirs and theirs[name].get(key) != value:
                    out.append(f"~ {name}.{key}: {value} -> {theirs[name].get(key)}")
        return sorted(out, key=lambda line: line[2:])


def preset_names() -> list[str]:
    """Names of the presets that come with Vivace."""
    folder = resources.files("vivace.plans").joinpath("presets")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"the plan {where} is not valid YAML{line}; mend it and try again.") from None


def _disjoint(items: list[Technique], model: ModelDescription) -> bool:
    return not any(_overlaps(a, b, model) for a, b in itertools.combinations(items, 2))


def _overlaps(a: Technique, b: Technique, model: ModelDescription) -> dict[str, frozenset[str]]:
    both = itertools.product(a.claims(model), b.claims(model))
    return {x.resource: sites for x, y in both if (sites := x.conflicts(y))}


def _conflicts(a: Technique, b: Technique, model: ModelDescription) -> list[Problem]:
    out = []
    for resource, sites in _overlaps(a, b, model).items():
        where = "everywhere" if "*" in sites else f"at {len(sites)} sites, e.g. {min(sites)}"
        out.append(
            Problem(
                "",
                "conflict",
                f"{a.card.name} and {b.card.name} both own {resource} ({where}); keep one of them.",
            )
        )
    for x, y in ((a, b), (b, a)):
        if reason := x.card.unsound_with.get(y.card.name):
            out.append(Problem("", "unsound", f"{x.card.name} with {y.card.name}: {reason}"))
            break
    return out
