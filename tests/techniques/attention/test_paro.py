"""PAROAttention on live pipelines, against dense attention under masks that are re-ordered by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vivace import Plan, accelerate
from vivace.calibration.artifact import key_of
from vivace.core.errors import PlanError
from vivace.models.describe import describe_pipeline
from vivace.models.families import for_module
from vivace.plans.costs import baseline
from vivace.techniques.attention.axis_orders import OrderFile, packed
from vivace.techniques.attention.head_patterns import AXES
from vivace.techniques.attention.paro import Paro
from vivace.testing import models

SHAPE = {"num_frames": 9, "height": 32, "width": 32}
FAMILIES = ("wan2.1", "wan2.2", "cogvideox", "hunyuan")


def grid_of(pipe):
    model = describe_pipeline(pipe)
    return model, model.grid(model.workload(frames=9, height=32, width=32))


def block_mask(blocks: int, layer: int, head: int) -> np.ndarray:
    random = np.random.default_rng(10 * layer + head)
    return (random.random((blocks, blocks)) < 0.3) | np.eye(blocks, dtype=bool)


def order_of(layer: int, head: int) -> int:
    return (2 * layer + 3 * head + 1) % 6


def order_file(pipe, folder) -> str:
    model, grid = grid_of(pipe)
    assert grid.video < 64  # one token a block
    made = OrderFile(
        key=key_of(model, pipe, model.workload(frames=9, height=32, width=32)),
        grid=(grid.frames, grid.height, grid.width),
        block=128,
        orders={
            e.name: [[order_of(i, h) for h in range(e.heads)] for i in range(e.depth)] for e in model.experts
        },
        masks={
            e.name: [
                packed(np.stack([block_mask(grid.video, i, h) for h in range(e.heads)]))
                for i in range(e.depth)
            ]
            for e in model.experts
        },
        mass=0.5,
        prompts=1,
        prompts_sha256="",
        seed=0,
        vivace="",
    )
    return str(made.save(folder / "orders.json"))


def token_mask(grid, layer, head) -> torch.Tensor:
    """Bool (S, S): token t stands where sorting by the head's axes puts it, and its block is that place."""
    axes = AXES[order_of(layer, head)]
    places = list(itertools.product(range(grid.frames), range(grid.height), range(grid.width)))
    stands = {
        t: i for i, t in enumerate(sorted(range(grid.video), key=lambda t: [places[t][a] for a in axes]))
    }
    kept = block_mask(grid.video, layer, head)
    out = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    first = grid.text if grid.text_first else 0
    for a, b in itertools.product(range(grid.video), repeat=2):
        out[first + a, first + b] = bool(kept[stands[a], stands[b]])
    return out


def by_hand(family):
    pipe, clock = models.pipeline(family), []
    for name in ("transformer", "transformer_2"):
        if (module := getattr(pipe, name, None)) is None:
            continue
        adapter = for_module(module)
        for site in adapter.expert(name, module).attentions:
            if site.kind == "cross":
                continue

            def kernel(q, k, v, mask=None, index=site.index):
                grid = clock[0].evaluation.grid
                allowed = torch.stack([token_mask(grid, index, h) for h in range(q.shape[2])])[None]
                allowed = allowed if mask is None else allowed & mask
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)

            site.module.set_processor(adapter.processor(site, kernel))
    with accelerate(pipe, Plan()) as session:
        clock.append(session.clock)
        return session("a cone", seed=3, **call_of(family))


def call_of(family, **changes):
    return models.call(family) | SHAPE | {"num_inference_steps": 3, "output_type": "latent"} | changes


def run(pipe, technique, family, **changes):
    with accelerate(pipe, Plan([technique] if technique else [])) as session:
        return session("a cone", seed=3, **call_of(family, **changes))


def latents(out) -> torch.Tensor:
    return torch.as_tensor(out.raw.frames)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_has_its_own_order_and_mask(family, tmp_path) -> None:
    pipe = models.pipeline(family)
    technique = Paro(file=order_file(pipe, tmp_path))
    out = run(pipe, technique, family)
    torch.testing.assert_close(latents(out), latents(by_hand(family)), rtol=2e-3, atol=2e-4)

    model, call = describe_pipeline(pipe), call_of(family)
    workload = model.workload(
        frames=9,
        height=32,
        width=32,
        steps=3,
        text=call["max_sequence_length"],
        guidance=call.get("true_cfg_scale"),
    )
    counts = {n: getattr(out.receipt, n) for n in ("nfe", "blocks_run", "attention_pairs", "flops")}
    assert technique.estimate(model, workload, baseline(model, workload)).problems(counts) == []
    assert out.receipt.attention_pairs < out.receipt.attention_pairs_dense


def test_another_shape_runs_dense_and_the_receipt_says_so(tmp_path) -> None:
    pipe = models.pipeline("wan2.1")
    technique = Paro(file=order_file(pipe, tmp_path))
    exact = run(models.pipeline("wan2.1"), None, "wan2.1", height=64)
    out = run(pipe, technique, "wan2.1", height=64)
    assert torch.equal(latents(out), latents(exact))
    assert out.receipt.attention_pairs == out.receipt.attention_pairs_dense
    effects = out.receipt.techniques[0].effects
    assert effects["dense_evaluations"] == 6
    assert "sparse_evaluations" not in effects
    assert "dense_evaluations" not in run(pipe, technique, "wan2.1").receipt.techniques[0].effects


def test_refusals_say_what_to_do(tmp_path) -> None:
    pipe = models.pipeline("wan2.1")
    model, _ = grid_of(pipe)
    file = order_file(pipe, tmp_path)

    def told(technique, model=model, severity="error"):
        return "; ".join(str(p) for p in Plan([technique]).problems(model) if p.severity == severity)

    assert "search_orders(pipeline, prompts)" in told(Paro())
    assert "there is no file of axis orders" in told(Paro(file=str(tmp_path / "none.json")))
    assert told(Paro(file=file)) == ""
    assert "was made for 3x2x2 tokens" in told(Paro(file=file), severity="warning")
    assert "blocks of 128 tokens; set block=128" in told(Paro(file=file, block=64))
    assert "is not for 2 layers" in told(
        Paro(file=file), describe_pipeline(models.pipeline("wan2.1", layers=2))
    )
    text = (tmp_path / "orders.json").read_text()
    (tmp_path / "cut.json").write_text(text.replace('"grid": [3, 2, 2]', '"grid": [3, 2, 3]'))
    assert "is damaged" in told(Paro(file=str(tmp_path / "cut.json")))
    with pytest.raises(PlanError, match="other weights"):
        accelerate(models.pipeline("wan2.1", seed=1), Plan([Paro(file=file)]))
