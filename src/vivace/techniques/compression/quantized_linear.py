"""Quantised linear layers in 8 and 4 bits, with rotation, smoothing, a low-rank branch and full-precision steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.errors import ConfigError, PlanError
from vivace.core.footprint import Footprint
from vivace.core.shapes import Workload
from vivace.kernels.api import Choice, candidates, select
from vivace.kernels.quant_linear.spec import ACTIVATIONS, GROUPS, INTEGERS, OP, WEIGHTS, Recipe, emulated
from vivace.models.adapter import Expert, LinearSite, ModelDescription, Need, RootCall
from vivace.models.quantized import TrainedLinears
from vivace.techniques.base import (
    Card,
    Cite,
    Claim,
    Estimate,
    Paradigm,
    Problem,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
)
from vivace.techniques.compression import activation_maxima
from vivace.techniques.compression.activation_maxima import ActivationMaxima
from vivace.techniques.compression.linears import blocks_between, layer_bytes, takes_role
from vivace.techniques.compression.mixed_bits import MixedBits

if TYPE_CHECKING:
    import torch

NAME = "quantized_linear"
ROTATION = 64.0
"""Most multiply-adds a value that a rotation costs (`vivace.kernels.quant_linear.rotation`)."""


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear(Technique):
    """Quantise the weights of the blocks' linears, and the activations that meet them, to one of several formats.

    Static-dynamic balancing as in ViDiT-Q: scales of activations are measured for each token as it comes; channels are
    balanced by a rotation (QuaRot, arXiv 2404.00456) and by smoothing (SmoothQuant, arXiv 2211.10438); a branch of low
    rank in 16 bits takes what the codes hold worst (SVDQuant, arXiv 2411.05007). The first and last steps may run the
    original weights, as they are the most sensitive. Layers may come from a file, where they were trained with the
    rounding in force (QVGen, arXiv 2505.11497). Formats that no unit here multiplies are emulated: their numbers are
    exact, their time means nothing, and the receipt says `emulated`.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Linear layers in int8, int4, FP8, NVFP4 or MX formats, with rotation, smoothing, a low-rank branch, "
        "mixed precision and full-precision steps.",
        objective="memory; time per step on integer and FP8 units",
        stage=Stage.WEIGHTS,
        claims=(exclusive("linear.weight"),),
        cite=Cite(
            title="ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers for Image and Video "
            "Generation",
            arxiv="2406.02540",
            code="https://github.com/thu-nics/ViDiT-Q",
            differs="one smoothing vector for all timesteps; the rotation is a block Hadamard matrix; precision by "
            "layer comes from one error of the output instead of one for each metric; NVFP4 and FP8 activations have "
            "one scale a token instead of one a tensor",
        ),
        needs=(Need.LINEAR_SITES,),
        training="optional",
        calibration="optional",
        fidelity=0.1,
    )

    weights: str = knob("int8", choices=WEIGHTS)
    """Format of the weights."""
    activations: str = knob("int8", choices=ACTIVATIONS)
    """Format of the activations; `none` leaves them as they are, which saves memory and no time."""
    group: int = knob(0, choices=GROUPS)
    """Integer weights that share a scale along the input channels; 0 for one scale an output channel."""
    rotate: str = knob("none", choices=("none", "hadamard"))
    """Whether input channels are rotated, which spreads outliers over a block of channels."""
    smooth: float = knob(0.0, low=0.0, high=1.0)
    """Share of the activations' range that smoothing moves into the weights; above 0 it needs `maxima`."""
    maxima: str = ""
    """File of activation maxima (`vivace.plans.quant_searching.record_maxima`)."""
    low_rank: int = knob(0, low=0, high=64)
    """Rank of the 16-bit branch; 0 for none."""
    roles: str = knob("all", choices=("all", "ffn", "attention"))
    """Which linears of a block: feed-forward, attention projections (cross-attention and text too), or both."""
    skip_blocks: int = knob(0, low=0, high=4)
    """Blocks left alone, at the front and likewise at the back."""
    full_first: int = knob(0, low=0, high=20)
    """First steps that run the original weights."""
    full_last: int = knob(0, low=0, high=20)
    """Last steps that run the original weights."""
    keep: str = knob("host", choices=("host", "device"))
    """Where the original weights wait: in main memory, from where full steps fetch one layer at a time, or on the
    device, which saves nothing and fetches nothing."""
    mixed: str = ""
    """File of formats layer by layer (`vivace.plans.quant_searching`), instead of `weights`, `activations`, `group`."""
    trained: str = ""
    """File of layers trained with these very settings (`vivace.training.quantization`), instead of rounded ones."""
    backend: str = "auto"
    """Kernel by name (`vivace.kernels.quant_linear`), or `auto`."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return cls(), cls(**_example_files(workdir, pipeline)), cls(**_trained_example(workdir, pipeline))

    # -- what may be said without weights -----------------------------------------------------------------------

    def claims(self, model: ModelDescription) -> tuple[Claim, ...]:
        return (exclusive("linear.weight", blocks_between(model, self.skip_blocks)),)

    def check(self, model: ModelDescription) -> list[Problem]:
        found = [self.problem("setting", sentence) for sentence in self._wrong_settings()]
        if not any(self._takes_block(i, e.depth) for e in model.experts for i in range(e.depth)):
            found.append(
                self.problem(
                    "pointless",
                    f"skip_blocks={self.skip_blocks} leaves none of {model.depth} blocks; lower it or leave it out.",
                )
            )
        if self.full_first + self.full_last >= (steps := model.workload().steps):
            message = f"{steps} steps leave none that runs quantised weights; lower full_first or full_last."
            found.append(self.problem("pointless", message, "warning"))
        try:
            if self.smooth and self.maxima and (why := activation_maxima.unfit(self.maxima, model)):
                found.append(self.problem("file", why))
            if self.trained and not found and (why := self._unfit_training(model)):
                found.append(self.problem("file", why))
            if self.mixed:
                file = MixedBits.load(self.mixed)
                if why := file.unfit(self.mixed, model):
                    found.append(self.problem("file", why))
                elif not found:
                    found += [self.problem("setting", s) for s in self._wrong_backend(file)]
        except ConfigError as error:
            found.append(self.problem("file", str(error)))
        return found

    def _wrong_settings(self) -> Iterator[str]:
        if self.trained and (self.mixed or self.maxima):
            yield "trained has formats and smoothing of its own; leave mixed and maxima out."
        if self.smooth and not self.maxima and not self.trained:
            yield f"smooth needs maxima, a file of activation maxima; make it with {activation_maxima.MAKER}."
        if self.group and self.weights not in INTEGERS and not self.mixed:
            yield f"{self.weights} has blocks of its own; set group: 0."
        elif self.backend not in (names := ["auto", *(c.name for c in candidates(OP))]):
            yield f"backend must be one of {', '.join(names)}."
        elif not self.mixed:
            yield from self._wrong_backend(None)

    def _wrong_backend(self, file: MixedBits | None) -> Iterator[str]:
        """Why the backend that is asked for cannot multiply a recipe, whatever the device."""
        wanted = next((c for c in candidates(OP) if c.name == self.backend), None)
        if wanted is None:
            return
        recipes = {self._usual} if file is None else {file.recipe(s, self._usual) for s in file.layers}
        reasons = {wanted.refuse({"recipe": r, "device": "cpu"}) for r in recipes if r is not None} - {None}
        for reason in sorted(map(str, reasons)):
            yield f"backend {self.backend}: {reason}; set backend: auto, or other formats."

    def _unfit_training(self, model: ModelDescription) -> str:
        """Why the trained layers cannot serve a model; empty when they can."""
        file = TrainedLinears.load(self.trained, tensors=False)
        if file.family != model.family:
            return f"{self.trained} was made for the family {file.family}, and {model.name} is of {model.family}."
        blocks = tuple(f"{site}." for site in blocks_between(model, self.skip_blocks))
        if strange := next((name for name in file.layers if not name.startswith(blocks)), None):
            return (
                f"{self.trained} has the layer {strange}, which these settings leave alone or {model.name} "
                "does not have; set skip_blocks as in training."
            )
        return file.unfit(self.trained, self._usual, self.smooth)

    @property
    def _usual(self) -> Recipe:
        """What layers get that no file speaks of."""
        # With a file, a group that the technique's own format does not have may still be meant for nobody.
        group = self.group if self.weights in INTEGERS else 0
        return Recipe(
            weights=self.weights,
            activations=self.activations,
            group=group,
            rotate=self.rotate == "hadamard",
            low_rank=self.low_rank,
        )

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """The products themselves cost what they did; a branch and a rotation add at most a share of them."""
        if not self.low_rank and self.rotate == "none":
            return base
        width = min(e.heads * e.head_dim for e in model.experts)
        # Against K N multiply-adds a token: r (K + N) of a branch with r at most half of the smaller side.
        more = min(1.0, 2.0 * self.low_rank / width) + (ROTATION / width if self.rotate != "none" else 0.0)
        return base.scaled(1.0, 1.0 + more, fields=("flops",))

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        """Codes and scales in the place of weights; originals beside them where they wait on the device."""
        mixed = MixedBits.load(self.mixed) if self.mixed else None
        scheduled = bool(self.full_first or self.full_last)
        depths = {expert.name: expert.depth for expert in model.experts}
        for part in base.parts:
            sizes = {}
            for x in part.linears if part.name in depths else ():
                if not (self._takes_block(x.block, depths[part.name]) and self._takes_role(x.role)):
                    continue
                recipe = self._usual if mixed is None else mixed.recipe(x.site, self._usual)
                if recipe is not None:
                    kept = x.bytes if self.keep == "device" and scheduled else 0
                    sizes[x.site] = layer_bytes(recipe, x.inputs, x.outputs, bool(self.smooth)) + kept
            base = base.with_part(part.resized(sizes))
        return base

    # -- on a live pipeline ---------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        mixed = MixedBits.load(self.mixed) if self.mixed else None
        maxima = ActivationMaxima.load(self.maxima) if self.smooth and not self.trained else None
        trained = TrainedLinears.load(self.trained) if self.trained else None
        for file in (mixed, maxima, trained):
            if file is not None and file.model_hash and target.model_hash not in ("", file.model_hash):
                sentence = f"its file was made for other weights of {target.model.name}; make one for these."
                raise PlanError([self.problem("calibration", sentence)])
        work = [
            (e, site, r)
            for e in target.experts
            for site in self._sites(e)
            if (r := self._recipe(site, mixed))
        ]
        if trained is not None and (why := trained.unfit_sites(self.trained, (s.site for _, s, _ in work))):
            raise PlanError([self.problem("file", why)])
        choices = self._choices(target, [(site, recipe) for _, site, recipe in work])
        layers: dict[str, list[Any]] = {}
        for expert, site, recipe in work:
            new = self._convert(target, site, recipe, choices[recipe], maxima, trained)
            layers.setdefault(expert.name, []).append(new)
        if self.full_first or self.full_last:
            for expert in target.experts:
                if expert.name in layers:
                    target.around_expert(expert, self._around(target, layers[expert.name]))

    def _choices(self, target: Target, work: list[tuple[LinearSite, Recipe]]) -> dict[Recipe, Choice]:
        """A kernel for each recipe, told to the receipt with whether it is emulated."""
        choices: dict[Recipe, Choice] = {}
        for recipe in dict.fromkeys(r for _, r in work):
            linears: list[Any] = [site.module for site, r in work if r == recipe]
            features = math.gcd(*(n for x in linears for n in (x.in_features, x.out_features)))
            device = linears[0].weight.device.type
            choice = select(OP, self.backend, device=device, recipe=recipe, features=features)
            pair = f"{recipe.weights} weights, {recipe.activations} activations"
            if emulated(choice, recipe):
                why = f"EMULATED ({pair}: exact numbers, no speed); {choice.why}"
            else:
                why = f"{pair}; {choice.why}"
            choices[recipe] = Choice(choice.op, choice.name, why, choice.run)
            target.chosen(choices[recipe])
        return choices

    def _convert(
        self,
        target: Target,
        site: LinearSite,
        recipe: Recipe,
        choice: Choice,
        maxima: ActivationMaxima | None,
        trained: TrainedLinears | None,
    ) -> Any:
        """Put the quantised layer in force; returns it."""
        linear: Any = site.module
        before = linear.weight.nbytes
        if trained is None:
            new = choice.run(linear, recipe, self._smoothing(site, maxima))
        else:
            new = trained.layer(site.site, linear, choice)
        scheduled = bool(self.full_first or self.full_last)
        if self.keep == "host":
            self._send_away(target, linear, new if scheduled else None)
        elif scheduled:
            new.original = linear.weight
            target.report(NAME, "bytes_kept", before)
        target.edit.swap(site.parent, site.name, new)
        effects = {
            "linears": 1,
            f"linears_{recipe.weights}": 1,
            "linears_emulated": int(emulated(choice, recipe)),
            "bytes_before": before,
            "bytes_after": new.nbytes,
            f"bytes_{recipe.weights}": new.nbytes,
        }
        if trained is not None:
            effects |= {"linears_trained": 1, "bytes_trained": new.nbytes}
        for effect, amount in effects.items():
            target.report(NAME, effect, amount)
        return new

    def _send_away(self, target: Target, linear: Any, new: Any | None) -> None:
        """Free the original weight on its device. `new`: the layer that fetches it in full steps."""
        empty = linear.weight.new_empty(0)
        if new is None:
            target.edit.weight(linear, "weight", empty, keep="host")
            return
        host = linear.weight.detach().to("cpu", copy=True)
        if linear.weight.device.type == "cuda":
            host = host.pin_memory()
        new.original = host
        target.edit.weight(linear, "weight", empty, keep="reload", reload=lambda: host)

    def _smoothing(self, site: LinearSite, maxima: ActivationMaxima | None) -> torch.Tensor | None:
        if maxima is None:
            return None
        from vivace.kernels.quant_linear.layer import smoothing

        linear: Any = site.module
        seen = maxima.layers.get(site.site)
        if seen is None or seen.shape != (linear.in_features,):
            sentence = f"{self.maxima} has no maxima of the {linear.in_features} channels of {site.site}."
            raise PlanError(
                [self.problem("file", f"{sentence} Make it again with {activation_maxima.MAKER}.")]
            )
        return smoothing(seen, linear.weight, self.smooth)

    def _around(self, target: Target, layers: list[Any]) -> Callable[..., Any]:
        clock = target.clock

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            full = clock.step < self.full_first or clock.step >= clock.num_steps - self.full_last
            evaluation = clock.evaluation
            if not full or evaluation is None:
                return run(call)
            evaluation.variant += (f"{NAME}: full",)
            try:
                for layer in layers:
                    layer.full = True
                return run(call)
            finally:
                for layer in layers:
                    layer.full = False
                share = evaluation.requested * call.rows / max(evaluation.rows, 1)
                target.report(NAME, "full_evaluations", share)

        return handler

    def _recipe(self, site: LinearSite, mixed: MixedBits | None) -> Recipe | None:
        return self._usual if mixed is None else mixed.recipe(site.site, self._usual)

    def _sites(self, expert: Expert) -> Iterator[LinearSite]:
        for site in expert.linears:
            new = not hasattr(site.module, "recipe")  # not quantised when it was loaded
            if new and self._takes_block(site.block, len(expert.blocks)) and self._takes_role(site.role):
                yield site

    def _takes_block(self, index: int, depth: int) -> bool:
        return self.skip_blocks <= index < depth - self.skip_blocks

    def _takes_role(self, role: str) -> bool:
        return takes_role(self.roles, role)


def _example_files(workdir: Path, pipeline: Any) -> dict[str, Any]:
    """Settings that use everything at once, with made-up files for a small pipeline: for contract checks."""
    import torch

    from vivace.models.describe import describe_pipeline
    from vivace.models.families import for_module

    family, adapter = describe_pipeline(pipeline).family, for_module(pipeline.transformer)
    assert adapter is not None
    maxima: dict[str, torch.Tensor] = {}
    formats: dict[str, Any] = {}
    for name in ("transformer", "transformer_2"):
        if (module := getattr(pipeline, name, None)) is None:
            continue
        for site in adapter.expert(name, module).linears:
            columns = site.module.in_features  # type: ignore[union-attr]
            maxima[site.site] = torch.linspace(0.5, 2.0, int(columns))  # type: ignore[arg-type]
            if site.role.startswith("ffn."):
                formats[site.site] = {"weights": "int4", "activations": "int8", "group": 32}
            elif site.role == "cross.out":
                formats[site.site] = None
    seen = ActivationMaxima(family=family, model_hash="", layers=maxima).save(workdir / "maxima.safetensors")
    mixed = MixedBits(family=family, model_hash="", layers=formats).save(workdir / "mixed.json")
    return {
        "rotate": "hadamard",
        "smooth": 0.5,
        "maxima": str(seen),
        "low_rank": 4,
        "mixed": str(mixed),
        "full_first": 1,
        "full_last": 1,
    }


def _trained_example(workdir: Path, pipeline: Any) -> dict[str, Any]:
    """Settings with a file of layers as training would write it, for a small pipeline: for contract checks."""
    from vivace.kernels.quant_linear import reference
    from vivace.models.describe import describe_pipeline
    from vivace.models.families import for_module

    recipe = Recipe(weights="int4", activations="int8", group=32, low_rank=4)
    adapter, layers = for_module(pipeline.transformer), {}
    assert adapter is not None
    for name in ("transformer", "transformer_2"):
        if (module := getattr(pipeline, name, None)) is None:
            continue
        for site in adapter.expert(name, module).linears:
            if not takes_role("all", site.role):
                continue
            linear: Any = site.module
            layer = reference.quantise(linear, recipe)
            parts = {"weight": layer.weight.data, "scale": layer.scale}
            if layer.down is not None and layer.up is not None:
                parts |= {"down": layer.down.weight.data.bfloat16(), "up": layer.up.weight.data.bfloat16()}
            if linear.bias is not None:
                parts["bias"] = linear.bias.detach().float() + 0.01
            layers[site.site] = parts
    family = describe_pipeline(pipeline).family
    file = TrainedLinears(family=family, model_hash="", recipe=recipe, layers=layers)
    return {
        "weights": "int4",
        "activations": "int8",
        "group": 32,
        "low_rank": 4,
        "trained": str(file.save(workdir / "trained.safetensors")),
    }
