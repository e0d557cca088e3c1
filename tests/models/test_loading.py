"""Pipelines and descriptions from folders, names and objects, and one clear sentence for everything that is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from vivace.core.errors import ModelError, OfflineError, PlanError, UnknownNameError, WeightsError
from vivace.models.adapter import Guidance, Need
from vivace.models.describe import describe_pipeline
from vivace.models.loading import describe, load, safetensors_header
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.testing import models


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small-wan"
    models.pipeline("wan2.2").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "small-wan"))


def weights(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def run(pipe, **call):
    generator = torch.Generator().manual_seed(0)
    arguments = models.call("wan2.2") | {"num_inference_steps": 3} | call
    return pipe(prompt="red", generator=generator, output_type="latent", **arguments).frames


def test_a_folder_gives_the_pipeline_that_was_saved(saved):
    pipe = load(saved)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "WanPipeline"
    original = models.pipeline("wan2.2")
    for part in ("transformer", "transformer_2", "vae", "text_encoder"):
        weights = getattr(original, part).state_dict()
        assert all(torch.equal(weights[k], v) for k, v in getattr(pipe, part).state_dict().items())
    # Weights read from a file lie at other addresses, and on some processors a product's rounding depends on those.
    torch.testing.assert_close(run(pipe), run(original), rtol=0, atol=1e-4)
    assert describe_pipeline(pipe).name == "small-wan"


def test_folder_and_pipeline_have_the_same_description(saved):
    told, live = describe(saved), describe(models.pipeline("wan2.2"))
    for field in ("pipeline_class", "family", "experts", "scheduler_class", "guidance", "pixels", "offers"):
        assert getattr(told, field) == getattr(live, field), field
    assert told.boundary_ratio == live.boundary_ratio == 0.8
    assert told.grid(told.workload()) == live.grid(live.workload())
    assert told.name == "small-wan"


def test_weights_keep_the_type_they_were_saved_in_unless_told(tmp_path):
    pipe = models.pipeline("cogvideox")
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    same = load(tmp_path)
    assert (same.transformer.dtype, same.vae.dtype) == (torch.bfloat16, torch.float32)
    half = load(tmp_path, dtype=torch.float16)
    assert (half.transformer.dtype, half.vae.dtype) == (torch.float16, torch.float16)


def test_defaults_serve_a_session_and_leave_the_pipeline_alone():
    pipe = models.pipeline("wan2.1")
    before = dict(vars(pipe))
    assert load(pipe, defaults=models.call("wan2.1") | {"num_inference_steps": 3}) is pipe
    assert vars(pipe) == before
    assert describe_pipeline(pipe).workload().steps == 3
    with accelerate(pipe, Plan()) as session:
        out = session("red")
    assert out.frames.shape == (9, 32, 32, 3)
    assert len(out.receipt.steps) == 3


def test_device_is_where_the_pipeline_goes(saved):
    assert load(saved, device="cpu").transformer.device.type == "cpu"


def test_the_embedded_model_is_described_without_weights():
    model = describe("tiny")
    assert (model.name, model.family, model.guidance) == ("tiny", "wan", Guidance.SEPARATE)
    assert model.grid(model.workload()).video == 2048


@pytest.mark.parametrize("action", [load, describe])
def test_unknown_names_get_an_offer(action):
    with pytest.raises(UnknownNameError, match="did you mean tiny"):
        action("tinny")


def test_known_configurations_have_no_weights():
    assert describe("hunyuanvideo").depth == 60
    with pytest.raises(ModelError, match="hunyuanvideo-community/HunyuanVideo"):
        load("hunyuanvideo")


@pytest.mark.parametrize("action", [load, describe])
def test_a_folder_that_is_no_pipeline_names_the_missing_file(action, tmp_path):
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        action(tmp_path)
    with pytest.raises(ModelError, match="is no folder"):
        action(tmp_path / "nowhere")


@pytest.mark.parametrize("action", [load, describe])
def test_a_damaged_configuration_is_named(action, folder):
    (folder / "transformer" / "config.json").write_text("{broken")
    with pytest.raises(ModelError, match=r"transformer/config\.json cannot be read"):
        action(folder)


@pytest.mark.parametrize("content", ["[]", '{"_diffusers_version": "0.42"}'])
def test_an_index_of_something_else_is_named(content, tmp_path):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model_index\.json"):
        describe(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 5_000, -1])
def test_truncated_weights_are_named(keep, folder):
    content = weights(folder).read_bytes()
    weights(folder).write_bytes(content[:keep])
    with pytest.raises(WeightsError, match=r"transformer/diffusion_pytorch_model\.safetensors is damaged"):
        load(folder)


def test_garbage_in_the_header_is_named(folder):
    content = bytearray(weights(folder).read_bytes())
    content[8:40] = b"\xff" * 32
    weights(folder).write_bytes(bytes(content))
    with pytest.raises(WeightsError, match="is damaged"):
        load(folder)


def test_missing_weights_shards_and_components_are_named(folder):
    index = {"metadata": {}, "weight_map": {"a": "part-1-of-2.safetensors"}}
    (folder / "transformer_2" / "x.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="part-1-of-2"):
        load(folder)
    weights(folder).unlink()
    with pytest.raises(WeightsError, match="transformer holds no weights"):
        load(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelError, match=r"vae/config\.json is missing"):
        load(folder)


def test_a_class_that_diffusers_lacks_is_one_sentence(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "MyOwnPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="MyOwnPipeline") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_the_header_tells_the_tensors(saved):
    pipe = load(saved)
    header = safetensors_header(weights(saved))
    assert {k: tuple(v["shape"]) for k, v in header.items()} == {
        k: tuple(v.shape) for k, v in pipe.transformer.state_dict().items()
    }


@pytest.mark.parametrize("action", [load, describe])
def test_a_hub_id_offline_says_what_to_do(action, monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OfflineError, match=r"hf download vivace-tests/absent.*or pass a folder") as error:
        action("vivace-tests/absent")
    assert "\n" not in str(error.value)


def test_the_local_cache_serves_a_hub_id_offline(saved, monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    home = tmp_path / "models--org--small-wan"
    shutil.copytree(saved, home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert describe("org/small-wan").name == "org/small-wan"
    assert describe_pipeline(load("org/small-wan")).name == "org/small-wan"


@pytest.mark.parametrize("thing", [torch.nn.Linear(1, 1), lambda: None, 3])
def test_things_that_are_no_pipelines_are_refused(thing):
    with pytest.raises(ModelError, match="is no video pipeline"):
        load(thing)


# -- pipelines without an adapter -----------------------------------------------------------------------------


def latte():
    """A tiny real pipeline whose transformer Vivace has no adapter for."""
    from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = LatteTransformer3DModel(
            sample_size=4,
            num_layers=1,
            video_length=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
            attention_bias=True,
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
        ).eval()
        text = T5EncoderModel(
            T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ).eval()
        vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4,
                            down_block_types=("DownEncoderBlock2D",) * 2,
                            up_block_types=("UpDecoderBlock2D",) * 2).eval()  # fmt: skip
    pipe = LattePipeline(
        tokenizer=models.byte_tokenizer(120), text_encoder=text, vae=vae, transformer=transformer,
        scheduler=DDIMScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_without_adapter_loads_is_described_and_runs():
    pipe = load(latte())
    model = describe(pipe)
    assert (model.family, model.adapter, model.pixels, model.depth) == ("", None, None, 0)
    assert model.grid(model.workload()) is None
    assert Need.ORDERED_BLOCKS not in model.offers

    def call(target, **more):
        return target(
            prompt="red",
            height=8,
            width=8,
            video_length=2,
            num_inference_steps=3,
            clean_caption=False,
            **more,
        )

    plain = call(pipe, generator=torch.Generator().manual_seed(0), output_type="latent").frames
    with accelerate(pipe, Plan()) as session:
        out = call(session, seed=0, output_type="latent")
    assert torch.equal(plain, out.raw.frames)
    assert out.receipt.completed
    assert out.receipt.flops == out.receipt.flops_dense > 0
    assert out.receipt.blocks_total == 0


def test_only_techniques_that_need_an_adapter_are_refused_without_one():
    from vivace.techniques.base import registry

    if "first_block_cache" not in registry:
        pytest.skip("no technique that needs blocks is there")
    with pytest.raises(PlanError, match="no adapter for LatteTransformer3DModel"):
        accelerate(latte(), Plan([registry["first_block_cache"]()]))
