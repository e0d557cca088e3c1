"""Small stores with known truth, and the scripts of `benchmarks` as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from vivace.evaluation.record import Contender, Model, Record, Samples, TaskRef
from vivace.evaluation.store import Store

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODEL = Model(name="tiny", pipeline="WanPipeline", weights="trained", sha256="w" * 64, dtype="float32")
TASK = TaskRef(name="world-short@1", sha256="a" * 64)
DENSE = 1000.0
"""Pairs and FLOPs of the exact run."""


def script(name: str) -> ModuleType:
    """A script as a module; scripts find each other in their folder."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def put(
    folder: Path,
    name: str,
    columns: dict[str, list[float]],
    *,
    kind: str = "plan",
    techniques: list[dict[str, Any]] | None = None,
    pairs: float = DENSE,
    flops: float = DENSE,
    repeats: int = 1,
    **more: Any,
) -> None:
    """Keep a record; columns hold prompts, `repeats` times one after the other."""
    listed = techniques or []
    prompts = len(next(iter(columns.values()))) // repeats
    places = [(p, k) for k in range(repeats) for p in range(prompts)]
    values: dict[str, Any] = {
        "created": "2026-01-01T00:00:00",
        "code": {"version": "0", "commit": "c"},
        "contender": Contender(
            name=name,
            kind=kind,  # type: ignore[arg-type]
            techniques=tuple(t["technique"] for t in listed),
            settings={"techniques": listed},
        ),
        "model": MODEL,
        "task": TASK,
        "environment": {"device": "cpu", "fingerprint": "e1"},
        "counts": {
            "attention_pairs": pairs,
            "attention_pairs_dense": DENSE,
            "flops": flops,
            "flops_dense": DENSE,
            "weight_bytes": DENSE,
        },
    }
    samples = Samples(
        ids=tuple(f"{p}.{k}" for p, k in places),
        prompt=tuple(p for p, _ in places),
        k=tuple(k for _, k in places),
        seed=tuple(range(len(places))),
        columns={n: tuple(c) for n, c in columns.items()},
    )
    Store(folder).add(Record(**(values | more)), samples)
