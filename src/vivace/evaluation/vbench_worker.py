"""Runs VBench's own code on a folder of clips; started by `vivace.evaluation.vbench` in VBench's interpreter.

Imports nothing of Vivace, since that interpreter need not have it. Reads the request named on the command line and
writes `answer.json` beside it: {dimension: [[file, score], ...]}.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

_DIVIDE = {"imaging_quality": 100.0}
"""VBench scales this dimension after the mean over videos; single videos are on the old scale."""


def run(vbench: Any, job: dict[str, Any], folder: Path, device: Any) -> dict[str, list[tuple[str, float]]]:
    """Scores of one folder of clips by dimension."""
    info = folder / "info.json"
    info.write_text(json.dumps(job["info"]), encoding="utf-8")
    found = {}
    for name in job["dimensions"]:
        bench = vbench.VBench(device, str(info), str(folder))
        bench.evaluate(
            videos_path=job["videos"],
            name=name,
            prompt_list=job["prompts"],
            dimension_list=[name],
            local=True,
            mode=job["mode"],
            imaging_quality_preprocessing_mode="longer",
        )
        _, rows = json.loads((folder / f"{name}_eval_results.json").read_text(encoding="utf-8"))[name]
        found[name] = [
            (row["video_path"], float(row["video_results"]) / _DIVIDE.get(name, 1.0)) for row in rows
        ]
    return found


def main() -> None:
    request = Path(sys.argv[1])
    asked = json.loads(request.read_text(encoding="utf-8"))
    # This file's own folder holds modules of ours under the names of others, vbench among them.
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent
    ]
    vbench = importlib.import_module("vbench")
    torch = importlib.import_module("torch")
    answer: dict[str, list[tuple[str, float]]] = {}
    for number, job in enumerate(asked["jobs"]):
        folder = request.parent / f"results-{number}"
        folder.mkdir()
        for name, rows in run(vbench, job, folder, torch.device(asked["device"])).items():
            answer.setdefault(name, []).extend(rows)
    partial = request.with_name("answer.partial")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.replace(request.with_name("answer.json"))


if __name__ == "__main__":
    main()
