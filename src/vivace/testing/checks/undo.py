"""What remains when a technique is gone: nothing, whatever happened in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from vivace.core.surgery import Surgery
from vivace.testing.case import Case, ContractViolation, check, expect
from vivace.testing.fingerprints import differences, digest, fingerprint
from vivace.testing.subjects import Subject

MAX_FAILURES = 12
"""Edits of one technique at which a failure is injected: all when there are so few, else spread evenly."""


class Injected(RuntimeError):
    """The failure that the suite injects."""


def expect_exact(subject: Subject, before: dict[str, Any], when: str, case: Case) -> None:
    """The pipeline is bit for bit what it was, its classes too, and its output is the exact run's."""
    changed = differences(before, fingerprint(subject.pipeline)) or case.world.changes()
    expect(not changed, f"{when}: {changed}")
    same = digest(subject.glance()) == digest(case.subject().glance())
    expect(same, f"{when}: the pipeline's output is not the exact run's any more")


@check
def check_undo_is_exact(case: Case) -> None:
    """After the session: same weights, structure, classes and output, with counters and without."""
    subject = case.subject()
    subject.glance()
    before = fingerprint(subject.pipeline)
    for i, (label, technique) in enumerate(case.variants().items()):
        for counters in (True, False) if i == 0 else (True,):
            # The counters' own wrappers can hide what a technique leaves behind.
            subject.run(technique, counters=counters)
            changed = differences(before, fingerprint(subject.pipeline)) or case.world.changes()
            expect(not changed, f"{label}, counters {'on' if counters else 'off'}: {changed}")
    expect_exact(subject, before, "after the last session", case)


@check
def check_failed_apply_leaves_nothing(case: Case) -> None:
    """A failure at any edit of `apply` comes through, and leaves the pipeline untouched."""
    subject = case.subject()
    subject.glance()
    before = fingerprint(subject.pipeline)
    with _counted_edits(case.name, fail_at=None) as count, subject.open(case.main):
        total = count()
    expect(total, "apply makes no edit")
    step = max(1, -(-total // MAX_FAILURES))
    for at in sorted({1, total, *range(1, total + 1, step)}):
        try:
            with _counted_edits(case.name, fail_at=at):
                subject.open(case.main).close()
        except Injected:
            changed = differences(before, fingerprint(subject.pipeline)) or case.world.changes()
            expect(not changed, f"after a failure at edit {at} of {total}: {changed}")
        else:
            raise ContractViolation(f"a failure at edit {at} of {total} is swallowed")
    expect_exact(subject, before, "after failures in apply", case)


@contextmanager
def _counted_edits(owner: str, fail_at: int | None) -> Iterator[Callable[[], int]]:
    """Count the edits that `owner` makes, and let the one numbered `fail_at` (from 1) fail."""
    made = 0
    original = Surgery._add

    def add(ledger: Surgery, obj: Any, name: str, layer: Any) -> None:
        nonlocal made
        if layer.owner == owner:
            made += 1
            if made == fail_at:
                raise Injected(f"edit {made}")
        original(ledger, obj, name, layer)

    with mock.patch.object(Surgery, "_add", add):
        yield lambda: made


class _Foreign:
    """Somebody else's wrapper around a module's forward, put in and taken out in the usual impolite way."""

    def __init__(self, module: Any) -> None:
        self.module, self.found, self.calls = module, module.forward, 0
        self.was_own = "forward" in vars(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.found(*args, **kwargs)

        vars(module)["forward"] = forward

    def remove(self) -> None:
        if self.was_own:
            vars(self.module)["forward"] = self.found
        else:
            vars(self.module).pop("forward", None)


def _victims(subject: Subject) -> dict[str, Any]:
    """Modules where techniques like to wrap: the transformer, its first block, the last attention."""
    expert = subject.experts[0]
    places = {"the transformer": expert.module}
    places |= {b.site: b.module for b in expert.blocks[:1]}
    return places | {a.site: a.module for a in expert.attentions[-1:]}


@check
def check_foreign_hooks_survive(case: Case) -> None:
    """Somebody else's wrapper keeps working whether it came before or after ours, and leaves before or after us."""
    exact = case.subject().glance()
    for order in ("before us, gone after us", "after us, gone after us", "after us, gone before us"):
        subject = case.subject()
        victims = _victims(subject)
        foreign = {p: _Foreign(v) for p, v in victims.items()} if order.startswith("before") else {}
        session = subject.open(case.main)
        foreign = foreign or {p: _Foreign(v) for p, v in victims.items()}
        subject.generate(session)
        if order.endswith("gone before us"):
            for wrapper in foreign.values():
                wrapper.remove()
            subject.generate(session)
            session.close()
        else:
            session.close()
            calls = {path: wrapper.calls for path, wrapper in foreign.items()}
            same = exact.equal(subject.glance())
            lost = [path for path, w in foreign.items() if w.calls == calls[path]]
            expect(not lost, f"a wrapper put in {order} is lost at {', '.join(lost)}")
            expect(same, f"with wrappers put in {order}, our part still acts after the session")
            for wrapper in foreign.values():
                wrapper.remove()
        expect(exact.equal(subject.glance()), f"the output is not exact after wrappers {order}")


@check
def check_library_hooks_survive(case: Case) -> None:
    """A hook of diffusers' own registry, put in before or during the session, keeps working and can be removed."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Counting(ModelHook):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    for when in ("before", "during"):
        subject = case.subject()
        exact, block = subject.glance(), subject.experts[0].blocks[0].module
        hook = Counting()
        if when == "before":
            HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, "contract")
        with subject.open(case.main) as session:
            if when == "during":
                HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, "contract")
            subject.generate(session)
        called = hook.calls
        expect(
            exact.equal(subject.glance()),
            f"with a diffusers hook put in {when} the session, our part still acts",
        )
        expect(hook.calls > called, f"a diffusers hook put in {when} the session is lost")
        HookRegistry.check_if_exists_or_initialize(block).remove_hook("contract")
        expect(
            exact.equal(subject.glance()),
            f"not exact after a diffusers hook put in {when} the session is removed",
        )
