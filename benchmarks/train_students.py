"""Train the students of the embedded model, or one student of every method under an equal budget.

    python benchmarks/train_students.py --out OUT --part students     (on two GPUs: about 11 minutes)
    python benchmarks/train_students.py --out OUT --part equal        (on two GPUs: about 6 minutes)

Every student is one `vivace distill` command, on a GPU of its own; commands start as soon as a GPU is free and the
student that they go on from is there. A killed run goes on where it was. Files, records and curves lie in
`OUT/students` and `OUT/equal`, `OUT/train.json` tells the commands. Students are merged once both parts are there.

Equal: the same clips, batch and seconds for all, compiled once before. `adversarial` has to start from a student that
nearly can do it, so half of its seconds are phased consistency's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vivace.models.student import merge_students
from vivace.models.student_artifact import Artifact

RANK = 32
SHORT = (
    "--lora", str(RANK), "--store", f"int8-lora:{RANK}"
)  # fmt: skip
"""Layers of the rank that the file has: what is written is what was trained."""
MATCHED = ("--set", "ratio=2", "--set", "rate=1e-4")


@dataclass(frozen=True)
class Job:
    """One student: `seconds` of training by `recipe`, from another student where `init` names one."""

    name: str
    recipe: str
    seconds: float
    steps: int = 4
    init: str = ""
    more: tuple[str, ...] = field(default=())

    def command(self, folder: Path, data: Path, common: Sequence[str], updates: int | None) -> list[str]:
        """What trains it."""
        length = ["--minutes", f"{self.seconds / 60:.3f}"] if updates is None else ["--updates", str(updates)]
        out = ["--out", str(folder / f"{self.name}.safetensors"), "--data", str(data)]
        start = ["--init", str(folder / f"{self.init}.safetensors")] if self.init else []
        steps = ["--student-steps", str(self.steps)]
        return ["distill", "--recipe", self.recipe, *steps, *length, *out, *start, *self.more, *common]


def students() -> list[Job]:
    """Phased consistency first, which is cheap; then distributions are matched, then attention becomes sparse."""
    sparse = (*SHORT, "--attention", "vsa", "--density", "0.25")
    pcm, dmd = (*SHORT, "--set", "rate=2e-4"), (*SHORT, *MATCHED, "--set", "gan=0")
    return [
        Job("pcm-4", "pcm", 100, more=pcm),
        Job("pcm-2", "pcm", 100, 2, more=pcm),
        Job("tdm-4", "tdm", 170, init="pcm-4", more=(*SHORT, *MATCHED)),
        Job("dmd2-4", "dmd2", 170, init="pcm-4", more=dmd),
        Job("dmd2-2", "dmd2", 150, 2, init="pcm-2", more=dmd),
        Job("tdm-4-sparse", "tdm", 200, init="merged-4", more=(*MATCHED, *sparse)),
        Job("pcm-4-sparse", "pcm", 80, init="merged-4", more=(*sparse, "--set", "rate=2e-4")),
        Job("dmd2-1", "dmd2", 110, 1, init="dmd2-2", more=dmd),
    ]


MERGED = {
    "merged-4": ("dmd2-4", "pcm-4"),
    "merged-tdm-4": ("tdm-4", "pcm-4"),
    "merged-4-sparse": ("tdm-4-sparse", "pcm-4-sparse"),
}
"""Students of half of each delta, sampled without fresh noise as the second is."""


def equal(seconds: float) -> list[Job]:
    """Every method from the teacher, for the same time."""
    pcm = ("--set", "rate=2e-4")
    dmd = (*MATCHED, "--set", "gan=0")
    return [
        Job("lcm", "lcm", seconds),
        Job("pcm", "pcm", seconds, more=pcm),
        Job("dmd2", "dmd2", seconds, more=dmd),
        Job("tdm", "tdm", seconds, more=MATCHED),
        Job("rcm", "rcm", seconds),
        Job("meanflow", "meanflow", seconds),
        Job("progressive", "progressive", seconds),
        Job("pcm-half", "pcm", seconds / 2, more=pcm),
        Job("adversarial", "adversarial", seconds / 2, init="pcm-half"),
    ]


def finished(folder: Path, job: Job) -> bool:
    """Whether a student was written (its record is the last file)."""
    return (folder / f"{job.name}.json").is_file()


def train(
    jobs: list[Job], folder: Path, data: Path, devices: list[str], common: list[str], updates: int | None
) -> list[str]:
    """Train all; returns the names of those that failed or whose start did."""
    waiting = [job for job in jobs if not finished(folder, job)]
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    failed: list[str] = []
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            for device, (job, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[device]
                failed += [] if process.returncode == 0 else [job.name]
                print(f"{job.name}: {'done' if process.returncode == 0 else 'failed'}", flush=True)
            merge(folder)
            failed += [m for m, parts in MERGED.items() if m not in failed and set(parts) & set(failed)]
            while lost := [j for j in waiting if j.init in failed]:
                failed += [j.name for j in lost]
                waiting = [j for j in waiting if j not in lost]
            at_work = {job.name for job, _ in running.values()}
            not_yet = at_work | {j.name for j in waiting}
            not_yet |= {m for m, parts in MERGED.items() if set(parts) & not_yet}
            ready = [j for j in waiting if j.init not in not_yet]
            for device in [d for d in devices if d not in running][: len(ready)]:
                job = ready.pop(0)
                waiting.remove(job)
                running[device] = (
                    job,
                    started(job, logs, device, job.command(folder, data, common, updates)),
                )
            time.sleep(0.5)
    finally:
        for _, process in running.values():
            process.terminate()
    return failed


def started(job: Job, logs: Path, device: str, command: list[str]) -> subprocess.Popen[bytes]:
    """A command on a device of its own, its words in a file."""
    print(f"{job.name} on {device}: vivace {shlex.join(command)}", flush=True)
    visible = {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": device}
    with (logs / f"{job.name}.txt").open("ab") as log:
        full = [sys.executable, "-m", "vivace", *command]
        return subprocess.Popen(full, env=os.environ | visible, stdout=log, stderr=log)


def merge(folder: Path) -> list[str]:
    """Make the merged students whose parts are finished; returns their names."""
    made = []
    for name, parts in MERGED.items():
        files = [folder / f"{part}.safetensors" for part in parts]
        if all((folder / f"{part}.json").is_file() for part in parts):
            out, made = folder / f"{name}.safetensors", [*made, name]
            if not out.is_file():
                artifact = Artifact.of(files[1])
                merge_students(files, [0.5, 0.5], out, store=f"int8-lora:{RANK}", artifact=artifact)
    return made


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--part", nargs="+", choices=("students", "equal"), default=["students"])
    words.add_argument("--only", nargs="+", default=[], help="students of these names")
    words.add_argument("--data", type=Path, help="a folder of `vivace encode` (default: OUT/data, made here)")
    words.add_argument("--clips", type=int, default=8192, help="to render where there are no data")
    words.add_argument("--size", type=int, nargs=3, default=(29, 128, 128))
    words.add_argument("--batch", type=int, default=64)
    words.add_argument("--captions", type=int, default=96, help="of the validation at the end of each")
    words.add_argument("--seconds", type=float, default=60.0, help="of the equal budget")
    words.add_argument("--updates", type=int, help="in the place of all seconds, to try it out")
    words.add_argument("--devices", nargs="+", help="numbers of GPUs, or cpu (default: all GPUs)")
    words.add_argument("--no-compile", action="store_true")
    options = words.parse_args()
    devices = options.devices or [str(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    data = options.data or options.out / "data"
    kind = "cpu" if devices == ["cpu"] else "cuda"
    if not (data / "dataset.json").is_file():
        size = [str(n) for n in options.size]
        encode = ["--count", str(options.clips), "--batch", str(options.batch), "--device", kind]
        command = ["encode", "--from", "world", "--size", *size, *encode, "--out", str(data)]
        subprocess.run([sys.executable, "-m", "vivace", *command], check=True)
    common = ["--batch", str(options.batch), "--captions", str(options.captions), "--device", kind]
    common += [] if options.no_compile or kind == "cpu" else ["--compile"]
    failed: list[str] = []
    told: dict[str, Any] = {}
    for part in options.part:
        jobs = students() if part == "students" else equal(options.seconds)
        jobs = [j for j in jobs if not options.only or j.name in options.only]
        folder = options.out / part
        folder.mkdir(parents=True, exist_ok=True)
        if part == "equal" and "--compile" in common:
            # What compiles first pays for all: torch keeps the code on disk. It took 16 of LCM's 50 seconds before.
            train([Job("warm", "lcm", 0)], folder, data, devices[:1], [*common, "--captions", "0"], 2)
        failed += train(jobs, folder, data, devices, common, options.updates)
        told[part] = {
            j.name: shlex.join(["vivace", *j.command(Path(), Path("data"), common, options.updates)])
            for j in jobs
        }
        if part == "students":
            told["merged"] = {name: MERGED[name] for name in merge(folder)}
    (options.out / "train.json").write_text(json.dumps(told, indent=1) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}; see the logs in {options.out}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
