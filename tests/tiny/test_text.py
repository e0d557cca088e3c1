"""The tokenizer, and text embeddings as training makes them."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer

from vivace.tiny.defaults import TEXT_LENGTH
from vivace.tiny.tokenizer import build_tokenizer
from vivace.tiny.train.latents import embed_text, tokenize

WORDS = ["a", "red", "ball", "rolls", "to", "the", "left"]


def test_one_word_is_one_token():
    tokenizer = build_tokenizer(WORDS)
    assert tokenizer.tokenize("A red ball, to the LEFT.") == [
        "a",
        "red",
        "ball",
        ",",
        "to",
        "the",
        "left",
        ".",
    ]
    assert tokenizer.convert_ids_to_tokens(tokenizer("red zebra").input_ids) == ["red", "<unk>", "</s>"]
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id == 0


def test_ids_do_not_depend_on_the_order_of_the_words():
    assert build_tokenizer(WORDS).get_vocab() == build_tokenizer(WORDS[::-1] + ["Red"]).get_vocab()


def test_survives_saving(tmp_path):
    tokenizer = build_tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    options = {"padding": "max_length", "max_length": 16, "truncation": True}
    assert again("a red ball", **options) == tokenizer("a red ball", **options)


@torch.no_grad()
def test_embeddings_are_those_of_the_pipeline(pipeline):
    prompts = ["a red sphere", "", "a large blue cube and a small red sphere on the floor"]
    expected, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
    )
    ids = tokenize(pipeline.tokenizer, prompts)
    embedded = embed_text(pipeline.text_encoder, ids)
    assert torch.allclose(embedded, expected, atol=1e-6)
    assert (embedded[1, 1:] == 0).all()
    assert embedded[1, 0].abs().max() > 0
