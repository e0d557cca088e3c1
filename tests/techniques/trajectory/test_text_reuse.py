"""Text reuse: a call of the encoder is saved, never a bit changed. The encoder is counted below the technique."""

from __future__ import annotations

import pytest
import torch

from vivace.core.errors import PlanError
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.trajectory.text_reuse import TextReuse
from vivace.testing.case import counting_tensors
from vivace.testing.models import call, pipeline

FAMILIES = ["wan2.1", "cogvideox", "ltx", "hunyuan"]


def counted(pipe):
    """How often each text encoder really runs: torch's hooks on the first attention, below every wrapper."""
    runs = {}
    for name in ("text_encoder", "text_encoder_2"):
        if (encoder := getattr(pipe, name, None)) is not None:
            runs[name] = 0

            def count(*_, name=name):
                runs[name] += 1

            inside = (m for m in encoder.modules() if type(m).__name__.endswith("Attention"))
            next(inside).register_forward_hook(count)
    return runs


def generate(session, name, prompt, **changes):
    settings = call(name) | {"num_inference_steps": 2} | changes
    return session(prompt, seed=3, output_type="latent", **settings)


def effects(out):
    return out.receipt.techniques[0].effects


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_changes_and_the_second_call_is_saved(name):
    prompts = ["a red ball", "a blue cone", "a red ball"]
    with accelerate(pipeline(name), Plan()) as exact:
        want = [generate(exact, name, p).raw.frames for p in prompts]
    pipe = pipeline(name)
    plain, runs = counted(pipe), []
    with accelerate(pipe, Plan([TextReuse()])) as fast:
        for prompt, frames in zip(prompts, want, strict=True):
            before = dict(plain)
            out = generate(fast, name, prompt)
            assert torch.equal(out.raw.frames, frames)
            runs.append(sum(plain.values()) - sum(before.values()))
            assert effects(out).get("encodings_run", 0) > 0 or runs[-1] == 0
    # First everything, then the new prompt alone (the negative one is known), then nothing at all.
    assert runs[0] > runs[1] > runs[2] == 0
    assert effects(out)["encodings_reused"] == runs[0]


def test_the_negative_prompt_is_encoded_once():
    pipe = pipeline("wan2.1")
    runs = counted(pipe)
    with accelerate(pipe, Plan([TextReuse()])) as fast:
        for k in range(5):
            generate(fast, "wan2.1", f"prompt {k}")
    assert runs["text_encoder"] == 5 + 1


def encode(pipe, text):
    tokens = torch.tensor([list(text.encode())])
    with torch.no_grad():
        return pipe.text_encoder(tokens, torch.ones_like(tokens))


@pytest.fixture
def session():
    pipe = pipeline("wan2.1")
    runs = counted(pipe)
    with accelerate(pipe, Plan([TextReuse(entries=2)])) as fast:
        yield fast, pipe, runs


def test_the_least_recently_used_leaves_first(session):
    _, pipe, runs = session
    for text in ("a", "b", "a", "c", "a", "b"):
        encode(pipe, text)
    # a and b are new, a is known, c drives b out, a is known, b is new again.
    assert runs["text_encoder"] == 4


def test_an_answer_may_be_written_to(session):
    _, pipe, _ = session
    want = encode(pipe, "a").last_hidden_state.clone()
    encode(pipe, "a").last_hidden_state.zero_()
    again = encode(pipe, "a")
    assert torch.equal(again.last_hidden_state, want)
    first = encode(pipe, "b")
    want = first.last_hidden_state.clone()
    first.last_hidden_state.zero_()
    assert torch.equal(encode(pipe, "b").last_hidden_state, want)
    assert type(again) is type(first)


def test_a_changed_encoder_encodes_again(session):
    _, pipe, runs = session
    encode(pipe, "a")
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).mul_(1.5)
    changed = encode(pipe, "a")
    assert runs["text_encoder"] == 2
    pipe.text_encoder.to(torch.bfloat16)
    assert encode(pipe, "a").last_hidden_state.dtype == torch.bfloat16
    assert runs["text_encoder"] == 3
    assert changed.last_hidden_state.dtype == torch.float32


def test_what_differs_in_the_call_is_another_entry(session):
    _, pipe, runs = session
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        masked = pipe.text_encoder(tokens, torch.tensor([[1, 1, 0]])).last_hidden_state
        whole = pipe.text_encoder(tokens, torch.tensor([[1, 1, 1]])).last_hidden_state
        assert not torch.equal(masked, whole)
        assert isinstance(pipe.text_encoder(tokens, torch.tensor([[1, 1, 1]]), return_dict=False), tuple)
    assert runs["text_encoder"] == 3


def test_gradients_and_training_are_left_alone(session):
    _, pipe, runs = session
    tokens = torch.tensor([[5, 6, 7]])
    for _ in range(2):
        assert pipe.text_encoder(tokens).last_hidden_state.requires_grad
    pipe.text_encoder.train()
    encode(pipe, "a"), encode(pipe, "a")
    assert runs["text_encoder"] == 4


def test_sessions_share_nothing_and_closing_releases():
    pipe = pipeline("wan2.1")
    runs = counted(pipe)

    with counting_tensors() as alive:
        encode(pipe, "a")
        before = alive()
        for k in (1, 2):
            with accelerate(pipe, Plan([TextReuse()])):
                encode(pipe, "a"), encode(pipe, "a")
                assert alive() > before, "nothing is remembered, so nothing is tested"
            assert runs["text_encoder"] == 1 + k
        assert alive() == before
    assert "forward" not in vars(pipe.text_encoder)


def test_a_rival_is_refused():
    from dataclasses import replace

    class Rival(TextReuse):
        card = replace(TextReuse.card, name="rival")

    with pytest.raises(PlanError, match=r"text\.encode"):
        accelerate(pipeline("wan2.1"), Plan([TextReuse(), Rival()]))
