"""Tasks are immutable, disjoint where they must be, and seeded by content."""

from __future__ import annotations

import itertools

import pytest

from vivace.core.errors import ConfigError, UnknownNameError
from vivace.evaluation.metrics.base import registry
from vivace.evaluation.task import Task, names, sample_seed

WORLD = ("world-smoke@1", "world-dev@1", "world-short@1", "world-motion@1")
SEALED = {
    "world-smoke@1": "0ebc87f0c2411285ce13656fe6e61c84ad89d37068f6caf01b192e434ec9e339",
    "world-dev@1": "322741cb54f86f609dbb60d2de1454a542e2402ab828b2d212c7b3eed26eb6a2",
    "world-short@1": "cd029f032c8f88d495f7220578d93b834dd3177dfb99b0e80b00d4927dec4009",
    "world-motion@1": "821fb7848605af1fe79a6e889ef4966b39ee6c351a9c82f124d31a0558f2b362",
}
"""Hashes of tasks that have records. A test that fails here means: make a new version, do not edit this table."""


def test_the_tasks_that_were_promised_are_there():
    wanted = {
        *WORLD,
        "vbench-custom@1",
        "vbench-official@1",
        "speed-wan1.3b-480p@1",
        "speed-wan14b-720p@1",
        "speed-hunyuan-720p@1",
    }
    assert wanted <= set(names())


@pytest.mark.parametrize("name", WORLD)
def test_tasks_with_records_never_change(name):
    assert Task.load(name).ref.sha256 == SEALED[name]


@pytest.mark.parametrize("name", names())
def test_a_task_asks_for_metrics_that_exist_at_that_version(name):
    task = Task.load(name)
    assert task.full_name == name
    for use in task.metrics:
        assert registry[use.name].card.version >= use.version


def test_no_prompt_is_shared_between_tasks_of_the_world():
    texts = {name: set(Task.load(name).prompt_texts()) for name in WORLD}
    for a, b in itertools.combinations(WORLD, 2):
        assert not texts[a] & texts[b], (a, b)
    assert len(texts["world-short@1"]) == 200


def test_the_official_list_of_vbench_is_whole():
    texts = Task.load("vbench-official@1").prompt_texts()
    assert len(texts) == 946
    seeds = [s.seed for s in Task.load("vbench-official@1").samples()]
    assert len(set(seeds)) == 946 * 5  # also the prompts that stand there twice


def test_seeds_depend_on_the_prompt_and_the_repeat_alone():
    samples = Task.load("world-short@1").samples()
    assert len(samples) == 400
    assert len({s.seed for s in samples}) == 400
    assert [s.k for s in samples[:200]] == [0] * 200
    few = Task.load("world-short@1").samples(limit=3)
    assert [s.seed for s in few if s.k == 0] == [s.seed for s in samples[:3]]
    assert sample_seed("a red ball", 0) == 271243543545904
    other = Task.load("world-short@1").samples(limit=3, repeat_from=2)
    assert not {s.seed for s in other} & {s.seed for s in samples}


def test_a_changed_prompt_list_is_refused(tmp_path):
    text = "vivace_task: 1\nname: x\nversion: 1\ntitle: x\nabout: x\nkind: quality\n"
    text += "frames: 9\nheight: 64\nwidth: 64\nfps: 8\nsteps: 4\nguidance: 4\n"
    text += f"prompts: {{file: world-smoke.txt, sha256: {'a' * 64}, count: 4}}\n"
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match="has changed"):
        Task.load(tmp_path / "x.yaml").prompt_texts()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not valid YAML"),
        ("name: x", "is no task"),
        ("vivace_task: 9", "newer Vivace"),
        ("vivace_task: 1\nname: x", "version"),
    ],
)
def test_a_broken_file_says_what_is_wrong(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        Task.load(tmp_path / "x.yaml")


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UnknownNameError, match="world-short@1"):
        Task.load("world-shrot@1")
    assert Task.load("world-short").full_name == "world-short@1"
