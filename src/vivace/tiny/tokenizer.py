"""A word-level tokenizer over the vocabulary of the world: one word, one token, nothing to download."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_tokenizer(words: Iterable[str], max_length: int = 64) -> PreTrainedTokenizerFast:
    """Lower-cases, splits at white space and punctuation, ends with `</s>`; words not in `words` become `<unk>`.

    Ids follow the sorted words after the three special tokens, so the order of `words` does not matter.
    """
    pieces = sorted({word.lower() for word in words} | {",", "."})
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        padding_side="right",
    )
