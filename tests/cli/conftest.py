"""A real pipeline in a folder, and the command line run in process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from vivace.cli.main import main
from vivace.testing.models import pipeline


@dataclass(frozen=True)
class Ran:
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line on stderr; fails when there are more."""
        (line,) = self.err.strip().splitlines()
        assert line.startswith("error: ")
        assert "Traceback" not in self.err
        return line


@pytest.fixture
def vivace(capsys, monkeypatch, tmp_path):
    """Runs a command line in an empty folder: `vivace("plan", "list")`."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Ran:
        code = main(arguments)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def here() -> Path:
    """The folder the command line runs in."""
    return Path.cwd()


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tiny Wan 2.1 pipeline with random weights, saved in diffusers' layout."""
    target = tmp_path_factory.mktemp("models") / "small-wan"
    pipeline("wan2.1").save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def small(folder) -> tuple[str, ...]:
    """Options that choose that pipeline and a clip it makes in a moment."""
    return ("--model", str(folder), "--frames", "9", "--height", "32", "--width", "32")
