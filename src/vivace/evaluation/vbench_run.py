"""Runs VBench's own code (Huang et al., arXiv:2311.17982) where the user has it, with the user's weights.

VBench's packages do not live beside ours, so it runs in an interpreter of its own; what that code answered, and nothing
else, is called `vbench-official`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.core.errors import ConfigError, UnavailableError
from vivace.evaluation.vbench import dimensions, prompts

if TYPE_CHECKING:
    import numpy as np

_WORKER = Path(__file__).with_name("vbench_worker.py")
WEIGHTS = "VIVACE_VBENCH_WEIGHTS"
"""Environment variable: the folder with VBench's weights, laid out as its own cache folder."""
PYTHON = "VIVACE_VBENCH_PYTHON"
"""Environment variable: the interpreter that VBench is installed in; this one without it."""
TAKES = 5
"""Clips of one prompt that VBench reads in its standard mode."""
CUSTOM = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "temporal_style",
    "overall_consistency",
)
"""Dimensions for prompts that are not VBench's. Its custom mode also takes human_action, whose label it then looks for
in the file name; on other prompts that says nothing."""
_GRIT = ("grit_model/grit_b_densecap_objectdet.pth",)
_CLIP_B = ("clip_model/ViT-B-32.pt",)
_VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth",)
_NEEDS = {
    "subject_consistency": (
        "dino_model/dino_vitbase16_pretrain.pth",
        "dino_model/facebookresearch_dino_main",
    ),
    "background_consistency": _CLIP_B,
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    "object_class": _GRIT,
    "multiple_objects": _GRIT,
    "human_action": ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",),
    "color": _GRIT,
    "spatial_relationship": _GRIT,
    "scene": ("caption_model/tag2text_swin_14m.pth",),
    "appearance_style": _CLIP_B,
    "temporal_style": _VICLIP,
    "overall_consistency": _VICLIP,
}
"""What VBench would try to download if it were not in the weights folder; temporal_flickering needs nothing."""


def interpreter() -> str:
    """The interpreter that VBench is installed in."""
    return os.environ.get(PYTHON) or sys.executable


@lru_cache(maxsize=8)
def _version(python: str) -> str:
    """VBench's version in that interpreter; empty when it is not there."""
    probe = (
        "import importlib.util as u, importlib.metadata as m\n"
        "if u.find_spec('vbench'):\n"
        " try: print(m.version('vbench'))\n"
        " except m.PackageNotFoundError: print('source')"
    )
    try:
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def missing() -> str:
    """Why VBench's own code cannot run here, in a sentence that says what to do; empty when it can."""
    folder = os.environ.get(WEIGHTS, "")
    if not folder:
        return f"vbench_official needs VBench's own weights; put their folder into {WEIGHTS}."
    if not Path(folder).is_dir():
        return f"vbench_official: {WEIGHTS} is {folder}, which is no folder; name the folder with VBench's weights."
    if not _version(interpreter()):
        return (
            f"vbench_official: no package vbench in {interpreter()}; pip install vbench into an environment of "
            f"its own and put its python into {PYTHON}."
        )
    return ""


def runnable() -> tuple[str, ...]:
    """The dimensions whose weights are in the folder, in VBench's order."""
    folder = Path(os.environ.get(WEIGHTS, "."))
    return tuple(n for n in dimensions() if all((folder / part).exists() for part in _NEEDS.get(n, ())))


def official(
    clips: Sequence[np.ndarray],
    texts: Sequence[str],
    *,
    fps: float,
    device: str = "cuda",
    timeout: float = 24 * 3600.0,
) -> dict[str, list[float]]:
    """Raw scores of clips by VBench's own code: by dimension, one value a clip, NaN where the dimension does not apply.

    A clip of one of VBench's prompts is measured on that prompt's dimensions, any other on `CUSTOM`, and only on those
    whose weights are there: VBench would download the others. Every call loads all networks, so give many clips.

    Args:
        clips: uint8 `(T, H, W, 3)` each; VBench reads files, so they go through H.264 (crf 0, 4:2:0).
        texts: one prompt a clip.
        fps: of the clips.
        device: torch device in VBench's interpreter.
        timeout: seconds after which it is stopped.

    Raises:
        UnavailableError: see `missing`.
        ConfigError: VBench stopped with an error; the message ends with its last line.
    """
    from vivace.evaluation.video import write_mp4

    if why := missing():
        raise UnavailableError(why)
    columns = {name: [math.nan] * len(clips) for name in dimensions()}
    able = runnable()
    folder = Path(tempfile.mkdtemp(prefix="vivace-vbench-"))
    try:
        jobs, where = _jobs(texts, able, folder)
        for index, clip in enumerate(clips):
            write_mp4(where[index], clip, fps, crf=0)
        request = folder / "request.json"
        request.write_text(json.dumps({"jobs": jobs, "device": device}), encoding="utf-8")
        scores = _ask(request, timeout)
        index_of = {str(path): index for index, path in where.items()}
        for name, rows in scores.items():
            for path, value in rows:
                if path in index_of:
                    columns[name][index_of[path]] = value
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return columns


def _jobs(
    texts: Sequence[str], able: Sequence[str], folder: Path
) -> tuple[list[dict[str, Any]], dict[int, Path]]:
    """What the worker is asked, and where each clip lies: in standard mode VBench reads the prompt off the file."""
    suite = prompts()
    where: dict[int, Path] = {}
    taken: dict[str, int] = {}
    rounds: dict[int, list[str]] = {}
    custom: dict[str, str] = {}
    for index, text in enumerate(texts):
        if text in suite:
            take = taken.get(text, 0)
            taken[text] = take + 1
            number, k = divmod(take, TAKES)
            where[index] = folder / f"suite-{number}" / f"{text}-{k}.mp4"
            rounds.setdefault(number, []).append(text)
        else:
            where[index] = folder / "custom" / f"{index}.mp4"
            custom[f"{index}.mp4"] = text
    jobs = []
    for number, members in rounds.items():
        info = [
            {
                "prompt_en": t,
                "dimension": list(suite[t].dimensions),
                "auxiliary_info": dict(suite[t].auxiliary),
            }
            for t in dict.fromkeys(members)
        ]
        wanted = [d for d in able if any(d in row["dimension"] for row in info)]
        jobs.append({
            "videos": str(folder / f"suite-{number}"),
            "info": info,
            "dimensions": wanted,
            "mode": "vbench_standard",
            "prompts": {},
        })  # fmt: skip
    if custom:
        jobs.append({
            "videos": str(folder / "custom"),
            "info": [],
            "dimensions": [d for d in able if d in CUSTOM],
            "mode": "custom_input",
            "prompts": custom,
        })  # fmt: skip
    return jobs, where


def _ask(request: Path, timeout: float) -> dict[str, list[tuple[str, float]]]:
    """The worker's answer: by dimension, (file, raw score on the scale of the total)."""
    environment = os.environ | {"VBENCH_CACHE_DIR": os.environ[WEIGHTS]}
    command = [interpreter(), str(_WORKER), str(request)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            cwd=request.parent,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"VBench did not finish in {timeout:g} s; give fewer clips or more time."
        ) from error
    answer = request.with_name("answer.json")
    if done.returncode or not answer.is_file():
        lines = [line for line in re.split(r"[\r\n]+", done.stderr + done.stdout) if line.strip()]
        raise ConfigError(
            f"VBench's own code failed in {interpreter()}; mend that environment. Its last line: "
            f"{lines[-1] if lines else 'none'}"
        )
    return json.loads(answer.read_text(encoding="utf-8"))


__all__ = ["CUSTOM", "PYTHON", "WEIGHTS", "interpreter", "missing", "official", "runnable"]
