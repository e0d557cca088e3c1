"""What the contract suite runs a technique on: tiny real pipelines, told how to make a small clip by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vivace.core.receipt import Receipt
from vivace.core.seeding import generators
from vivace.core.shapes import Workload
from vivace.models.adapter import EXPERTS, Expert, ModelDescription
from vivace.models.describe import describe_pipeline
from vivace.models.families import for_module
from vivace.plans.plan import Plan
from vivace.plans.session import Session, accelerate
from vivace.techniques.base import Estimate, Technique
from vivace.testing import models

PROMPT = "a red ball"
OTHER_PROMPT = "two blue cones"


def plan_of(*techniques: Technique, name: str = "custom") -> Plan:
    """A plan of techniques with their companions."""
    beside = (c for t in techniques for c in type(t).companions(techniques))
    return Plan((*techniques, *dict.fromkeys(beside)), name)


def estimate_of(
    technique: Technique, model: ModelDescription, workload: Workload, base: Estimate
) -> Estimate:
    """A technique's estimate, on top of its companions'."""
    for companion in type(technique).companions():
        base = companion.estimate(model, workload, base)
    return technique.estimate(model, workload, base)


@dataclass(frozen=True, slots=True)
class Run:
    """One generation: the final latents, and the receipt of what was computed."""

    latents: torch.Tensor
    receipt: Receipt


class Subject:
    """A fresh tiny pipeline of a family with a plan's worth of shorthand around it.

    Args:
        name: a key of `models.BUILDERS`.
        defaults: call arguments that count as the model's own defaults, so that a technique may change them;
            arguments given to `run` count as the user's and win.
        options: passed to the builder (`layers=2`).
    """

    def __init__(self, name: str, defaults: dict[str, Any] | None = None, **options: Any) -> None:
        self.name, self.options = name, options
        self.pipeline = models.pipeline(name, **options)
        call = models.call(name) | (defaults or {})
        if "image" in call:
            call["image"] = models.picture(call["width"], call["height"])
        self.defaults = {k: v for k, v in call.items() if isinstance(v, (int, float))}
        self.call = {k: v for k, v in call.items() if k not in self.defaults}
        self.model = describe_pipeline(self.pipeline, name=f"the tiny {name}", defaults=self.defaults)

    @property
    def experts(self) -> list[Expert]:
        """The transformers with their blocks and sites."""
        modules = {n: m for n in EXPERTS if (m := getattr(self.pipeline, n, None)) is not None}
        adapter = for_module(next(iter(modules.values())))
        return [adapter.expert(n, m) if adapter else Expert(n, m) for n, m in modules.items()]

    def open(self, *techniques: Technique, **options: Any) -> Session:
        """A session with these techniques on this pipeline."""
        return accelerate(self.pipeline, plan_of(*techniques), model=self.model, **options)

    def run(
        self, *techniques: Technique, counters: bool = True, compile_backend: str | None = None, **call: Any
    ) -> Run:
        """One generation in a session of its own."""
        with self.open(*techniques, counters=counters, compile_backend=compile_backend) as session:
            return self.generate(session, **call)

    def generate(self, session: Session, prompt: Any = PROMPT, seed: Any = 7, **call: Any) -> Run:
        """One generation in an open session."""
        out = session(prompt, seed=seed, output_type="latent", **(self.call | call))
        return Run(_latents(out.raw), out.receipt)

    def frames(self, *techniques: Technique) -> Run:
        """One generation with its decoding: the float frames in the place of the latents."""
        with self.open(*techniques) as session:
            out = session(PROMPT, seed=7, output_type="pt", **self.call)
        return Run(out.raw.frames.float(), out.receipt)

    def plain(self, prompt: Any = PROMPT, seed: int = 7, **call: Any) -> torch.Tensor:
        """Latents of the pipeline called directly, with no arguments of Vivace's."""
        own = {"generator": generators(seed, 1)[0], "output_type": "latent"}
        return _latents(self.pipeline(prompt=prompt, **(self.defaults | self.call | own | call)))

    def glance(self) -> torch.Tensor:
        """Latents of the pipeline called directly for two steps: enough to see whether it is the exact one."""
        return self.plain(num_inference_steps=2)

    def without(self, technique: Technique, frames: bool = False) -> Run:
        """What a technique is compared with: the exact run, or the one of its companions alone."""
        companions = type(technique).companions()
        if frames:
            return self.frames(*companions)
        return self.run(*companions) if companions else self.exact()

    def exact(self, **call: Any) -> Run:
        """The exact run, remembered for every subject of the same make."""
        key = repr(
            (self.name, sorted(self.options.items()), sorted(self.defaults.items()), sorted(call.items()))
        )
        if key not in _exact:
            _exact[key] = self.run(**call)
        return _exact[key]

    def workload(self, **call: Any) -> Workload:
        """The workload of a call, for estimates."""
        call = self.defaults | call
        guided = models.call(self.name).get("true_cfg_scale", call.get("guidance_scale"))
        return self.model.workload(
            frames=call["num_frames"],
            height=call["height"],
            width=call["width"],
            steps=call["num_inference_steps"],
            guidance=guided,
            text=call.get("max_sequence_length"),
        )

    def base_estimate(self, **call: Any) -> Estimate:
        """Counts of the exact run as an estimate without slack."""
        counts = self.exact(**call).receipt.counts
        return Estimate.exact(*(counts[n] for n in ("nfe", "blocks_run", "attention_pairs", "flops")))


_exact: dict[str, Run] = {}


def _latents(raw: Any) -> torch.Tensor:
    frames = getattr(raw, "frames", raw)
    return frames[0] if isinstance(frames, tuple) else frames


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance of `a` from `b`; infinite when the shapes differ or a value is not finite."""
    if a.shape != b.shape or not torch.isfinite(a).all():
        return float("inf")
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))
