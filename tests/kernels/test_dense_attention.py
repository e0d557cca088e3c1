"""Dense attention: every vendor that can run here against the sum written out, and reasons for those that cannot."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from vivace.core.errors import ConfigError
from vivace.kernels.api import candidates, select
from vivace.kernels.dense_attention.spec import OP, TOLERANCE

HERE = [c for c in candidates(OP) if not c.refuse({"device": "cpu"}) and not c.avoid({"device": "cpu"})]
GPU = {"device": "cuda", "dtype": "bfloat16", "head_dim": 128}
LINUX_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is refused without one")


def by_hand(q, k, v, mask=None):
    """The definition, query by query, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                s = (k[b, :, h] * q[b, i, h]).sum(-1) / math.sqrt(q.shape[-1])
                if mask is not None:
                    row = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])[b, h, i]
                    s = s.masked_fill(~row, float("-inf")) if row.dtype == torch.bool else s + row.double()
                w = (s - s.max()).exp()
                out[b, i, h] = (w / w.sum()) @ v[b, :, h]
    return out


def inputs(dtype=torch.float32, queries=11, keys=17):
    g = torch.Generator().manual_seed(5)
    sizes = ((2, queries, 3, 16), (2, keys, 3, 16), (2, keys, 3, 16))
    return [torch.randn(s, generator=g).to(dtype) for s in sizes]


def test_cpu_has_torchs_two():
    assert [c.name for c in HERE] == ["flash", "math"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [c.name for c in HERE])
def test_values(name, dtype):
    q, k, v = inputs(getattr(torch, dtype))
    out = select(OP, name, device="cpu", dtype=dtype).run(q, k, v)
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    assert (out.double() - by_hand(q, k, v)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("name", [c.name for c in HERE])
def test_masks(name):
    q, k, v = inputs()
    seen = torch.rand(2, 1, 1, 17, generator=torch.Generator().manual_seed(1)) > 0.4
    run = select(OP, name, device="cpu", mask=True).run
    want = by_hand(q, k, v, seen)
    assert (run(q, k, v, seen).double() - want).abs().max() < 1e-5
    added = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    assert (run(q, k, v, added).double() - want).abs().max() < 1e-5
    assert (run(q, k, v).double() - want).abs().max() > 1e-2


@pytest.mark.parametrize("name", [c.name for c in HERE])
def test_any_strides_and_inputs_stay(name):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs())
    before = [x.clone() for x in (q, k, v)]
    out = select(OP, name, device="cpu").run(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
    torch.testing.assert_close(out, select(OP, name, device="cpu").run(*before))


@pytest.mark.parametrize("name", [c.name for c in HERE])
def test_no_graph_break_and_gradients(name):
    run = select(OP, name, device="cpu").run
    q, k, v = (x.requires_grad_() for x in inputs())
    compiled = torch.compile(lambda q, k, v: run(q * 2, k, v) + 1, backend="eager", fullgraph=True)
    out = compiled(q, k, v)
    torch.testing.assert_close(out, run(q * 2, k, v) + 1)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    twice = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", twice[0] * 2, twice[1]) / 4
    plain = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), twice[2]) + 1
    for a, b in zip(grads, torch.autograd.grad(plain.square().sum(), twice), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
@LINUX_GPU
def test_a_backend_that_cannot_serve_raises_instead_of_handing_over(name):
    from vivace.kernels.dense_attention.vendors import VENDORS

    with pytest.raises(RuntimeError):
        VENDORS[name]()(*inputs())


@pytest.mark.parametrize(
    ("name", "context", "reason"),
    [
        ("cudnn", {"device": "cpu"}, "needs a GPU"),
        ("efficient", {"device": "cpu"}, "needs a GPU"),
        ("cudnn", GPU | {"dtype": torch.float32}, "not float32"),
        ("cudnn", GPU | {"head_dim": 256}, "not 256"),
        ("flash", GPU | {"mask": True}, "takes no mask"),
        ("flash", GPU | {"head_dim": 20}, "not 20"),
        ("flash", GPU | {"dtype": "float32"}, "not float32"),
        ("efficient", GPU | {"head_dim": 20}, "multiple of 8"),
        ("flex", GPU | {"head_dim": 8}, "at least 16"),
        ("flex", GPU | {"mask": True}, "takes no mask"),
    ],
)
def test_refusals(name, context, reason):
    with pytest.raises(ConfigError, match=reason):
        select(OP, name, **context)


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient", "flex", "math"])
def test_what_fits_is_not_refused(name):
    if torch.cuda.is_available():
        pytest.skip("depends on the GPU")
    assert next(c for c in candidates(OP) if c.name == name).refuse(GPU) is None


def _here(monkeypatch, *modules):
    import importlib.util

    old = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: object() if n in modules else old(n, *rest)
    )


@pytest.mark.parametrize(
    ("name", "module"),
    [("flash_attn", "flash_attn"), ("flash_attn_3", "flash_attn_interface"), ("sage", "sageattention")],
)
def test_packages(monkeypatch, name, module):
    refuse = next(c for c in candidates(OP) if c.name == name).refuse
    if module not in sys.modules:
        assert "is not installed" in (refuse(GPU) or "is not installed")
    _here(monkeypatch, module)
    if not torch.cuda.is_available():
        assert refuse(GPU) is None
    assert "needs a GPU" in str(refuse({"device": "cpu"}))
    assert "float32" in str(refuse(GPU | {"dtype": "float32"}))
    assert "mask" in str(refuse(GPU | {"mask": True}))


def test_what_rounds_is_never_chosen_unasked(monkeypatch):
    _here(monkeypatch, "sageattention")
    sage = next(c for c in candidates(OP) if c.name == "sage")
    assert "8 bits" in str(sage.avoid(GPU))
    assert "not 80" in str(sage.refuse(GPU | {"head_dim": 80}))


def test_a_mask_for_a_vendor_without_is_refused_in_the_call(monkeypatch):
    from vivace.kernels.dense_attention.vendors import VENDORS

    q, k, v = inputs()
    with pytest.raises(ValueError, match="takes no mask"):
        VENDORS["flex"]()(q, k, v, torch.ones(1, 1, 1, 17, dtype=torch.bool))
