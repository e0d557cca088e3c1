"""Taking parts out of real transformers: a smaller model of the same weights, and back again bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from vivace.core.errors import ConfigError, WeightsError
from vivace.core.surgery import Surgery
from vivace.models import pruned_file
from vivace.models.describe import describe_pipeline
from vivace.models.families import for_module
from vivace.models.pruned_costs import counted, on_meta, step_costs, unit_costs
from vivace.models.pruning import KINDS, Kept, Unit, anatomy, carved, choose, cut
from vivace.testing import models

FAMILIES = ("wan2.1", "wan2.1-i2v", "cogvideox", "ltx", "hunyuan")


def subject(family: str = "wan2.1") -> tuple[Any, Any, Any]:
    pipeline = models.pipeline(family)
    adapter: Any = for_module(pipeline.transformer)
    return pipeline, adapter, anatomy(adapter, pipeline.transformer)


def wan_call(rows: int = 2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(rows, 16, 3, 8, 8, generator=draw),
        "timestep": torch.full((rows,), 400.0),
        "encoder_hidden_states": torch.randn(rows, 16, models.TEXT_WIDTH, generator=draw),
    }


@torch.no_grad()
def output(module: Any) -> torch.Tensor:
    return module(**wan_call(), return_dict=False)[0]


def test_a_pruned_model_is_a_smaller_model_of_diffusers() -> None:
    pipeline, adapter, _ = subject()
    whole, stay, wide = pipeline.transformer, (0, 2, 3), tuple(range(0, 48, 3))
    kept = Kept(tuple(f"blocks.{i}" for i in stay), {}, {f"blocks.{i}.ffn": wide for i in stay})
    small = carved(adapter, whole, kept)
    config = {k: v for k, v in whole.config.items() if not k.startswith("_")}
    by_hand = WanTransformer3DModel(**config | {"num_layers": 3, "ffn_dim": len(wide)}).eval()
    state = {}
    for key, value in whole.state_dict().items():
        words = key.split(".")
        if words[0] == "blocks":
            if int(words[1]) not in stay:
                continue
            words[1] = str(stay.index(int(words[1])))
            if "ffn.net.0" in key:
                value = value[list(wide)]
            elif key.endswith("ffn.net.2.weight"):
                value = value[:, list(wide)]
        state[".".join(words)] = value
    by_hand.load_state_dict(state)
    assert torch.equal(output(small), output(by_hand))
    assert small.config["num_layers"] == 3
    assert small.config["ffn_dim"] == len(wide)
    assert len(whole.blocks) == 4


def test_a_head_that_is_gone_is_one_that_writes_nothing() -> None:
    """Norms over heads see fewer of them; with those out of the way a removal equals zeroed columns."""
    pipeline, adapter, whole = subject()
    for block in pipeline.transformer.blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q = attention.norm_k = torch.nn.Identity()
    whole = anatomy(adapter, pipeline.transformer)
    path = "blocks.1.attn1"
    small = carved(adapter, pipeline.transformer, Kept(whole.blocks, {path: (1,)}))
    with torch.no_grad():
        pipeline.transformer.blocks[1].attn1.to_out[0].weight[:, :12] = 0.0
    torch.testing.assert_close(output(small), output(pipeline.transformer))
    site = next(s for s in adapter.expert("transformer", small).attentions if s.site.endswith(path))
    assert site.heads == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_taken_out_comes_back(family: str) -> None:
    pipeline, _, whole = subject(family)
    module = pipeline.transformer
    before = {k: (v, v.clone()) for k, v in module.state_dict(keep_vars=True).items()}
    facts = {p: repr(m) for p, m in module.named_modules()}
    config = dict(module.config)
    blocks = tuple(b for paths in whole.lists.values() for b in paths[:1])
    kept = Kept(
        blocks,
        {p: (0,) for p, a in whole.attentions.items() if a.block in blocks},
        {p: tuple(range(f.size // 2)) for p, f in whole.feed_forwards.items() if f.block in blocks},
    )
    assert kept.channels
    for keep in ("device", "host"):
        edit = Surgery()
        cut(edit, whole, kept, keep=keep)
        assert sum(p.numel() for p in module.parameters()) < sum(v.numel() for _, v in before.values())
        assert dict(module.config) != config
        edit.close()
        after = module.state_dict(keep_vars=True)
        assert list(after) == list(before)
        assert all(after[k] is v and torch.equal(v, copy) for k, (v, copy) in before.items())
        assert {p: repr(m) for p, m in module.named_modules()} == facts
        assert dict(module.config) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_what_is_missing_afterwards(family: str) -> None:
    pipeline, adapter, whole = subject(family)
    model = describe_pipeline(pipeline)
    call = models.call(family)
    workload = model.workload(
        frames=call["num_frames"], height=call["height"], width=call["width"], steps=2, text=16
    )
    arguments = adapter.dummy_call(model, workload, "cpu", torch.float32)
    counts = counted(whole.expert, arguments)
    groups = {
        p: [list(range(f.size // 2)), list(range(f.size // 2, f.size))]
        for p, f in whole.feed_forwards.items()
    }
    units = whole.units(groups)
    assert {u.kind for u in units} >= {"block", "channels"}
    costs = unit_costs(whole, units, counts)
    for unit in units[:3] + units[-2:]:
        edit = Surgery()
        cut(edit, whole, whole.everything().without(unit, whole))
        left = counted(adapter.expert("transformer", pipeline.transformer), arguments)
        edit.close()
        assert counts.flops - left.flops == pytest.approx(costs[unit], rel=1e-9)


def test_a_step_is_counted_without_weights() -> None:
    pipeline, adapter, whole = subject()
    model, expert = (m := describe_pipeline(pipeline)), m.experts[0]
    kept = Kept(whole.blocks[:2], {}, {f"blocks.{i}.ffn": tuple(range(24)) for i in range(2)})
    before, after = step_costs(model, expert, model.workload(frames=9, height=32, width=32, text=16), kept)
    assert (before.blocks, after.blocks) == (8, 4)
    assert after.pairs == before.pairs / 2
    assert before.flops / 2 < after.flops < 0.55 * before.flops
    shares, live = on_meta(adapter, expert, kept)
    assert [s > 0 for s in shares] == [True, True, False, False]
    assert all(0.5 < s < 1.0 for s in shares[:2])
    assert len(live.blocks) == 2


def test_the_cheapest_harm_goes_first() -> None:
    *_, whole = subject()
    groups = {p: [list(range(24)), list(range(24, 48))] for p in whole.feed_forwards}
    units = whole.units(groups, ("block", "channels"))
    costs = {u: 10.0 if u.kind == "block" else 2.0 for u in units}
    scores = {
        u: {"blocks.0": 9.0, "blocks.1": 1.0, "blocks.2": 5.0, "blocks.3": 7.0}.get(u.name, 3.0)
        for u in units
    }
    assert choose(whole, scores, costs, 42.0, 0.77).blocks == ("blocks.0", "blocks.2", "blocks.3")
    narrow = dict(scores) | {u: 0.1 for u in units if u.kind == "channels" and u.members[0] == 24}
    kept = choose(whole, narrow, costs, 42.0, 0.82)
    assert kept.blocks == whole.blocks
    assert kept.channels == {p: tuple(range(24)) for p in whole.feed_forwards}
    uneven = choose(whole, narrow, costs, 42.0, 0.95, even=False)
    assert len(uneven.channels) == 1
    start = Kept(whole.blocks[:3])
    assert choose(whole, scores, costs, 42.0, 0.63, start=start).blocks == start.blocks
    assert len(choose(whole, scores, costs, 42.0, 0.63, start=start).channels) == 3
    assert choose(whole, scores, costs, 42.0, 1.0) == whole.everything()
    with pytest.raises(ConfigError, match="FLOPs at least"):
        choose(whole, {u: v for u, v in scores.items() if u.kind == "channels"}, costs, 42.0, 0.3)
    with pytest.raises(ConfigError, match="above 0"):
        choose(whole, scores, costs, 42.0, 0.0)


def test_what_does_not_fit_is_refused() -> None:
    *_, whole = subject()
    for kept, word in (
        (Kept(("blocks.9",)), "nothing that can be cut"),
        (Kept(()), "keep at least one"),
        (Kept(("blocks.0",), {"blocks.1.attn1": (0,)}), "taken out"),
        (Kept(("blocks.0",), {"blocks.0.attn1": (2,)}), "keep some of 0 to 1"),
        (Kept(("blocks.0",), {}, {"blocks.0.ffn": (3, 3)}), "keep some of 0 to 47"),
    ):
        with pytest.raises(ConfigError, match=word):
            cut(Surgery(), whole, kept)
    assert Unit("head", "blocks.0.attn1", (1,)) in whole.units({}, KINDS)
    with pytest.raises(ConfigError, match="does not say"):
        Kept.from_dict({"blocks": ["blocks.0"]})


@pytest.mark.parametrize(("store", "worst"), [("fp32", 0.0), ("bf16", 2.0**-8), ("int8", 1.0 / 200)])
def test_files_come_back(tmp_path, store: str, worst: float) -> None:
    pipeline, adapter, whole = subject()
    kept = Kept(whole.blocks[:2], {"blocks.0.attn1": (1,)})
    small = carved(adapter, pipeline.transformer, kept)
    state, head = small.state_dict(), pruned_file.head_of(pipeline.transformer, kept, {"steps": 3})
    file = pruned_file.save(tmp_path / "p.safetensors", state, head, store)
    found, tensors = pruned_file.load(file)
    assert found == head
    assert pruned_file.read_head(file) == head
    assert set(tensors) == set(state)
    for name, value in state.items():
        largest = value.abs().flatten(1).amax(1) if value.ndim > 1 else value.abs()
        error = (tensors[name].float() - value).abs().flatten(1).amax(1) if value.ndim > 1 else None
        error = (tensors[name].float() - value).abs() if error is None else error
        assert (error <= worst * largest + 1e-12).all(), name
    sizes = {
        s: pruned_file.save(tmp_path / f"{s}.st", state, head, s).stat().st_size for s in pruned_file.STORES
    }
    assert sizes["int8"] < sizes["bf16"] < sizes["fp32"]


def test_damaged_files_are_named(tmp_path) -> None:
    (tmp_path / "noise").write_bytes(b"no tensors here")
    with pytest.raises(WeightsError, match="noise cannot be read"):
        pruned_file.read_head(tmp_path / "noise")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(WeightsError, match="is no pruned model"):
        pruned_file.read_head(tmp_path / "other")
    with pytest.raises(WeightsError, match="make one with"):
        pruned_file.find(str(tmp_path / "missing"))
