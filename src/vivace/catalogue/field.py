"""The field's methods: read from `data/*.yaml`, checked against each other, found by name, family or words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import ValidationError

from vivace.catalogue.schema import Family, Method, key
from vivace.core.errors import ConfigError, UnknownNameError

FILES = ("distillation", "attention", "compression", "cache_and_trajectory")
"""One file for each family, in the survey's order."""


@cache
def families() -> tuple[Family, ...]:
    """The survey's paradigms with their branches, in its order."""
    return tuple(Family.model_validate(item) for item in _read("taxonomy"))


@cache
def methods() -> tuple[Method, ...]:
    """All methods, by family, main branch, year and name.

    Raises:
        ConfigError: the data are inconsistent; the sentence names the method.
    """
    found: list[Method] = []
    for file in FILES:
        for item in _read(file):
            try:
                found.append(Method.model_validate(item))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "entry"
                raise ConfigError(
                    f"the catalogue's method {item.get('name', '?')} is wrong at {where}: {first['msg']}; "
                    f"mend data/{file}.yaml."
                ) from error
    _check(found)
    order = [s.id for f in families() for s in f.subs]
    return tuple(sorted(found, key=lambda m: (order.index(m.sub[0]), m.year, m.name)))


def method(name: str) -> Method:
    """One method by slug, title or alias; case and punctuation do not matter.

    Raises:
        UnknownNameError: no method is called so; the sentence offers the nearest.
    """
    found = _by_key().get(key(name))
    if found is None:
        raise UnknownNameError(
            "method",
            name,
            (m.name for m in methods()),
            "`vivace methods` lists all, `--search` looks inside.",
        )
    return found


def methods_of(technique: str) -> tuple[Method, ...]:
    """The published methods that one of our techniques implements."""
    return tuple(m for m in methods() if m.technique == technique)


def related(found: Method) -> tuple[Method, ...]:
    """Methods that it names and methods that name it."""
    names = dict.fromkeys(found.related)
    names.update(dict.fromkeys(m.name for m in methods() if found.name in m.related))
    return tuple(method(n) for n in names)


def family(found: Method) -> Family:
    """The paradigm of a method."""
    return next(f for f in families() if f.letter == found.letter)


def branch(sub: str) -> str:
    """A branch in words, e.g. `B1 Static sparse`."""
    return next(f"{s.id} {s.title}" for f in families() for s in f.subs if s.id == sub)


def search(text: str, among: Iterable[Method] | None = None) -> tuple[Method, ...]:
    """Methods that contain every word of `text`; those with a word in their name come first."""
    words = text.lower().split()
    if not words:
        return tuple(methods() if among is None else among)
    hits, texts = [], _texts()
    for place, found in enumerate(methods() if among is None else among):
        names = " ".join(found.names).lower() + " " + " ".join(map(key, found.names))
        if all(w in names or w in texts[found.name] for w in words):
            hits.append((-sum(w in names for w in words), place, found))
    return tuple(found for *_, found in sorted(hits, key=lambda h: h[:2]))


def select(
    *,
    family: str | None = None,
    status: str | None = None,
    training: str | None = None,
    base: str | None = None,
    text: str = "",
) -> tuple[Method, ...]:
    """Methods that pass all filters; None passes everything.

    Args:
        family: a paradigm, its letter, a branch or its id (`efficient attention`, `B`, `static`, `B1`).
        status: implemented, peer, planned or out of scope.
        training: none, calibration, light or full.
        base: part of a base model's name.
        text: words that must all occur.

    Raises:
        UnknownNameError: a filter names what the catalogue does not know.
    """
    found: Sequence[Method] = methods()
    if family is not None:
        subs = _branches(family)
        found = [m for m in found if subs & set(m.sub)]
    if status is not None:
        known = {m.status for m in methods()}
        wanted = next((s for s in known if key(s) == key(status)), None)
        if wanted is None:
            raise UnknownNameError("status", status, known)
        found = [m for m in found if m.status == wanted]
    if training is not None:
        known = {m.training for m in methods()}
        if training.lower() not in known:
            raise UnknownNameError("training", training, known)
        found = [m for m in found if m.training == training.lower()]
    if base is not None:
        if not any(key(base) in key(b) for m in methods() for b in m.bases):
            raise UnknownNameError("base model", base, {b for m in methods() for b in m.bases})
        found = [m for m in found if any(key(base) in key(b) for b in m.bases)]
    return search(text, found)


def _branches(name: str) -> set[str]:
    wanted, tree = key(name), families()
    exact = {s.id for f in tree for s in f.subs if wanted in (key(s.id), key(s.title), *map(key, s.aka))}
    whole = {s.id for f in tree for s in f.subs if wanted in (key(f.letter), key(f.name))}
    part = {
        s.id
        for f in tree
        for s in f.subs
        if wanted and (wanted in key(f.name) or any(wanted in key(n) for n in (s.title, *s.aka)))
    }
    found = exact or whole or part
    if not found:
        known = {n.lower() for f in tree for n in (f.name, *(w for s in f.subs for w in (s.title, *s.aka)))}
        raise UnknownNameError("family", name, known, "an id such as B1 names a branch as well.")
    return found


@cache
def _by_key() -> dict[str, Method]:
    return {key(n): m for m in methods() for n in m.names}


@cache
def _texts() -> dict[str, str]:
    return {m.name: _text(m) for m in methods()}


def _text(found: Method) -> str:
    claims = " ".join(f"{c.text} {c.metric} {c.hardware} {c.against}" for c in found.claims)
    parts = (
        found.gist,
        found.idea,
        *found.bases,
        found.arxiv,
        found.technique,
        *(p.name for p in found.peers),
    )
    return " ".join((*parts, *(branch(s) for s in found.sub), claims)).lower()


def _check(found: Sequence[Method]) -> None:
    """Names must be unique, and what points to another entry must find it."""
    owner: dict[str, str] = {}
    ids = {s.id for f in families() for s in f.subs}
    names = {m.name for m in found}
    for m in found:
        for k in {key(n) for n in m.names}:
            if owner.setdefault(k, m.name) != m.name:
                raise ConfigError(
                    f"the catalogue's methods {owner[k]} and {m.name} share a name; rename one."
                )
        if wrong := [s for s in m.sub if s not in ids] + [r for r in m.related if r not in names]:
            raise ConfigError(
                f"the catalogue's method {m.name} points to {', '.join(wrong)}, which is not there."
            )


def _read(name: str) -> list[dict[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = (files("vivace.catalogue") / "data" / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=loader)
