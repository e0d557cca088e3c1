"""Sparse-vDiT (and sliding tiles with a file) on live pipelines, against dense attention under masks made by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vivace import Plan, accelerate
from vivace.calibration.artifact import key_of
from vivace.core.errors import ConfigError
from vivace.models.describe import describe_pipeline
from vivace.models.families import for_module
from vivace.plans.costs import baseline
from vivace.techniques.attention.mask_file import MaskFile
from vivace.techniques.attention.sliding_tile import SlidingTile
from vivace.techniques.attention.sparse_vdit import SparseVDiT
from vivace.testing import models

FAMILIES = ("wan2.1", "wan2.2", "cogvideox", "ltx", "hunyuan")
PATTERNS = ("full", "multi_diagonal:0", "diagonal:0.2", "stripe:1", "skip")


def wanted(layer: int, head: int) -> str:
    """The pattern that the test's files give a head."""
    return PATTERNS[(2 * layer + 3 * head + 1) % len(PATTERNS)]


def mask_file(pipe, folder: Path, patterns=PATTERNS, choice=wanted) -> str:
    """A file in which the wanted pattern of every head has no error and all others have a large one."""
    model = describe_pipeline(pipe)
    errors = {
        e.name: [
            [[0.0 if p == choice(layer, head) else 0.9 for p in patterns] for head in range(e.heads)]
            for layer in range(e.depth)
        ]
        for e in model.experts
    }
    made = MaskFile(
        key=key_of(model, pipe, model.workload()),
        patterns=patterns,
        densities=tuple(1.0 - 0.1 * i for i in range(len(patterns))),
        block=128,
        errors=errors,
        prompts=1,
        prompts_sha256="",
        seed=0,
        vivace="",
    )
    return str(made.save(folder / "masks.json"))


def token_mask(grid, pattern: str) -> torch.Tensor:
    """Bool (S, S), token by token. A frame of these tiny clips has four blocks of neighbours, equally large."""
    area = grid.height * grid.width
    size, rest = divmod(area, 4)
    assert not rest
    # (frame, middle of the token's block in its frame)
    video = [(f, place // size * size + (size - 1) / 2) for f in range(grid.frames) for place in range(area)]
    places = [None] * grid.text * grid.text_first + video + [None] * grid.text * (not grid.text_first)

    def sees(a, b) -> bool:
        if a is None or b is None or a == b or pattern == "full":
            return True
        if pattern == "multi_diagonal:0":
            return a[1] == b[1]
        if pattern == "diagonal:0.2":
            return abs(a[0] * area + a[1] - b[0] * area - b[1]) <= 0.2 * len(video)
        return pattern == "stripe:1" and b[0] == 0

    return torch.tensor([[sees(a, b) for b in places] for a in places])


class ByHand:
    """Dense attention of one layer, head by head under its own mask; counts the pairs it visits."""

    visited = 0

    def __init__(self, layer: int, clock, first: int = 0, choice=wanted) -> None:
        self.layer, self.clock, self.first, self.choice = layer, clock, first, choice

    def __call__(self, q, k, v, mask=None):
        allowed = torch.ones(1, q.shape[2], q.shape[1], k.shape[1], dtype=torch.bool)
        clock = self.clock()
        if clock.step >= self.first:
            grid = clock.evaluation.grid
            heads = [token_mask(grid, self.choice(self.layer, h)) for h in range(q.shape[2])]
            allowed = torch.stack(heads)[None]
        ByHand.visited += int(allowed.sum()) * q.shape[0]
        if mask is not None:
            allowed = allowed & mask
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed)
        return out.transpose(1, 2)


def call_of(family: str, steps: int = 4) -> dict:
    return models.call(family) | {"num_inference_steps": steps, "output_type": "latent"}


def generate(pipe, techniques, family, **options):
    with accelerate(pipe, Plan(techniques), **options) as fast:
        return fast("a red sphere", seed=3, **call_of(family))


def latents(out) -> torch.Tensor:
    return torch.as_tensor(out.raw.frames)


def by_hand(family: str, first: int = 0, choice=wanted):
    pipe, clock = models.pipeline(family), []
    for name in ("transformer", "transformer_2"):
        if (module := getattr(pipe, name, None)) is None:
            continue
        adapter = for_module(module)
        for site in adapter.expert(name, module).attentions:
            if site.kind != "cross":
                oracle = ByHand(site.index, lambda: clock[0], first, choice)
                site.module.set_processor(adapter.processor(site, oracle))
    ByHand.visited = 0
    with accelerate(pipe, Plan()) as session:
        clock.append(session.clock)
        out = session("a red sphere", seed=3, **call_of(family))
    return latents(out), ByHand.visited


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_of_every_layer_has_the_files_pattern(family, tmp_path) -> None:
    pipe = models.pipeline(family)
    technique = SparseVDiT(file=mask_file(pipe, tmp_path), dense_steps=1)
    want, _ = by_hand(family, first=1)
    out = generate(pipe, [technique], family)
    torch.testing.assert_close(latents(out), want, rtol=2e-3, atol=2e-4)

    model, call = describe_pipeline(pipe), models.call(family)
    workload = model.workload(
        frames=call["num_frames"], height=call["height"], width=call["width"], steps=4,
        text=call["max_sequence_length"], guidance=call.get("true_cfg_scale"),
    )  # fmt: skip
    counts = {n: getattr(out.receipt, n) for n in ("nfe", "blocks_run", "attention_pairs", "flops")}
    assert technique.estimate(model, workload, baseline(model, workload)).problems(counts) == []


def test_visited_pairs_are_the_oracles(tmp_path) -> None:
    _, visited = by_hand("wan2.1")
    pipe = models.pipeline("wan2.1")
    receipt = generate(pipe, [SparseVDiT(file=mask_file(pipe, tmp_path))], "wan2.1").receipt
    skipped = receipt.attention_pairs_dense - receipt.attention_pairs
    assert visited == 12**2 * 2 * receipt.blocks_run - skipped  # 3 x 2 x 2 tokens, two heads
    (kernel,) = receipt.kernels
    assert (kernel.op, kernel.choice) == ("block_attention", "gather")


@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_without_a_file_all_heads_have_one_pattern(pattern) -> None:
    want, _ = by_hand("wan2.1", choice=lambda layer, head: pattern)
    out = generate(models.pipeline("wan2.1"), [SparseVDiT(pattern=pattern)], "wan2.1")
    torch.testing.assert_close(latents(out), want, rtol=2e-3, atol=2e-4)


def test_layers_of_full_heads_run_the_models_own_attention(tmp_path) -> None:
    pipe = models.pipeline("wan2.1")
    exact = generate(models.pipeline("wan2.1"), (), "wan2.1")
    everywhere = SparseVDiT(file=mask_file(pipe, tmp_path, choice=lambda layer, head: "full"))
    out = generate(pipe, [everywhere], "wan2.1")
    assert torch.equal(latents(out), latents(exact))
    assert out.receipt.kernels == []

    def half(layer, head):
        return "full" if layer < 2 else "skip"

    want, _ = by_hand("wan2.1", choice=half)
    out = generate(pipe, [SparseVDiT(file=mask_file(pipe, tmp_path, choice=half))], "wan2.1")
    torch.testing.assert_close(latents(out), want, rtol=2e-3, atol=2e-4)


def test_compiled_blocks_of_unlike_layers_compile_twice_and_never_again(tmp_path) -> None:
    from torch._dynamo.utils import counters

    pipe = models.pipeline("wan2.1")
    technique = SparseVDiT(file=mask_file(pipe, tmp_path), dense_steps=2)
    eager = generate(pipe, [technique], "wan2.1")
    torch._dynamo.reset()
    counters.clear()
    with accelerate(pipe, Plan([technique]), compile_backend="eager") as fast:
        first = fast("a red sphere", seed=3, **call_of("wan2.1"))
        graphs = counters["stats"]["unique_graphs"]
        fast("a red sphere", seed=3, **call_of("wan2.1"))
    assert graphs == 2
    assert counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(latents(first), latents(eager), rtol=1e-5, atol=1e-5)
    assert first.receipt.attention_pairs == eager.receipt.attention_pairs
    torch._dynamo.reset()


def test_a_pattern_of_another_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="pattern must be one of full, diagonal"):
        SparseVDiT(pattern="window:0.5")


def test_sliding_tiles_take_a_window_for_each_head(tmp_path) -> None:
    """Head 0 dense and head 1 narrow is neither all dense nor all narrow; all narrow is `window`'s."""
    pipe = models.pipeline("wan2.1")

    def file(*of_head):
        folder = tmp_path / "-".join(of_head)
        return mask_file(pipe, folder, ("window:1.0", "window:0.0"), lambda layer, head: of_head[head])

    def run(technique):
        out = generate(pipe, [technique], "wan2.1")
        return latents(out), out.receipt.attention_pairs

    narrow, pairs = run(SlidingTile(file=file("window:0.0", "window:0.0")))
    by_window, same_pairs = run(SlidingTile(window=0.05))
    torch.testing.assert_close(narrow, by_window, rtol=1e-4, atol=1e-5)
    assert pairs == same_pairs
    dense, all_pairs = run(SlidingTile(file=file("window:1.0", "window:1.0")))
    mixed, between = run(SlidingTile(file=file("window:1.0", "window:0.0")))
    assert between == (pairs + all_pairs) / 2
    assert not torch.allclose(mixed, dense, atol=1e-3)
    assert not torch.allclose(mixed, narrow, atol=1e-3)
    # A file is used even where `window` says that nothing is to be done.
    again, _ = run(SlidingTile(file=file("window:0.0", "window:0.0"), window=1.0))
    assert torch.equal(again, narrow)


def test_a_file_for_other_weights_by_hash_alone_is_taken_where_the_hash_is_unknown(tmp_path) -> None:
    pipe = models.pipeline("wan2.1")
    path = mask_file(pipe, tmp_path)
    found = MaskFile.load(path)
    dataclasses.replace(found, key=dataclasses.replace(found.key, model_hash="")).save(path)
    generate(models.pipeline("wan2.1", seed=5), [SparseVDiT(file=path)], "wan2.1")
