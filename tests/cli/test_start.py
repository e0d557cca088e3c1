"""The command line starts at once, imports nothing heavy for it, and says what it can do."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

import vivace as package
from vivace.cli.shared.screen import fancy

HEAVY = ("torch", "diffusers", "transformers", "av")


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["plan", "list"], ["methods"]])
def test_nothing_heavy_is_imported(arguments):
    code = f"""
import sys
from vivace.cli.main import main
assert main({arguments}) == 0
print("heavy:", [m for m in {HEAVY} if m in sys.modules])
"""
    assert _python(code).splitlines()[-1] == "heavy: []"


def test_help_is_quick():
    """Processor time, which a busy machine does not stretch; showing a help text waits for nothing."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        before = spent()
        subprocess.run([sys.executable, "-m", "vivace", "--help"], capture_output=True, check=True)
        times.append(spent() - before)
    assert min(times) < 0.5


def test_help_names_every_command(vivace):
    ran = vivace("--help")
    assert ran.code == 0
    for command in ("generate", "compare", "plan", "methods", "doctor", "encode"):
        assert command in ran.out


def test_version(vivace):
    assert vivace("--version").out.strip() == f"vivace {package.__version__}"


def test_no_arguments_show_help(vivace):
    assert "Usage" in vivace().out


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m vivace methods | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_terminal_without_unicode_gets_words():
    done = subprocess.run(
        [sys.executable, "-m", "vivace", "methods", "show", "first_block_cache"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert not fancy("ascii")
    assert fancy("utf-8")
