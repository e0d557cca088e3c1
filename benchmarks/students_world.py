"""Few-step students of the embedded model under one protocol, beside the teacher with as few steps.

    python benchmarks/students_world.py --out OUT --limit 0 --no-videos
    python benchmarks/students_world.py --out OUT --task world-motion@1 --limit 0 --no-videos

Run it from the repository's root. The exact run, 50 steps with guidance, is always the baseline. Every student file in
the folder `--weights`, those that come with Vivace by default, is sampled as its contract says; `turbo` is the preset.
`naive-N` is the teacher with N steps and guidance (2 N evaluations), `unguided-N` without (N evaluations). A killed run
goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

from world_runs import parser, run

from vivace.models.student import students_folder
from vivace.plans.plan import Plan
from vivace.techniques.base import registry
from vivace.techniques.distillation.student import plan_of

STEPS = (8, 4, 2, 1)
METRICS = (
    "attributes", "dynamic_degree", "motion_energy", "verifier_distance", "trajectory_mmd", "psnr", "lpips_alex",
    "flicker", "frozen",
)  # fmt: skip


def plans(weights: Path | None) -> dict[str, dict[str, Plan]]:
    """Part -> name -> plan."""
    own = weights is None
    weights = students_folder() if weights is None else weights
    few, interval = registry["few_steps"], registry["guidance_interval"]
    naive: dict[str, Plan] = {}
    for steps in STEPS:
        parts = [few(steps=steps)]
        naive[f"naive-{steps}"] = Plan(parts, f"naive-{steps}", f"The teacher with {steps} steps.")
        parts = [few(steps=steps), interval(high=0.0)]
        text = f"The teacher with {steps} steps and no guidance."
        naive[f"unguided-{steps}"] = Plan(parts, f"unguided-{steps}", text)
    students = {
        file.stem: Plan(plan_of(file.stem if own else str(file)), file.stem, f"The student {file.stem}.")
        for file in sorted(weights.glob("*.safetensors"))
    }
    return {"naive": naive, "students": students, "presets": {"turbo": Plan.load("turbo")}}


def main() -> int:
    found = parser(__doc__, ("naive", "students", "presets"))
    found.set_defaults(metrics=METRICS)
    found.add_argument("--weights", type=Path, help="folder of student files")

    def chosen(a) -> list[str]:
        known = plans(a.weights)
        names = [n for part in a.part for n in known[part] if not a.only or any(text in n for text in a.only)]
        return [f"plan:{a.out / 'plans' / name}.yaml" for name in names]

    def save(a) -> None:
        (a.out / "plans").mkdir(parents=True, exist_ok=True)
        for entries in plans(a.weights).values():
            for name, plan in entries.items():
                plan.save(a.out / "plans" / f"{name}.yaml")

    return run(found, chosen, save)


if __name__ == "__main__":
    sys.exit(main())
