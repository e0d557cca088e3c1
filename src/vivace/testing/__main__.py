"""`python -m vivace.testing [NAME ...]`: the contract's table for registered techniques; exit code 1 on a failure."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vivace.core.errors import VivaceError


def main(names: Sequence[str]) -> int:
    """Check the named techniques (all by default) and print the table, with a sentence for each failure."""
    from rich.console import Console

    from vivace.techniques.base import registry
    from vivace.testing.contract import check_technique, table

    console = Console()
    if {"-h", "--help"} & set(names):
        console.print("usage: python -m vivace.testing [TECHNIQUE ...]", markup=False)
        return 0
    try:
        chosen = [registry[n] for n in names] or [registry[n] for n in registry]
    except VivaceError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    reports = []
    for technique in chosen:
        with console.status(f"checking {technique.card.name}"):
            reports.append(check_technique(technique))
    console.print(table(reports))
    for report in reports:
        for failure in report.failures:
            console.print(f"{report.technique}: {failure.check}: {failure.message}", markup=False)
    return 0 if all(r.ok for r in reports) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
