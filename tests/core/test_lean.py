"""Importing is free, the public names are listed, and nobody edits models behind the ledger's back."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vivace

SOURCES = sorted(Path(vivace.__file__).parent.rglob("*.py"))


def test_public_names_are_sorted_and_there():
    assert list(vivace.__all__) == sorted(vivace.__all__)
    assert dir(vivace) == vivace.__all__
    for name in vivace.__all__:
        assert getattr(vivace, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vivace.nonsense  # noqa: B018


def test_import_loads_no_torch():
    code = "import sys, vivace, vivace.core.config, vivace.core.surgery; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(SOURCES[0].parent)))
def test_only_the_ledger_edits_other_objects(path):
    """No assignment to `.forward`, to an attribute of a class object, or to a module's function, outside the ledger."""
    if path.parts[-2:] == ("core", "surgery.py"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [a for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    modules = {a.asname or a.name.partition(".")[0] for a in imports}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if not isinstance(target, ast.Attribute):
                continue
            where = f"{path.name}:{target.lineno}"
            assert target.attr not in ("forward", "__class__", "processor"), f"{where} assigns .{target.attr}"
            owner = target.value
            assert not (isinstance(owner, ast.Attribute) and owner.attr == "__class__"), (
                f"{where} edits a class"
            )
            assert not (isinstance(owner, ast.Name) and owner.id in modules), f"{where} edits a module"


def test_no_file_is_too_long():
    assert not {p.name: n for p in SOURCES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 800}
