"""The receipt: what really ran in one generation. Counted, never claimed.

Counting rules: NFE counts guidance branches, so a pair of separate calls and one fused call both count 2. Blocks,
attention pairs and FLOPs cover the transformer(s), not the text encoder or the VAE. A multiply-add is two FLOPs;
matrix products, convolutions and attention products are counted, element-wise work is not. `*_dense` and
`*_total` are what the same requests would have cost with nothing skipped.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class BranchRecord:
    """One transformer call of one step."""

    branch: str
    expert: str
    action: str
    blocks_run: float
    blocks_total: float
    by: str = ""


@dataclass(slots=True)
class StepRecord:
    """One step of the solver."""

    index: int
    timestep: float
    sigma: float | None
    """Its noise level; None for a scheduler without `sigmas`."""
    seconds: float | None = None
    branches: list[BranchRecord] = field(default_factory=list)


@dataclass(slots=True)
class TechniqueRecord:
    """What one technique did: edits made to the model, and the effects it reported while running."""

    name: str
    paradigm: str
    settings: dict[str, Any]
    cite: str = ""
    edits: int = 0
    effects: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class KernelRecord:
    """A kernel chosen for an operation, and why.

    `calls` is how often the choice was made in the session so far: a kernel that is built once is chosen once.
    """

    op: str
    choice: str
    why: str
    calls: int = 0


@dataclass(slots=True)
class Receipt:
    """See the module's docstring for the counting rules. Seconds are wall time; bytes are bytes."""

    nfe: int = 0
    nfe_requested: int = 0
    blocks_run: float = 0.0
    blocks_total: int = 0
    attention_pairs: float = 0.0
    attention_pairs_dense: float = 0.0
    attention_pairs_in_run_blocks: float = 0.0
    """Query-key pairs that dense attention would visit in the blocks that really ran."""
    flops: float = 0.0
    flops_dense: float = 0.0
    cache_hits: int = 0
    cache_bytes: int = 0
    weight_bytes: int = 0
    peak_bytes: int | None = None
    samples: int = 0
    completed: bool = False
    stages: dict[str, float] = field(default_factory=dict)
    steps: list[StepRecord] = field(default_factory=list)
    techniques: list[TechniqueRecord] = field(default_factory=list)
    kernels: list[KernelRecord] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """JSON text; floats keep full precision."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Receipt:
        """Inverse of `to_dict`; unknown keys are an error, so that a foreign file is noticed."""
        steps = [
            StepRecord(**{**s, "branches": [BranchRecord(**b) for b in s["branches"]]})
            for s in data.get("steps", [])
        ]
        rest = {k: v for k, v in data.items() if k not in ("steps", "techniques", "kernels")}
        return cls(
            steps=steps,
            techniques=[TechniqueRecord(**t) for t in data.get("techniques", [])],
            kernels=[KernelRecord(**k) for k in data.get("kernels", [])],
            **rest,
        )

    @property
    def counts(self) -> dict[str, float]:
        """The deterministic part: equal for equal plan, model, shape and seed, whatever the machine's speed."""
        names = (
            "nfe",
            "nfe_requested",
            "blocks_run",
            "blocks_total",
            "attention_pairs",
            "attention_pairs_dense",
            "flops",
            "flops_dense",
            "cache_hits",
        )
        return {n: getattr(self, n) for n in names}

    @property
    def compute_share(self) -> float:
        """Executed share of the dense FLOPs of the requested evaluations, 1.0 when nothing was saved."""
        return self.flops / self.flops_dense if self.flops_dense else 1.0

    @property
    def density(self) -> float:
        """Visited share of the attention pairs of the blocks that ran, 1.0 for dense attention."""
        dense = self.attention_pairs_in_run_blocks
        return self.attention_pairs / dense if dense else 1.0
