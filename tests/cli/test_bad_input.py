"""Bad input: exit code 2, one sentence that says what to do, no traceback, and nothing left behind."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest

from vivace.core.context import Clock

PROMPT = "a red sphere"


@pytest.mark.parametrize("command", ["generate", "compare"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan", "fsat"], "no plan is called 'fsat'; did you mean fast?"),
        (["--plan", "gone.yaml"], "the plan file gone.yaml cannot be read"),
        (["--model", "tinny"], "no model is called 'tinny'; did you mean tiny?"),
        (["--model", "./nowhere"], "nowhere is no folder"),
        (["--frames", "10"], "nearest to 10: 9 or 13"),
        (["--height", "40"], "height must be a multiple of 16 (nearest to 40: 32 or 48)"),
        (["--width", "0"], "width must be a multiple of 16"),
        (["--frames", "-3"], "frames must be 4k+1"),
        (["--steps", "0"], "'--steps'"),
        (["--steps", "many"], "'--steps'"),
        (["--seed", "-1"], "'--seed'"),
        (["--fps", "0"], "'--fps'"),
        (["--dtype", "fp8"], "'--dtype'"),
        (["--device", "cuda:9"], "there is no GPU 'cuda:9' here"),
        (["--device", "abacus"], "'abacus' is no device"),
        (["--threads", "0"], "'--threads'"),
        (["--nonsense"], "no such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(vivace, here, small, command, arguments, words):
    ran = vivace(command, PROMPT, *small, *arguments)
    assert ran.code == 2
    assert words in ran.sentence
    assert not list(here.iterdir())


@pytest.mark.parametrize("prompt", ["", "   "])
def test_empty_prompt(vivace, small, prompt):
    assert "the prompt is empty" in vivace("generate", prompt, *small).sentence


def test_no_prompt(vivace):
    assert "missing argument 'prompt'; see `vivace generate --help`" in vivace("generate").sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generat"], "did you mean 'generate'"),
        (["plan", "shwo"], "did you mean 'show'"),
        (["plan", "show", "fasst"], "did you mean fast?"),
        (["plan", "diff", "fast", "nearexact"], "did you mean near-exact"),
        (["methods", "show", "frist_block_cache"], "did you mean"),
        (["plan", "check", "fast", "--model", "missing/folder/of/mine"], "is no folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_names(vivace, arguments, words):
    ran = vivace(*arguments)
    assert ran.code == 2
    assert words in ran.sentence.replace("Did", "did")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("techniques: [first_block_cash]", "did you mean first_block_cache?"),
        ("techniques: [{technique: few_steps, step: 3}]", "few_steps has no setting called step"),
        ("techniques: [{technique: few_steps, steps: 0}]", "steps must be from 1 to 100, not 0"),
        ("techniques: [", "is not valid YAML in line 1"),
        ("just words", "a plan file has a list called 'techniques'"),
        (
            "techniques: [{technique: few_steps, steps: 3}, {technique: few_steps, steps: 4}, "
            "{technique: solver, solver: sde-dpm++2m}]",
            "the plan has 2 problems: ",
        ),
    ],
)
def test_plan_files(vivace, here, small, text, words):
    (here / "wrong.yaml").write_text(text, encoding="utf-8")
    ran = vivace("generate", PROMPT, *small, "--plan", "wrong.yaml")
    assert ran.code == 2
    assert words in ran.sentence
    assert [p.name for p in here.iterdir()] == ["wrong.yaml"]


# -- the model ----------------------------------------------------------------------------------------------------


def test_damaged_weights_are_named(vivace, here, folder, small, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (weights,) = (broken / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    ran = vivace("generate", PROMPT, *small, "--model", str(broken))
    assert ran.code == 2
    assert str(weights) in ran.sentence
    assert not list(here.iterdir())


def test_missing_configuration_is_named(vivace, folder, small, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model_index.json").unlink()
    assert (
        "model_index.json is missing" in vivace("generate", PROMPT, *small, "--model", str(broken)).sentence
    )


def test_hub_id_without_network(tmp_path):
    closed = "http://127.0.0.1:9"
    env = os.environ | {"HF_ENDPOINT": closed, "HF_HOME": str(tmp_path), "HTTP_PROXY": "", "HTTPS_PROXY": ""}
    done = subprocess.run(
        [sys.executable, "-m", "vivace", "generate", PROMPT, "--model", "nobody/nothing"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


# -- the output ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_run(monkeypatch):
    """The long run must not start: what is wrong with the output is found before."""

    def refuse(*_):
        raise AssertionError("the model was loaded before the output was checked")

    monkeypatch.setattr("vivace.cli.shared.run.load", refuse)


@pytest.mark.usefixtures("no_run")
class TestOutputIsCheckedFirst:
    def test_other_ending(self, vivace, small):
        assert "ends in .mp4" in vivace("generate", PROMPT, *small, "-o", "clip.gif").sentence

    def test_a_folder(self, vivace, here, small):
        (here / "clip.mp4").mkdir()
        assert "is a folder" in vivace("generate", PROMPT, *small, "-o", "clip.mp4").sentence

    @pytest.mark.parametrize("command", ["generate", "compare"])
    def test_below_a_file(self, vivace, here, small, command):
        (here / "file").write_text("mine")
        ran = vivace(command, PROMPT, *small, "-o", "file/new/clip.mp4")
        assert ran.code == 2
        assert "choose another folder" in ran.sentence
        assert (here / "file").read_text() == "mine"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_forbidden_folder(self, vivace, here, small):
        (here / "closed").mkdir(mode=0o500)
        assert "permission denied" in vivace("generate", PROMPT, *small, "-o", "closed/clip.mp4").sentence

    @pytest.mark.parametrize("command", ["generate", "compare"])
    def test_no_space(self, vivace, here, small, monkeypatch, command):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
        ran = vivace(command, PROMPT, *small, "-o", "new/clip.mp4")
        assert ran.code == 2
        assert "only 1,000 B are free" in ran.sentence.replace("\N{NO-BREAK SPACE}", " ")
        assert not list(here.iterdir())


def test_the_disk_fills_up_while_writing(small, tmp_path):
    """A real failed write: the system refuses files above a size."""

    def tiny_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))

    done = subprocess.run(
        [sys.executable, "-m", "vivace", "generate", PROMPT, *small, "--steps", "1", "-o", "new/clip.mp4"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=tiny_files,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


# -- interrupts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_interrupted_run_leaves_nothing(small, tmp_path, number, code):
    kept = tmp_path / "both" / "exact.mp4"
    kept.parent.mkdir()
    kept.write_bytes(b"of an earlier run")
    process = subprocess.Popen(
        [sys.executable, "-m", "vivace", "compare", PROMPT, *small, "--exact-steps", "100000", "-o", "both"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    until = time.monotonic() + 120
    # The hidden files appear just before the model is loaded.
    while not list(kept.parent.glob(".partial-*")) and time.monotonic() < until:
        time.sleep(0.05)
    assert list(kept.parent.glob(".partial-*"))
    time.sleep(1.0)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert [p.name for p in kept.parent.iterdir()] == ["exact.mp4"]
    assert kept.read_bytes() == b"of an earlier run"


def test_interrupt_in_the_middle_of_a_run(vivace, here, small, monkeypatch):
    """An interrupt between two steps of the solver, through the session and out of the command line."""
    advance = Clock.advance

    def interrupt_at_third(clock):
        if clock.step == 2:
            raise KeyboardInterrupt
        return advance(clock)

    monkeypatch.setattr(Clock, "advance", interrupt_at_third)
    ran = vivace("generate", PROMPT, *small, "-o", "new/clip.mp4")
    assert ran.code == 130
    assert ran.err.strip().splitlines()[-1] == "error: interrupted; unfinished files were removed."
    assert "stopped" in ran.err
    assert not list(here.iterdir())


def test_our_own_bugs_are_not_hidden(vivace, small, monkeypatch):
    def bug(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("vivace.cli.shared.run.load", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        vivace("generate", PROMPT, *small)
