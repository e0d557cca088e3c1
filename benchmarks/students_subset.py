"""Few-step plans on some prompts of a task, where the exact run is too slow to be made again: beside records of it.

    python benchmarks/students_subset.py --plan turbo --prompts 0 90 --exact STORE --out subset.json

Made for a processor, on which a student takes seconds a clip and the exact run a minute. Clips have the task's prompts
and seeds. Attributes and motion are told by the world's verifier, `dynamic_degree` and `flow_magnitude` by the metric
of that name; the exact run's values of the same clips come from the newest record of it in the store `--exact`, which
was made on another machine: noise is the same, rounding is not. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from student_quality import maker

import vivace
from vivace.core.env import environment
from vivace.core.errors import VivaceError
from vivace.evaluation.metrics.base import Context
from vivace.evaluation.metrics.dynamic_degree import DynamicDegree
from vivace.evaluation.paired import paired
from vivace.evaluation.store import Store, newest
from vivace.evaluation.task import Task
from vivace.plans.plan import Plan
from vivace.world import parse_prompt
from vivace.world.verifier import Verifier

BATCH = 4
SERIES = {
    "attributes": "attributes",
    "motion": "attribute_motion",
    "dynamic_degree": "dynamic_degree",
    "flow_magnitude": "flow_magnitude",
}
"""What is compared -> the name of it in records."""


def exact_rows(store: Path, task: str) -> dict[str, dict[str, float]]:
    """Values of the exact run by clip."""
    found = Store.existing(store)
    record = next(r for r in newest(found.records()) if r.contender.kind == "exact" and r.task.name == task)
    samples = found.samples(record)
    return {
        name: {k: samples.columns[column][i] for k, column in SERIES.items()}
        for i, name in enumerate(samples.ids)
    }


def compared(rows: list[dict[str, Any]], exact: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Means of a plan and of exact, and paired differences with 95 % intervals over prompts."""
    out: dict[str, Any] = {"clips": len(rows)}
    for name in SERIES:
        both = [(r[name], exact[r["id"]][name], r["id"].partition(".")[0]) for r in rows if r["id"] in exact]
        both = [b for b in both if b[0] is not None and b[1] == b[1]]
        if not both:
            continue
        own, theirs, prompts = (list(x) for x in zip(*both, strict=True))
        found = paired(own, theirs, prompts, better="higher", margin=0.01)
        out[name] = {
            "value": float(np.mean(own)),
            "exact": float(np.mean(theirs)),
            "difference": found.difference.to_dict(),
        }
    return out


def kept(record: dict[str, Any], out: Path) -> None:
    """Write the record, rows as columns: a third of the bytes."""
    told = {
        name: entry | {"rows": {k: [r[k] for r in entry["rows"]] for k in ("id", *SERIES)}}
        for name, entry in record["contenders"].items()
    }
    out.write_text(json.dumps(record | {"contenders": told}, separators=(",", ":")) + "\n")


def before(out: Path) -> dict[str, Any]:
    """The record that is there, rows one by one, or an empty one."""
    if not out.is_file():
        return {"benchmark": "students on some prompts", "contenders": {}}
    record = json.loads(out.read_text())
    for entry in record["contenders"].values():
        columns = entry["rows"]
        entry["rows"] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return record


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--plan", action="append", required=True, help="a preset or a file")
    words.add_argument("--task", default="world-short@1")
    words.add_argument("--prompts", type=int, nargs=2, default=(0, 20), help="from, and up to but without")
    words.add_argument("--exact", type=Path, required=True, help="store that holds the exact run of the task")
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--out", type=Path, required=True)
    options = words.parse_args()
    torch.set_num_threads(options.threads)
    try:
        task = Task.load(options.task)
        exact = exact_rows(options.exact, task.full_name)
    except VivaceError as error:
        words.error(str(error))
    samples = [s for s in task.samples() if options.prompts[0] <= s.prompt < options.prompts[1]]
    record = before(options.out) | {"task": options.task, "environment": environment("cpu")}
    pipeline, verifier, metric = vivace.load("tiny"), Verifier.load(), DynamicDegree()
    pipeline.set_progress_bar_config(disable=True)
    for spec in options.plan:
        plan = Plan.load(spec)
        make, entry = maker(pipeline, plan), record["contenders"].setdefault(plan.name, {"rows": []})
        entry["plan"] = plan.to_dict()
        there = {r["id"] for r in entry["rows"]}
        missing = [s for s in samples if f"{s.prompt}.{s.k}" not in there]
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            clips = make([s.text for s in part], [s.seed for s in part])
            for sample, clip, seen in zip(part, clips, verifier.verify(clips), strict=True):
                found = seen.matches(parse_prompt(sample.text))
                moved = metric.sample(clip[None].float() / 255.0, Context(fps=task.fps))
                entry["rows"].append(
                    {
                        "id": f"{sample.prompt}.{sample.k}",
                        "attributes": sum(found.values()) / max(1, len(found)),
                        "motion": found.get("motion"),
                        "dynamic_degree": moved["dynamic_degree"][0],
                        "flow_magnitude": round(moved["flow_magnitude"][0], 5),
                    }
                )
            entry |= compared(entry["rows"], exact)
            kept(record, options.out)
        entry |= compared(entry["rows"], exact)
        kept(record, options.out)
        print(plan.name, {k: v for k, v in entry.items() if k not in ("rows", "plan")}, flush=True)


if __name__ == "__main__":
    main()
