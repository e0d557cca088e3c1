"""Video Sparse Attention against cubes walked token by token, its gates' file, and its gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file

from vivace import Plan
from vivace.core.errors import ConfigError, PlanError
from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.op import runner as attention_by
from vivace.kernels.block_select.op import runner as selection_by
from vivace.techniques.attention.dynamic import SparseSite, View
from vivace.techniques.attention.vsa import VideoSparseAttention
from vivace.testing.subjects import Subject

GRID = TokenGrid(
    9, 12, 10, text=24, text_first=True
)  # 1080 tokens: 3 x 3 x 3 cubes of 64, some cut by the border
D, HEADS, BATCH = 8, 2, 2
CLIP = {"num_frames": 33, "height": 64, "width": 64, "num_inference_steps": 2}  # 9 x 4 x 4 tokens


def noise(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, GRID.tokens, HEADS, D, generator=generator) for _ in range(3)]


def attend(technique, q, k, v, weights=None):
    layout = technique.layout(GRID)
    arranged = (layout.arrange(x) for x in (q, k, v))
    view = View(*arranged, layout, D**-0.5, {}, selection_by("reference"), attention_by("reference"))
    view.weights = weights or {}
    out, routes = technique.attention(view, None)
    return layout.restore(out), routes, view


def cubes():
    """Tokens of every 4 x 4 x 4 cube of the video, text in front."""
    sides = (GRID.frames, GRID.height, GRID.width)
    for corner in itertools.product(*(range(0, side, 4) for side in sides)):
        ranges = (range(c, min(c + 4, side)) for c, side in zip(corner, sides, strict=True))
        yield [GRID.text + (t * sides[1] + y) * sides[2] + x for t, y, x in itertools.product(*ranges)]


def by_hand(q, k, v, top, gate):
    """One head (S, D) in float64, and the pairs that it visits."""
    parts, text, out = list(cubes()), list(range(GRID.text)), torch.zeros_like(v)
    mq, mk, mv = (torch.stack([x[p].mean(0) for p in parts]) for x in (q, k, v))
    coarse = torch.softmax(mq @ mk.T * D**-0.5, -1)
    pairs = GRID.text * GRID.tokens
    for rows, weights in zip(parts, coarse, strict=True):
        seen = text + [t for j in weights.argsort(descending=True)[:top] for t in parts[j]]
        exact = torch.softmax(q[rows] @ k[seen].T * D**-0.5, -1) @ v[seen]
        out[rows] = exact + gate * (weights @ mv)
        pairs += len(rows) * len(seen)
    out[text] = torch.softmax(q[text] @ k.T * D**-0.5, -1) @ v
    return out, pairs


@pytest.mark.parametrize("gates", [None, [0.7, -0.2]])
def test_is_the_method_written_out(gates):
    q, k, v = noise()
    weights = None if gates is None else {"gate": torch.tensor(gates)}
    out, routes, view = attend(VideoSparseAttention(top=5), q, k, v, weights)
    visited = 0
    for b in range(BATCH):
        for h in range(HEADS):
            gate = 0.0 if gates is None else gates[h]
            want, pairs = by_hand(*(x[b, :, h].double() for x in (q, k, v)), 5, gate)
            torch.testing.assert_close(out[b, :, h].double(), want, rtol=1e-4, atol=1e-5)
            visited += pairs
    assert routes.pairs(view.layout.counts, BATCH, HEADS) == visited
    assert view.beside == (0.0 if gates is None else 27**2)


def test_a_constant_gate_is_the_same_gate_in_every_head():
    q, k, v = noise()
    constant, _, _ = attend(VideoSparseAttention(top=3, gate=0.25), q, k, v)
    trained, _, _ = attend(VideoSparseAttention(top=3), q, k, v, {"gate": torch.full((HEADS,), 0.25)})
    assert torch.equal(constant, trained)


def test_gradients_are_those_of_the_method_written_out():
    gate = torch.tensor([0.7, -0.2], requires_grad=True)
    inputs = [x.requires_grad_() for x in noise(3)]
    aim = torch.randn(BATCH, GRID.tokens, HEADS, D, generator=torch.Generator().manual_seed(4))
    out, _, _ = attend(VideoSparseAttention(top=4), *inputs, {"gate": gate})
    got = torch.autograd.grad((out * aim).sum(), [*inputs, gate])
    wanted = []
    for b in range(BATCH):
        for h in range(HEADS):
            want, _ = by_hand(*(x[b, :, h].double() for x in inputs), 4, gate[h])
            wanted.append((want * aim[b, :, h]).sum())
    want = torch.autograd.grad(sum(wanted), [*inputs, gate])
    for a, b in zip(got, want, strict=True):
        assert a.abs().max() > 0.0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def write(folder, sites, gates):
    path = folder / "gates.safetensors"
    save_file({f"{site}.gate": gates.clone() for site in sites}, path)
    return str(path)


def addresses(subject):
    return [a.site for e in subject.experts for a in e.attentions if a.kind != "cross"]


def test_gates_come_from_the_file(tmp_path):
    """A file of equal gates is the constant gate; a trained gate moves the picture."""
    subject = Subject("wan2.2", CLIP)
    assert {s.split(".")[0] for s in addresses(subject)} == {"transformer", "transformer_2"}
    file = write(tmp_path, addresses(subject), torch.full((2,), 0.25))
    run = subject.run(VideoSparseAttention(top=2, file=file))
    same = subject.run(VideoSparseAttention(top=2, gate=0.25))
    assert torch.equal(run.latents, same.latents)
    assert run.receipt.counts == same.receipt.counts
    assert not torch.equal(run.latents, subject.run(VideoSparseAttention(top=2)).latents)


def test_every_site_gets_its_own_gate(tmp_path):
    subject = Subject("wan2.1", CLIP)
    sites = addresses(subject)
    path = tmp_path / "gates.safetensors"
    save_file({f"{s}.gate": torch.tensor([i, -i]) / 10.0 for i, s in enumerate(sites)}, path)
    with subject.open(VideoSparseAttention(file=str(path))):
        kernels = [a.module.processor.kernel for a in subject.experts[0].attentions if a.kind != "cross"]
        assert all(isinstance(kernel, SparseSite) for kernel in kernels)
        held = [kernel.weights["gate"].tolist() for kernel in kernels]
    assert held == [pytest.approx([i / 10.0, -i / 10.0]) for i in range(len(sites))]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda sites: (sites[:-1], torch.zeros(2)), "holds no transformer.blocks.3.attn1.gate"),
        (lambda sites: ([*sites, "elsewhere"], torch.zeros(2)), "holds elsewhere.gate, which no sparse site"),
        (lambda sites: (sites, torch.zeros(3)), r"is \(3,\), and this model needs \(2,\)"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, words):
    subject = Subject("wan2.1", CLIP)
    sites, gates = change(addresses(subject))
    with pytest.raises(PlanError, match=words):
        Plan([VideoSparseAttention(file=write(tmp_path, sites, gates))]).check(subject.model)


def test_missing_and_damaged_files_are_refused(tmp_path):
    model = Subject("wan2.1", CLIP).model
    with pytest.raises(PlanError, match="is missing"):
        Plan([VideoSparseAttention(file=str(tmp_path / "none.safetensors"))]).check(model)
    (tmp_path / "bad.safetensors").write_bytes(b"not at all")
    with pytest.raises(PlanError, match="cannot be read as safetensors"):
        Plan([VideoSparseAttention(file=str(tmp_path / "bad.safetensors"))]).check(model)
    with pytest.raises(ConfigError, match="top"):
        VideoSparseAttention(top=0)
