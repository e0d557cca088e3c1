"""Dynamic attention on a GPU, end to end: a real Wan pipeline in bfloat16 against the same one on a CPU."""

from __future__ import annotations

import pytest
import torch

from vivace import Plan, accelerate
from vivace.core.receipt import Receipt
from vivace.kernels.api import candidates
from vivace.techniques.attention.sla import SparseLinearAttention
from vivace.techniques.attention.svg2 import Svg2
from vivace.techniques.attention.vmoba import VideoMoba
from vivace.testing import models
from vivace.testing.subjects import distance

CALL = {"num_frames": 33, "height": 256, "width": 256, "num_inference_steps": 2}
SVG2 = Svg2(dense_steps=0, dense_layers=0, mass=0.1, share=0.25, clusters_q=20, clusters_k=50, first=4)
METHODS = [
    (SparseLinearAttention(critical=0.25), 0.03),
    (SparseLinearAttention(critical=0.25, precision="int8"), 0.03),
    (VideoMoba(dense_steps=1, threshold=0.25), 0.03),
    # Between two clusters a token goes by the last bit: two exact CPU kernels are 0.05 apart here.
    (SVG2, 0.15),
]
"""Methods, and how far the latents may be from those of the CPU: bfloat16 alone makes about 0.01."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def pipeline(device: str):
    """A tiny Wan 2.1 whose heads have 64 channels, which the GPU kernels need."""
    from diffusers import WanTransformer3DModel

    pipe = models.pipeline("wan2.1", layers=1)
    torch.manual_seed(1)
    pipe.transformer = WanTransformer3DModel.from_config(
        pipe.transformer.config, attention_head_dim=64, num_layers=2, ffn_dim=128
    ).eval()
    models.enliven(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.bfloat16)


def run(device: str, *techniques) -> tuple[torch.Tensor, Receipt]:
    """Latents of a clip of 9 x 16 x 16 tokens, 36 blocks of 64."""
    with accelerate(pipeline(device), Plan(techniques)) as session:
        out = session("a red ball", seed=7, output_type="latent", **models.call("wan2.1") | CALL)
    return torch.as_tensor(out.raw.frames).float().cpu(), out.receipt


@pytest.mark.parametrize(("technique", "bound"), METHODS, ids=lambda t: getattr(t, "precision", t))
def test_a_gpu_makes_the_clip_of_the_cpu(technique, bound) -> None:
    attend = "low_bit_attention" if technique.precision == "int8" else "block_attention"
    fast = next(c for c in candidates(attend) if c.name == "triton")
    if reason := fast.refuse({"device": "cuda", "block": 64, "head_dim": 64, "dtype": "bfloat16"}):
        pytest.skip(reason)
    got, receipt = run("cuda", technique)
    want, known = run("cpu", technique.replace(backend="reference"))
    dense, _ = run("cpu")
    assert {k.op: k.choice for k in receipt.kernels}[attend] in ("triton", "hopper")
    assert got.isfinite().all()
    # Scores that lie close may be ranked apart, so lists that end at a sum differ in length by a little.
    assert receipt.attention_pairs == pytest.approx(known.attention_pairs, rel=0.02)
    assert receipt.attention_pairs < 0.7 * receipt.attention_pairs_dense
    assert distance(got, want) < bound
    assert distance(got, want) < distance(got, dense)


def test_sorted_by_meaning_and_put_back() -> None:
    """With all blocks kept, SVG2 is dense attention of sorted tokens: clusters and permutations must leave no trace."""
    dense, _ = run("cuda")
    got, receipt = run("cuda", SVG2.replace(share=1.0))
    assert "cluster_tokens by triton" in next(k.why for k in receipt.kernels if k.op == "block_select")
    assert distance(got, dense) < 0.03
    assert receipt.attention_pairs > receipt.attention_pairs_dense  # k-means is counted
