"""The whole programme at toy size: train, pack, unpack, export, load, generate, evaluate."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file

from vivace.core.errors import WeightsError
from vivace.tiny.build import build_pipeline
from vivace.tiny.load import MANIFEST, load_tiny
from vivace.tiny.train import __main__ as commands
from vivace.tiny.train import text_to_video
from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.evaluate import evaluate, sample_clips
from vivace.tiny.train.export import export, pack, read_pipeline, unpack

SIZE = "--size 5 32 32"
CALL = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 64}


def generate(pipeline: WanPipeline, **extra) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    return pipeline("a red sphere", generator=noise, output_type="pt", **CALL | extra).frames.float()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of the first two stages, with the embedded configuration."""
    out = tmp_path_factory.mktemp("run")
    vae = f"vae --out {out} --steps 2 --bank 4 --portion 2 --stage 1:5x16x2 --eval-clips 2 {SIZE}"
    assert commands.main(vae.split()) == 0
    flow = f"text-to-video --out {out} --vae {out}/vae --steps 2 --clips 4 --portion 2 --batch 2 --no-compile {SIZE}"
    assert commands.main(flow.split()) == 0
    return out


def test_training_leaves_weights_records_and_a_sheet(run: Path):
    quality = json.loads((run / "vae.json").read_text())["quality"]
    assert len(quality["psnr_per_frame"]) == 5
    assert 0 < quality["psnr_objects"] < 100
    record = json.loads((run / "text_to_video.json").read_text())
    assert record["steps"] == 2
    assert record["clips"] == 4
    assert len(record["latent_deviation"]) == 48
    assert (run / "vae.png").stat().st_size > 1000
    power = sum(d * d for d in record["latent_deviation"]) / 48
    assert 0.3 < power < 3.0, "the transformer works on latents of about unit power"


def test_plain_diffusers_runs_the_result(run: Path):
    pipeline = WanPipeline.from_pretrained(run / "pipeline", dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    frames = generate(pipeline)
    assert frames.shape == (1, 5, 3, 32, 32)
    assert frames.isfinite().all()
    assert frames.std() > 0
    half = WanPipeline.from_pretrained(run / "pipeline", dtype=torch.bfloat16, local_files_only=True)
    half.set_progress_bar_config(disable=True)
    assert (generate(half) - frames).abs().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_our_reader_gives_what_diffusers_gives(run: Path, dtype):
    plain = WanPipeline.from_pretrained(run / "pipeline", dtype=dtype, local_files_only=True)
    ours = read_pipeline(run / "pipeline", dtype)
    for part in ("transformer", "vae", "text_encoder"):
        expected, found = getattr(plain, part).state_dict(), getattr(ours, part).state_dict()
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            n: t.dtype for n, t in expected.items()
        }
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_pack_unpack_export_load(run: Path, tmp_path: Path):
    packed, folder = tmp_path / "packed", tmp_path / "weights"
    assert commands.main(["export", "--pipeline", f"{run}/pipeline", "--pack-to", f"{packed}"]) == 0
    assert commands.main(["export", "--packed", f"{packed}", "--folder", f"{folder}"]) == 0
    files = [*packed.iterdir(), *(p for p in folder.rglob("*") if p.is_file())]
    assert max(p.stat().st_size for p in files) <= 16 * 2**20
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 23 * 2**20
    expected = generate(
        WanPipeline.from_pretrained(run / "pipeline", dtype=torch.float32, local_files_only=True)
    )
    assert torch.equal(generate(load_tiny(torch.float32, folder)), expected)


def test_damaged_or_missing_weights_are_named(pipeline, tmp_path: Path):
    folder = tmp_path / "weights"
    manifest = export(pipeline, folder)
    assert "vae/diffusion_pytorch_model.safetensors" in manifest
    victim = folder / "text_encoder" / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(WeightsError, match=r"text_encoder.*model\.safetensors is damaged"):
        load_tiny(folder=folder)
    victim.unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing"):
        load_tiny(folder=folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(WeightsError, match=MANIFEST):
        load_tiny(folder=folder)


def test_packed_weights_of_another_size_are_refused(pipeline, tmp_path: Path):
    paths = pack(pipeline, tmp_path, largest=100_000)
    assert len(paths) > 1
    assert all(path.stat().st_size <= 100_000 or len(load_file(path)) == 1 for path in paths)
    with pytest.raises(WeightsError, match="does not fit"):
        unpack(tmp_path)
    with pytest.raises(WeightsError, match="pack a trained pipeline"):
        unpack(tmp_path / "nowhere")


def test_a_clip_depends_on_its_seed_not_on_its_batch(pipeline):
    shape, options = ClipShape(frames=5, height=32, width=32), {"steps": 2, "guidance": 3.0}
    prompts, seeds = ["a red sphere", "a blue cube", "a green cone"], [5, 6, 7]
    together = sample_clips(pipeline, prompts, seeds, shape=shape, batch=3, **options)
    apart = sample_clips(pipeline, prompts, seeds, shape=shape, batch=2, **options)
    assert together.shape == (3, 5, 32, 32, 3)
    assert together.dtype == torch.uint8
    assert (together.int() - apart.int()).abs().max() <= 1  # rounding; the batch size may change the kernels


def test_evaluation_chooses_guidance_on_other_prompts_and_reports(pipeline, tmp_path: Path):
    asked = []

    def check(clips: torch.Tensor, wanted: list) -> list[dict[str, bool]]:
        """A yardstick that can be checked by hand: is the clip brighter than mid grey, and was a motion asked for."""
        asked.append(wanted)
        return [
            {"bright": bool(clip.float().mean() > 127), "moving": w.motion is not None}
            for clip, w in zip(clips, wanted, strict=True)
        ]

    record = evaluate(
        pipeline,
        check,
        torch.device("cpu"),
        shape=ClipShape(frames=5, height=32, width=32, supersample=1),
        count=3,
        development=2,
        guidances=(2.0, 3.0),
        steps=1,
        batch=2,
        sheets=tmp_path,
        sheet_rows=2,
    )
    assert record["guidance"] in (2.0, 3.0)
    assert set(record["development"]["sweep"]) == {"2.0", "3.0"}
    assert record["accuracy"]["moving"] == 1.0
    assert record["accuracy"]["mean"] == pytest.approx((1.0 + record["accuracy"]["bright"]) / 2)
    assert record["worst"][1] == min(record["accuracy"].values())
    assert sum(len(batch) for batch in asked) == 2 * 2 + 3 * 3
    assert (tmp_path / "samples-1.png").exists()
    assert (tmp_path / "samples-2.png").exists()


def test_latents_of_an_earlier_run_are_reused(run: Path, small):
    arguments = argparse.Namespace(out=run, clips=10**9)
    pipeline = build_pipeline(0)
    pipeline.register_modules(vae=AutoencoderKLWan.from_pretrained(run / "vae"))
    processes = text_to_video.Processes(0, 1, torch.device("cpu"))
    data = text_to_video.gather_latents(pipeline, processes, ClipShape(), arguments)
    assert len(data) == 4
    assert data.latents.shape[1:] == (48, 2, 4, 4)


def test_unknown_or_unusable_arguments_end_with_a_sentence(capsys, tmp_path: Path):
    assert commands.main(["export", "--packed", f"{tmp_path}/nowhere"]) == 2
    assert "pack a trained pipeline" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        commands.main(["text-to-speech"])
