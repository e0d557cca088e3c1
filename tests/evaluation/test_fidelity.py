"""Fidelity metrics over batches: against frame functions, another package, published values, closed forms."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from vivace.core.errors import ConfigError, UnavailableError
from vivace.evaluation import weights
from vivace.evaluation.damage import DAMAGES
from vivace.evaluation.frames import FrameError
from vivace.evaluation.metrics import psnr, ssim
from vivace.evaluation.metrics.base import Context, Trajectory, registry
from vivace.evaluation.metrics.cvvdp import Cvvdp, _GaussianBlur
from vivace.evaluation.metrics.latent_error import LatentError, error_curve
from vivace.evaluation.metrics.lpips import Lpips, LpipsVgg, Network, lpips
from vivace.evaluation.metrics.psnr import Psnr
from vivace.evaluation.metrics.ssim import Ssim
from vivace.testing.metric_material import blurred, noisy, rendered, unit

LPIPS_PICTURES = Path(__file__).parent / "data" / "lpips"


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return rendered(2, 8, 48, 64)[0]


def flickering(clips: torch.Tensor, strength: float) -> torch.Tensor:
    """Every other frame brighter, the others darker."""
    signs = 1 - 2 * (torch.arange(clips.shape[1]) % 2)
    return (unit(clips) * (1 + strength * signs.view(1, -1, 1, 1, 1))).clamp(0, 1)


def needs(name: str) -> None:
    if why := registry[name]().missing():
        pytest.skip(why)


@pytest.mark.parametrize(("metric", "function"), [(Psnr, psnr), (Ssim, ssim)])
def test_batched_values_equal_the_float64_frame_function(metric, function, clips) -> None:
    other = (noisy(clips, 0.05) * 255).round().to(torch.uint8)
    other[0, 2] = clips[0, 2]  # an equal frame: infinite by itself, finite in the pool
    got = metric().measure(other, Context(reference=clips))
    for row in range(2):
        wanted = function(clips[row], other[row])
        assert got[metric.card.name][row] == pytest.approx(wanted.pooled, abs=1e-6)
        assert got[f"{metric.card.name}_worst"][row] == pytest.approx(min(wanted.per_frame), abs=1e-6)


def test_equal_clips_have_infinite_psnr(clips) -> None:
    assert Psnr().measure(clips, Context(reference=clips)) == {
        "psnr": [math.inf] * 2,
        "psnr_worst": [math.inf] * 2,
    }


def test_ssim_equals_pytorch_msssim(clips) -> None:
    package = pytest.importorskip("pytorch_msssim", reason="pytorch-msssim is not installed")
    other = blurred(clips, 1.3)
    got = Ssim().measure(other, Context(reference=clips))["ssim"]
    for row in range(2):
        frames = (x[row].double().permute(0, 3, 1, 2) for x in (unit(clips), other))
        # That package rounds its window to float32, whatever the frames are.
        assert got[row] == pytest.approx(float(package.ssim(*frames, data_range=1.0)), abs=5e-6)


@pytest.mark.parametrize(
    ("net", "far", "near"), [("alex", 0.7219, 0.1376), ("vgg", 0.5686, 0.4217)], ids=["alex", "vgg"]
)
def test_lpips_gives_the_published_values(net, far, near) -> None:
    """The authors print 0.722 and 0.138 (AlexNet) for these patches; their package gives four digits."""
    needs(f"lpips_{net}")
    reference, *others = (
        np.asarray(Image.open(LPIPS_PICTURES / f"{name}.png").convert("RGB"))[None]
        for name in ("ex_ref", "ex_p0", "ex_p1")
    )
    assert [lpips(reference, other, net=net).pooled for other in others] == pytest.approx(
        [far, near], abs=1e-4
    )
    metric = {"alex": Lpips, "vgg": LpipsVgg}[net]()
    clips = torch.from_numpy(np.stack(others))
    both = torch.from_numpy(np.stack([reference, reference]))
    got = metric.measure(clips, Context(reference=both))
    assert got[f"lpips_{net}"] == pytest.approx([far, near], abs=1e-4)
    assert got[f"lpips_{net}_worst"] == got[f"lpips_{net}"]  # one frame each


def test_lpips_network_equals_its_definition() -> None:
    """With random weights: taps after every rectifier, unit channels, squared differences, heads, means."""
    generator = torch.Generator().manual_seed(2)
    layers: list[torch.nn.Module] = []
    before = 3
    plan = [(64, 11, 4, 2), None, (192, 5, 1, 2), None, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)]
    for part in plan:
        if part is None:
            layers.append(torch.nn.MaxPool2d(3, 2))
        else:
            layers += [torch.nn.Conv2d(before, part[0], part[1], part[2], part[3]), torch.nn.ReLU()]
            before = part[0]
    trunk = torch.nn.Sequential(*layers).requires_grad_(False)
    for tensor in trunk.parameters():
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    heads = [torch.rand(width, generator=generator) for width in (64, 192, 384, 256, 256)]
    state = {f"features.{k}": v for k, v in trunk.state_dict().items()}
    state |= {f"heads.{k}": v for k, v in enumerate(heads)}
    one, two = torch.rand((2, 2, 40, 56, 3), generator=generator)
    wanted = torch.zeros(2)
    x, y = (
        (2 * v.permute(0, 3, 1, 2) - 1 - torch.tensor([-0.03, -0.088, -0.188]).view(3, 1, 1))
        / torch.tensor([0.458, 0.448, 0.45]).view(3, 1, 1)
        for v in (one, two)
    )
    taps = iter(heads)
    for layer in trunk:
        x, y = layer(x), layer(y)
        if isinstance(layer, torch.nn.ReLU):
            difference = F.normalize(x, dim=1) - F.normalize(y, dim=1)
            wanted += torch.einsum("bchw,c->bhw", difference**2, next(taps)).mean(dim=(1, 2))
    torch.testing.assert_close(Network("alex", state)(one, two), wanted, rtol=1e-4, atol=1e-6)


def test_lpips_without_weights_says_so(tmp_path, monkeypatch, clips) -> None:
    monkeypatch.setenv("VIVACE_CACHE", str(tmp_path))
    assert "python -m vivace.evaluation.weights" in Lpips().missing()
    with pytest.raises(UnavailableError, match="lpips_alex"):
        Lpips().measure(clips, Context(reference=clips))


def test_backbones_are_named_by_hash() -> None:
    for name in ("lpips_alex", "lpips_vgg"):
        backbone = registry[name].card.backbone
        assert backbone is not None
        assert backbone.sha256 == weights.known[name].sha256


@pytest.mark.parametrize("name", ["psnr", "ssim", "lpips_alex", "cvvdp"])
def test_cards_say_what_the_metric_sees(name, clips) -> None:
    """Whatever a card calls seen moves the value more than anything that it calls unseen."""
    needs(name)
    metric, short = registry[name](), clips[:, :4]
    series = metric.card.series[0]
    seen, unseen = {}, {"nothing": 0.0}
    best = metric.measure(short, Context(reference=short))[series.name]
    for damage in [*metric.card.sees, *(set(metric.card.blind_to) & set(DAMAGES))]:
        values = metric.measure(DAMAGES[damage](short), Context(reference=short))[series.name]
        loss = min(1e3, float(np.mean(np.abs(np.subtract(best, values)))))
        (seen if damage in metric.card.sees else unseen)[damage] = loss
    assert min(seen.values()) > 1.2 * max(unseen.values()), (seen, unseen)


def test_cvvdp_sees_flicker_that_psnr_does_not(clips) -> None:
    """The order that PSNR gives is the wrong one: blur is farther by PSNR, flicker is what a viewer sees."""
    needs("cvvdp")
    context = Context(reference=clips[:1])
    jod, decibels = {}, {}
    damaged = {
        "blur": blurred(clips, 1.0),
        "strong flicker": flickering(clips, 0.1),
        "flicker": flickering(clips, 0.02),
    }
    for name, other in damaged.items():
        jod[name] = Cvvdp().measure(other[:1], context)["jod"][0]
        decibels[name] = Psnr().measure(other[:1], context)["psnr"][0]
    assert jod["strong flicker"] < jod["blur"] - 5
    assert decibels["flicker"] > decibels["blur"]
    assert jod["flicker"] < jod["blur"] - 0.5
    assert Cvvdp().measure(clips[:1], context)["jod"] == [10.0]


def test_cvvdp_leaves_no_trace_in_the_interpreter(clips) -> None:
    needs("cvvdp")
    kept, path = {n: m for n, m in sys.modules.items() if "torchvision" in n}, list(sys.path)
    Cvvdp().measure(clips[:1, :2], Context(reference=clips[:1, :2]))
    assert {n: m for n, m in sys.modules.items() if "torchvision" in n} == kept
    assert not {"interp", "third_party", "pycvvdp"} & set(sys.modules)
    assert sys.path == path


def test_the_stand_in_blur_is_a_gaussian_with_reflected_borders() -> None:
    maps = torch.rand((2, 1, 20, 31), generator=torch.Generator().manual_seed(1))
    offsets = np.arange(-6, 7)
    taps = np.exp(-(offsets**2) / (2 * 3.0**2))
    grid = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(maps.numpy().astype(np.float64), ((0, 0), (0, 0), (6, 6), (6, 6)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (13, 13), axis=(2, 3))
    wanted = np.einsum("nchwij,ij->nchw", windows, grid)
    np.testing.assert_allclose(_GaussianBlur(13, 3).forward(maps).numpy(), wanted, atol=1e-6)


def test_cvvdp_refuses_tiny_frames_and_other_versions(clips, monkeypatch) -> None:
    needs("cvvdp")
    tiny = clips[:, :, :12]
    with pytest.raises(FrameError, match="16x16"):
        Cvvdp().measure(tiny, Context(reference=tiny))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.0")
    assert "another calibration" in Cvvdp().missing()


def trajectory(sigmas: tuple[float, ...], latents: torch.Tensor) -> Trajectory:
    return Trajectory(sigmas=sigmas, latents=latents)


def test_latent_error_of_a_known_scaling() -> None:
    exact = torch.randn((4, 2, 3, 5), generator=torch.Generator().manual_seed(0))
    sigmas = (0.75, 0.5, 0.25, 0.0)
    other = exact * torch.tensor([1.3, 1.5, 1.1, 1.2]).view(4, 1, 1, 1)
    context = Context(trajectory=trajectory(sigmas, other), reference_trajectory=trajectory(sigmas, exact))
    got = LatentError().measure(torch.zeros(0), context)
    assert got["latent_rel_l2"] == pytest.approx([0.2, 0.2], abs=1e-6)
    assert got["latent_rel_l2_max"] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert got["latent_cosine"] == pytest.approx([1.0, 1.0])


def test_latent_error_of_fewer_steps_on_the_same_straight_line_is_zero() -> None:
    """Latents linear in sigma: interpolation is exact at noise levels that the reference never visited."""
    start, goal = torch.randn((2, 1, 2, 4, 4), generator=torch.Generator().manual_seed(1)).double()

    def line(sigmas: tuple[float, ...]) -> Trajectory:
        return trajectory(sigmas, torch.stack([s * start + (1 - s) * goal for s in sigmas]))

    curve = error_curve(line((0.9, 0.8, 0.6, 0.4, 0.2, 0.0)), line((0.85, 0.5, 0.1, 0.0)))
    assert curve.sigmas == (0.85, 0.5, 0.1, 0.0)
    assert curve.rel_l2.shape == (4, 1)
    assert float(curve.rel_l2.max()) < 1e-12
    assert float(curve.cosine.min()) == pytest.approx(1.0)


def test_latent_error_of_orthogonal_latents() -> None:
    exact = torch.tensor([1.0, 0.0]).view(1, 1, 2)
    curve = error_curve(trajectory((0.0,), exact), trajectory((0.0,), exact.flip(-1)))
    assert curve.rel_l2.item() == pytest.approx(math.sqrt(2))
    assert curve.cosine.item() == 0.0


def test_latent_error_asks_for_both_trajectories(clips) -> None:
    with pytest.raises(ConfigError, match="record the latents"):
        LatentError().measure(clips, Context())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["psnr", "ssim", "lpips_alex", "lpips_vgg", "cvvdp"])
def test_values_on_a_gpu_are_those_of_the_cpu(name, clips) -> None:
    needs(name)
    other, context = blurred(clips, 1.0), Context(reference=clips)
    on_gpu, on_cpu = (registry[name](device=d).measure(other, context) for d in ("cuda", "cpu"))
    for series, values in on_cpu.items():
        assert on_gpu[series] == pytest.approx(values, rel=1e-4)
