"""Documents tell the truth: their Python runs, their links and records exist, their commands parse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path):
    code = "\n".join(blocks(page, "python"))
    if not code:
        return
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_records_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    records = re.findall(r"`((?:benchmarks|docs|src|tests)/[\w./-]+\.\w+)`", text)
    missing = [name for name in links if not (page.parent / name).exists()]
    missing += [name for name in records if not (ROOT / name).exists()]
    assert not missing


def test_the_readmes_commands_are_there():
    commands = "\n".join(blocks(ROOT / "README.md", "sh"))
    for target in re.findall(r"^make (\w+)", commands, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    assert "make demo" in commands
    assert "make test" in commands


def test_every_test_folder_is_collected():
    configured = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in configured
    names = [p.name for p in (ROOT / "tests").rglob("*.py") if p.name.startswith("test")]
    assert all(name.startswith("test_") for name in names)


def test_the_protocol_page_names_every_metric_task_and_rule():
    from vivace.evaluation.metrics.base import registry
    from vivace.evaluation.task import names

    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    missing = [n for n in (*registry, *names()) if f"`{n}`" not in text]
    assert not missing
    assert [f"**{i}." in text for i in range(1, 15)] == [True] * 14
    assert not re.findall(r"%[A-Z]+%", text)
