"""Every attention method on the embedded model, and combinations of methods, under one protocol: the clips of
`density.py` and `composition.py`.

    python benchmarks/attention_world.py --out OUT --jobs 12 --limit 50 --no-videos
    python benchmarks/density.py OUT --json density.json
    python benchmarks/composition.py OUT --json composition.json

Run it from the repository's root: plans name their mask files from there. The exact run is always the baseline, and a
killed run goes on where it was. `--list` shows the contenders, `--only` takes those whose name holds one of the texts.

Curves: settings of each method from about 15 to 60 % of the pairs, with and without dense first steps, as far as the
model's 8 x 16 x 16 tokens let blocks of 64 come down (`radial` 36 %, `sparse_videogen` 39 %, `sliding_tile` 41 %).
Settings come from the queries and keys of a development clip. `vsa`, `vmoba` and `sla` were meant to be trained and run
untrained here. `sparse_vdit`, `paro`, `sliding-tile-heads` and `efficient-vdit-layers` use masks that
`attention_masks.py` searched on development prompts. No attention method decides for a batch as a whole, so all clips
are made in the task's batches.

Combinations: `a+b` with a from sparse attention, b from caches and solvers, c from low bits, and the parts alone. First
steps are not left dense there, so that a part is the same alone and with a solver of few steps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from world_runs import parser, run

from vivace.plans.plan import Plan
from vivace.techniques.base import Technique, registry

PLANS = "benchmarks/plans"

SVG2 = "svg2.dense_layers=0,svg2.first=5,svg2.later=1"
SPARGE = "sparge_attention.block=64,sparge_attention.similar=-1.0"
XATTENTION = "x_attention.block=64,x_attention.stride=8"
CURVES = (
    "steps=33",
    "steps=25",
    "steps=15",
    "pisa@pisa.share=0.06,pisa.dense_steps=0",
    "pisa@pisa.share=0.125,pisa.dense_steps=0",
    "pisa@pisa.share=0.125,pisa.dense_steps=5",
    "pisa@pisa.share=0.18,pisa.dense_steps=5",
    "pisa@pisa.share=0.25,pisa.dense_steps=0",
    "pisa@pisa.share=0.4,pisa.dense_steps=5",
    "pisa@pisa.share=0.25,pisa.dense_steps=0,pisa.order=0",
    f"sparge@{SPARGE},sparge_attention.share=0.15",
    f"sparge@{SPARGE},sparge_attention.share=0.3",
    f"sparge@{SPARGE},sparge_attention.share=0.25,sparge_attention.dense_steps=5",
    f"sparge@{SPARGE},sparge_attention.share=0.5,sparge_attention.dense_steps=5",
    "sparge@sparge_attention.share=0.0,sparge_attention.mass=0.7,sparge_attention.similar=0.3",
    f"xattention@{XATTENTION},x_attention.mass=0.6,x_attention.dense_steps=0",
    f"xattention@{XATTENTION},x_attention.mass=0.78,x_attention.dense_steps=0",
    f"xattention@{XATTENTION},x_attention.mass=0.65,x_attention.dense_steps=5",
    f"xattention@{XATTENTION},x_attention.mass=0.9,x_attention.dense_steps=5",
    "adaspa@adaspa.sparsity=0.9,adaspa.dense_steps=2,adaspa.refresh=12",
    "adaspa@adaspa.sparsity=0.8,adaspa.dense_steps=2,adaspa.refresh=12",
    "adaspa@adaspa.sparsity=0.85,adaspa.dense_steps=5,adaspa.refresh=15",
    "adaspa@adaspa.sparsity=0.55,adaspa.dense_steps=5,adaspa.refresh=15",
    "draft@draft_attention.block=64,draft_attention.sparsity=0.85",
    "draft@draft_attention.block=64,draft_attention.sparsity=0.7",
    "draft@draft_attention.block=64,draft_attention.sparsity=0.75,draft_attention.dense_steps=5",
    "draft@draft_attention.block=64,draft_attention.sparsity=0.5,draft_attention.dense_steps=5",
    "jenga@jenga.block=64,jenga.neighbours=false,jenga.drop=0.85,jenga.mass=0.0",
    "jenga@jenga.block=64,jenga.neighbours=false,jenga.drop=0.7",
    "jenga@jenga.block=64,jenga.neighbours=false,jenga.drop=0.75,jenga.dense_steps=5",
    "jenga@jenga.block=64,jenga.drop=0.7,jenga.dense_steps=5",
    "svg@sparse_videogen.density=0.1,sparse_videogen.dense_layers=0,sparse_videogen.dense_steps=0",
    "svg@sparse_videogen.density=0.2,sparse_videogen.dense_layers=0",
    "svg@sparse_videogen.density=0.35",
    f"svg2@{SVG2},svg2.clusters_q=31,svg2.clusters_k=31,svg2.mass=0.5,svg2.dense_steps=0",
    f"svg2@{SVG2},svg2.clusters_q=31,svg2.clusters_k=62,svg2.mass=0.7,svg2.dense_steps=2",
    f"svg2@{SVG2},svg2.clusters_q=62,svg2.clusters_k=124,svg2.mass=0.8,svg2.dense_steps=5",
    "chipmunk@chipmunk.columns=0.05,chipmunk.refresh=10,chipmunk.block=64",
    "chipmunk@chipmunk.columns=0.08,chipmunk.refresh=10,chipmunk.dense_steps=5,chipmunk.block=64",
    "chipmunk@chipmunk.columns=0.2,chipmunk.refresh=5,chipmunk.block=64",
    "radial@radial.decay=2.0,radial.sink=0",
    "radial@radial.decay=1.0",
    "radial@radial.decay=1.0,radial.sink=0,radial.dense_steps=5",
    "sliding-tile@sliding_tile.window=0.25",
    "sliding-tile@sliding_tile.window=0.25,sliding_tile.dense_steps=5",
    "sliding-tile-heads@sliding_tile.density=0.5",
    "sparse-vdit@sparse_vdit.density=0.2",
    "sparse-vdit@sparse_vdit.density=0.3",
    "sparse-vdit@sparse_vdit.density=0.4,sparse_vdit.dense_steps=5",
    "efficient-vdit@efficient_vdit.references=1",
    "efficient-vdit@efficient_vdit.references=2,efficient_vdit.dense_steps=5",
    "efficient-vdit-layers@efficient_vdit.density=0.35",
    "paro-0.2",
    "paro-0.3",
    "paro-0.45@paro.dense_steps=5",
    "vsa@vsa.top=4",
    "vsa@vsa.top=8",
    "vsa@vsa.top=14,vsa.dense_steps=5",
    "vmoba@vmoba.threshold=0.4,vmoba.dense_steps=0",
    "vmoba@vmoba.threshold=0.25,vmoba.dense_steps=12",
    "vmoba@vmoba.threshold=0.6,vmoba.dense_steps=5",
    "sla@sla.critical=0.15",
    "sla@sla.critical=0.3",
    "sage",
    'sage@sage_attention.pv="bf16"',
    'pisa@pisa.share=0.125,pisa.dense_steps=5,pisa.precision="int8"',
    "attention-backend",
)
"""Plans of `benchmarks/plans` with settings, and the control that fewer steps are."""

SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "pisa": ("pisa", {"share": 0.2, "dense_steps": 0}),
    "sparge": ("sparge_attention", {"share": 0.3, "similar": -1.0, "block": 64}),
}
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "first-block-cache": ("first_block_cache", {"threshold": 0.08}),
    "taylorseer": ("taylorseer", {"warmup": 9, "interval": 3}),
    "fitted-solver": ("fitted_solver", {"steps": 14}),
}
INT8, SAGE = "int8-linear", "int8-attention"
"""Low-bit linear layers and attention; beside a sparse method the latter is its `precision`."""


def composed() -> list[str]:
    """Names of the parts and of their combinations."""
    full, other = SPARSE
    out = [
        "+".join(part for part in (sparse, cache, low) if part)
        for sparse in ("", full)
        for cache in ("", *CACHES)
        for low in ("", INT8, SAGE)
    ]
    out += [other, *(f"{other}+{more}" for more in (*CACHES, INT8, SAGE))]
    out += [f"{INT8}+{SAGE}", f"{full}+{INT8}+{SAGE}", f"{full}+fitted-solver+{INT8}+{SAGE}"]
    return [name for name in out if name]


def plan_of(name: str) -> Plan:
    """The plan of a combination by its name."""
    parts = name.split("+")
    techniques: list[Technique] = []
    for part in parts:
        if part in SPARSE:
            key, settings = SPARSE[part]
            low = {"precision": "int8"} if SAGE in parts else {}
            techniques.append(registry[key](**settings, **low))
        elif part in CACHES:
            key, settings = CACHES[part]
            techniques.append(registry[key](**settings))
        elif part == INT8:
            techniques.append(registry["int8_linear"]())
        elif not any(p in SPARSE for p in parts):
            techniques.append(registry["sage_attention"]())
    return Plan(techniques, name, f"{', '.join(parts)} together." if len(parts) > 1 else f"{name} alone.")


def specs(parts: list[str], only: list[str], out: Path) -> list[str]:
    """Contenders as `vivace bench` reads them; combinations are plans in `out/plans` (`save`)."""

    def wanted(name: str) -> bool:
        return not only or any(text in name for text in only)

    found = []
    if "curves" in parts:
        for text in filter(wanted, CURVES):
            name, at, changes = text.partition("@")
            found.append(text if text.startswith("steps=") else f"plan:{PLANS}/{name}.yaml{at}{changes}")
    if "composition" in parts:
        found += [f"plan:{out / 'plans' / name}.yaml" for name in filter(wanted, composed())]
    return found


def save(out: Path) -> None:
    """Write the combinations' plans."""
    (out / "plans").mkdir(parents=True, exist_ok=True)
    for name in composed():
        plan_of(name).save(out / "plans" / f"{name}.yaml")


def main() -> int:
    return run(
        parser(__doc__, ("curves", "composition")),
        lambda a: specs(a.part, a.only, a.out),
        lambda a: save(a.out),
    )


if __name__ == "__main__":
    sys.exit(main())
