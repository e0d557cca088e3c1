"""What must be as before once a technique is gone: one pipeline's objects, its classes, the process's settings.

A comparison gives sentences, one for each difference, so that a failed check says what was left behind.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

_PLAIN = (bool, int, float, str, tuple, type(None))
_FUNCTION_HOMES = (
    "torch",
    "torch.nn.functional",
    "diffusers.models.attention_dispatch",
    "diffusers.hooks.hooks",
)
_ABSENT = object()


def differences(before: dict[str, Any], after: dict[str, Any], limit: int = 4) -> str:
    """What differs between two fingerprints as one sentence; empty when nothing does."""
    found = [f"{k} is new" for k in after if k not in before]
    found += [f"{k} is gone" for k in before if k not in after]
    found += [f"{k} changed" for k in before if k in after and not _same(before[k], after[k])]
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return isinstance(a, _PLAIN) and type(a) is type(b) and a == b


def fingerprint(pipeline: Any) -> dict[str, Any]:
    """Weights, structure and instance attributes of a pipeline and its components, by address.

    Values that a pipeline legitimately changes when it runs (a scheduler's position, a VAE's frame cache) are not
    part of it: of instance attributes, plain constants of modules, callables and modules are compared.
    """
    out: dict[str, Any] = {}
    _instance(out, "pipeline", pipeline)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            for path, module in part.named_modules():
                _module(out, f"{name}.{path}" if path else name, module)
        elif part is not None:
            _instance(out, name, part)
    return out


def _instance(out: dict[str, Any], address: str, obj: Any) -> None:
    out[f"class of {address}"] = type(obj)
    for key, value in getattr(obj, "__dict__", {}).items():
        kept = value if callable(value) or isinstance(value, nn.Module) else None
        out[f"{address}.{key}"] = kept
    if (config := getattr(obj, "config", None)) is not None and not isinstance(obj, nn.Module):
        out[f"configuration of {address}"] = repr(config)


def _module(out: dict[str, Any], address: str, module: nn.Module) -> None:
    out[f"class of {address}"] = type(module)
    for key, value in vars(module).items():
        if key in ("_parameters", "_buffers"):
            for name, tensor in value.items():
                out[f"{address}.{name}"] = tensor
                out[f"bytes of {address}.{name}"] = _digest(tensor)
        elif key == "_modules" or (key.endswith("_hooks") and isinstance(value, dict)):
            out.update({f"{address}.{key}[{name}]": entry for name, entry in value.items()})
        elif isinstance(value, _PLAIN) or callable(value):
            out[f"{address}.{key}"] = value
        else:
            out[f"{address}.{key}"] = None


def _digest(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return ""
    facts = f"{tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad} {tensor.device}"
    if hasattr(tensor, "__tensor_flatten__"):
        return facts
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{facts} {hashlib.sha256(content).hexdigest()}"


def digest(tensor: torch.Tensor) -> str:
    """A hash of a tensor's shape, type and bytes."""
    return _digest(tensor)


class World:
    """Classes and modules that other pipelines share, and settings of the process: watched, compared, put back."""

    def __init__(self) -> None:
        self._classes: dict[type, dict[str, Any]] = {}
        self._modules: dict[str, dict[str, Any]] = {}
        self.settings = process_settings()

    def watch(self, pipeline: Any) -> None:
        """Remember the classes of a pipeline's components and the functions of the modules they come from."""
        parts: list[Any] = [pipeline, *pipeline.components.values()]
        modules = [m for p in parts if isinstance(p, nn.Module) for m in p.modules()]
        for cls in {c for obj in (*parts, *modules) if obj is not None for c in type(obj).__mro__}:
            if cls is not object and cls not in self._classes:
                self._classes[cls] = dict(vars(cls))
        for name in {c.__module__ for c in self._classes} | set(_FUNCTION_HOMES):
            if name in sys.modules and name not in self._modules:
                self._modules[name] = {
                    k: v for k, v in vars(sys.modules[name]).items() if inspect.isroutine(v)
                }

    def changes(self) -> str:
        """What differs in classes and module-level functions, as one sentence; empty when nothing does."""
        before: dict[str, Any] = {}
        after: dict[str, Any] = {}
        for cls, attributes in self._classes.items():
            label = f"class attribute {cls.__qualname__}"
            before |= {f"{label}.{k}": v for k, v in attributes.items()}
            after |= {f"{label}.{k}": v for k, v in vars(cls).items()}
        for name, functions in self._modules.items():
            before |= {f"function {name}.{k}": v for k, v in functions.items()}
            after |= {f"function {name}.{k}": vars(sys.modules[name]).get(k) for k in functions}
        return differences(before, after)

    def restore(self) -> None:
        """Put classes, functions and settings back, so that one bad technique cannot spoil the next check."""
        for cls, attributes in self._classes.items():
            for key in set(vars(cls)) | set(attributes):
                old = attributes.get(key, _ABSENT)
                if old is _ABSENT:
                    type.__delattr__(cls, key)
                elif vars(cls).get(key, _ABSENT) is not old:
                    type.__setattr__(cls, key, old)
        for name, functions in self._modules.items():
            vars(sys.modules[name]).update(functions)
        now = process_settings()
        for key, (get, put) in _SETTINGS.items():
            if now[key] != self.settings[key]:
                put(self.settings[key])
                assert get() == self.settings[key]


def _backend() -> str:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return str(_AttentionBackendRegistry._active_backend)


def _put_backend(value: str) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    _AttentionBackendRegistry._active_backend = next(b for b in AttentionBackendName if str(b) == value)


def _put_environment(value: tuple[tuple[str, str], ...]) -> None:
    os.environ.clear()
    os.environ.update(dict(value))


def _torch_random() -> str:
    return digest(torch.random.get_rng_state())


def _numpy_random() -> str:
    return hashlib.sha256(repr(np.random.get_state()).encode()).hexdigest()  # noqa: NPY002


_Access = tuple[Callable[[], Any], Callable[[Any], Any]]
_SETTINGS: dict[str, _Access] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic mode": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the cuDNN benchmark flag": (
        lambda: torch.backends.cudnn.benchmark,
        lambda v: setattr(torch.backends.cudnn, "benchmark", v),
    ),
    "the flash attention flag": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    "the math attention flag": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    "diffusers' attention backend": (_backend, _put_backend),
    "the warnings filters": (
        lambda: tuple(warnings.filters),
        lambda v: warnings.filters.__setitem__(slice(None), list(v)),  # type: ignore[attr-defined]
    ),
    "the environment": (lambda: tuple(sorted(os.environ.items())), _put_environment),
}
_GENERATORS: dict[str, Callable[[], Any]] = {
    "torch's global generator": _torch_random,
    "numpy's global generator": _numpy_random,
    "python's global generator": lambda: hash(random.getstate()),
}


def process_settings() -> dict[str, Any]:
    """Settings of the process that a technique could change for everybody."""
    return {key: get() for key, (get, _) in _SETTINGS.items()}


def generators() -> dict[str, Any]:
    """The states of the process's random generators, hashed."""
    return {key: get() for key, get in _GENERATORS.items()}
