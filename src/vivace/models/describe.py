"""A `ModelDescription` from a live pipeline or from a folder's configuration files (no weights read)."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vivace.core.errors import ModelError
from vivace.models.adapter import EXPERTS, ExpertDescription, Guidance, ModelDescription, Need
from vivace.models.families import by_class, for_module

_facts: weakref.WeakKeyDictionary[Any, tuple[str, Mapping[str, Any]]] = weakref.WeakKeyDictionary()
"""Name and call defaults of pipelines we loaded: what a live pipeline cannot tell about itself."""

_CONFIGURED = (*EXPERTS, "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3")


def remember(pipeline: Any, name: str = "", defaults: Mapping[str, Any] | None = None) -> None:
    """Keep a pipeline's name and call defaults for `describe_pipeline`, without touching the pipeline."""
    _facts[pipeline] = (name, dict(defaults or {}))


def describe_pipeline(
    pipeline: Any, *, name: str = "", defaults: Mapping[str, Any] | None = None
) -> ModelDescription:
    """Describe a live diffusers pipeline as it now is; name and defaults left out are the remembered ones."""
    known, usual = _facts.get(pipeline, ("", {}))
    name, defaults = name or known, usual if defaults is None else defaults
    configs: dict[str, Mapping[str, Any]] = {}
    classes: dict[str, str] = {}
    for part in _CONFIGURED:
        module = getattr(pipeline, part, None)
        if module is not None:
            config = getattr(module, "config", None)
            configs[part] = (
                dict(config) if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
            )
            classes[part] = type(module).__name__
    transformer = next((m for e in EXPERTS if (m := getattr(pipeline, e, None)) is not None), None)
    adapter = for_module(transformer) if transformer is not None else None
    if adapter is not None:
        # A subclass of a known transformer is driven like its parent.
        classes |= {e: adapter.transformer_classes[0] for e in EXPERTS if e in classes}
    settings = _settings(getattr(pipeline, "config", {}))
    kind = type(pipeline).__name__
    return describe_configs(name or kind, kind, configs, classes, defaults, settings)


def describe_folder(
    folder: Path, *, name: str = "", defaults: Mapping[str, Any] | None = None
) -> ModelDescription:
    """Describe a pipeline saved in diffusers' layout, reading only its JSON files.

    Raises:
        ModelError: the folder is no pipeline; the sentence names the file that is missing or damaged.
    """
    index = _json(folder / "model_index.json")
    if "_class_name" not in index:
        raise ModelError(f"{folder / 'model_index.json'} names no pipeline class; download the model again.")
    configs: dict[str, Mapping[str, Any]] = {}
    classes: dict[str, str] = {}
    for part in _CONFIGURED:
        entry = index.get(part)
        if not entry or entry[1] is None:
            continue
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        configs[part], classes[part] = _json(file), entry[1]
    kind = index["_class_name"]
    return describe_configs(name or folder.name, kind, configs, classes, defaults, _settings(index))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline's settings among the entries of its configuration: components are pairs, settings are plain."""
    return {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and isinstance(value, (bool, int, float, str))
    }


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no table of settings")
        return content
    except FileNotFoundError:
        raise ModelError(f"{file} is missing: a pipeline folder in diffusers' layout holds it.") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} cannot be read ({error}); download the model again.") from None


def describe_configs(
    name: str,
    pipeline_class: str,
    configs: Mapping[str, Mapping[str, Any]],
    classes: Mapping[str, str],
    defaults: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> ModelDescription:
    """Describe a pipeline from the configurations and class names of its components.

    Args:
        name: shown to people.
        pipeline_class: the diffusers pipeline.
        configs, classes: by component, as far as they are known: transformers, VAE, scheduler, text encoder.
        defaults: call arguments used when the caller gives none.
        settings: the pipeline's own settings, e.g. `boundary_ratio`.
    """
    settings = settings or {}
    experts: list[ExpertDescription] = []
    adapter = next((a for e in EXPERTS if e in classes and (a := by_class(classes[e]))), None)
    for part in EXPERTS:
        if part not in classes:
            continue
        if adapter is not None:
            experts.append(adapter.describe_expert(part, classes[part], configs[part]))
        else:
            experts.append(ExpertDescription(part, 0, 0, 0, configs[part], classes[part]))
    scheduler = configs.get("scheduler", {})
    guidance = adapter.guidance if adapter is not None else Guidance.SEPARATE
    offers = set()
    if adapter is not None:
        offers |= {Need.ORDERED_BLOCKS, Need.ATTENTION_SITES, Need.TOKEN_GRID, Need.LINEAR_SITES}
        if adapter.whole_clip_decoder(classes.get("vae", "")) is not None:
            offers.add(Need.WHOLE_CLIP_DECODE)
    if guidance is not Guidance.NONE:
        offers.add(Need.GUIDANCE)
    if scheduler.get("prediction_type") == "flow_prediction" or "FlowMatch" in classes.get("scheduler", ""):
        offers.add(Need.FLOW_SCHEDULER)
    facts = dict(defaults or {})
    if "vae" in configs:
        facts["vae"] = dict(configs["vae"])
    return ModelDescription(
        name=name,
        pipeline_class=pipeline_class,
        family=adapter.family if adapter else "",
        experts=tuple(experts),
        scheduler_class=classes.get("scheduler", ""),
        scheduler=scheduler,
        guidance=guidance,
        pixels=adapter.pixels(configs) if adapter else None,
        offers=frozenset(offers),
        defaults=facts,
        components=dict(classes),
        boundary_ratio=settings.get("boundary_ratio"),
        settings=settings,
        configs={name: dict(config) for name, config in configs.items()},
    )
