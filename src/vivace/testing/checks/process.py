"""A saved plan in another process gives the same bits."""

from __future__ import annotations

import sys

from vivace.testing.case import Case, NotApplicable, check, expect
from vivace.testing.fingerprints import digest
from vivace.testing.fresh import worker
from vivace.testing.subjects import plan_of


@check
def check_saved_plan_in_a_fresh_process(case: Case) -> None:
    """A plan written to a file, read by another process and run there, gives bit-equal latents and equal counts."""
    cls = case.technique
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
        raise NotApplicable("the class cannot be imported by another process")
    here = case.alone(case.main)
    plan = plan_of(case.main, name="contract").save(case.workdir / "plan.yaml")
    there = worker().ask(
        path=sys.path,
        module=cls.__module__,
        name=cls.__qualname__,
        plan=str(plan),
        family=case.family,
        call=case.call,
    )
    expect("error" not in there, f"fails in a fresh process: {there.get('error')}")
    expect(there["latents"] == digest(here.latents), "another process gives other latents")
    expect(there["counts"] == here.receipt.counts, "another process counts other work")
