"""What quantisation needs to know of a model: activation maxima, and what each number format costs each layer.

    maxima = record_maxima(pipeline, prompts, num_inference_steps=20)
    maxima.save("maxima.safetensors")                        # quantized_linear(smooth=0.5, maxima="maxima.safetensors")
    calls = record_calls(pipeline, prompts[:1], count=4)
    errors = measure_errors(pipeline, calls, [Recipe(weights="int4", group=64), Recipe(weights="int8")])
    errors.choose(bits=5.0).save("mixed.json")               # quantized_linear(mixed="mixed.json")

The exact pipeline runs in a session and a recorder watches. Errors are measured on recorded evaluations outside of any
session: one unit (a layer, or all layers of a role in a block) is quantised at a time, and the transformer's output is
compared with what it gives exactly. That takes units * candidates * calls evaluations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.calibration.artifact import model_hash
from vivace.core.errors import ConfigError, ModelError
from vivace.core.surgery import Surgery
from vivace.kernels.api import AUTO, select
from vivace.kernels.quant_linear.spec import OP, Recipe
from vivace.models.adapter import EXPERTS, Expert, LinearSite, ModelDescription, RootCall
from vivace.models.describe import describe_pipeline
from vivace.models.families import for_module
from vivace.plans.engine import StepListener
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Target, Technique, reads
from vivace.techniques.compression.activation_maxima import ActivationMaxima
from vivace.techniques.compression.mixed_bits import BitErrors

if TYPE_CHECKING:
    import torch

UNITS = ("layer", "role", "block")
CANDIDATES = (
    Recipe(weights="int4", activations="int8", group=64),
    Recipe(weights="int8", activations="int8"),
)


@dataclass(frozen=True, slots=True, eq=False)
class RecordedCall:
    """One evaluation of a transformer.

    Attributes:
        expert: its name.
        step, steps: which step of how many.
        values: the call's arguments by name, tensors in main memory.
    """

    expert: str
    step: int
    steps: int
    values: dict[str, Any]


def _card(name: str, summary: str) -> Card:
    return Card(
        name=name,
        paradigm=Paradigm.COMPRESSION,
        summary=summary,
        objective="knowledge",
        stage=Stage.CACHE,
        claims=(reads("linear.weight"),),
        needs=(Need.LINEAR_SITES,),
        cite=Cite(title="Vivace"),
        lossless=True,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Recorder(Technique):
    """Watches an exact run; changes nothing and stands in no plan file."""

    abstract: ClassVar[bool] = True

    def to_dict(self) -> dict[str, Any]:
        return {"_type": self.type_name(), "_version": self.version}


@dataclass(frozen=True, kw_only=True, eq=False)
class MaximaRecorder(_Recorder):
    """Keeps the largest magnitude of every input channel of the blocks' linears."""

    card: ClassVar[Card] = _card("maxima_recorder", "Records activation maxima.")
    seen: dict[str, Any] = field(default_factory=dict)

    def apply(self, target: Target) -> None:
        for site in (s for e in target.experts for s in e.linears if s.role != "other"):
            target.edit.wrap(site.module, self._watching(target, site.site))

    def _watching(self, target: Target, site: str) -> Callable[..., Any]:
        import torch

        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if target.clock.evaluation is not None:
                    top = x.detach().abs().flatten(0, -2).amax(0).float()
                    self.seen[site] = torch.maximum(self.seen[site], top) if site in self.seen else top
                    target.report(self.card.name, "inputs_seen", 1)
                return old(x, *args, **kwargs)

            return forward

        return make


@dataclass(frozen=True, kw_only=True, eq=False)
class CallRecorder(_Recorder):
    """Keeps the arguments of some evaluations. `at`: which step of how many to look at, by step number and total."""

    card: ClassVar[Card] = _card("call_recorder", "Records evaluations.")
    at: Callable[[int, int], bool] = field(default=lambda step, steps: True)
    sink: dict[str, list[RecordedCall]] = field(default_factory=dict)

    def apply(self, target: Target) -> None:
        clock = target.clock
        for expert in target.experts:

            def handler(call: RootCall, run: Callable[[RootCall], Any], name: str = expert.name) -> Any:
                if self.at(clock.step, clock.num_steps):
                    values = _moved(call.values, "cpu", copy=True)
                    made = RecordedCall(name, clock.step, clock.num_steps, values)
                    self.sink.setdefault("calls", []).append(made)
                target.report(self.card.name, "evaluations_seen", 1)
                return run(call)

            target.around_expert(expert, handler)


def record_maxima(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    model: ModelDescription | None = None,
    seed: int = 0,
    on_step: StepListener | None = None,
    **call: Any,
) -> ActivationMaxima:
    """Run the exact pipeline once for each prompt and keep what smoothing needs.

    Args:
        pipeline: a diffusers pipeline that no session holds.
        prompts: one clip each.
        model: its description; found from the pipeline when left out.
        seed: of the first clip; clip i gets seed + i.
        on_step: called after every step, as in a session.
        call: the pipeline's arguments (steps, shape, guidance); what is left out is the model's default.

    Raises:
        ConfigError: no prompts.
        PlanError: the model's linears cannot be addressed.
    """
    recorder = MaximaRecorder()
    model = _watch(recorder, pipeline, prompts, model, seed, on_step, call)
    layers = {site: top.cpu() for site, top in recorder.seen.items()}
    return ActivationMaxima(family=model.family, model_hash=model_hash(pipeline), layers=layers)


def record_calls(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    count: int = 4,
    model: ModelDescription | None = None,
    seed: int = 0,
    on_step: StepListener | None = None,
    **call: Any,
) -> list[RecordedCall]:
    """Run the exact pipeline once for each prompt and keep every evaluation of `count` steps, evenly spread.

    Args:
        count: steps to record; both ends are among them from 2 on.
        pipeline, prompts, model, seed, on_step, call: as for `record_maxima`.

    Raises:
        ConfigError: no prompts, or a count below 1.
        PlanError: as for `record_maxima`.
    """
    if count < 1:
        raise ConfigError(f"at least one step must be recorded, not {count}.")

    def at(step: int, steps: int) -> bool:
        spread = [round(i * (steps - 1) / max(count - 1, 1)) for i in range(count)]
        return step in (spread if count > 1 else [steps // 2])

    recorder = CallRecorder(at=at)
    _watch(recorder, pipeline, prompts, model, seed, on_step, call)
    return recorder.sink["calls"]


def measure_errors(
    pipeline: Any,
    calls: Sequence[RecordedCall],
    candidates: Sequence[Recipe] = CANDIDATES,
    *,
    by: str = "layer",
    backend: str = AUTO,
    takes: Callable[[LinearSite, int], bool] = lambda site, depth: True,
    maxima: ActivationMaxima | None = None,
    smooth: float = 0.0,
    on_unit: Callable[[int, int], None] | None = None,
    part: Path | None = None,
    header: dict[str, Any] | None = None,
) -> BitErrors:
    """What each candidate costs each unit.

    Args:
        pipeline: a diffusers pipeline that no session holds.
        calls: evaluations of `record_calls` on it.
        candidates: ways to quantise a layer.
        by: one of `UNITS`: every layer by itself, all of a role in a block (q, k and v of an attention count as one
            role), or a whole block.
        backend: kernel by name, or `auto`.
        takes: whether a linear of a block, in an expert of so many blocks, is measured at all.
        maxima, smooth: as of `quantized_linear`; without maxima nothing is smoothed.
        on_unit: called with (number, total) before every unit that is measured.
        part: file that finished units are kept in, so that an interrupted measurement goes on behind them. The caller
            deletes it.
        header: what `part` was made for, as plain data, beside what is known here; another one begins again.

    Raises:
        ConfigError: no calls or candidates, no such units, or no maxima for a layer.
        ModelError: the model's linears cannot be addressed, or an expert was in no recorded call.
    """
    import torch

    if not calls or not candidates or by not in UNITS:
        raise ConfigError(f"a measurement needs calls, candidates and units ({', '.join(UNITS)}).")
    experts = _experts(pipeline)
    units: dict[str, list[tuple[Expert, LinearSite]]] = {}
    for expert in experts:
        for site in (s for s in expert.linears if s.role != "other"):
            if takes(site, len(expert.blocks)):
                units.setdefault(_unit(site, by, expert), []).append((expert, site))
    if not units:
        raise ModelError(f"the linear layers of {type(pipeline).__name__} cannot be addressed.")
    if unseen := {e.name for u in units.values() for e, _ in u} - {c.expert for c in calls}:
        raise ModelError(f"no call of {', '.join(sorted(unseen))} was recorded; record more steps.")
    modules = {e.name: e.module for e in experts}
    family, weights_hash = describe_pipeline(pipeline).family, model_hash(pipeline)
    done = _Units(
        part,
        {
            "family": family,
            "model_hash": weights_hash,
            "units": {name: [s.site for _, s in unit] for name, unit in units.items()},
            "candidates": [r.to_dict() for r in candidates],
            "calls": [(c.expert, c.step, c.steps) for c in calls],
            "smooth": smooth if maxima is not None else 0.0,
            **(header or {}),
        },
    )
    with torch.no_grad():
        exact = [replay(modules[c.expert], c) for c in calls]
        errors, sizes = done.errors, done.sizes
        for number, unit in enumerate(units.values()):
            if number < len(errors):
                continue
            if on_unit is not None:
                on_unit(number, len(units))
            owners = {e.name for e, _ in unit}
            row, taken = [], []
            for recipe in candidates:
                with _quantised([s for _, s in unit], recipe, backend, maxima, smooth) as nbytes:
                    row.append(
                        [
                            _distance(replay(modules[c.expert], c), out) if c.expert in owners else None
                            for c, out in zip(calls, exact, strict=True)
                        ]
                    )
                taken.append(nbytes)
            done.add(row, taken)
    weights = [[s.module.weight for _, s in unit] for unit in units.values()]
    return BitErrors(
        family=family,
        model_hash=weights_hash,
        units={name: [s.site for _, s in unit] for name, unit in units.items()},
        sizes=[sum(w.numel() for w in ws) for ws in weights],  # type: ignore[operator,union-attr]
        candidates=[r.to_dict() for r in candidates],
        bytes=sizes,
        full_bytes=[sum(w.nbytes for w in ws) for ws in weights],  # type: ignore[operator,union-attr]
        calls=[(c.expert, c.step, c.steps) for c in calls],
        errors=errors,
    )


def _watch(
    recorder: _Recorder,
    pipeline: Any,
    prompts: Sequence[str],
    model: ModelDescription | None,
    seed: int,
    on_step: StepListener | None,
    call: dict[str, Any],
) -> ModelDescription:
    """The exact runs."""
    if not prompts:
        raise ConfigError("a recording needs at least one prompt.")
    model = model or describe_pipeline(pipeline)
    call = {"num_inference_steps": model.asked(call).steps, "output_type": "latent"} | call
    with accelerate(pipeline, Plan([recorder]), model=model, counters=False, on_step=on_step) as session:
        for i, prompt in enumerate(prompts):
            session(prompt, seed=seed + i, **call)
    return model


def _experts(pipeline: Any) -> list[Expert]:
    modules = {name: m for name in EXPERTS if (m := getattr(pipeline, name, None)) is not None}
    adapter = for_module(next(iter(modules.values()))) if modules else None
    return [] if adapter is None else [adapter.expert(name, m) for name, m in modules.items()]


def _unit(site: LinearSite, by: str, expert: Expert) -> str:
    if by == "layer":
        return site.site
    block = expert.blocks[site.block].site
    if by == "block":
        return block
    kind, _, part = site.role.rpartition(".")
    return f"{block}.{kind}.{'qkv' if part in 'qkv' else part}"


class _Units:
    """Finished units, in memory and, where a file is given, in a file that an interrupted measurement leaves behind."""

    def __init__(self, file: Path | None, header: dict[str, Any]) -> None:
        self._file, self._header = file, json.loads(json.dumps(header))
        self.errors: list[list[list[float | None]]] = []
        self.sizes: list[list[int]] = []
        if file is None or not file.is_file():
            return
        try:
            data = json.loads(file.read_text())
            if data["header"] == self._header and len(data["errors"]) == len(data["sizes"]):
                self.errors, self.sizes = data["errors"], data["sizes"]
        except (ValueError, KeyError, TypeError):
            return  # cut off while being written, or somebody else's: begin again

    def add(self, errors: list[list[float | None]], sizes: list[int]) -> None:
        """One more unit."""
        self.errors.append(errors)
        self.sizes.append(sizes)
        if self._file is None:
            return
        fresh = self._file.with_name(self._file.name + ".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps({"header": self._header, "errors": self.errors, "sizes": self.sizes}))
        fresh.replace(self._file)


class _quantised:
    """Sites by a recipe inside a `with`, which gives the bytes of their codes; the layers come back after."""

    def __init__(
        self,
        sites: Sequence[LinearSite],
        recipe: Recipe,
        backend: str,
        maxima: ActivationMaxima | None = None,
        smooth: float = 0.0,
    ) -> None:
        self.sites, self.recipe, self.backend, self.edit = sites, recipe, backend, Surgery()
        self.maxima, self.smooth = maxima, smooth

    def __enter__(self) -> int:
        nbytes = 0
        try:
            for site in self.sites:
                linear: Any = site.module
                features = math.gcd(linear.in_features, linear.out_features)
                device = linear.weight.device.type
                choice = select(OP, self.backend, device=device, recipe=self.recipe, features=features)
                new = choice.run(linear, self.recipe, self._smoothing(site))
                nbytes += new.nbytes
                self.edit.swap(site.parent, site.name, new)
        except BaseException:
            self.edit.close()
            raise
        return nbytes

    def _smoothing(self, site: LinearSite) -> torch.Tensor | None:
        if self.maxima is None or not self.smooth:
            return None
        from vivace.kernels.quant_linear.layer import smoothing

        linear: Any = site.module
        seen = self.maxima.layers.get(site.site)
        if seen is None or seen.shape != (linear.in_features,):
            raise ConfigError(f"there are no activation maxima of {site.site}; record them again.")
        return smoothing(seen, linear.weight, self.smooth)

    def __exit__(self, *exc: object) -> None:
        self.edit.close()


def replay(module: Any, call: RecordedCall) -> torch.Tensor:
    """A transformer's output for a recorded call, on its device."""
    values = _moved(call.values, next(module.parameters()).device)
    values.pop("return_dict", None)
    return module(**values, return_dict=False)[0]


def _distance(out: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.float()
    return float((out.float() - exact).norm() / exact.norm().clamp_min(1e-30))


def _moved(value: Any, device: Any, copy: bool = False) -> Any:
    """Tensors inside containers on another device."""
    if hasattr(value, "detach"):
        return value.detach().to(device, copy=copy)
    if isinstance(value, dict):
        return {k: _moved(v, device, copy) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(v, device, copy) for v in value)
    return value
