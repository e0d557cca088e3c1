"""Text reuse: a prompt that a session has encoded before is not encoded again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vivace.techniques.base import Card, Cite, Paradigm, Stage, Target, Technique, exclusive, knob

NAME = "text_reuse"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True, kw_only=True)
class TextReuse(Technique):
    """Remember what the text encoders gave, by the content of their inputs, for as long as the session is open.

    The negative prompt is the usual gain: it is the same in every generation. An answer is reused for bit-equal inputs
    to unchanged weights, so nothing changes but the time. Answers are kept in the host's memory, the least recently
    used one leaves first, and all go when the session closes. What is no tensor in an answer (a language model's
    key-value cache) is not remembered: a reused answer has no such field.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.CACHING,
        summary="Encodes a prompt once in a session, the negative prompt above all; the same output bit for bit.",
        objective="seconds of text encoding",
        stage=Stage.KERNELS,
        claims=(exclusive("text.encode"),),
        lossless=True,
        cite=Cite(
            title="Prompt embeddings passed in by the caller (diffusers' prompt_embeds)",
            code="https://github.com/huggingface/diffusers",
            differs="the pipeline is called with prompts as always; keyed by the encoder's inputs and the state of its "
            "weights, so a changed encoder encodes again",
        ),
    )

    entries: int = knob(16, low=0, high=4096, identity=0)
    """Encoder calls remembered for each text encoder."""

    def apply(self, target: Target) -> None:
        for name in ENCODERS:
            if (encoder := getattr(target.pipeline, name, None)) is not None:
                target.edit.wrap(encoder, self._wrapper(target, encoder))

    def _wrapper(self, target: Target, encoder: Any) -> Callable[..., Any]:
        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            # Lives in this closure and nowhere else: undoing the edit releases it.
            memory: OrderedDict[bytes, Any] = OrderedDict()

            def forward(*args: Any, **kwargs: Any) -> Any:
                key = self._key(encoder, args, kwargs)
                if key is None:
                    return old(*args, **kwargs)
                if key in memory:
                    memory.move_to_end(key)
                    target.report(NAME, "encodings_reused", 1)
                    return copied(memory[key])
                out = old(*args, **kwargs)
                target.report(NAME, "encodings_run", 1)
                if (kept := remembered(out)) is not None:
                    memory[key] = kept
                    while len(memory) > self.entries:
                        memory.popitem(last=False)
                return out

            return forward

        return make

    def _key(self, encoder: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | None:
        """What an answer depends on; None where it must not be reused (training, gradients, unknown inputs)."""
        import torch

        if not self.entries or encoder.training or torch.is_grad_enabled():
            return None
        digest = hashlib.sha256()
        for p in (*encoder.parameters(), *encoder.buffers()):
            version = 0 if p.is_inference() else p._version
            digest.update(f"{id(p)} {version} {p.dtype} {p.device};".encode())
        for name, value in (*enumerate(args), *sorted(kwargs.items())):
            if isinstance(value, torch.Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)} {value.device}:".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            elif value is None or isinstance(value, (bool, int, float, str)):
                digest.update(f"{name} {type(value).__name__} {value!r};".encode())
            else:
                return None
        return digest.digest()


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor in the host's memory, and the device it belongs on."""

    data: Any
    device: Any


def remembered(value: Any) -> Any:
    """A copy of an encoder's answer in the host's memory; None for what is neither tensors nor a container of them."""
    import torch

    if isinstance(value, torch.Tensor):
        return Kept(value.detach().to("cpu", copy=True), value.device)
    if isinstance(value, Mapping):
        fields = {k: kept for k, v in value.items() if (kept := remembered(v)) is not None}
        return (type(value), fields) if fields else None
    if type(value) in (tuple, list):
        parts = [remembered(v) for v in value]
        return None if any(p is None for p in parts) else (type(value), parts)
    return None


def copied(kept: Any) -> Any:
    """The answer again, in memory of its own on its own device."""
    if isinstance(kept, Kept):
        return kept.data.to(kept.device, copy=True)
    kind, content = kept
    if isinstance(content, dict):
        return kind(**{k: copied(v) for k, v in content.items()})
    return kind(copied(v) for v in content)
