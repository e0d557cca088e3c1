"""Small runs of distillations, in this process or as a program of its own: `python distilling.py JOBS.json`.

JOBS.json is a list of {"recipe", "settings", "choices", "stop_after", "keep"}; `keep` is a file that the checkpoint is
copied to by the leader. The program reads the environment of torchrun.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers  # noqa: F401
    import torch
    import transformers  # noqa: F401

from vivace.models.pruning import anatomy
from vivace.tiny.build import TinyConfig, build_pipeline
from vivace.tiny.train.common import Processes
from vivace.training.data.samples import MemorySet
from vivace.training.distillation.recipes import find
from vivace.training.distillation.run import Choices, run
from vivace.training.distillation.team import assemble
from vivace.training.distillation.trainer import DistillationTrainer
from vivace.training.subject import supported

SMALL = TinyConfig(
    heads=2, head_dim=16, layers=2, ffn_dim=64, text_dim=32, text_layers=1, vae_dim=8, latent_channels=8
)
HERE = Processes(0, 1, torch.device("cpu"))


def save_small(folder: Path) -> Path:
    """A real pipeline of a few thousand weights, whose output is not near zero."""
    pipeline: Any = build_pipeline(0, SMALL)
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.mul_(3.0)
    pipeline.save_pretrained(folder)
    return folder


def choices(model: Path, out: Path, **more: Any) -> Choices:
    """Of a run that takes about a second."""
    usual = {"clips": 6, "size": (9, 32, 32), "batch": 2, "steps": 6, "captions": 3}
    return Choices(model=str(model), out=out, **(usual | more))


def distil(name: str, model: Path, out: Path, stop_after: int | None = None, **more: Any) -> dict[str, Any]:
    """One run; `more` beside fields of `Choices`: `settings` of the recipe and `processes`."""
    recipe = find(name)(**more.pop("settings", {}))
    processes = more.pop("processes", HERE)
    return run(recipe, choices(model, out, **more), processes, stop_after=stop_after)


def team_of(roles: frozenset[str] = frozenset(), **more: Any) -> Any:
    """A team on the small model, without a run."""
    pipeline: Any = build_pipeline(0, SMALL)
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.mul_(3.0)
    adapter = supported(pipeline)
    lists = anatomy(adapter, pipeline.transformer).lists
    usual = {"empty": torch.zeros(4, 32), "guidance": 3.0, "shift": 3.0, "device": torch.device("cpu")}
    return assemble(pipeline.transformer, lists, roles, **(usual | more))


def samples(count: int = 6) -> MemorySet:
    """Latents and captions that mean nothing."""
    draw = torch.Generator().manual_seed(5)
    latents = torch.randn(count, 8, 3, 4, 4, generator=draw).bfloat16()
    text = torch.randn(count, 4, 32, generator=draw).bfloat16()
    return MemorySet({"latents": latents, "text": text}, {"text": torch.zeros(4, 32)})


def trainer_of(name: str, settings: dict[str, Any] | None = None, **more: Any) -> DistillationTrainer:
    """A trainer on the small model; `more` is for `assemble`."""
    recipe = find(name)(**(settings or {}))
    full = getattr(recipe, "derivative", "") == "difference"
    team = team_of(recipe.roles, full=full, **more)
    return DistillationTrainer(HERE, team, recipe, samples(), batch=2)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists, by address."""
    if isinstance(value, dict):
        pairs: Any = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    else:
        return {name: value}
    out: dict[str, Any] = {}
    for key, part in pairs:
        out |= flat(part, f"{name}.{key}")
    return out


def equal(a: Any, b: Any) -> str:
    """The address of the first leaf in which two states differ; empty where they are equal bit for bit."""
    one, two = flat(a), flat(b)
    if wrong := sorted(set(one) ^ set(two)):
        return wrong[0]
    for name, value in one.items():
        same = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
        if not same:
            return name
    return ""


def start(jobs: list[dict[str, Any]], file: Path, processes: int = 1) -> list[subprocess.Popen[str]]:
    """Start the program, in so many processes that know each other."""
    file.write_text(json.dumps(jobs, default=str))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(file)],
            env=os.environ | here | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(started: list[subprocess.Popen[str]], seconds: float = 150.0) -> str:
    """Wait for the program; what its first process said. All must have ended well."""
    said = []
    try:
        said = [process.communicate(timeout=seconds)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [p.returncode for p in started] == [0] * len(started), "\n".join(t[-3000:] for t in said)
    return said[0]


def main() -> None:
    """The program."""
    torch.set_num_threads(1)
    processes = Processes.join()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        options = job["choices"]
        model, out = Path(options.pop("model")), Path(options.pop("out"))
        settings = job.get("settings", {})
        distil(
            job["recipe"],
            model,
            out,
            job.get("stop_after"),
            settings=settings,
            processes=processes,
            **options,
        )
        if processes.leads and job.get("keep"):
            shutil.copy(out.with_suffix(".ckpt"), job["keep"])
        processes.agree(0.0)
    if processes.world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
