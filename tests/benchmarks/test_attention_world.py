"""The contenders of `attention_world.py` can run on the embedded model, and none of the methods is forgotten."""

from __future__ import annotations

import sys

import pytest
from small_store import FOLDER, script

from vivace.evaluation.contender import Contender, parse
from vivace.evaluation.subject import Subject
from vivace.evaluation.task import Task
from vivace.techniques.base import Paradigm, registry

world = script("attention_world")


@pytest.fixture
def contenders(tmp_path, monkeypatch) -> dict[str, list[Contender]]:
    # Plans name their mask files from the root.
    monkeypatch.chdir(FOLDER.parent)
    world.save(tmp_path)
    return {part: [parse(s) for s in world.specs([part], [], tmp_path)] for part in ("curves", "composition")}


def test_all_can_run_and_none_decides_for_a_batch(contenders):
    model = Subject(Task.load("world-short@1")).description
    everyone = [c for found in contenders.values() for c in found]
    assert {c.name: why for c in everyone if (why := c.refuse(model))} == {}
    assert not any(c.batch_coupled for c in everyone)
    assert len({c.name for c in everyone}) == len(everyone)


def test_every_attention_method_has_a_curve(contenders):
    methods = {n for n in registry if registry[n].card.paradigm is Paradigm.ATTENTION}
    # Recorders watch exact runs for a search and change nothing.
    methods -= {n for n in methods if registry[n].card.lossless}
    settings: dict[str, int] = {}
    for contender in contenders["curves"]:
        for technique in contender.plan.techniques:
            settings[technique.card.name] = settings.get(technique.card.name, 0) + 1
    assert methods <= set(settings)
    single = {"attention_backend", "sage_attention", "sla"}
    assert {n for n in methods - single if settings[n] < 3} == set()


def test_parts_and_combinations_are_complete(contenders):
    names = [c.name for c in contenders["composition"]]
    assert {part for name in names for part in name.split("+")} <= set(names)
    pairs = [n for n in names if n.count("+") == 1]
    for name in names:
        parts = name.split("+")
        if len(parts) == 3:  # for the third order
            wanted = [{a, b} for a in parts for b in parts if a < b]
            assert all(any(set(p.split("+")) == w for p in pairs) for w in wanted), name


def test_low_bit_attention_beside_a_sparse_method_is_its_precision():
    both = {t.card.name: t for t in world.plan_of("pisa+first-block-cache+int8-attention").techniques}
    assert set(both) == {"pisa", "first_block_cache"}
    assert both["pisa"].precision == "int8"
    assert [t.card.name for t in world.plan_of("int8-attention").techniques] == ["sage_attention"]
    assert world.plan_of("pisa+int8-linear").techniques[0].precision == "full"


def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["attention_world.py", "--out", str(tmp_path), "--only", "nobody"])
    with pytest.raises(SystemExit) as stop:
        world.main()
    assert stop.value.code == 2
    assert "no contender's name holds nobody" in capsys.readouterr().err
