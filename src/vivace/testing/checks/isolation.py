"""What a technique must not touch: other pipelines, the process, its own settings, the caller's tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from vivace.testing.case import Case, check, expect
from vivace.testing.fingerprints import differences, digest, fingerprint, generators, process_settings
from vivace.testing.subjects import OTHER_PROMPT


@check
def check_siblings_are_untouched(case: Case) -> None:
    """A second pipeline of the same classes gives the exact run while the technique is in force on the first."""
    subject, sibling = case.subject(), case.subject()
    exact = digest(sibling.glance())
    before = fingerprint(sibling.pipeline)
    with subject.open(case.main) as session:
        subject.generate(session)
        expect(digest(sibling.glance()) == exact, "a second pipeline gives something else during the session")
    changed = differences(before, fingerprint(sibling.pipeline))
    expect(not changed, f"a second pipeline changed: {changed}")


@check
def check_process_is_untouched(case: Case) -> None:
    """Classes, module-level functions and settings of the process stay as they are, also during the session."""
    subject = case.subject()
    subject.glance()
    settings = process_settings()
    with subject.open(case.main) as session:
        subject.generate(session)
        changed = case.world.changes() or differences(settings, process_settings())
        expect(not changed, f"during the session: {changed}")
    changed = case.world.changes() or differences(settings, process_settings())
    expect(not changed, f"after the session: {changed}")


@check
def check_global_randomness_is_untouched(case: Case) -> None:
    """No global random generator is consumed, and none decides the output."""
    subject = case.subject()
    outputs = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = generators()
            outputs.append(subject.run(case.main).latents)
            changed = differences(before, generators())
        expect(not changed, f"{changed}: draw from generators of your own")
    expect(outputs[0].equal(outputs[1]), "the output depends on the global random generator")


@check
def check_technique_stays_as_it_is(case: Case) -> None:
    """Running changes neither the settings object nor anything on its class: what is remembered lives in the store."""
    cls = case.technique
    subject = case.subject()

    def look() -> tuple[Any, ...]:
        own = {k: v for k, v in vars(cls).items() if not k.startswith("__")}
        content = {k: repr(v) for k, v in own.items() if isinstance(v, (dict, list, set, bytearray))}
        fields = {f.name: getattr(case.main, f.name) for f in dataclasses.fields(case.main)}
        return {k: id(v) for k, v in own.items()}, content, fields, dict(getattr(case.main, "__dict__", {}))

    case.main.to_dict()
    before = look()
    subject.run(case.main, prompt=OTHER_PROMPT, seed=1234)
    expect(look()[:2] == before[:2], "running changes attributes of the technique's class")
    expect(look()[2:] == before[2:], "running changes the technique object")


@check
def check_inputs_are_not_edited(case: Case) -> None:
    """No tensor that a block or the transformer is given is changed in place, nor one it has handed back."""
    subject = case.subject()
    edited: set[str] = set()

    def watch(module: Any, where: str) -> None:
        old = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            copies = [t.clone() for t in given]
            out = old(*args, **kwargs)
            if not all(torch.equal(t, c) for t, c in zip(given, copies, strict=True)):
                edited.add(where)
            return out

        vars(module)["forward"] = forward

    for technique in case.variants().values():
        with subject.open(technique) as session:
            modules = {e.name: e.module for e in subject.experts}
            modules |= {b.site: b.module for e in subject.experts for b in e.blocks}
            saved = {name: vars(m).get("forward") for name, m in modules.items()}
            for name, module in modules.items():
                watch(module, name)
            try:
                subject.generate(session)
            finally:
                for name, module in modules.items():
                    vars(module).pop("forward")
                    if saved[name] is not None:
                        vars(module)["forward"] = saved[name]
        expect(not edited, f"inputs are edited in place at {', '.join(sorted(edited))}")
