"""Pruning and repair: probing sees what matters, repair mends what was cut, a run taken up again is the same run."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from vivace.core.errors import ConfigError, VivaceError
from vivace.models import pruned_file
from vivace.models.pruning import Kept, anatomy, carved
from vivace.tiny.build import TinyConfig, build_pipeline
from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.common import Budget, Processes
from vivace.training import pruning as command
from vivace.training import pruning_data as data
from vivace.training import pruning_probe as probing
from vivace.training import pruning_repair as repairing
from vivace.training import subject

SMALL = TinyConfig(
    heads=2, head_dim=16, layers=4, ffn_dim=64, text_dim=32, text_layers=1, vae_dim=8, latent_channels=8
)
SHAPE = ClipShape(frames=5, height=32, width=32, supersample=1)
HERE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model() -> Any:
    """A pipeline whose third block is nearly idle, so that there is something to find."""
    pipeline = build_pipeline(0, SMALL)
    block: Any = pipeline.transformer.blocks[2]
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.mul_(3.0)
        block.scale_shift_table.mul_(0.01)
        for linear in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            linear.weight.mul_(0.01)
            linear.bias.mul_(0.01)
    subject.supported(pipeline)
    return pipeline


@pytest.fixture(scope="module")
def whole():
    pipeline = model()
    return pipeline, anatomy(subject.supported(pipeline), pipeline.transformer)


@pytest.fixture(scope="module")
def batches(whole):
    return data.held_out_batches(whole[0], HERE, SHAPE, 2)


@pytest.fixture(scope="module")
def pool(whole):
    return data.gather(whole[0], HERE, SHAPE, count=6, portion=3, captions=2)


def probe(whole, batches, path, **more) -> probing.Probe:
    return probing.Probe(whole[1], batches, HERE, path, {"groups": 4} | more)


def test_probing_finds_the_idle_block_and_leaves_the_model_alone(whole, batches, tmp_path):
    before = {k: v.clone() for k, v in whole[0].transformer.state_dict().items()}
    table = probe(whole, batches, tmp_path / "i.json").run(
        ("block", "head", "channels"), 4, say=lambda t: None
    )
    blocks = {k: v["error"] for k, v in table["units"].items() if v["kind"] == "block"}
    assert min(blocks, key=lambda k: blocks[k]) == "blocks.2"
    assert min(v for k, v in blocks.items() if k != "blocks.2") > 5 * blocks["blocks.2"]
    # 4 blocks, 2 attentions of 2 heads each, 4 groups of channels
    assert len(table["units"]) == 4 * (1 + 4 + 4)
    after = whole[0].transformer.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_probing_is_taken_up_where_it_stopped(whole, batches, tmp_path):
    full = probe(whole, batches, tmp_path / "full.json").run(("block", "channels"), 4, say=lambda t: None)
    path = tmp_path / "part.json"
    probe(whole, batches, path).run(("block", "channels"), 4, stop_after=3, say=lambda t: None)
    assert len(probing.read(path)["units"]) == 3
    again = probe(whole, batches, path).run(("block", "channels"), 4, say=lambda t: None)
    assert again == full
    assert probing.read(path) == full
    with pytest.raises(ConfigError, match="other settings"):
        probe(whole, batches, path, groups=8)
    other = build_pipeline(1, SMALL)
    stranger = other, anatomy(subject.supported(other), other.transformer)
    with pytest.raises(ConfigError, match="another model"):
        probe(stranger, batches, path)
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ConfigError, match="no table of importance"):
        probing.read(tmp_path / "no.json")


def test_blocks_go_one_by_one_until_the_depth_is_reached(whole, batches):
    kept = probing.drop_blocks(whole[1], batches, HERE, 2, lambda t: None)
    assert len(kept.blocks) == 2
    assert "blocks.2" not in kept.blocks
    with pytest.raises(ConfigError, match="has 4 blocks"):
        probing.drop_blocks(whole[1], batches, HERE, 5, lambda t: None)


def test_a_batch_has_the_twins_of_its_first_rows(pool):
    torch.manual_seed(0)
    batch = data.noisy(pool, repairing.FlowLoss(), 8, 0.25)
    assert batch.pairs == 2
    assert torch.equal(batch.x[:2], batch.x[-2:])
    assert torch.equal(batch.s[:2], batch.s[-2:])
    assert torch.equal(batch.text[-1], pool.empty)
    assert not torch.equal(batch.text[0], pool.empty)


def test_hidden_states_are_those_before_the_next_kept_block(whole):
    kept = Kept(("blocks.0", "blocks.3"))
    assert repairing.counterparts(whole[1], kept) == [2, 3]
    assert repairing.counterparts(whole[1], Kept(("blocks.0", "blocks.1"))) == [0, 3]


KEPT = Kept(
    ("blocks.0", "blocks.2", "blocks.3"), {}, {f"blocks.{i}.ffn": tuple(range(0, 64, 2)) for i in (0, 2, 3)}
)


def trainer(whole) -> repairing.Repairer:
    student = carved(subject.supported(whole[0]), whole[1].expert.module, KEPT)
    return repairing.Repairer(HERE, whole[1], student, KEPT, muon_lr=2e-3, adam_lr=2e-3)


def test_repair_mends_what_was_cut(whole, batches, pool):
    run = trainer(whole)
    teacher = whole[1].expert.module
    before = repairing.measure(run.student, teacher, batches, HERE)
    for i in range(60):
        run.student.train()
        run.step(pool, 8, i / 60)
    run.average.store()
    after = repairing.measure(run.student, teacher, batches, HERE)
    assert after["prediction"] < 0.5 * before["prediction"]
    assert after["guided"] < before["guided"]
    assert after["flow_whole"] == before["flow_whole"]


def test_a_run_taken_up_again_is_the_same_run(whole, pool, tmp_path):
    run = trainer(whole)
    repairing.fit(run, pool, Budget(None, 6), tmp_path / "whole.ckpt", batch=4)
    repairing.fit(trainer(whole), pool, Budget(None, 6), tmp_path / "part.ckpt", batch=4, stop_after=3)
    assert repairing.clips_of(tmp_path / "part.ckpt") == len(pool)
    torch.manual_seed(99)
    again = trainer(whole)
    found = repairing.fit(again, pool, Budget(None, 6), tmp_path / "part.ckpt", batch=4)
    assert found["steps"] == 6
    for a, b in zip(again.average.values, run.average.values, strict=True):
        assert torch.equal(a, b)
    for name, value in run.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], value), name


def test_the_command_writes_a_file_that_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda name: ((p := model()), subject.supported(p)))
    out = tmp_path / "pruned.safetensors"
    given = "--steps 2 --size 5 32 32 --clips 4 --batch 4 --groups 4 --depth 3 --keep 0.7 --eval-clips 1 --store int8"
    record = command.main(["repair", *given.split(), "--device", "cpu", "--out", str(out)])
    assert 0.68 <= record["flops"] <= 0.72
    assert record["kept"]["blocks"] == [0, 1, 3]
    assert json.loads(out.with_suffix(".json").read_text())["steps"] == 2
    assert out.with_suffix(".importance.json").is_file()
    head, state = pruned_file.load(out)
    whole = model().transformer
    assert head.base == pruned_file.base_hash(whole)
    student = carved(subject.supported(model()), whole, head.kept)
    student.load_state_dict(state)
    assert student.config["num_layers"] == 3
    assert student.config["ffn_dim"] == student.blocks[0].ffn.net[2].in_features < 64
    assert "after: prediction error" in capsys.readouterr().out


def test_what_cannot_be_pruned_is_refused(tmp_path):
    with pytest.raises(VivaceError, match="is missing: a pipeline folder"):
        subject.load_model(str(tmp_path))
    from vivace.testing import models

    with pytest.raises(ConfigError, match="not for LTXPipeline"):
        subject.supported(models.pipeline("ltx"))
