"""Text cache: a prompt that was encoded once on this machine is not encoded again, in whatever process."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.digest import tensors_digest
from vivace.core.disk_cache import DiskCache
from vivace.core.env import cache_folder
from vivace.techniques.base import Card, Cite, Paradigm, Stage, Target, Technique, exclusive, knob

NAME = "text_cache"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
FORMAT = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TextCache(Technique):
    """Keep what the text encoders gave on disk, by the content of everything that it depends on.

    The key is a hash of the encoder's weights and configuration, of the token ids and the mask (which stand for
    tokenizer, template, prompt and length), and of the device, the arithmetic settings and the versions of the
    libraries; so an answer is reused only where encoding again would give the same bits. Files are written under
    another name and moved into place; a damaged one is told, removed, and encoded again. The least recently used
    leave when the folder grows beyond `max_gib`.

    An encoder whose weights somebody else keeps elsewhere (offloaded by hooks) cannot be hashed and is left alone. A
    language model that returns the states of all layers (HunyuanVideo's) takes about 100 MB a prompt.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.CACHING,
        summary="Encodes a prompt once on this machine: a later run reads the embeddings from disk, bit for bit.",
        objective="seconds of text encoding",
        stage=Stage.KERNELS,
        claims=(exclusive("text.encode"),),
        lossless=True,
        cite=Cite(
            title="Precomputed prompt embeddings, as training scripts keep them (diffusers' prompt_embeds)",
            code="https://github.com/huggingface/diffusers",
            differs="found by content, not by name, so that a changed encoder, tokenizer or template encodes again; "
            "the pipeline is called with prompts as always",
        ),
    )

    max_gib: float = knob(2.0, low=0.0, high=1024.0, identity=0.0)
    """Size of the folder in GiB, beyond which the least recently used files leave."""
    folder: str = ""
    """Where the files lie; by default `text` in the folder named by VIVACE_CACHE, or `~/.cache/vivace/text`."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(folder=str(workdir / "text")),)

    def apply(self, target: Target) -> None:
        folder = Path(self.folder).expanduser() if self.folder else cache_folder("text")
        store = DiskCache(folder, int(self.max_gib * 2**30))
        for name in ENCODERS:
            if (encoder := getattr(target.pipeline, name, None)) is None:
                continue
            if away(encoder):
                target.report(NAME, "encoders_offloaded", 1)
                _log.warning("%s is offloaded by hooks of others; text_cache leaves it alone", name)
                continue
            target.edit.wrap(encoder, self._wrapper(target, encoder, store))

    def _wrapper(self, target: Target, encoder: Any, store: DiskCache) -> Callable[..., Any]:
        weights = WeightsHash(encoder, target)

        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._call(target, weights, store, old, args, kwargs)

        return make

    def _call(
        self,
        target: Target,
        weights: WeightsHash,
        store: DiskCache,
        old: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        import torch

        inputs = None
        if self.max_gib and not (weights.encoder.training or torch.is_grad_enabled()):
            inputs = inputs_hash(args, kwargs)
        if inputs is None:
            return old(*args, **kwargs)
        key = hashlib.sha256(inputs + weights.now()).hexdigest()
        start = time.perf_counter()
        if (kept := self._look_up(target, store, key, _device(args, kwargs))) is not None:
            target.report(NAME, "encodings_reused", 1)
            target.report(NAME, "seconds_reading", time.perf_counter() - start)
            return kept
        start = time.perf_counter()
        answer = old(*args, **kwargs)
        data = pack(answer)
        target.report(NAME, "encodings_run", 1)
        target.report(NAME, "seconds_encoding", time.perf_counter() - start)
        if data is not None:
            self._keep(target, store, key, data)
        return answer

    def _look_up(self, target: Target, store: DiskCache, key: str, device: Any) -> Any:
        """The kept answer, or None; a file that cannot be used is told."""
        found = store.read(key)
        why = found.damaged
        if found.data is not None:
            try:
                return unpack(found.data, device)
            except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
                why = str(error)
        if why:
            target.report(NAME, "damaged_files", 1)
            _log.warning("%s is damaged (%s); the prompt is encoded again", found.path, why)
        return None

    def _keep(self, target: Target, store: DiskCache, key: str, data: bytes) -> None:
        start = time.perf_counter()
        try:
            if left := store.write(key, data):
                target.report(NAME, "files_removed", left)
        except OSError as error:
            # A full or read-only disk must not cost the clip.
            target.report(NAME, "files_not_written", 1)
            _log.warning("%s cannot be written (%s); this prompt will be encoded again", store.folder, error)
        target.report(NAME, "seconds_writing", time.perf_counter() - start)


class WeightsHash:
    """The hash of an encoder's weights, configuration and surroundings; computed again when a weight changed.

    It is made when the session opens, because later the weights may be elsewhere (offloaded).
    """

    def __init__(self, encoder: Any, target: Target) -> None:
        self.encoder, self._target = encoder, target
        self._state, self._hash = self._look(), self._compute()

    def now(self) -> bytes:
        """32 bytes."""
        if (state := self._look()) != self._state:
            self._state, self._hash = state, self._compute()
        return hashlib.sha256(self._hash + _surroundings()).digest()

    def _look(self) -> tuple[Any, ...]:
        tensors = (*self.encoder.parameters(), *self.encoder.buffers())
        return tuple((id(t), 0 if t.is_inference() else t._version, t.dtype) for t in tensors)

    def _compute(self) -> bytes:
        start = time.perf_counter()
        config = getattr(self.encoder, "config", None)
        facts: dict[str, Any] = {"class": type(self.encoder).__qualname__, "format": FORMAT}
        if config is not None:
            facts["config"] = {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
            # Which attention runs is no part of the saved configuration, and changes the rounding.
            facts["attention"] = str(getattr(config, "_attn_implementation", ""))
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        digest.update(tensors_digest([*self.encoder.named_parameters(), *self.encoder.named_buffers()]))
        self._target.report(NAME, "seconds_hashing", time.perf_counter() - start)
        return digest.digest()


def away(encoder: Any) -> bool:
    """Whether weights are not where the module says: on the meta device, or moved by somebody's hooks."""
    if any(t.is_meta for t in (*encoder.parameters(), *encoder.buffers())):
        return True
    if any(hasattr(m, "_hf_hook") for m in encoder.modules()):
        return True
    registries = [r for m in encoder.modules() if (r := getattr(m, "_diffusers_hook", None)) is not None]
    return any("offload" in name for registry in registries for name in registry.hooks)


def _surroundings() -> bytes:
    """What else decides the bits: versions, threads, precision settings, the GPU."""
    import torch

    from vivace.core.env import cpu_name, versions

    known = {k: v for k, v in versions().items() if k in ("torch", "transformers")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    settings = (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.is_autocast_enabled("cpu"),
        torch.backends.cuda.matmul.allow_tf32,
    )
    return repr((sorted(known.items()), cpu_name(), gpu, settings)).encode()


def inputs_hash(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | None:
    """32 bytes of a call's arguments; None for a call that holds something else than tensors and plain values."""
    import torch

    digest = hashlib.sha256()
    for name, value in (*enumerate(args), *sorted(kwargs.items())):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} {value.device.type}:".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif value is None or isinstance(value, (bool, int, float, str)):
            digest.update(f"{name} {type(value).__name__} {value!r};".encode())
        else:
            return None
    return digest.digest()


def _device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Where the answer belongs: where the inputs are."""
    import torch

    tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
    return next((t.device for t in tensors), torch.device("cpu"))


def pack(answer: Any) -> bytes | None:
    """An encoder's answer as bytes: a safetensors file whose header says how the tensors are put together.

    What is no tensor (a language model's key-value cache) is left out; None where nothing is left.
    """
    import safetensors.torch

    tensors: dict[str, Any] = {}
    places: dict[int, str] = {}
    if (shape := _outline(answer, tensors, places)) is None:
        return None
    return safetensors.torch.save(tensors, {"outline": json.dumps(shape)})


def _outline(value: Any, tensors: dict[str, Any], places: dict[int, str]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        # The last of all hidden states is often the last hidden state too: it is kept once.
        name = places.setdefault(id(value), str(len(places)))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return name
    if isinstance(value, Mapping):
        fields = {k: o for k, v in value.items() if (o := _outline(v, tensors, places)) is not None}
        kind = type(value)
        return {"kind": f"{kind.__module__}:{kind.__qualname__}", "fields": fields} if fields else None
    if type(value) in (tuple, list):
        parts = [_outline(v, tensors, places) for v in value]
        return None if any(p is None for p in parts) else {"kind": type(value).__name__, "parts": parts}
    return None


def unpack(data: bytes, device: Any) -> Any:
    """Inverse of `pack`, with all tensors on `device`."""
    import safetensors.torch

    length = int.from_bytes(data[:8], "little")
    shape = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["outline"])
    tensors = {k: t.to(device) for k, t in safetensors.torch.load(data).items()}
    return _built(shape, tensors)


def _built(shape: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(shape, str):
        return tensors[shape]
    if "parts" in shape:
        parts = (_built(p, tensors) for p in shape["parts"])
        return tuple(parts) if shape["kind"] == "tuple" else list(parts)
    module, _, name = shape["kind"].partition(":")
    fields = {k: _built(p, tensors) for k, p in shape["fields"].items()}
    if module == "builtins":
        return fields
    return _output_class(module, name)(**fields)


def _output_class(module: str, name: str) -> Any:
    """The class of an answer by its name; only what transformers itself returns, so that a file cannot run code."""
    from transformers.utils import ModelOutput

    if module.partition(".")[0] != "transformers":
        raise ValueError(f"{module} is no module of transformers")
    found = getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, ModelOutput)):
        raise ValueError(f"{name} is no output of a model")
    return found
