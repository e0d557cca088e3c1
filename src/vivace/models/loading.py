"""Getting a pipeline, or only its description, from a name, a folder, the hub, or the caller's own object."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.core.errors import ModelError, OfflineError, UnknownNameError, WeightsError
from vivace.core.quiet import quiet
from vivace.models.adapter import EXPERTS, ModelDescription
from vivace.models.describe import describe_folder, describe_pipeline, remember
from vivace.models.known import KNOWN

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

EMBEDDED = "tiny"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CONFIG_FILES = ("model_index.json", "*/config.json", "*/scheduler_config.json")
_HINT = "A model is 'tiny', a folder, a hub id such as 'org/name', or a pipeline object."


def load(
    source: Any = EMBEDDED,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """A diffusers pipeline, ready to be called or accelerated.

    Args:
        source: "tiny" (the embedded model), a folder in diffusers' layout, a hub id "org/name" (from the local cache
            when it is there), or a pipeline object, which is returned as it is.
        dtype: of the weights; by default what suits the embedded model on this machine, and for a folder what each
            component was saved in. A pipeline object is not converted.
        device: where to put the pipeline; by default it stays where it is, which is the CPU for loaded ones.
        defaults: call arguments that a session uses when its caller gives none.

    Raises:
        UnknownNameError: no model has that name.
        ModelError: the folder is no pipeline; the sentence names the file that is missing or damaged.
        WeightsError: a weight file is missing, truncated or damaged; the sentence names it.
        OfflineError: a hub id that is not in the cache, and the hub cannot be reached.
    """
    with quiet():
        # The first use of a pipeline class imports every optional library that diffusers knows.
        from diffusers import WanPipeline  # noqa: F401
    if not isinstance(source, (str, Path)):
        _check_pipeline(source)
        pipeline, name = source, ""
    elif str(source) == EMBEDDED:
        pipeline, name = _embedded(dtype, device), EMBEDDED
        defaults = {**_embedded_defaults(), **(defaults or {})}
    else:
        folder = _folder(source, weights=True)
        pipeline, name = _from_folder(folder, dtype), _name(source)
    if device is not None:
        pipeline.to(device)
    if name or defaults:
        remember(pipeline, name, defaults)
    return pipeline


def describe(source: Any = EMBEDDED) -> ModelDescription:
    """What `load` would load, from configuration files alone: no weights are read.

    Takes what `load` takes, and the names of `vivace.models.known`, models that are known by configuration only.

    Raises:
        UnknownNameError, ModelError, OfflineError: as `load`.
    """
    if not isinstance(source, (str, Path)):
        _check_pipeline(source)
        return describe_pipeline(source)
    if str(source) == EMBEDDED:
        from vivace.tiny.load import WEIGHTS

        return describe_folder(WEIGHTS, name=EMBEDDED, defaults=_embedded_defaults())
    if str(source) in KNOWN:
        return KNOWN[str(source)].describe()
    return describe_folder(_folder(source, weights=False), name=_name(source))


def _check_pipeline(source: Any) -> None:
    if not callable(source) or all(getattr(source, e, None) is None for e in EXPERTS):
        raise ModelError(f"a {type(source).__name__} is no video pipeline with a transformer. {_HINT}")


def _embedded(dtype: torch.dtype | None, device: Any) -> Any:
    import torch

    from vivace.tiny.load import load_tiny

    if dtype is None and device is not None and torch.device(device).type != "cpu":
        dtype = torch.bfloat16
    return load_tiny(dtype)


def _embedded_defaults() -> Mapping[str, Any]:
    from vivace.tiny.defaults import DEFAULTS

    return DEFAULTS


def _name(source: str | Path) -> str:
    return str(source) if _is_hub_id(source) else Path(source).name


def _is_hub_id(source: str | Path) -> bool:
    return isinstance(source, str) and not Path(source).is_dir() and _HUB_ID.fullmatch(source) is not None


def _folder(source: str | Path, *, weights: bool) -> Path:
    """The folder that holds a pipeline, fetched from the hub when it has to be."""
    path = Path(source)
    if path.is_dir():
        return path
    if _is_hub_id(source):
        return _from_hub(str(source), weights)
    text = str(source)
    if text in KNOWN:
        raise ModelError(
            f"'{text}' is known by its configuration only; give a folder or the hub id {KNOWN[text].hub}."
        )
    if os.sep in text or path.exists():
        raise ModelError(f"{path} is no folder; give one in diffusers' layout, with a model_index.json.")
    raise UnknownNameError("model", text, [EMBEDDED], _HINT)


def _from_hub(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    def get(local: bool) -> Path:
        if weights:
            from diffusers import DiffusionPipeline

            return Path(DiffusionPipeline.download(name, local_files_only=local))
        return Path(snapshot_download(name, allow_patterns=list(_CONFIG_FILES), local_files_only=local))

    try:
        return get(local=True)
    except (OSError, ValueError) as error:
        _log.debug("%s is not whole in the local cache: %s", name, error)
    try:
        return get(local=False)
    except RepositoryNotFoundError as error:
        kind = "needs a login" if isinstance(error, GatedRepoError) else "is not on the hub"
        raise ModelError(f"'{name}' {kind}; check the id, or pass a folder.") from None
    except (OSError, HTTPError):
        raise OfflineError(
            f"'{name}' is not in the local cache and the hub cannot be reached; download it first "
            f"(`hf download {name}`) or pass a folder."
        ) from None


def _from_folder(folder: Path, dtype: torch.dtype | None) -> Any:
    from diffusers import DiffusionPipeline

    index = describe_folder(folder)
    for part in _components(folder):
        _check_component(folder, part)
    kinds = dtype if dtype is not None else _saved_dtypes(folder)
    try:
        return DiffusionPipeline.from_pretrained(folder, torch_dtype=kinds, local_files_only=True)
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{folder} cannot be loaded as {index.pipeline_class} ({reason}); build the pipeline yourself and pass it."
        ) from error


def _components(folder: Path) -> list[str]:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return [k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1] is not None]


def _check_component(folder: Path, part: str) -> None:
    """Raises ModelError or WeightsError for a component that is not whole."""
    home = folder / part
    if not home.is_dir():
        raise ModelError(f"{home} is missing: model_index.json asks for it; download the model again.")
    if not (home / "config.json").is_file():
        return  # tokenizers, schedulers and image processors have no weights
    for index in home.glob("*.safetensors.index.json"):
        for shard in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            if not (home / shard).is_file():
                raise WeightsError(f"{home / shard} is missing; download the model again.")
    weights = sorted(home.glob("*.safetensors"))
    if not weights and not any(home.glob("*.bin")):
        raise WeightsError(f"{home} holds no weights (*.safetensors); download the model again.")
    for file in weights:
        header = safetensors_header(file)
        stop = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        expected = 8 + _header_length(file) + stop
        if (actual := file.stat().st_size) != expected:
            raise WeightsError(
                f"{file} is damaged ({actual} bytes instead of {expected}); download the model again."
            )


def _header_length(file: Path) -> int:
    with file.open("rb") as stream:
        return int.from_bytes(stream.read(8), "little")


def safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes, shapes and places of the tensors in a safetensors file, without reading them.

    Raises:
        WeightsError: the file does not begin with a header; the sentence names it.
    """
    length = _header_length(file)
    try:
        if length > file.stat().st_size - 8:
            raise ValueError("shorter than its header")
        with file.open("rb") as stream:
            stream.seek(8)
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return {
            name: {**entry, "data_offsets": tuple(entry["data_offsets"])} for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{file} is damaged ({error}); download the model again.") from None


def _saved_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """By component, the dtype that most of its weights were saved in."""
    import torch

    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found: dict[str, torch.dtype] = {"default": torch.float32}
    for part in _components(folder):
        sizes: dict[str, int] = {}
        for entry in _tensors(folder / part):
            start, stop = entry["data_offsets"]
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + stop - start
        if sizes and (most := max(sizes, key=sizes.__getitem__)) in names:
            found[part] = names[most]
    return found


def _tensors(home: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(home.glob("*.safetensors")):
        yield from safetensors_header(file).values()
