"""Pruned model: a transformer with fewer blocks, heads and channels, repaired by distillation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from vivace.core.errors import ConfigError, WeightsError
from vivace.core.footprint import Footprint, LinearSize
from vivace.core.shapes import Workload
from vivace.models.adapter import EXPERTS, ExpertDescription, ModelDescription, Need
from vivace.techniques.base import (
    Card,
    Cite,
    Estimate,
    Paradigm,
    Problem,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
)

if TYPE_CHECKING:
    from vivace.models.pruned_file import Head

NAME = "pruned_model"


@dataclass(frozen=True, kw_only=True)
class PrunedModel(Technique):
    """Run a smaller transformer that `python -m vivace.training.pruning repair` made from this one.

    Blocks that were taken out are gone from the block list, linears have their smaller shapes, and all weights come
    from the file. The modules that stay are the model's own, so that what others hung on them stays too. A file made
    from another model (architecture or weights) is refused.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="A transformer with fewer blocks, heads and feed-forward channels, chosen by leave-one-out error and "
        "repaired by distillation from the whole one.",
        objective="time per step; memory of weights",
        stage=Stage.CHECKPOINT,
        claims=(exclusive("weights.checkpoint"),),
        needs=(Need.ORDERED_BLOCKS, Need.ATTENTION_SITES, Need.LINEAR_SITES),
        training="required",
        cite=Cite(
            title="FastLightGen; Individual Content and Motion Dynamics Preserved Pruning for Video Diffusion Models",
            arxiv="2603.01685, 2411.18375",
            differs="units are chosen greedily by leave-one-out error per FLOP, heads and channels as well as blocks; "
            "repair matches predictions, guided predictions and hidden states, with no adversarial loss",
        ),
    )

    file: str = ""
    """The pruned model; left empty, the packaged one of the embedded model."""
    expert: str = knob("transformer", choices=EXPERTS)
    """The transformer that is replaced."""
    keep: str = knob("host", choices=("host", "device"))
    """Where the original weights wait for the end of the session: in main memory, or on the device (saves nothing)."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        from vivace.models import pruned_file
        from vivace.models.families import for_module
        from vivace.models.pruning import Kept, anatomy, carved

        adapter, module = for_module(pipeline.transformer), pipeline.transformer
        if adapter is None:
            raise ConfigError("only a transformer with an adapter can be pruned.")
        whole, kept = anatomy(adapter, module), []
        blocks = tuple(b for paths in whole.lists.values() for b in (paths[:1] + paths[2:]))
        heads = {p: tuple(range(a.size - 1)) for p, a in whole.attentions.items() if a.block in blocks[:1]}
        widths = {p: tuple(range(0, f.size, 2)) for p, f in whole.feed_forwards.items() if f.block in blocks}
        kept.append(Kept(blocks, {p: h for p, h in heads.items() if h}, widths))
        kept.append(Kept(whole.blocks, {}, {p: w for p, w in widths.items() if w}))
        made = []
        for i, stays in enumerate(kept):
            head = pruned_file.head_of(module, stays, {"repair": "none"})
            state = carved(adapter, module, stays).state_dict()
            path = pruned_file.save(workdir / f"pruned-{i}.safetensors", state, head, ("fp32", "int8")[i])
            made.append(cls(file=str(path)))
        return tuple(made)

    # -- before anything is loaded --------------------------------------------------------------------------------

    def missing(self, model: ModelDescription) -> str:
        """A plan may leave it out where there is no file, or one for another architecture."""
        try:
            self._head(model)
        except (WeightsError, ConfigError) as error:
            return f"cannot run a pruned model: {error}"
        return ""

    def _head(self, model: ModelDescription) -> Head:
        """The file's head, if it fits the model as far as configurations tell.

        Raises:
            WeightsError: there is no such file, or it is damaged.
            ConfigError: it is for another model.
        """
        from vivace.models import pruned_file

        file = pruned_file.find(self.file)
        head = pruned_file.read_head(file)
        described = self._described(model)
        if described is None:
            raise ConfigError(f"{file} is for {self.expert}, and {model.name} has none.")
        if head.architecture != pruned_file.architecture(described.config):
            raise ConfigError(
                f"{file} was made from another architecture than {model.name}; make one for it with "
                f"`{pruned_file.COMMAND}`."
            )
        return head

    def _described(self, model: ModelDescription) -> ExpertDescription | None:
        return next((e for e in model.experts if e.name == self.expert), None)

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        """Others must fit the smaller model; what was fitted to the whole one is told."""
        out: list[Problem] = []
        smaller = self.shrunk(model) if others else model
        for other in others:
            card = other.card
            if card.stage is Stage.CHECKPOINT:
                reason = f"{card.name} changes weights of the whole model, which are gone here; leave it out."
                out.append(self.problem("composition", reason))
                continue
            known = {p.kind for p in other.check(model)}
            new = [p for p in other.check(smaller) if p.severity == "error" and p.kind not in known]
            out += [
                self.problem("composition", f"with {card.name} on what is left: {p.message}") for p in new
            ]
            if card.calibration == "required" and not new:
                reason = f"{card.name} was calibrated on the whole model; measure before you trust it here."
                out.append(self.problem("calibration", reason, "warning"))
        return out

    def shrunk(self, model: ModelDescription) -> ModelDescription:
        """The description of the model with this file in force; as it is where diffusers does not know the class."""
        from vivace.models.pruned_costs import buildable, on_meta

        described, adapter = self._described(model), model.adapter
        assert described is not None
        assert adapter is not None
        if not buildable(described):
            return model
        _, live = on_meta(adapter, described, self._head(model).kept)
        small = adapter.describe_expert(described.name, described.class_name, dict(live.config))
        experts = tuple(small if e is described else e for e in model.experts)
        return dataclasses.replace(model, experts=experts)

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact: both models are counted on the meta device; bounds where diffusers does not know the class."""
        from vivace.models.pruned_costs import buildable, step_costs, steps_of

        if not all(buildable(e) for e in model.experts):
            return base.scaled(0.0, 1.0, fields=("blocks_run", "attention_pairs", "flops"))
        kept, steps = self._head(model).kept, steps_of(model, workload)
        before, after = [0.0] * 3, [0.0] * 3
        for expert in model.experts:
            whole, pruned = step_costs(model, expert, workload, kept if expert.name == self.expert else None)
            for i, name in enumerate(("blocks", "pairs", "flops")):
                before[i] += steps[expert.name] * getattr(whole, name)
                after[i] += steps[expert.name] * getattr(pruned, name)
        for field, a, b in zip(("blocks_run", "attention_pairs", "flops"), after, before, strict=True):
            base = base.scaled(a / b if b else 1.0, fields=(field,))
        return base

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        from vivace.models.pruned_costs import buildable, on_meta

        described, adapter = self._described(model), model.adapter
        part = next((p for p in base.parts if p.name == self.expert), None)
        if described is None or adapter is None or part is None or len(part.blocks) != described.depth:
            return base
        if not buildable(described):
            return base
        shares, live = on_meta(adapter, described, self._head(model).kept)
        blocks = tuple(round(b * s) for b, s in zip(part.blocks, shares, strict=True) if s)
        each = {x.bytes // (x.inputs * x.outputs) for x in part.linears} or {base.size}
        linears = tuple(
            LinearSize(x.site, x.block, x.role, m.in_features, m.out_features, m.weight.numel() * max(each))
            for x in live.linears
            for m in (cast(Any, x.module),)
        )
        rest = part.rest if self.keep == "host" else part.rest + part.weights
        return base.with_part(dataclasses.replace(part, rest=rest, blocks=blocks, linears=linears))

    # -- on a live pipeline ---------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        from vivace.models import pruned_file
        from vivace.models.pruning import anatomy, cut

        expert = next((e for e in target.experts if e.name == self.expert), None)
        if expert is None or target.adapter is None:
            return  # nothing is edited, which the session reports as an error
        file = pruned_file.find(self.file)
        head, state = pruned_file.load(file)
        if head.base != pruned_file.base_hash(expert.module):
            raise WeightsError(
                f"{file} was made from other weights than those of this {expert.name}; make one for them with "
                f"`{pruned_file.COMMAND}`."
            )
        whole = anatomy(target.adapter, expert.module, expert.name)
        before = sum(p.numel() for p in expert.module.parameters())
        cut(target.edit, whole, head.kept, state, self.keep)
        target.report(NAME, "blocks", len(head.kept.blocks))
        target.report(NAME, "blocks_removed", len(whole.blocks) - len(head.kept.blocks))
        target.report(NAME, "parameters", sum(p.numel() for p in expert.module.parameters()))
        target.report(NAME, "parameters_before", before)
