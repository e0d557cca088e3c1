"""Text cache: a later session runs no encoder and gives the same bits. The encoder is counted below the technique."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from vivace.core.errors import NoEffectError, PlanError
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.compression import text_cache
from vivace.techniques.compression.text_cache import TextCache
from vivace.techniques.trajectory.text_reuse import TextReuse
from vivace.testing.fingerprints import digest
from vivace.testing.fresh import worker
from vivace.testing.models import call, pipeline
from vivace.testing.subjects import Subject

FAMILIES = ["wan2.1", "cogvideox", "ltx", "hunyuan", "hunyuan-i2v"]


def counted(pipe):
    """How often each text encoder really runs: torch's hooks on the first attention, below every wrapper."""
    runs = {}
    for name in ("text_encoder", "text_encoder_2"):
        if (encoder := getattr(pipe, name, None)) is not None:
            runs[name] = 0

            def count(*_, name=name):
                runs[name] += 1

            # The attention of the language model, not that of a picture's encoder in front of it.
            inside = [m for m in encoder.modules() if type(m).__name__.endswith("Attention")]
            inside[-1].register_forward_hook(count)
    return runs


def generate(session, name, prompt, **changes):
    settings = call(name) | {"num_inference_steps": 2} | changes
    return session(prompt, seed=3, output_type="latent", **settings)


def effects(out):
    return out.receipt.techniques[0].effects


@pytest.mark.parametrize("name", FAMILIES)
def test_a_later_session_encodes_nothing_and_gives_the_same_bits(name, tmp_path):
    prompts = ["a red ball", "a blue cone"]
    with accelerate(pipeline(name), Plan()) as exact:
        want = [generate(exact, name, p).raw.frames for p in prompts]
    for again in (False, True):
        pipe = pipeline(name)
        runs = counted(pipe)
        with accelerate(pipe, Plan([TextCache(folder=str(tmp_path))])) as fast:
            for prompt, frames in zip(prompts, want, strict=True):
                out = generate(fast, name, prompt)
                assert torch.equal(out.raw.frames, frames)
                done = effects(out)
                assert ("encodings_run" in done) is not again
                assert done["seconds_reading" if again else "seconds_encoding"] > 0
                assert done["seconds_hashing"] > 0
        assert (sum(runs.values()) == 0) is again


def test_a_new_process_finds_it(tmp_path):
    plan, small = Plan([TextCache(folder=str(tmp_path / "text"))]), {"num_inference_steps": 1}
    subject = Subject("wan2.1", small)
    here = subject.run(*plan.techniques)
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "text").iterdir()}
    there = worker().ask(
        path=sys.path,
        module=TextCache.__module__,
        name=TextCache.__name__,
        plan=str(plan.save(tmp_path / "plan.yaml")),
        family="wan2.1",
        call=small,
    )
    assert there["latents"] == digest(here.latents)
    after = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "text").iterdir()}
    # The same files, and each of them was used.
    assert len(before) == 2
    assert after.keys() == before.keys()
    assert all(after[name] > before[name] for name in before)


@pytest.fixture
def wan(tmp_path):
    """Gives a function that encodes a text in a session of its own on a pipeline, and tells the effects."""

    def encode(pipe, text="a", **settings):
        tokens = torch.tensor([list(text.encode())])
        technique = TextCache(folder=str(tmp_path), **settings)
        with accelerate(pipe, Plan([technique])) as session, torch.no_grad():
            answer = pipe.text_encoder(tokens, torch.ones_like(tokens))
            return answer, {k: v for k, v in session._effects["text_cache"].items() if "seconds" not in k}

    return encode


RUN, REUSED = {"encodings_run": 1}, {"encodings_reused": 1}


def test_what_the_answer_depends_on_is_in_the_key(wan):
    pipe = pipeline("wan2.1")
    assert wan(pipe)[1] == RUN
    assert wan(pipeline("wan2.1"))[1] == REUSED
    assert wan(pipe, "b")[1] == RUN
    torch.set_num_threads(2)
    assert wan(pipe)[1] == RUN
    torch.set_num_threads(1)
    with torch.no_grad():
        last = list(pipe.text_encoder.parameters())[-1]
        last.view(-1)[-1] += 1e-3
    assert wan(pipe)[1] == RUN
    pipe.text_encoder.to(torch.bfloat16)
    answer, done = wan(pipe)
    assert done == RUN
    again, done = wan(pipe)
    assert done == REUSED
    assert again.last_hidden_state.dtype == torch.bfloat16
    assert torch.equal(again.last_hidden_state, answer.last_hidden_state)
    other = pipeline("wan2.1")
    other.text_encoder.config.layer_norm_epsilon = 0.1
    assert wan(other)[1] == RUN


def test_weights_changed_inside_a_session_encode_again(tmp_path):
    pipe = pipeline("wan2.1")
    tokens = torch.tensor([[5, 6, 7]])
    with accelerate(pipe, Plan([TextCache(folder=str(tmp_path))])) as session, torch.no_grad():
        first = pipe.text_encoder(tokens).last_hidden_state
        next(pipe.text_encoder.parameters()).mul_(1.5)
        second = pipe.text_encoder(tokens).last_hidden_state
        assert session._effects["text_cache"]["encodings_run"] == 2
    assert not torch.equal(first, second)


@pytest.mark.parametrize("harm", ["truncated", "flipped", "foreign class"])
def test_a_damaged_file_is_told_and_encoded_again(wan, tmp_path, caplog, monkeypatch, harm):
    want, _ = wan(pipeline("wan2.1"))
    (file,) = tmp_path.glob("*.bin")
    if harm == "foreign class":
        monkeypatch.setattr(text_cache, "_output_class", lambda *_: (_ for _ in ()).throw(ValueError("no")))
    else:
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content[:-9] if harm == "truncated" else content)
    with caplog.at_level(logging.WARNING):
        answer, done = wan(pipeline("wan2.1"))
    assert done == {"damaged_files": 1, "encodings_run": 1}
    assert file.name in caplog.text
    assert torch.equal(answer.last_hidden_state, want.last_hidden_state)
    monkeypatch.undo()
    assert wan(pipeline("wan2.1"))[1] == REUSED


def test_a_file_cannot_name_a_class_to_run():
    for module, name in (("os", "system"), ("subprocess", "Popen"), ("transformers", "AutoModel")):
        with pytest.raises(ValueError, match="no "):
            text_cache._output_class(module, name)


def test_the_folder_stays_within_its_limit(wan, tmp_path):
    pipe = pipeline("wan2.1")
    wan(pipe, "aaaa")
    one = next(tmp_path.glob("*.bin")).stat().st_size
    room = 2.5 * one / 2**30
    for text, reused in (("bbbb", 0), ("aaaa", 1), ("cccc", 0), ("aaaa", 1), ("bbbb", 0)):
        assert ("encodings_reused" in wan(pipe, text, max_gib=room)[1]) == bool(reused), text
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= room * 2**30


def test_a_folder_that_cannot_be_written_costs_no_clip(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    pipe = pipeline("wan2.1")
    with accelerate(pipe, Plan([TextCache(folder=str(tmp_path / "file" / "text"))])) as fast:
        done = effects(generate(fast, "wan2.1", "a"))
    assert done["files_not_written"] == done["encodings_run"] == 2
    assert "cannot be written" in caplog.text


def test_the_default_folder_is_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("VIVACE_CACHE", str(tmp_path))
    with accelerate(pipeline("wan2.1"), Plan([TextCache()])) as fast:
        generate(fast, "wan2.1", "a")
    assert len(list((tmp_path / "text").glob("*.bin"))) == 2


def test_gradients_and_training_are_left_alone(tmp_path):
    pipe, tokens = pipeline("wan2.1"), torch.tensor([[5, 6, 7]])
    with accelerate(pipe, Plan([TextCache(folder=str(tmp_path))])):
        for _ in range(2):
            assert pipe.text_encoder(tokens).last_hidden_state.requires_grad
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_others_offload_is_left_alone(tmp_path, caplog):
    from accelerate import cpu_offload_with_hook

    pipe = pipeline("hunyuan")
    cpu_offload_with_hook(pipe.text_encoder, "cpu")
    with accelerate(pipe, Plan([TextCache(folder=str(tmp_path))])) as fast:
        done = effects(generate(fast, "hunyuan", "a"))
    assert done["encoders_offloaded"] == 1
    assert done["encodings_run"] > 0
    assert "text_encoder is offloaded" in caplog.text
    pipe = pipeline("wan2.1")
    cpu_offload_with_hook(pipe.text_encoder, "cpu")
    with pytest.raises(NoEffectError):
        accelerate(pipe, Plan([TextCache(folder=str(tmp_path))]))


def test_two_owners_of_the_text_are_refused():
    with pytest.raises(PlanError, match=r"text\.encode"):
        accelerate(pipeline("wan2.1"), Plan([TextReuse(), TextCache()]))
