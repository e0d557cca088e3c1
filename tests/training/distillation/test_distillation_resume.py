"""A run that was interrupted and taken up in another process is the run that was not, bit for bit."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch
from distilling import HERE, distil, equal, finish, flat, start, trainer_of
from safetensors.torch import load_file

from vivace.core.errors import ConfigError, WeightsError
from vivace.models.student_artifact import metadata
from vivace.tiny.train.common import load_checkpoint
from vivace.training.distillation import watch
from vivace.training.distillation.trainer import DistillationTrainer

CASES = {
    "dmd2": {"settings": {"ratio": 2}},
    "meanflow": {},
    "lcm": {"lora": 2, "checkpointing": True},
}
KILLED = {"settings": {"ratio": 2}, "steps": 16}


def checkpoint(path):
    state = load_checkpoint(path, HERE)
    assert state is not None
    return state


def same_file(one, two):
    """Same tensors and same metadata, whatever their order."""
    return equal(load_file(one), load_file(two)) == "" and metadata(one) == metadata(two)


@pytest.fixture(scope="module")
def others(small, tmp_path_factory):
    """As `taken_up`, of the recipes that need less."""
    folder = tmp_path_factory.mktemp("others")
    finish(start(in_parts(folder, small, ("meanflow", "lcm")), folder / "jobs.json"))
    return folder


def in_parts(folder, small, names):
    """Runs `whole` and `parts` of recipes, and returns what a fresh process has to go on with."""
    options = {"model": str(small), "clips": 6, "size": [9, 32, 32], "batch": 2, "captions": 3, "steps": 6}
    jobs = []
    for name in names:
        more = CASES[name]
        distil(name, small, folder / f"{name}-whole.safetensors", 4, **more)
        distil(name, small, folder / f"{name}-parts.safetensors", 2, **more)
        out = {"out": str(folder / f"{name}-parts.safetensors")}
        own = {k: v for k, v in more.items() if k != "settings"}
        job = {"recipe": name, "settings": more.get("settings", {}), "choices": options | own | out}
        jobs.append(job | {"stop_after": 4})
    return jobs


@pytest.fixture(scope="module")
def taken_up(small, tmp_path_factory):
    """The folder with `whole` (never interrupted) and `parts` (stopped, or killed, and taken up) of DMD2."""
    folder = tmp_path_factory.mktemp("resume")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(watch, "CURVE_EVERY", 0.0)
    options = {"model": str(small), "clips": 6, "size": [9, 32, 32], "batch": 2, "captions": 3, "steps": 6}
    # A victim that writes a checkpoint after every update, and dies after one of them.
    victim = {"recipe": "dmd2", "settings": KILLED["settings"]}
    victim["choices"] = options | {"out": str(folder / "killed.safetensors"), "steps": 16, "save_every": 0.0}
    process = start([victim], folder / "victim.json")[0]
    jobs = [victim | {"choices": victim["choices"] | {"save_every": 120.0}}]
    jobs += in_parts(folder, small, ["dmd2"])
    distil("dmd2", small, folder / "killed-whole.safetensors", **KILLED)
    until = time.monotonic() + 120
    while not (folder / "killed.ckpt").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the victim was too fast"
    died = checkpoint(folder / "killed.ckpt")["step"]
    assert 0 < died < 16
    said = finish(start(jobs, folder / "jobs.json"))
    assert f"resumed at step {died} " in said
    monkey.undo()
    return folder


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("dmd2", "taken_up"),
        pytest.param("meanflow", "others", marks=pytest.mark.slow),
        pytest.param("lcm", "others", marks=pytest.mark.slow),
    ],
)
def test_all_state_is_bit_equal_after_a_fresh_process(request, small, name, where):
    taken_up = request.getfixturevalue(where)
    one, two = (checkpoint(taken_up / f"{name}-{kind}.ckpt") for kind in ("whole", "parts"))
    assert one["step"] == two["step"] == 4
    assert equal(one["trainer"], two["trainer"]) == ""
    found = flat(one["trainer"])
    moved = [k for k in found if k.endswith("exp_avg_sq") and bool(found[k].any())]
    assert moved, "nothing was learned, so nothing was compared"
    roles = {k.split(".")[2] for k in found if k.startswith(".modules")}
    assert roles == ({"student", "critic"} if name == "dmd2" else {"student"})
    if name == "dmd2":
        assert any(k.startswith(".modules.critic.1.") for k in found), "the head is part of the state"
    if name == "meanflow":
        assert any("second_time" in k for k in found)
    # And both go on to the same student.
    for kind in ("whole", "parts"):
        distil(name, small, taken_up / f"{name}-{kind}.safetensors", **CASES[name])
        assert not (taken_up / f"{name}-{kind}.ckpt").exists()
    assert same_file(*(taken_up / f"{name}-{kind}.safetensors" for kind in ("whole", "parts")))


def test_a_killed_run_goes_on_to_the_same_student(taken_up):
    assert same_file(taken_up / "killed.safetensors", taken_up / "killed-whole.safetensors")
    one, two = (json.loads((taken_up / f"{n}.json").read_text()) for n in ("killed", "killed-whole"))
    for record in (one, two):
        assert len(record["curve"]) >= 1
        for name in ("seconds", "prepared_seconds", "curve"):  # wall time
            del record[name]
        del record["choices"]["save_every"]
    assert equal(one, two) == ""


def test_the_curve_has_every_update_once(small, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "CURVE_EVERY", 0.0)
    out = tmp_path / "s.safetensors"
    curve = tmp_path / "s.curve.jsonl"
    curve.write_text('{"update": 1, "of": "an older run"}\n')
    distil("lcm", small, out, 2)
    # As a run leaves it that was killed after its last checkpoint, in the middle of a line.
    with curve.open("a") as file:
        file.write('{"update": 3, "student.loss": 7.0}\n{"update": 4, "stu')
    distil("lcm", small, out)
    lines = [json.loads(line) for line in curve.read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["student.loss"] != 7.0 and "of" not in line for line in lines)


def test_clips_that_fitted_into_the_time_are_made_again(small, tmp_path):
    """The clock may let another number of clips pass; a run that is taken up needs those that it had."""
    from vivace.training.distillation import run as module

    monkey, out = pytest.MonkeyPatch(), tmp_path / "s.safetensors"
    monkey.setattr(module, "PORTION", 2)
    distil("lcm", small, out, 1, data_minutes=1e-9)
    record = distil("lcm", small, out, data_minutes=10.0)
    monkey.undo()
    assert record["data"]["clips"] == 2


def test_other_settings_are_refused_and_named(small, tmp_path):
    out = tmp_path / "s.safetensors"
    distil("lcm", small, out, 1)
    with pytest.raises(ConfigError, match="another batch"):
        distil("lcm", small, out, batch=3)
    with pytest.raises(ConfigError, match="another recipe settings"):
        distil("lcm", small, out, settings={"rate": 1e-3})


@pytest.mark.parametrize(("name", "settings"), [("pcm", {}), ("dmd2", {"ratio": 2}), ("meanflow", {})])
@pytest.mark.parametrize("lora", [0, 2])
def test_the_global_random_state_is_of_no_influence(name, settings, lora):
    states = []
    for poison in (1, 2):
        torch.manual_seed(poison)
        trainer = trainer_of(name, settings, lora=lora)
        for update in (1, 2):
            torch.manual_seed(poison * 77 + update)
            trainer.update(update, 0.1 * update)
        before = torch.get_rng_state()
        trainer.update(3, 0.3)
        assert torch.equal(before, torch.get_rng_state()), "the trainer draws from the global generator"
        states.append(trainer.state_dict())
    assert equal(*states) == ""


def test_a_state_of_another_team_is_refused():
    state = trainer_of("lcm", lora=2).state_dict()
    with pytest.raises(WeightsError, match="another student"):
        trainer_of("lcm").load_state_dict(state)


def test_what_is_no_number_is_not_kept(small, tmp_path, monkeypatch):
    from vivace.training.distillation.recipes.consistency import Consistency

    out, right = tmp_path / "s.safetensors", Consistency.student

    def wrong(self, turn):
        loss, told = right(self, turn)
        return (loss if turn.update < 3 else loss * float("nan")), told

    monkeypatch.setattr(Consistency, "student", wrong)
    with pytest.raises(ConfigError, match="not finite"):
        distil("lcm", small, out, save_every=0.0)
    assert checkpoint(out.with_suffix(".ckpt"))["step"] == 2


def test_an_interrupted_run_keeps_its_update_and_goes_on_bit_for_bit(small, tmp_path, monkeypatch):
    files = [tmp_path / f"{name}.safetensors" for name in ("whole", "parts")]
    distil("lcm", small, files[0])
    right = DistillationTrainer.update

    def update(self, number, progress):
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return right(self, number, progress)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "update", update)
        with pytest.raises(KeyboardInterrupt):
            distil("lcm", small, files[1])
    assert checkpoint(files[1].with_suffix(".ckpt"))["step"] == 2
    record = distil("lcm", small, files[1])
    assert record["steps"] == 6
    assert same_file(*files)
