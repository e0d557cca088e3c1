"""A whole run of a distillation: data, team, updates with checkpoints and validation, and the student file."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vivace.calibration.artifact import model_hash
from vivace.core.errors import ConfigError
from vivace.models import pruning
from vivace.models.student import STORES, read_head, save_student, student_tensors
from vivace.models.student_artifact import Artifact, architecture
from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.common import (
    Budget,
    Processes,
    load_checkpoint,
    machine,
    save_checkpoint,
    write_json,
)
from vivace.training.data.encoding import Encoder
from vivace.training.data.samples import MemorySet, Samples
from vivace.training.data.shards import LatentShards
from vivace.training.data.sources import TeacherSource, WorldSource
from vivace.training.distillation.recipe import Recipe
from vivace.training.distillation.team import Team, assemble
from vivace.training.distillation.trainer import DistillationTrainer
from vivace.training.distillation.validation import Validation
from vivace.training.loop import train
from vivace.training.subject import load_model

PORTION = 32
"""Clips rendered and encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a run is, beside its recipe.

    Attributes:
        model: `tiny`, or a diffusers folder. out: the student file (.safetensors).
        data: a folder of `vivace encode`; None renders clips of the world.
        clips, data_minutes: how many clips to render, or as many as fit into the time.
        size: frames, height, width. batch: clips of an update in each process.
        minutes, steps: of training; `steps` (updates) wins.
        lora: rank; 0 trains all weights. store: see `vivace.models.student.STORES`.
        init: a student file to start from.
        validate_every: seconds between validations; 0 for the end alone. patience: validations without a better
            accuracy after which to stop; 0 never stops. captions: of a validation.
    """

    out: Path
    model: str = "tiny"
    data: Path | None = None
    clips: int = 4096
    data_minutes: float = 1.0
    size: tuple[int, int, int] = (29, 128, 128)
    batch: int = 64
    minutes: float = 5.0
    steps: int | None = None
    seed: int = 0
    lora: int = 0
    checkpointing: bool = False
    compile: bool = False
    store: str = "int8-delta"
    init: Path | None = None
    save_every: float = 120.0
    validate_every: float = 0.0
    patience: int = 0
    captions: int = 32

    def __post_init__(self) -> None:
        if self.out.suffix != ".safetensors":
            raise ConfigError(f"--out is the student file and ends in .safetensors, unlike {self.out}.")
        if self.store.split(":")[0] not in {s.split(":")[0] for s in STORES}:
            raise ConfigError(f"a student is stored as {', '.join(STORES)}, not {self.store}.")
        if self.batch < 1 or (self.minutes if self.steps is None else self.steps) <= 0:
            raise ConfigError("nothing to train: give a batch of 1 or more, and minutes or steps above 0.")


def run(
    recipe: Recipe, choices: Choices, processes: Processes, *, stop_after: int | None = None
) -> dict[str, Any]:
    """Distil, and write the student, its record (.json) and its curve (.curve.jsonl); returns the record.

    Raises:
        VivaceError: the model, the data or a checkpoint do not fit.
    """
    device, started = processes.device, time.perf_counter()
    pipeline, adapter = load_model(choices.model)
    identity = model_hash(pipeline)
    base = {k: v.detach().clone() for k, v in pipeline.transformer.state_dict().items()}
    pipeline.to(device)
    shape = ClipShape(frames=choices.size[0], height=choices.size[1], width=choices.size[2])
    encoder = Encoder(pipeline, device)
    data = gather(recipe, choices, encoder, shape, processes)
    anatomy = pruning.anatomy(adapter, pipeline.transformer)
    workload = encoder.model.workload()
    shift = float(
        pipeline.scheduler.config.get("flow_shift") or pipeline.scheduler.config.get("shift") or 1.0
    )
    team = assemble(
        pipeline.transformer,
        anatomy.lists,
        recipe.roles,
        empty=data.empty["text"],
        guidance=recipe.guidance or workload.guidance,
        shift=shift,
        device=device,
        lora=choices.lora,
        checkpointing=choices.checkpointing,
        compiled=choices.compile,
    )
    if choices.init is not None:
        start_from(team, choices.init, base)
    trainer = DistillationTrainer(processes, team, recipe, data, batch=choices.batch, seed=choices.seed)
    settings = json.dumps(
        [
            recipe.name, recipe.settings(), identity, data.hash,
            choices.batch, choices.seed, choices.lora, processes.world,
        ],
        sort_keys=True,
    )  # fmt: skip
    checkpoint = choices.out.with_suffix(".ckpt")
    state = load_checkpoint(checkpoint, processes)
    if state is not None:
        if state["settings"] != settings:
            raise ConfigError(
                f"{checkpoint} is of a run with other settings; delete it, or give another --out, to start afresh."
            )
        trainer.load_state_dict(state["trainer"])
    watch = Watch(choices, recipe, trainer, Validation(encoder, shape, choices.captions), processes, state)
    prepared = time.perf_counter() - started
    processes.say(f"{len(data)} clips and a team for {recipe.name} after {prepared:.0f} s")
    fitted = train(
        watch.update,
        lambda kept: save_checkpoint(
            checkpoint,
            kept | {"settings": settings, "trainer": trainer.state_dict(), "watch": watch.state()},
        ),
        Budget(choices.minutes, choices.steps),
        processes,
        state,
        save_every=choices.save_every,
        stop_after=stop_after,
        enough=watch.enough,
    )
    if not processes.leads or (stop_after is not None and not fitted["finished"]):
        return fitted
    student = trainer.averaged()
    artifact = Artifact(
        recipe=recipe.name,
        base=architecture(pipeline.transformer.config),
        sampler=recipe.sampler(shift),
        settings=recipe.settings(),
        teacher=identity,
        data=data.hash,
        provenance={"paper": recipe.paper, "updates": fitted["steps"], "seconds": fitted["seconds"]},
    )
    save_student(choices.out, student, {k: v.cpu() for k, v in base.items()}, artifact, choices.store)
    trainer.average.store()
    final = watch.validation(team, recipe, choices.out.with_suffix(".png"))
    record = {
        "machine": machine() | {"processes": processes.world},
        "recipe": recipe.name,
        "settings": recipe.settings(),
        "choices": {k: v for k, v in vars(choices).items() if k not in ("out", "data", "init")},
        "init": choices.init.name if choices.init else None,
        "teacher": identity,
        "data": {"clips": len(data), "hash": data.hash},
        "prepared_seconds": round(prepared, 1),
        "validation": final,
        "validations": watch.history,
        "bytes": choices.out.stat().st_size,
        **fitted,
    }  # fmt: skip
    write_json(choices.out.with_suffix(".json"), record)
    checkpoint.unlink(missing_ok=True)
    processes.say(f"accuracy {final['accuracy']:.4f}; wrote {choices.out}, {record['bytes'] / 1e6:.1f} MB")
    return record


class Watch:
    """Curve on disk and validation while a run goes on; stops it early where it no longer gets better."""

    def __init__(
        self,
        choices: Choices,
        recipe: Recipe,
        trainer: DistillationTrainer,
        validation: Validation,
        processes: Processes,
        state: dict[str, Any] | None,
    ) -> None:
        self.choices, self.recipe, self.trainer = choices, recipe, trainer
        self.validation, self.processes = validation, processes
        self.history: list[dict[str, float]] = state["watch"]["history"] if state else []
        self.curve = choices.out.with_suffix(".curve.jsonl")
        self.seen = self.line = time.perf_counter()
        if state is None and processes.leads:
            self.curve.parent.mkdir(parents=True, exist_ok=True)
            self.curve.unlink(missing_ok=True)
        self.writer = board(choices.out.with_suffix(".board")) if processes.leads else None

    def update(self, update: int, progress: float) -> torch.Tensor:
        """An update, and what is due after it."""
        loss = self.trainer.update(update, progress)
        now = time.perf_counter()
        if self.processes.leads and now - self.line > 5.0:
            self._write(update, self.trainer.diagnostics())
            self.line = now
        every = self.choices.validate_every
        if every and self.processes.agree(now - self.seen) > every:
            sheet = self.choices.out.with_suffix(f".{update}.png")
            found = self.validation(self.trainer.team, self.recipe, sheet if self.processes.leads else None)
            self.history.append({"update": update} | found)
            self._write(update, {f"validation.{k}": v for k, v in found.items()})
            self.processes.say(f"update {update}: accuracy {found['accuracy']:.4f}")
            self.seen = time.perf_counter()
        return loss

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"history": self.history}

    def enough(self) -> bool:
        """Whether accuracy has not risen for as many validations as `patience` says."""
        if not self.choices.patience or not self.history:
            return False
        best = max(range(len(self.history)), key=lambda i: self.history[i]["accuracy"])
        return len(self.history) - 1 - best >= self.choices.patience

    def _write(self, update: int, values: dict[str, float]) -> None:
        if not self.processes.leads:
            return
        with self.curve.open("a") as file:
            file.write(json.dumps({"update": update} | {k: round(v, 6) for k, v in values.items()}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name.replace(".", "/"), value, update)
            self.writer.flush()


def board(folder: Path) -> Any:
    """TensorBoard's writer where it is installed, else None; the curve is in a JSON-lines file in either case."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # pyright: ignore[reportPrivateImportUsage]
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def gather(
    recipe: Recipe, choices: Choices, encoder: Encoder, shape: ClipShape, processes: Processes
) -> Samples:
    """The data: from a folder, or rendered now; the same in every process."""
    if choices.data is not None:
        found = LatentShards.open(choices.data, encoder.pipeline, any_teacher="noise" not in recipe.fields)
        small = found.bytes < 2 * 1024**3 and encoder.device.type == "cuda"
        return found.load(encoder.device, recipe.fields) if small else found
    if "noise" in recipe.fields:
        source: Any = TeacherSource(encoder, shape, seed=choices.seed)
    else:
        source = WorldSource(encoder, shape)
    parts, started, limit = [], time.perf_counter(), 60.0 * choices.data_minutes
    for start in range(0, choices.clips, PORTION):
        parts.append(source.portion(start, min(start + PORTION, choices.clips)))
        if processes.agree(time.perf_counter() - started) > limit:
            processes.say(f"{start + PORTION} clips made in {limit:.0f} s, no more")
            break
    fields = {name: torch.cat([p[name] for p in parts]).to(encoder.device) for name in recipe.fields}
    return MemorySet(fields, source.empty())


def start_from(team: Team, file: Path, base: dict[str, torch.Tensor]) -> None:
    """Put a student file's weights into the student.

    Raises:
        WeightsError: the file does not fit.
    """
    read_head(file)
    module = team.student.module
    own = module.state_dict()
    tensors = dict(student_tensors([file], lambda name: base[name].cpu()))
    with torch.no_grad():
        for name, value in tensors.items():
            if name in own:
                own[name].copy_(value.to(own[name]))
