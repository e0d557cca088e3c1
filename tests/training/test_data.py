"""Training data: what a source makes is what a stream gives, in the same order, from wherever it is taken up."""

from __future__ import annotations

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch

from vivace.core.errors import ConfigError, ModelError, ShapeError, WeightsError
from vivace.models.loading import load
from vivace.testing.models import pipeline as small
from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.common import Processes
from vivace.tiny.train.latents import make_encoder, pool_mask
from vivace.training.data.encoding import Encoder, Normalisation, identity_of, pool
from vivace.training.data.samples import MemorySet
from vivace.training.data.shards import EMPTY, HEAD, LatentShards, shard_name
from vivace.training.data.sources import STREAM, TeacherSource, VideoSource, WorldSource
from vivace.training.data.videos import captioned, clip
from vivace.training.data.writing import ShardWriter, fill
from vivace.world import sample_scenes
from vivace.world.splits import train_seeds

SEALED = [4, 6, 3, 7, 1, 0, 2, 5]
"""The first epoch of eight samples from seed 0."""
SHAPE = ClipShape(frames=5, height=32, width=32, supersample=1)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(load("tiny", dtype=torch.float32))


@pytest.fixture
def world(encoder, tmp_path):
    """Four clips in two shards: the folder, its source, and the samples as they were made."""
    source = WorldSource(encoder, SHAPE)
    folder = tmp_path / "data"
    fill(ShardWriter(folder, source.head(4, 2)), source, 2)
    return folder, source, [source.portion(0, 2), source.portion(2, 4)]


def test_what_is_made_is_what_is_read(world, encoder):
    folder, _, portions = world
    data = LatentShards.open(folder, encoder.pipeline)
    assert (len(data), data.fields) == (4, ("latents", "mask", "text"))
    assert not list(folder.glob("*.partial"))
    for name in data.fields:
        made = torch.cat([p[name] for p in portions])
        assert torch.equal(data.rows(range(4))[name], made)
        assert torch.equal(data.rows([3, 0])[name], made[[3, 0]])
    whole = data.load()
    assert torch.equal(whole.tensors["latents"], data.rows(range(4), ["latents"])["latents"])
    assert torch.equal(whole.empty["text"], data.empty["text"])
    assert data.empty["text"].shape == data.rows([0])["text"].shape[1:]
    assert data.head.fields["latents"] == {"dtype": "bfloat16", "shape": [48, 2, 4, 4]}


def test_latents_and_text_are_those_of_the_model_s_own_training_and_pipeline(world, encoder):
    """The embedded model's trainer has code of its own for the same things."""
    _, _, portions = world
    pipeline = encoder.pipeline
    scenes = sample_scenes(train_seeds(0, 2, STREAM))
    video, mask = SHAPE.draw(scenes, torch.device("cpu"))
    latents = make_encoder(pipeline.vae, Processes(0, 1, torch.device("cpu")))(video)
    assert torch.equal(portions[0]["latents"], latents)
    assert torch.equal(portions[0]["mask"], pool_mask(mask, pipeline.vae.config.scale_factor_spatial))
    assert torch.equal(pool(mask, latents), portions[0]["mask"])
    assert 0 < portions[0]["mask"].float().mean() < 1
    text, _ = pipeline.encode_prompt([""], do_classifier_free_guidance=False, max_sequence_length=64)
    assert torch.equal(encoder.text([""])["text"], text.bfloat16())


def test_copies_in_another_precision_are_the_same_model(encoder):
    assert identity_of(load("tiny", dtype=torch.bfloat16)) == encoder.identity()
    assert identity_of(small("wan2.1")) != identity_of(small("wan2.1", seed=1))


def test_an_interrupted_run_goes_on_behind_the_last_shard(encoder, tmp_path):
    folder, asked = tmp_path / "cut", []
    source = WorldSource(encoder, SHAPE)

    class Killed(WorldSource):
        def portion(self, start, stop):
            if start == 6:
                raise KeyboardInterrupt
            return super().portion(start, stop)

    writer = ShardWriter(folder, source.head(8, 4))
    with pytest.raises(KeyboardInterrupt):
        fill(writer, Killed(encoder, SHAPE), 2, asked.append)
    assert (asked, writer.done) == ([2, 2, 2], 4)
    assert sorted(p.name for p in folder.iterdir()) == [HEAD, shard_name(0)]
    with pytest.raises(ConfigError, match=r"not complete \(4 of 8 samples\)"):
        LatentShards.open(folder)

    def run(count, where=folder):
        asked.clear()
        return fill(ShardWriter(where, source.head(count, 4)), source, 2, asked.append)

    cut = run(8)
    assert asked == [2, 2]
    assert cut.hash == run(8, tmp_path / "whole").hash
    assert run(8).hash == cut.hash
    assert asked == []
    # More clips are added behind those that are there; a last shard that was not full is made anew.
    assert len(run(10)) == 10
    assert asked == [2]
    assert run(12).hash == run(12, tmp_path / "whole").hash
    assert len(LatentShards.open(folder, thorough=True)) == 12


def test_other_data_are_not_mixed(world, encoder, tmp_path):
    folder, source, _ = world
    with pytest.raises(ConfigError, match="made with settings seed 0 and not 1"):
        ShardWriter(folder, WorldSource(encoder, SHAPE, seed=1).head(4, 2))
    with pytest.raises(ConfigError, match="is for 4 samples and 3 are asked for"):
        ShardWriter(folder, source.head(3, 2))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        ShardWriter(tmp_path, source.head(3, 2))


def test_what_is_wrong_with_a_folder_is_one_sentence(world, encoder, tmp_path):
    folder, source, _ = world
    with pytest.raises(ConfigError, match="there is no folder"):
        LatentShards.open(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"holds no training data: there is no dataset\.json"):
        LatentShards.open(tmp_path)
    with pytest.raises(ConfigError, match="made with another VAE"):
        LatentShards.open(folder, small("wan2.1"))
    path, head = folder / shard_name(1), folder / HEAD
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(WeightsError, match=r"shard-00001\.safetensors is damaged \(its checksum differs\)"):
        LatentShards.open(folder)
    LatentShards.open(folder, thorough=False)
    path.write_bytes(whole[:-1])
    with pytest.raises(WeightsError, match=f"damaged \\({len(whole) - 1} bytes instead of {len(whole)}\\)"):
        LatentShards.open(folder, thorough=False)
    path.unlink()
    with pytest.raises(WeightsError, match=r"shard-00001\.safetensors is missing"):
        LatentShards.open(folder)
    # The same command mends what is missing.
    fill(ShardWriter(folder, source.head(4, 2)), source, 2)
    assert path.read_bytes() == whole
    text = head.read_text()
    head.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(ConfigError, match="vivace-latents 2 and this Vivace reads vivace-latents 1"):
        LatentShards.open(folder)
    head.write_text(text[:50])
    with pytest.raises(WeightsError, match=r"dataset\.json is damaged"):
        LatentShards.open(folder)


def numbered(count: int) -> MemorySet:
    return MemorySet({"latents": torch.arange(count), "text": torch.arange(count) * 2})


def test_a_stream_is_known_by_one_integer():
    data = numbered(10)
    run = list(itertools.islice(data.stream(4, seed=3), 12))
    for k in (1, 5, 11):
        again = next(data.stream(4, seed=3, start=k))
        assert torch.equal(again["latents"], run[k]["latents"])
    line = torch.cat([b["latents"] for b in run]).tolist()
    epochs = [line[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(torch.equal(b["text"], 2 * b["latents"]) for b in run)
    other = torch.cat([b["latents"] for b in itertools.islice(data.stream(4, seed=4), 12)])
    assert other.tolist() != line
    # A batch may be larger than the set.
    assert sorted(next(numbered(3).stream(6))["latents"].tolist()) == [0, 0, 1, 1, 2, 2]


def test_the_order_is_sealed():
    """A change would make runs that are taken up see other batches than they would have."""

    def mixed(x: int) -> int:
        """SplitMix64 in whole numbers."""
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    # The generator's published first values from the state 1234567.
    step = 0x9E3779B97F4A7C15
    assert [mixed((1234567 + i * step) % 2**64) for i in (1, 2)] == [6457827717110365317, 3203168211198807973]
    start = int.from_bytes(hashlib.sha256(b"3 1").digest()[:8], "little")
    keys = [mixed((start + i * step) % 2**64) for i in range(1, 9)]
    order = sorted(range(8), key=keys.__getitem__)
    assert numbered(8).picks(1, 8, seed=3).tolist() == order
    assert numbered(8).picks(0, 8, seed=0).tolist() == SEALED


def test_processes_share_the_batches_of_one():
    data = numbered(10)
    for k in range(7):
        one = data.picks(k, 6, seed=1)
        two = [data.picks(k, 3, seed=1, rank=rank, world=2) for rank in (0, 1)]
        assert np.array_equal(np.concatenate(two), one)
        got = [next(data.stream(3, 1, rank, 2, start=k))["latents"] for rank in (0, 1)]
        assert torch.equal(torch.cat(got), torch.from_numpy(one))


def test_shards_stream_what_memory_streams(world):
    data = LatentShards.open(world[0])
    stream = data.stream(3, seed=5, start=2, fields=["latents", "text"])
    for a, b in itertools.islice(zip(stream, data.load().stream(3, 5, 0, 1, 2), strict=False), 5):
        assert set(a) == {"latents", "text"}
        assert all(torch.equal(a[name], b[name]) for name in a)
    stream.close()
    with pytest.raises(ConfigError, match="hold no noise; they hold latents, mask, text"):
        data.stream(1, fields=["noise"])
    with pytest.raises(ConfigError, match="rank below world"):
        data.stream(1, rank=2, world=2)


@pytest.mark.gpu
def test_a_stream_onto_a_gpu(world):
    data = LatentShards.open(world[0])
    far, near = data.stream(3, device="cuda"), data.load("cuda").stream(3)
    for a, b in itertools.islice(zip(far, near, strict=False), 4):
        assert a["latents"].is_cuda
        assert torch.equal(a["latents"], b["latents"])


def test_sets_of_unequal_fields_are_refused():
    with pytest.raises(ConfigError, match="latents 2, text 3"):
        MemorySet({"latents": torch.zeros(2), "text": torch.zeros(3)})


# -- videos -----------------------------------------------------------------------------------------------------


def write_video(path, frames, rate):
    """Frames uint8 (T, H, W, 3) as an mp4 of high quality."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"crf": "4"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def grey_ramp(count: int, height: int, width: int) -> np.ndarray:
    """Frame i is grey of level 4 i + 20, so that a frame tells its number."""
    levels = (4 * np.arange(count) + 20).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def test_the_frames_nearest_in_time_are_taken(tmp_path):
    write_video(tmp_path / "a.mp4", grey_ramp(24, 32, 48), 24)
    video = clip(tmp_path / "a.mp4", 5, 32, 32, 8)
    assert video.shape == (5, 32, 32, 3)
    levels = video.float().mean(dim=(1, 2, 3))
    numbers = (levels - 20) / 4
    # Five frames, three apart, around the middle of 24: 5.5 is where they begin.
    assert torch.allclose(numbers.diff(), torch.full((4,), 3.0), atol=0.3)
    assert numbers.mean() == pytest.approx(11.5, abs=0.8)
    # More frames than the file has are repeated, half as many as asked per second.
    slow = clip(tmp_path / "a.mp4", 41, 32, 32, 48).float().mean(dim=(1, 2, 3))
    assert len(slow.round().unique()) in (20, 21, 22)
    with pytest.raises(
        ConfigError, match=r"a\.mp4 is too short: 1\.00 s, and 17 frames at 8 fps take 2\.12 s"
    ):
        clip(tmp_path / "a.mp4", 17, 32, 32, 8)


def test_the_centre_is_cropped_and_resized(tmp_path):
    frames = np.zeros((9, 64, 160, 3), np.uint8)
    frames[:, :, 48:112] = 200  # the middle square
    frames[:, :32, 48:112] = 60
    write_video(tmp_path / "a.mp4", frames, 8)
    video = clip(tmp_path / "a.mp4", 5, 32, 32, 8).float()
    assert video[:, 2:14].mean() == pytest.approx(60, abs=3)
    assert video[:, 18:30].mean() == pytest.approx(200, abs=3)


def test_a_turned_video_is_seen_upright(tmp_path):
    """A telephone held upright writes lying frames and a matrix that turns them clockwise by a quarter."""
    frames = np.full((9, 32, 64, 3), 40, np.uint8)
    frames[:, :, :32] = 210  # the left half, which is shown on top
    path = tmp_path / "a.mp4"
    write_video(path, frames, 8)
    data, one = path.read_bytes(), (1 << 16).to_bytes(4, "big")
    straight = one + bytes(12) + one + bytes(12) + (1 << 30).to_bytes(4, "big")
    turned = bytes(4) + one + bytes(4) + (2**32 - 2**16).to_bytes(4, "big") + bytes(16) + straight[-4:]
    at = data.index(straight, data.index(b"tkhd"))
    path.write_bytes(data[:at] + turned + data[at + len(turned) :])
    video = clip(path, 5, 64, 32, 8).float()
    assert video[:, 2:28].mean() == pytest.approx(210, abs=4)
    assert video[:, 36:62].mean() == pytest.approx(40, abs=4)


def test_videos_become_samples(tmp_path, encoder):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "b.mp4", grey_ramp(8, 48, 64), 8)
    write_video(folder / "a.mp4", grey_ramp(8, 64, 48)[::-1], 8)
    write_video(folder / "short.mp4", grey_ramp(2, 32, 32), 8)
    (folder / "captions.txt").write_text("b.mp4\ta red cube\na.mp4 | a blue sphere\nshort.mp4|nothing\n")
    source = VideoSource(encoder, SHAPE, folder, 8)
    assert [v.caption for v in source.videos] == ["a blue sphere", "a red cube"]
    assert len(source.refused) == 1
    assert "short.mp4 is too short" in source.refused[0]
    data = fill(ShardWriter(tmp_path / "data", source.head(2, 8)), source, 2)
    got = data.rows([0, 1])
    assert torch.equal(got["text"], encoder.text(["a blue sphere", "a red cube"])["text"])
    # Back through the pipeline's own decoding, a ramp is a ramp.
    vae, norm = encoder.pipeline.vae, encoder.normalise
    with torch.no_grad():
        seen = vae.decode(got["latents"].float() / norm.gain + norm.centre).sample
    levels = (seen.mean(dim=(1, 3, 4)) + 1) * 127.5
    expected = torch.stack([clip(v.path, 5, 32, 32, 8).float().mean(dim=(1, 2, 3)) for v in source.videos])
    assert torch.allclose(levels, expected, atol=12)


def test_captions_are_found_or_missed_in_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="holds no videos"):
        captioned(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "in/b.mov"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a\.mp4 has no caption: write a\.txt beside it"):
        captioned(tmp_path)
    (tmp_path / "a.txt").write_text("one\ntwo ")
    (tmp_path / "in" / "b.txt").write_text("three")
    assert [v.caption for v in captioned(tmp_path)] == ["one two", "three"]
    listed = tmp_path / "captions.jsonl"
    listed.write_text(json.dumps({"file_name": "a.mp4", "text": "four"}) + "\n")
    with pytest.raises(ConfigError, match=r"has no caption for in/b\.mov"):
        captioned(tmp_path)
    listed.write_text(listed.read_text() + json.dumps({"file": "in/b.mov", "caption": "five"}) + "\n")
    assert [v.caption for v in captioned(tmp_path)] == ["four", "five"]
    listed.write_text("a.mp4 six\n")
    with pytest.raises(ConfigError, match=r"line 1 of .*captions\.jsonl is not"):
        captioned(tmp_path)
    listed.write_text(json.dumps({"file": "z.mp4", "caption": "seven"}))
    with pytest.raises(ConfigError, match=r"tells of z\.mp4, which is not in"):
        captioned(tmp_path)
    with pytest.raises(ConfigError, match=r"a\.mp4 cannot be read"):
        clip(tmp_path / "a.mp4", 5, 32, 32, 8)


# -- a teacher --------------------------------------------------------------------------------------------------


def test_the_stored_noise_gives_the_stored_latents(encoder, tmp_path):
    source = TeacherSource(
        encoder, SHAPE, ["a red cube", "a blue sphere"], steps=4, guidance=3.0, seed=7, states=1
    )
    fill(ShardWriter(tmp_path / "pairs", source.head(4, 4)), source, 2)
    data = LatentShards.open(tmp_path / "pairs", encoder.pipeline)
    assert data.fields == ("latents", "noise", "text", "trajectory")
    got = data.rows([2, 3])
    # The pipeline itself, called by hand.
    states = []
    out = encoder.pipeline(
        prompt_embeds=got["text"].float(),
        negative_prompt_embeds=data.empty["text"].float().expand(2, -1, -1),
        latents=got["noise"].float(),
        num_frames=5,
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, values: states.append(values["latents"].clone()) or {},
    ).frames
    # Embeddings were rounded to bf16 when they were stored.
    assert float((out - got["latents"]).norm() / out.norm()) < 0.02
    again, _ = source.sample(source.texts(2, 4), got["noise"], [torch.Generator()] * 2)
    assert torch.equal(again.bfloat16(), got["latents"])
    assert source.kept == [1]
    kept = got["trajectory"][:, 0].float()
    errors = [float((s - kept).norm() / kept.norm()) for s in states]
    assert min(range(4), key=errors.__getitem__) == 1
    assert data.head.settings["sigmas"] == [
        pytest.approx(float(encoder.pipeline.scheduler.sigmas[2]), abs=1e-5)
    ]
    # Noise is standard, and every sample has its own.
    assert data.rows(range(4))["noise"].float().std() == pytest.approx(1, abs=0.05)
    alone = source.portion(3, 4)["noise"]
    assert torch.equal(alone, got["noise"][1:])
    assert not torch.equal(got["noise"][0], got["noise"][1])


def test_pairs_of_another_teacher_are_told(encoder, tmp_path):
    source = TeacherSource(encoder, SHAPE, ["a red cube"], steps=1, guidance=1.0)
    fill(ShardWriter(tmp_path / "pairs", source.head(1, 4)), source, 2)
    other = load("tiny", dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ConfigError, match="made with another transformer"):
        LatentShards.open(tmp_path / "pairs", other)
    assert len(LatentShards.open(tmp_path / "pairs", other, any_teacher=True)) == 1


@pytest.mark.parametrize("name", ["wan2.2", "wan2.2-ti2v", "hunyuan"])
def test_teachers_of_other_families(name):
    """The pipeline draws the same noise itself, and ends near where it ends from the rounded one."""
    encoder = Encoder(small(name))
    rules, model = encoder.model.pixels, encoder.model
    shape = ClipShape(frames=rules.temporal + 1, height=2 * rules.spatial, width=2 * rules.spatial)
    source = TeacherSource(encoder, shape, ["a red cube"], steps=2, guidance=1.0, seed=3)
    got = source.portion(0, 1)
    call = {"num_frames": shape.frames, "height": shape.height, "width": shape.width}
    out = encoder.pipeline(
        "a red cube", **call, num_inference_steps=2, generator=torch.Generator().manual_seed(3),
        output_type="latent", max_sequence_length=source.workload.text,
        **{model.adapter.guidance_argument: 1.0},
    ).frames  # fmt: skip
    assert got["latents"].shape == got["noise"].shape == out.shape
    assert float((out - got["latents"]).norm() / out.norm()) < 0.05


@pytest.mark.parametrize("name", ["ltx", "cogvideox", "wan2.1-i2v"])
def test_teachers_of_other_layouts_are_refused(name):
    encoder = Encoder(small(name))
    rules = encoder.model.pixels
    shape = ClipShape(frames=rules.temporal + 1, height=2 * rules.spatial, width=2 * rules.spatial)
    with pytest.raises(ModelError, match="pairs cannot be made with"):
        TeacherSource(encoder, shape)


@pytest.mark.parametrize("name", ["wan2.1", "hunyuan", "ltx", "cogvideox"])
def test_every_family_s_latents_and_text(name):
    """Normalised latents, put through the de-normalisation that the pipeline uses, are the VAE's own."""
    encoder = Encoder(small(name))
    rules, vae = encoder.model.pixels, encoder.pipeline.vae
    shape = ClipShape(
        frames=rules.temporal + 1, height=2 * rules.spatial, width=2 * rules.spatial, supersample=1
    )
    got = WorldSource(encoder, shape).portion(0, 1)
    video, _ = shape.draw(sample_scenes(train_seeds(0, 1, STREAM)), torch.device("cpu"))
    with torch.no_grad():
        raw = vae.encode(video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).latent_dist.mode()
    norm = Normalisation.of(vae)
    assert torch.allclose(norm(raw), got["latents"].float(), rtol=0.01, atol=0.01)
    workload = encoder.model.workload(frames=shape.frames, height=shape.height, width=shape.width)
    assert tuple(got["latents"].shape[2:]) == tuple(encoder.model.adapter.latent(encoder.model, workload))
    assert got["text"].dtype == torch.bfloat16
    assert ("text_mask" in got) == (name in ("hunyuan", "ltx"))
    assert ("pooled" in got) == (name == "hunyuan")
    with pytest.raises(ShapeError):
        WorldSource(encoder, ClipShape(frames=shape.frames + 1, height=shape.height, width=shape.width))


def test_normalisation_is_the_inverse_of_the_pipeline_s():
    from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

    def wan(**settings):
        return AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], **settings
        )

    x = torch.randn(1, 4, 2, 3, 3)
    mean, std = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.0, 4.0]
    norm = Normalisation.of(wan(latents_mean=mean, latents_std=std))
    m, s = (torch.tensor(v).view(1, 4, 1, 1, 1) for v in (mean, std))
    assert torch.allclose(norm(x) * s + m, x, atol=1e-6)
    scaled = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        scaling_factor=0.7, shift_factor=0.25,
    )  # fmt: skip
    assert torch.allclose(Normalisation.of(scaled)(x) / 0.7 + 0.25, x, atol=1e-6)
    with pytest.raises(ModelError, match="no list of 4 numbers"):
        Normalisation.of(wan(latents_mean=[0.0] * 3, latents_std=[1.0] * 3))
    assert EMPTY.endswith(".safetensors")
