"""`vivace encode`: training data from the world, from videos and from a teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vivace.evaluation.video import write_mp4
from vivace.training.data.shards import HEAD, LatentShards
from vivace.training.data.sources import WorldSource

SIZE = ("--size", "5", "32", "32", "--device", "cpu", "--dtype", "fp32")


def test_clips_of_the_world(vivace, here: Path) -> None:
    run = vivace("encode", "--out", "new/data", "--count", "3", *SIZE)
    assert run.code == 0, run.err
    data = LatentShards.open(here / "new" / "data")
    assert (len(data), data.fields, data.head.kind) == (3, ("latents", "mask", "text"), "world")
    for words in ("48 x 2 x 4 x 4", "KiB", "for 3 samples", "new/data", data.hash):
        assert words in run.out.replace("\N{NO-BREAK SPACE}", " ")
    assert "3/3" in run.err
    again = vivace("encode", "--out", "new/data", "--count", "3", *SIZE)
    assert (again.code, "all was there already" in again.out) == (0, True)
    other = vivace("encode", "--out", "new/data", "--count", "3", *SIZE, "--seed", "1")
    assert (other.code, "made with settings seed 0 and not 1" in other.sentence) == (2, True)


def test_an_interrupted_command_goes_on(vivace, here: Path, monkeypatch) -> None:
    arguments = ("encode", "--from", "world", "--out", "data", "--count", "3", "--shard", "1", *SIZE)
    portion, asked = WorldSource.portion, []

    def stop_at(place):
        def stopped(self, start, stop):
            asked.append(start)
            if start == place:
                raise KeyboardInterrupt
            return portion(self, start, stop)

        monkeypatch.setattr(WorldSource, "portion", stopped)

    stop_at(0)
    early = vivace(*arguments)
    assert early.code == 130
    assert "unfinished files were removed." in early.err
    assert not list(here.iterdir())
    stop_at(2)
    cut = vivace(*arguments)
    assert cut.code == 130
    assert "2 of 3 samples are kept in data: the same command goes on behind them." in cut.err
    assert not list((here / "data").glob("*.partial"))
    asked.clear()
    stop_at(None)
    done = vivace(*arguments)
    assert (done.code, asked) == (0, [2])
    assert len(LatentShards.open(here / "data")) == 3


def test_videos_of_a_folder(vivace, folder: Path, here: Path) -> None:
    (here / "in").mkdir()
    write_mp4(here / "in" / "a.mp4", np.full((8, 48, 64, 3), 90, np.uint8), 8)
    write_mp4(here / "in" / "b.mp4", np.full((2, 48, 64, 3), 90, np.uint8), 8)
    for name in ("a", "b"):
        (here / "in" / f"{name}.txt").write_text("a grey wall")
    arguments = ("encode", "--from", "videos", "in", "-m", str(folder), "-o", "data", *SIZE)
    run = vivace(*arguments, "--fps", "8")
    assert run.code == 0, run.err
    assert "left out: in/b.mp4 is too short" in run.err
    data = LatentShards.open(here / "data")
    assert (len(data), data.fields, data.head.settings["fps"]) == (1, ("latents", "text"), 8.0)
    more = vivace(*arguments, "--fps", "8", "--count", "2")
    assert (more.code, "2 clips are asked for and 1 videos can be used" in more.err) == (2, True)


def test_pairs_of_a_teacher(vivace, folder: Path, here: Path) -> None:
    (here / "p.txt").write_text("a red ball\n\ntwo cones\n")
    run = vivace(
        *("encode", "--from", "teacher", "-m", str(folder), "--prompts", "p.txt", "--out", "pairs"),
        *("--steps", "3", "--guidance", "2", "--states", "1", "--seed", "5", *SIZE),
    )
    assert run.code == 0, run.err
    data = LatentShards.open(here / "pairs")
    assert (len(data), data.fields) == (2, ("latents", "noise", "text", "trajectory"))
    said = json.loads((here / "pairs" / HEAD).read_text())["settings"]
    assert (said["steps"], said["guidance"], said["seed"], len(said["sigmas"])) == (3, 2.0, 5, 1)


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (("--from", "videos"), "--from videos needs the folder"),
        (("--from", "videos", "none"), "there is no folder none"),
        (("videos",), "is for --from videos only"),
        (("--prompts", "p.txt"), "--prompts is for --from teacher only"),
        (("--guidance", "2"), "--guidance is for --from teacher only"),
        (("--fps", "8"), "--fps is for --from videos only"),
        (("--from", "teacher", "--prompts", "none.txt"), "none.txt cannot be read"),
        (("--from", "teacher", "--states", "3", "--steps", "3"), "3 states cannot be kept of 3 steps"),
        (("--size", "6", "32", "32"), "frames must be"),
        (("--model", "nobody"), "no model is called 'nobody'"),
        (("--device", "cuda:99"), "there is no GPU"),
        (("--from", "dreams"), "is not one of"),
    ],
)
def test_what_is_wrong_is_one_sentence(vivace, here: Path, arguments: tuple, phrase: str) -> None:
    run = vivace("encode", "--out", "data", *arguments)
    assert run.code == 2
    assert phrase in run.sentence
    assert not list(here.iterdir())


def test_the_help_tells_what_is_left_out(vivace) -> None:
    out = " ".join(vivace("encode", "--help").out.split())
    assert out.count("[default: the model's]") == 4
    assert "every prompt once, 256 of the world]" in out
