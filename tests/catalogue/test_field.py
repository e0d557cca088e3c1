"""The catalogue of the field: complete, consistent, honest about its sources, and found by any of its names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from vivace import catalogue
from vivace.catalogue import field
from vivace.catalogue.schema import EVIDENCE, Method, key
from vivace.core.errors import ConfigError, UnknownNameError
from vivace.techniques.base import registry

NAMES = [
    line
    for line in (Path(__file__).parent / "names.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
METHODS = catalogue.methods()


def test_every_named_method_has_an_entry():
    assert len(NAMES) >= 180
    missing = []
    for name in NAMES:
        try:
            catalogue.method(name)
        except UnknownNameError:
            missing.append(name)
    assert missing == []


def test_there_are_many_and_every_branch_has_some():
    assert len(METHODS) >= 120
    used = {m.sub[0] for m in METHODS}
    assert used == {s.id for f in catalogue.families() for s in f.subs}
    assert [f.letter for f in catalogue.families()] == ["A", "B", "C", "D"]


def test_implemented_means_that_the_technique_is_there():
    implemented = {m.technique for m in METHODS if m.status == "implemented"}
    assert implemented == set(registry)
    for found in METHODS:
        assert set(found.works_with) <= set(registry), found.name


def test_peers_are_those_that_can_be_run():
    peers = pytest.importorskip("vivace.evaluation.peers.base")
    assert {p.name for m in METHODS for p in m.peers} == set(peers.names())


def test_claims_name_their_evidence_and_speed_ups_their_baseline():
    claims = [(m.name, c) for m in METHODS for c in m.claims]
    assert len(claims) >= 150
    for name, claim in claims:
        assert claim.evidence in EVIDENCE, name
        if " times" in claim.text and claim.evidence != "recall":
            assert claim.against, name
    known = [c for _, c in claims if c.against != "not stated"]
    assert len(known) / len(claims) > 0.6


def test_no_two_methods_share_a_name_and_links_hold():
    seen: dict[str, str] = {}
    for found in METHODS:
        for k in {key(n) for n in found.names}:
            assert seen.setdefault(k, found.name) == found.name
        assert found.name not in found.related
        assert {m.name for m in field.related(found)} >= set(found.related)


def test_prose_is_whole_sentences():
    for found in METHODS:
        assert found.idea.rstrip().endswith("."), found.name
        assert found.gist.endswith("."), found.name
        assert "  " not in found.idea, found.name


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("S²Q-VDiT", "s2q-vdit"),
        ("s2q vdit", "s2q-vdit"),
        ("Δ-DiT", "delta-dit"),
        ("Self-Forcing++", "self-forcing-plus"),
        ("self forcing", "self-forcing"),
        ("FirstBlockCache", "fbcache"),
        ("TEACACHE", "teacache"),
    ],
)
def test_names_are_found_however_they_are_written(name, slug):
    assert catalogue.method(name).name == slug


def test_unknown_names_are_told_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean teacache"):
        catalogue.method("teacach")


def test_filters():
    caching = {m.name for m in catalogue.select(family="caching")}
    assert {"teacache", "magcache", "chipmunk"} <= caching
    assert caching.isdisjoint({"unipc", "vsa"})
    assert caching == {m.name for m in METHODS if "D1" in m.sub}
    assert {m.letter for m in catalogue.select(family="step distillation") if m.sub[0][0] == "A"} == {"A"}
    assert {m.name for m in catalogue.select(family="b0")} == {"flashattention-2", "flashattention-3"}
    assert {m.status for m in catalogue.select(status="out-of-scope")} == {"out of scope"}
    assert all("Wan" in " ".join(m.bases) for m in catalogue.select(base="wan2.1"))
    both = catalogue.select(training="none", status="planned")
    assert both
    assert all(m.training == "none" and m.status == "planned" for m in both)


@pytest.mark.parametrize(
    "filters", [{"family": "x9"}, {"status": "done"}, {"training": "some"}, {"base": "sora99"}]
)
def test_unknown_filters_are_refused(filters):
    with pytest.raises(UnknownNameError):
        catalogue.select(**filters)


def test_search_wants_every_word_and_puts_names_first():
    hits = catalogue.search("consistency")
    assert "consistency" in hits[0].title.lower()
    assert {"lcm", "dcm"} <= {m.name for m in hits}
    assert [m.name for m in catalogue.search("2506.09045")] == ["magcache"]
    assert catalogue.search("taylor zebra") == ()
    assert catalogue.search("") == METHODS


def test_by_technique():
    assert {m.name for m in catalogue.methods_of("solver")} == {"unipc", "dpm-solver-plus-plus"}
    assert catalogue.methods_of("nothing") == ()


def good(**changes):
    return {
        "name": "some-method",
        "title": "Some method",
        "year": 2025,
        "sub": ["D1"],
        "objective": "per-step",
        "training": "none",
        "bases": ["Wan"],
        "evidence": "notes",
        "status": "planned",
        "reason": "soon",
        "gist": "It does something.",
        "idea": "It does something that takes at least sixty letters to say in words.",
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"status": "implemented"}, "a technique is named exactly"),
        ({"technique": "radial"}, "a technique is named exactly"),
        ({"status": "peer"}, "needs a peer"),
        ({"status": "out of scope", "reason": ""}, "needs a reason"),
        ({"arxiv": "25.1"}, "pattern"),
        ({"evidence": "hearsay"}, "evidence"),
        ({"speed": "fast"}, "speed"),
    ],
)
def test_the_schema_refuses(changes, complaint):
    assert Method.model_validate(good()).letter == "D"
    with pytest.raises(ValidationError, match=complaint):
        Method.model_validate(good(**changes))


@pytest.mark.parametrize(
    ("items", "complaint"),
    [
        ([good(), good(name="other", aliases=["Some Method"])], "share a name"),
        ([good(related=["nobody"])], "points to nobody"),
        ([good(sub=["D9"])], "points to D9"),
        ([good(year=1815)], "some-method is wrong at year"),
    ],
)
def test_inconsistent_data_are_named(monkeypatch, items, complaint):
    read = field._read
    monkeypatch.setattr(
        field, "_read", lambda n: read(n) if n == "taxonomy" else items if n == "attention" else []
    )
    field.methods.cache_clear()
    try:
        with pytest.raises(ConfigError, match=complaint):
            field.methods()
    finally:
        field.methods.cache_clear()


def test_data_files_hold_their_own_family():
    letters = dict(zip(field.FILES, "ABCD", strict=True))
    for name, letter in letters.items():
        path = Path(field.__file__).parent / "data" / f"{name}.yaml"
        items = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        assert {i["sub"][0][0] for i in items} == {letter}


def test_the_catalogue_needs_no_torch():
    code = (
        "import sys, vivace.catalogue as c; c.methods(); c.entries(); c.search('wan');"
        "import vivace.catalogue.page; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
