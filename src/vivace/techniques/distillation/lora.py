"""LoRA: low-rank weight updates merged into the linears, undone bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.errors import WeightsError
from vivace.models.adapter import EXPERTS, ModelDescription
from vivace.models.original_names import diffusers_layer
from vivace.techniques.base import Card, Cite, Paradigm, Problem, Stage, Target, Technique, knob, shared
from vivace.techniques.distillation.artifact import (
    Shapes,
    expected_shapes,
    opened,
    shapes_in,
    shapes_of,
    weight_files,
)
from vivace.techniques.distillation.public import LORA, place_of

NAME = "lora"

_SUFFIXES: Mapping[str, str] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "bias",
}
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")


@dataclass(slots=True)
class Pair:
    """Tensor names of one layer's update: up (out, r) @ down (r, in), scaled by alpha / r.

    Beside or instead of the pair may stand `diff`, added to the weight as it is, and `bias`, added to the bias.
    """

    names: dict[str, str] = field(default_factory=dict)

    @property
    def factored(self) -> bool:
        return {"down", "up"} <= self.names.keys()

    @property
    def whole(self) -> bool:
        half = self.names.keys() & {"down", "up", "alpha"}
        return self.factored or (not half and bool(self.names))


@dataclass(frozen=True, kw_only=True)
class Lora(Technique):
    """W becomes W + scale * (alpha / r) * up @ down, computed in float32 and stored in W's own type.

    Reads what diffusers' `save_lora_weights` and peft write (`transformer.blocks.0.attn1.to_q.lora_A.weight`), with
    or without prefix and `.alpha`, and the down/up names of other trainers, whole differences (`.diff`, `.diff_b`) and
    layer names of the model's own code included. Names that begin with `transformer_2.` go to the second expert. A
    student checkpoint of the same plan is loaded first. In bfloat16 a merged update below half a unit in the last place
    of W is lost.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.DISTILLATION,
        summary="Merges a LoRA file, e.g. a few-step one, into the transformer's linears.",
        objective="fewer network evaluations",
        stage=Stage.CHECKPOINT,
        claims=(shared("weights.checkpoint"),),
        training="required",
        cite=Cite(
            title="LoRA: Low-Rank Adaptation of Large Language Models",
            arxiv="2106.09685",
            code="https://github.com/microsoft/LoRA",
            differs="merged for the length of a session; the weights before it are kept, not recomputed",
        ),
    )

    within_stage: ClassVar[int] = 1

    path: str = ""
    """A .safetensors file, a folder with one, or the name of a public LoRA."""
    scale: float = knob(1.0, low=0.0, high=2.0, identity=0.0)
    """Strength of the update."""
    expert: str = knob("transformer", choices=EXPERTS)
    """The transformer that names without `transformer_2.` belong to."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        import torch
        from safetensors.torch import save_file
        from torch import nn

        generator, tensors = torch.Generator().manual_seed(0), {}
        for name, module in pipeline.transformer.named_modules():
            if isinstance(module, nn.Linear) and "blocks" in name:
                sizes = {"A": (2, module.in_features), "B": (module.out_features, 2)}
                for factor, size in sizes.items():
                    key = f"transformer.{name}.lora_{factor}.weight"
                    tensors[key] = 0.2 * torch.randn(size, generator=generator)
        save_file(tensors, workdir / "lora.safetensors")
        return (cls(path=str(workdir / "lora.safetensors")),)

    def files(self) -> list[Path]:
        """The file or files.

        Raises:
            WeightsError: nothing is there; the sentence names the path.
        """
        return weight_files(place_of(self.path, "LoRA", LORA), "LoRA")

    def check(self, model: ModelDescription) -> list[Problem]:
        try:
            files = self.files()
            found = shapes_in(files)
            where = files[0] if len(files) == 1 else files[0].parent
            problems = []
            for name, pairs in self._pairs(found, where).items():
                expert = next((e for e in model.experts if e.name == name), None)
                if expert is None:
                    message = f"{where} has weights for {name}, and {model.name} has none."
                    problems.append(self.problem("expert", message))
                elif (expected := expected_shapes(expert)) is not None and (
                    reason := misfit(pairs, found, expected)
                ):
                    problems.append(self.problem("shapes", f"{where} does not fit {model.name}: {reason}."))
        except WeightsError as error:
            return [self.problem("file", str(error))]
        return problems

    def apply(self, target: Target) -> None:
        files = self.files()
        found = shapes_in(files)
        modules = {e.name: e.module for e in target.experts}
        sources = dict(_sources(files))
        alphas = _alphas(files)
        for name, pairs in self._pairs(found, files[0]).items():
            if reason := misfit(pairs, found, shapes_of(modules[name])):
                raise WeightsError(f"{files[0]} does not fit {name}: {reason}.")
            for layer, pair in pairs.items():
                self._merge(target, modules[name].get_submodule(layer), layer, pair, sources, alphas)

    def _pairs(self, found: Shapes, where: Path) -> dict[str, dict[str, Pair]]:
        """Updates by expert and layer.

        Raises:
            WeightsError: a tensor is no LoRA factor, or half of a pair is missing; the sentence names it.
        """
        out: dict[str, dict[str, Pair]] = {}
        for key in found:
            suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
            if suffix is None:
                raise WeightsError(f"{where} holds {key}, which is no LoRA factor of a linear layer.")
            expert, layer = self._address(key.removesuffix(suffix))
            out.setdefault(expert, {}).setdefault(layer, Pair()).names[_SUFFIXES[suffix]] = key
        for pairs in out.values():
            for layer, pair in pairs.items():
                if not pair.whole:
                    raise WeightsError(f"{where} holds only half of the update of {layer}; it is incomplete.")
        if not out:
            raise WeightsError(f"{where} holds no tensors.")
        return out

    def _address(self, name: str) -> tuple[str, str]:
        """(expert, path of the layer in it)."""
        for prefix in _PREFIXES[:2]:
            name = name.removeprefix(prefix)
        if name.startswith("transformer_2."):
            expert, name = "transformer_2", name.removeprefix("transformer_2.")
        else:
            expert, name = self.expert, name.removeprefix(_PREFIXES[2])
        return expert, diffusers_layer(name) or name

    def _merge(
        self,
        target: Target,
        linear: Any,
        layer: str,
        pair: Pair,
        sources: Mapping[str, Path],
        alphas: Alphas,
    ) -> None:
        import torch

        parts = {}
        for part, key in pair.names.items():
            with opened(sources[key]) as reader:
                parts[part] = reader.get_tensor(key).to(device=linear.weight.device, dtype=torch.float32)
        update = parts.get("diff", torch.zeros(()))
        if pair.factored:
            rank = parts["down"].shape[0]
            strength = parts["alpha"].item() / rank if "alpha" in parts else alphas.strength(layer, rank)
            update = update + strength * (parts["up"] @ parts["down"])
        for leaf, added in (("weight", update), ("bias", parts.get("bias"))):
            if added is not None and added.ndim:
                there = getattr(linear, leaf)
                merged = (there.float() + self.scale * added).to(there.dtype)
                target.edit.weight(linear, leaf, merged, keep="host")


@dataclass(frozen=True, slots=True)
class Alphas:
    """alpha / r as peft's adapter configuration in a file's metadata gives it; 1 without one."""

    config: Mapping[str, Any]

    def strength(self, layer: str, rank: int) -> float:
        """Factor of a layer's update."""
        if not self.config:
            return 1.0
        patterns = self.config.get("alpha_pattern") or {}
        own = next((a for p, a in patterns.items() if layer == p or layer.endswith("." + p)), None)
        alpha = self.config.get("lora_alpha", rank) if own is None else own
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _alphas(files: list[Path]) -> Alphas:
    for file in files:
        with opened(file) as reader:
            text = (reader.metadata() or {}).get("lora_adapter_metadata")
        if text:
            try:
                data = json.loads(text)
            except ValueError:
                raise WeightsError(f"{file} holds a damaged adapter configuration; save it again.") from None
            return Alphas({k.removeprefix("transformer."): v for k, v in data.items()})
    return Alphas({})


def _sources(files: list[Path]) -> Iterator[tuple[str, Path]]:
    for file in files:
        yield from ((key, file) for key in shapes_in([file]))


def misfit(pairs: Mapping[str, Pair], found: Shapes, expected: Shapes) -> str:
    """Why updates do not fit a transformer, in words; empty when they do."""
    for layer, pair in pairs.items():
        for part, leaf in (("up", "weight"), ("diff", "weight"), ("bias", "bias")):
            if part in pair.names and f"{layer}.{leaf}" not in expected:
                number = sum(f"{other}.{leaf}" not in expected for other in pairs)
                return f"the model has no layer {layer}" + (f" ({number} such)" if number > 1 else "")
    for layer, pair in pairs.items():
        if pair.factored:
            up, down, weight = found[pair.names["up"]], found[pair.names["down"]], expected[f"{layer}.weight"]
            if len(up) != 2 or len(down) != 2 or up[1] != down[0] or (up[0], down[1]) != weight:
                return f"the update of {layer} is {up} @ {down} and its weight {weight}"
        for part, leaf in (("diff", "weight"), ("bias", "bias")):
            if part in pair.names and (given := found[pair.names[part]]) != expected[f"{layer}.{leaf}"]:
                return f"the update of {layer} is {given} and its {leaf} {expected[f'{layer}.{leaf}']}"
    return ""
