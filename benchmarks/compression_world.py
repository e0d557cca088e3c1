"""Model compression on the embedded model under one protocol: formats, tokens, pruning, decoding, and combinations.

    python benchmarks/compression_world.py --out OUT --limit 50 --no-videos
    python benchmarks/compression_table.py OUT --json compression.json
    python benchmarks/composition.py OUT --json composition.json

Run it from the repository's root. The exact run is always the baseline, and a killed run goes on where it was.
`--list` shows the contenders, `--only` takes those whose name holds one of the texts.

Formats are those of `quantized_linear` with all linears of the blocks; what no unit multiplies is emulated with exact
numbers. Trained and pruned weights are those of the folder `--weights`. Combinations: `a+b` with a from token
reduction, b from sparse attention, c from caches, d from low bits, and the parts alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from world_runs import parser, run

from vivace.models.quantized import TrainedLinears
from vivace.plans.plan import Plan
from vivace.techniques.base import registry

Q = "quantized_linear"
ROTATED = {"rotate": "hadamard"}
W4A4 = {"weights": "int4", "activations": "int4", "rotate": "hadamard"}
FORMATS: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "w4a4-rank16": {"group": 64, "low_rank": 16, **W4A4},
    "w4a4-rank32": {"group": 32, "low_rank": 32, **W4A4},
    "fp8": {"weights": "fp8", "activations": "fp8"},
    "nvfp4-rank32": {"weights": "nvfp4", "activations": "nvfp4", "low_rank": 32, **ROTATED},
    "w4a8-rotated": {"weights": "int4", "group": 32, "activations": "int8", **ROTATED},
    "w4a4-rank32-steps": {"group": 32, "low_rank": 32, "full_first": 5, "full_last": 2, **W4A4},
    "w8": {"activations": "none"},
    "w8a8-rotated": ROTATED,
    "mxfp8": {"weights": "mxfp8", "activations": "mxfp8"},
    "w4": {"weights": "int4", "group": 32, "activations": "none"},
    "w4a4": {"weights": "int4", "group": 32, "activations": "int4"},
    "w4a4-rotated": {"group": 32, **W4A4},
    "nvfp4": {"weights": "nvfp4", "activations": "nvfp4"},
    "mxfp4": {"weights": "mxfp4", "activations": "mxfp8"},
}
"""Name -> settings of `quantized_linear`."""
MERGE, ASYMMETRIC, SKIP, RATE = "token_merging", "asymmetric_reduction", "token_skip", "latent_frame_rate"
LATE = {"dense_steps": 9}
TOKENS: dict[str, tuple[str, dict[str, Any]]] = {
    "merge-0.1": (MERGE, {"ratio": 0.1}),
    "merge-0.25": (MERGE, {"ratio": 0.25}),
    "merge-0.25-late": (MERGE, {"ratio": 0.25, **LATE}),
    "merge-0.5-late": (MERGE, {"ratio": 0.5, **LATE}),
    "asymmetric-0-0.25": (ASYMMETRIC, {"query_ratio": 0.0, "key_ratio": 0.25}),
    "asymmetric-0-0.5": (ASYMMETRIC, {"query_ratio": 0.0, "key_ratio": 0.5}),
    "asymmetric-0-0.5-late": (ASYMMETRIC, {"query_ratio": 0.0, "key_ratio": 0.5, **LATE}),
    "asymmetric-0.25-0.5-late": (ASYMMETRIC, {"query_ratio": 0.25, "key_ratio": 0.5, **LATE}),
    "skip-0.75": (SKIP, {"budget": 0.75, "warmup": 9, "interval": 3}),
    "skip-0.5": (SKIP, {"budget": 0.5, "warmup": 9, "interval": 3}),
    "skip-0.3": (SKIP, {"budget": 0.3, "warmup": 9, "interval": 3}),
    "rate-0.125": (RATE, {"probe": 9, "share": 0.125}),
    "rate-0.25": (RATE, {"probe": 9, "share": 0.25}),
    "rate-0.5": (RATE, {"probe": 9, "share": 0.5}),
}
"""Name -> technique and settings."""
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "skip": TOKENS["skip-0.5"],
    "rate": TOKENS["rate-0.25"],
    "pisa": ("pisa", {"share": 0.2, "dense_steps": 0}),
    "fbc": ("first_block_cache", {"threshold": 0.08}),
    "int8": ("int8_linear", {}),
    "int4": (Q, FORMATS["w4a4-rank32"]),
}
"""What is combined."""
COMBINED = (
    "skip", "rate", "pisa", "fbc", "int8", "int4", "skip+int8", "rate+pisa", "rate+fbc", "rate+int8", "pisa+fbc",
    "pisa+int4", "rate+pisa+fbc", "rate+pisa+fbc+int8",
)  # fmt: skip
GROUPS = ("formats", "tokens", "trained", "composition")


def trained(folder: Path | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Contenders of weights that were trained, as far as the folder has them."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else []:
        if file.stem.startswith("pruned"):
            found[file.stem] = ("pruned_model", {"file": str(file)})
        elif file.stem.startswith("trained"):
            made = TrainedLinears.load(file, tensors=False)
            recipe = made.recipe.to_dict() | {"rotate": "hadamard" if made.recipe.rotate else "none"}
            found[file.stem] = (Q, {"trained": str(file), "smooth": made.smooth, **recipe})
        elif file.stem.startswith("decoder"):
            found[file.stem] = ("tiny_decode", {"path": str(file)})
    return found


def plans(weights: Path | None = None) -> dict[str, dict[str, Plan]]:
    """Group -> name -> plan."""

    def plan(name: str, parts: list[tuple[str, dict[str, Any]]]) -> Plan:
        techniques = [registry[key](**settings) for key, settings in parts]
        return Plan(techniques, name, f"{name}: {', '.join(key for key, _ in parts)}.")

    single = {
        "formats": {n: (Q, s) for n, s in FORMATS.items()},
        "tokens": TOKENS,
        "trained": trained(weights),
    }
    found = {group: {n: plan(n, [part]) for n, part in entries.items()} for group, entries in single.items()}
    found["composition"] = {n: plan(n, [PARTS[p] for p in n.split("+")]) for n in COMBINED}
    return found


def specs(groups: list[str], only: list[str], out: Path, weights: Path | None = None) -> list[str]:
    """Contenders as `vivace bench` reads them: plans in `out/plans`, written by `save`."""
    known = plans(weights)
    names = [n for group in groups for n in known[group] if not only or any(text in n for text in only)]
    return [f"plan:{out / 'plans' / name}.yaml" for name in names]


def save(out: Path, weights: Path | None = None) -> None:
    """Write the plans."""
    (out / "plans").mkdir(parents=True, exist_ok=True)
    for entries in plans(weights).values():
        for name, plan in entries.items():
            plan.save(out / "plans" / f"{name}.yaml")


def main() -> int:
    found = parser(__doc__, GROUPS)
    found.add_argument("--weights", type=Path, help="folder of pruned*, trained* and decoder*.safetensors")
    return run(found, lambda a: specs(a.part, a.only, a.out, a.weights), lambda a: save(a.out, a.weights))


if __name__ == "__main__":
    sys.exit(main())
