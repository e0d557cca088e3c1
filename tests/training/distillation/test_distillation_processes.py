"""Two processes are one process with twice the batch, with weights copied or spread, and they agree on what to do."""

from __future__ import annotations

import json

import pytest
import torch
from distilling import HERE, distil, finish, flat, start
from safetensors.torch import load_file

from vivace.core.errors import ConfigError
from vivace.tiny.train.common import load_checkpoint
from vivace.training.distillation.sharding import shard

TWO = {"dmd2": {"ratio": 2}, "pcm": {}}
UPDATES = {"dmd2": 4, "pcm": 3}
LEAVES = "exp_avg", "exp_avg_sq"


def jobs_in(folder, small):
    """A maker of jobs that write into a folder."""
    options = {"model": str(small), "clips": 6, "size": [9, 32, 32], "captions": 2, "steps": 6, "batch": 2}

    def job(recipe, name, stop=None, settings=None, keep=True, **more):
        out = {"out": str(folder / f"{name}.safetensors")}
        return {
            "recipe": recipe,
            "settings": settings or TWO.get(recipe, {}),
            "choices": options | out | more,
            "stop_after": stop,
            "keep": str(folder / f"{name}.kept") if keep and stop else None,
        }

    return job


@pytest.fixture(scope="module")
def both(small, tmp_path_factory):
    """A folder with what two processes left behind, in one go, as their start takes longest."""
    folder = tmp_path_factory.mktemp("two")
    job = jobs_in(folder, small)
    finish(start([job(name, name, UPDATES[name]) for name in TWO], folder / "jobs.json", 2))
    return folder


@pytest.fixture(scope="module")
def spread(small, tmp_path_factory):
    """The same of spread weights, and of two that are to stop together."""
    folder = tmp_path_factory.mktemp("spread")
    job = jobs_in(folder, small)
    # A patience of one validation that never gets better stops both, or one waits for the other for ever.
    jobs = [job("lcm", "patient", steps=20, patience=1, validate_every=1e-9)]
    jobs.append(job("pcm", "spread", 2, fsdp=True))
    jobs.append(job("pcm", "spread", 4, fsdp=True))
    jobs.append(job("pcm", "spread", fsdp=True, validate_every=1e-9, store="bf16"))
    jobs.append(job("pcm", "copied", 4))
    jobs.append(job("pcm", "copied", store="bf16"))
    jobs.append(job("dmd2", "spread-dmd2", 4, fsdp=True, lora=2, checkpointing=True))
    jobs.append(job("dmd2", "copied-dmd2", 4, lora=2))
    jobs.append(job("meanflow", "difference", 2, {"derivative": "difference"}, fsdp=True))
    finish(start(jobs, folder / "jobs.json", 2))
    return folder


def far(one, two, leaves=()):
    """The largest distance between numbers of two states of a trainer, and where; `leaves`: of the optimizer's too."""
    a, b = flat(one), flat(two)
    assert a.keys() == b.keys()
    kinds = (".modules", ".average", *(f".{leaf}" for leaf in leaves))
    worst = (0.0, "")
    for name, value in a.items():
        if isinstance(value, torch.Tensor) and any(k in name for k in kinds) and value.numel():
            assert value.shape == b[name].shape, name
            worst = max(worst, (float((value - b[name]).abs().max()), name))
    return worst


def of(path):
    state = load_checkpoint(path, HERE)
    assert state is not None
    return state["trainer"]


@pytest.mark.parametrize("name", TWO)
def test_two_processes_are_one_with_twice_the_batch(both, small, tmp_path, name):
    out = tmp_path / "one.safetensors"
    distil(name, small, out, 1, batch=4, settings=TWO[name], captions=2)
    first = of(out.with_suffix(".ckpt"))
    distil(name, small, out, UPDATES[name], batch=4, settings=TWO[name], captions=2)
    alone, together = of(out.with_suffix(".ckpt")), of(both / f"{name}.kept")
    assert far(alone, together, LEAVES)[0] < 1e-6
    weights = [{"modules": state["modules"]} for state in (alone, first)]
    assert far(*weights)[0] > 1e-5, "the weights have to move for this to say anything"
    # Half of the batch is not enough.
    half = tmp_path / "half.safetensors"
    distil(name, small, half, UPDATES[name], batch=2, settings=TWO[name], captions=2)
    assert far(alone, of(half.with_suffix(".ckpt")))[0] > 3e-6


@pytest.mark.slow
def test_patience_ends_a_run_in_all_processes(spread):
    record = json.loads((spread / "patient.json").read_text())
    # Several processes look every five updates; the first validation is the best until one is better.
    updates = [v["update"] for v in record["validations"]]
    assert updates == [5 * (i + 1) for i in range(len(updates))]
    found = [v["accuracy"] for v in record["validations"]]
    assert len(found) >= 2
    assert found[-1] <= max(found[:-1])
    assert record["finished"]


@pytest.mark.slow
def test_spread_weights_are_copied_weights(spread):
    assert far(of(spread / "spread.kept"), of(spread / "copied.kept"), LEAVES)[0] < 1e-5
    one, two = load_file(spread / "spread.safetensors"), load_file(spread / "copied.safetensors")
    assert one.keys() == two.keys()
    assert (
        max(float((one[k].float() - two[k].float()).abs().max()) for k in one) < 1e-2
    )  # a step of bf16 at 1
    record = json.loads((spread / "spread.json").read_text())
    assert [v["update"] for v in record["validations"]] == [5]


@pytest.mark.slow
def test_spread_critic_head_and_lora(spread):
    spread, copied = of(spread / "spread-dmd2.kept"), of(spread / "copied-dmd2.kept")
    assert far(spread, copied, LEAVES)[0] < 1e-5
    names = [k for k in flat(spread) if k.startswith(".modules")]
    assert any("lora_A" in k for k in names)
    assert any(k.startswith(".modules.critic.1.") for k in names)


@pytest.mark.slow
def test_a_checkpoint_of_spread_weights_is_taken_up_by_others(spread, small, tmp_path):
    """One format: whole tensors. Only the number of processes must be the same, as batches depend on it."""
    state = of(spread / "spread.kept")
    from distilling import trainer_of

    trainer = trainer_of("pcm")
    trainer.load_state_dict(state)
    assert far(trainer.state_dict(), state, LEAVES)[0] == 0.0


@pytest.mark.slow
def test_differences_work_on_spread_weights(spread):
    found = of(spread / "difference.kept")["modules"]["student"][0]
    assert any("second_time" in k and bool(v.any()) for k, v in found.items() if "linear_2" in k)


def test_what_cannot_be_spread_says_so(small, tmp_path):
    with pytest.raises(ConfigError, match="torchrun"):
        shard(torch.nn.Linear(2, 2), HERE)
    from vivace.tiny.train.common import Processes

    with pytest.raises(ConfigError, match="derivative=difference"):
        distil(
            "meanflow", small, tmp_path / "s.safetensors", fsdp=True,
            processes=Processes(0, 2, torch.device("cpu")),
        )  # fmt: skip
    # One process has nothing to spread, and runs.
    assert distil("pcm", small, tmp_path / "s.safetensors", 1, fsdp=True)["steps"] == 1
