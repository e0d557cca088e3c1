"""Sparse-Linear Attention against both branches written out token by token, its projections' file, its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from vivace import Plan
from vivace.core.errors import PlanError
from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.op import runner as attention_by
from vivace.kernels.block_select.op import runner as selection_by
from vivace.kernels.trained_sparse import linear_branch
from vivace.techniques.attention.dynamic import View
from vivace.techniques.attention.sla import SparseLinearAttention
from vivace.testing.subjects import Subject

GRID = TokenGrid(3, 5, 6, text=20)  # 90 tokens of video: five blocks of 16 and one of 10
D, HEADS, BATCH = 8, 2, 2
CLIP = {"num_frames": 33, "height": 64, "width": 64, "num_inference_steps": 2}  # 9 x 4 x 4 tokens
BLOCKS = [list(range(i, min(i + 16, 90))) for i in range(0, 90, 16)]


def noise(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, GRID.tokens, HEADS, D, generator=generator) for _ in range(3)]


def projection(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "proj.weight": torch.randn(D, D, generator=generator) / D**0.5,
        "proj.bias": torch.randn(D, generator=generator),
    }


def view_of(technique, q, k, v, weights=None):
    layout = technique.layout(GRID)
    arranged = (layout.arrange(x) for x in (q, k, v))
    view = View(*arranged, layout, D**-0.5, {}, selection_by("reference"), attention_by("reference"))
    view.weights = weights or {}
    return view


def attend(technique, q, k, v, weights=None, kept=None):
    view = view_of(technique, q, k, v, weights)
    out, routes = technique.attention(view, kept)
    return view.layout.restore(out), routes, view


def by_hand(q, k, v, critical, skipped, weights=None, chosen=None):
    """One head (S, D). `chosen` are exact blocks of every row, where they are not the best ones."""
    out, text = torch.zeros_like(v), list(range(90, GRID.tokens))
    for i, rows in enumerate(BLOCKS):
        worth = [float(q[rows].detach().mean(0) @ k[b].detach().mean(0)) for b in BLOCKS]
        rank = sorted(range(6), key=lambda j, w=worth: -w[j])
        exact = rank[: math.ceil(critical * 6)] if chosen is None else chosen[i]
        rest = [j for j in rank if j not in exact]
        middling = rest[: max(0, len(rest) - math.floor(skipped * 6))]
        seen = text + [t for j in exact for t in BLOCKS[j]]
        out[rows] = torch.softmax(q[rows] @ k[seen].T * D**-0.5, -1) @ v[seen]
        if weights is not None:
            linear = torch.stack([naive(q[t], [u for j in middling for u in BLOCKS[j]], k, v) for t in rows])
            out[rows] = out[rows] + linear @ weights["proj.weight"].double().T + weights["proj.bias"].double()
    out[text] = torch.softmax(q[text] @ k.T * D**-0.5, -1) @ v
    return out


def naive(query, keys, k, v):
    """Linear attention of one query: every key with the weight f(q).f(k)."""
    if not keys:
        return torch.zeros_like(query)
    f = torch.softmax(query, -1)
    weights = torch.stack([(f * torch.softmax(k[u], -1)).sum() for u in keys])
    return (weights[:, None] * v[keys]).sum(0) / weights.sum()


@pytest.mark.parametrize(("critical", "skipped"), [(0.05, 0.1), (0.3, 0.4), (0.5, 0.5), (0.9, 0.2)])
@pytest.mark.parametrize("trained", [False, True])
def test_is_the_method_written_out(critical, skipped, trained):
    q, k, v = noise()
    weights = projection() if trained else None
    technique = SparseLinearAttention(critical=critical, skipped=skipped)
    out, routes, view = attend(technique, q, k, v, weights)
    for b in range(BATCH):
        for h in range(HEADS):
            head = (x[b, :, h].double() for x in (q, k, v))
            want = by_hand(*head, critical, skipped, weights)
            torch.testing.assert_close(out[b, :, h].double(), want, rtol=1e-4, atol=1e-5)
    assert (routes.count[:, :, :6] == math.ceil(critical * 6) + 2).all()  # two blocks of text
    assert view.beside == ((3 * 96 + 36) * D / 2 if trained else 0.0)


def test_linear_branch_over_any_mask():
    """Also over no block at all, which gives zero."""
    q, k, v = noise(2)
    view = view_of(SparseLinearAttention(), q, k, v)
    mask = torch.rand(BATCH, HEADS, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, :, 2] = False
    blocks = (x.unflatten(2, (-1, 16))[:, :, :6] for x in (view.q, view.k, view.v))
    got = linear_branch(*blocks, mask, view.layout.gone.view(-1, 16)[:6])
    for b in range(BATCH):
        for h in range(HEADS):
            head = [x[b, :, h].double() for x in (q, k, v)]
            for i, rows in enumerate(BLOCKS):
                keys = [u for j in range(6) if mask[b, h, i, j] for u in BLOCKS[j]]
                want = torch.stack([naive(head[0][t], keys, *head[1:]) for t in rows])
                torch.testing.assert_close(got[b, h, rows].double(), want, rtol=1e-4, atol=1e-6)


def test_a_few_rows_at_a_time_change_nothing(monkeypatch):
    q, k, v = noise()
    whole, _, _ = attend(SparseLinearAttention(), q, k, v, projection())
    monkeypatch.setattr("vivace.kernels.trained_sparse.MOST", 2 * BATCH * HEADS * D * D)
    parts, _, _ = attend(SparseLinearAttention(), q, k, v, projection())
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_kept_lists_are_exact_and_the_rest_is_judged_anew():
    technique, weights = SparseLinearAttention(critical=0.3, skipped=0.4, refresh=2), projection()
    _, routes, _ = attend(technique, *noise(0), weights)
    q, k, v = noise(7)
    out, again, _ = attend(technique, q, k, v, weights, kept=routes)
    assert again is routes
    mask = routes.mask(8)
    for b in range(BATCH):
        for h in range(HEADS):
            chosen = [mask[b, h, i, :6].nonzero().flatten().tolist() for i in range(6)]
            head = (x[b, :, h].double() for x in (q, k, v))
            want = by_hand(*head, 0.3, 0.4, weights, chosen)
            torch.testing.assert_close(out[b, :, h].double(), want, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_method_written_out():
    inputs = [x.requires_grad_() for x in noise(3)]
    weights = {name: x.requires_grad_() for name, x in projection().items()}
    aim = torch.randn(BATCH, GRID.tokens, HEADS, D, generator=torch.Generator().manual_seed(4))
    out, _, _ = attend(SparseLinearAttention(critical=0.3), *inputs, weights)
    got = torch.autograd.grad((out * aim).sum(), [*inputs, *weights.values()])
    loss = 0.0
    for b in range(BATCH):
        for h in range(HEADS):
            want = by_hand(*(x[b, :, h].double() for x in inputs), 0.3, 0.1, weights)
            loss = loss + (want * aim[b, :, h]).sum()
    want = torch.autograd.grad(loss, [*inputs, *weights.values()])
    for a, b in zip(got, want, strict=True):
        assert a.abs().max() > 0.0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def write(folder, subject, scale, drop=0):
    sites = [a for e in subject.experts for a in e.attentions if a.kind != "cross"]
    generator, tensors = torch.Generator().manual_seed(0), {}
    for site in sites[drop:]:
        d = site.head_dim
        tensors[f"{site.site}.proj.weight"] = scale * torch.randn(d, d, generator=generator)
        tensors[f"{site.site}.proj.bias"] = torch.zeros(d)
    save_file(tensors, folder / "projections.safetensors")
    return str(folder / "projections.safetensors")


def test_a_projection_of_zero_is_no_linear_branch(tmp_path):
    """As at the start of training: the picture is the untrained one, the branch's work is counted."""
    subject = Subject("wan2.1", CLIP)
    plain = subject.run(SparseLinearAttention(critical=0.3))
    zero = subject.run(SparseLinearAttention(critical=0.3, file=write(tmp_path, subject, 0.0)))
    assert torch.equal(zero.latents, plain.latents)
    work = 2 * 2 * 4 * 2 * (3 * 144 + 9**2) * 12 / 2  # steps, branches, layers, heads
    more = zero.receipt.counts["attention_pairs"] - plain.receipt.counts["attention_pairs"]
    assert more == pytest.approx(work)
    trained = subject.run(SparseLinearAttention(critical=0.3, file=write(tmp_path, subject, 0.1)))
    assert not torch.equal(trained.latents, plain.latents)


def test_files_that_do_not_fit_are_refused_and_none_is_told(tmp_path):
    subject = Subject("wan2.1", CLIP)
    file = write(tmp_path, subject, 0.1, drop=1)
    with pytest.raises(PlanError, match=r"holds no transformer\.blocks\.0\.attn1\.proj\.weight"):
        Plan([SparseLinearAttention(file=file)]).check(subject.model)
    warnings = Plan([SparseLinearAttention()]).check(subject.model)
    assert any("linear branch has no weight: only the top 5% of the key blocks" in str(w) for w in warnings)
    fitting = write(tmp_path, subject, 0.1)
    assert not any(
        "linear branch" in str(w) for w in Plan([SparseLinearAttention(file=fitting)]).check(subject.model)
    )
