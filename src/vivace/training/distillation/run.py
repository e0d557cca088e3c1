"""A whole run of a distillation: data, team, updates with checkpoints and validation, and the student file."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vivace.calibration.artifact import model_hash
from vivace.core.digest import tensors_digest
from vivace.core.errors import ConfigError, WeightsError
from vivace.models import pruning, second_time
from vivace.models.student import EXTRA, check_store, read_head, save_student, student_tensors, weights_hash
from vivace.models.student_artifact import SPARSE, Artifact, architecture
from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.common import Budget, Processes, load_checkpoint, machine, write_json
from vivace.training.chance import Chance
from vivace.training.data.encoding import Encoder
from vivace.training.data.samples import MemorySet, Samples
from vivace.training.data.shards import LatentShards
from vivace.training.data.sources import Source, TeacherSource, WorldSource
from vivace.training.distillation import student_forms
from vivace.training.distillation.recipe import Recipe
from vivace.training.distillation.team import Team, assemble
from vivace.training.distillation.trainer import DistillationTrainer
from vivace.training.distillation.validation import Validation
from vivace.training.distillation.watch import Watch
from vivace.training.distillation.weights import full_precision, take_up, wear
from vivace.training.fused_attention import choose_fastest
from vivace.training.loop import train
from vivace.training.losses.derivative import derivative_gap
from vivace.training.losses.paths import interpolate
from vivace.training.subject import load_model

PORTION = 32
"""Clips rendered and encoded at a time."""
GAP = 0.1
"""Largest disagreement of a forward-mode derivative with differences: see `losses.derivative.derivative_gap`."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a run is, beside its recipe.

    Attributes:
        model: `tiny`, or a diffusers folder. out: the student file (.safetensors).
        data: a folder of `vivace encode`; None renders clips of the world.
        clips, data_minutes: how many clips to render, or as many as fit into the time.
        size: frames, height, width. batch: clips of an update in each process.
        minutes, steps: of training; `steps` (updates) wins.
        lora: rank; 0 trains all weights. store: see `vivace.models.student.save_student`.
        attention, density, block: sparse attention of the student (`student_forms.attention`); dense where empty.
        linears: rounded linear layers of the student (`student_forms.linears`); exact where empty.
        fsdp: spread weights, gradients and optimizers over the processes (see `sharding`); nothing in one process.
        init: a student file to start from.
        validate_every: seconds between validations of the averaged weights; 0 for the end alone.
        patience: validations without a better accuracy after which to stop; 0 never stops.
        captions: of a validation; 0 for none, where the clips are not such as the world's verifier sees.
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
    attention: str = ""
    density: float = 0.25
    block: int = 64
    linears: str = ""
    fsdp: bool = False
    store: str = "int8-delta"
    init: Path | None = None
    save_every: float = 120.0
    validate_every: float = 0.0
    patience: int = 0
    captions: int = 32

    def __post_init__(self) -> None:
        if self.out.suffix != ".safetensors":
            raise ConfigError(f"--out is the student file and ends in .safetensors, unlike {self.out}.")
        check_store(self.store)
        if self.batch < 1 or (self.minutes if self.steps is None else self.steps) <= 0:
            raise ConfigError("nothing to train: give a batch of 1 or more, and minutes or steps above 0.")
        if self.clips < 1 or min(self.lora, self.captions) < 0:
            raise ConfigError("clips are 1 or more; captions and the rank of LoRA layers are 0 or more.")
        if self.validate_every and not self.captions:
            raise ConfigError("validations need captions; give some, or leave validate_every at 0.")
        if self.fsdp and (self.attention or self.linears):
            raise ConfigError(
                "spread weights train dense and exact students only; leave fsdp, attention or linears."
            )
        if self.patience and not self.validate_every:
            raise ConfigError("patience counts validations; give seconds between them too (validate_every).")


def run(
    recipe: Recipe, choices: Choices, processes: Processes, *, stop_after: int | None = None
) -> dict[str, Any]:
    """Distil, and write the student, its record (.json) and its curve (.curve.jsonl); returns the record.

    Raises:
        VivaceError: the model, the data or a checkpoint do not fit.
    """
    device, started = processes.device, time.perf_counter()
    checkpoint = choices.out.with_suffix(".ckpt")
    spread = choices.fsdp and processes.world > 1
    derivative = getattr(recipe, "derivative", None)
    if spread and derivative == "jvp":
        raise ConfigError(
            f"{recipe.name} takes forward-mode derivatives, which spread weights do not have; leave fsdp, or ask for "
            "derivative=difference."
        )
    # Into main memory: whole tensors of spread weights and optimizers need not fit into one GPU.
    state = load_checkpoint(checkpoint, replace(processes, device=torch.device("cpu")))
    if processes.agree(float(state is not None)) != float(state is not None):
        raise ConfigError(f"{checkpoint} must be on storage that all processes see.")
    pipeline, adapter = load_model(choices.model)
    identity = model_hash(pipeline)
    base = {k: v.detach().clone() for k, v in pipeline.transformer.state_dict().items()}
    pipeline.to(device)
    shape = ClipShape(frames=choices.size[0], height=choices.size[1], width=choices.size[2])
    encoder = Encoder(pipeline, device)
    data, origin = gather(
        recipe, choices, encoder, shape, processes, state["data"]["clips"] if state else None
    )
    settings = {
        "recipe": recipe.name,
        "recipe settings": recipe.settings(),
        "teacher": identity,
        "data": origin,
        "init": digest(choices.init) if choices.init else None,
        "batch": choices.batch,
        "seed": choices.seed,
        "lora": choices.lora,
        "form": [choices.attention, choices.density, choices.block, choices.linears],
        "processes": processes.world,
    }
    settings = json.loads(json.dumps(settings))
    if state is not None and (wrong := [k for k, v in settings.items() if state["settings"].get(k) != v]):
        raise ConfigError(
            f"{checkpoint} is of a run with another {wrong[0]}; delete it, or give another --out, to start afresh."
        )
    pipeline.transformer.to("cpu")  # the team has its own
    anatomy = pruning.anatomy(adapter, pipeline.transformer)
    workload = encoder.model.workload()
    shift = float(
        pipeline.scheduler.config.get("flow_shift") or pipeline.scheduler.config.get("shift") or 1.0
    )

    def form(student: Any) -> None:
        if choices.attention:
            student_forms.attention(
                student, adapter, grid, choices.attention, density=choices.density, block=choices.block
            )
        if choices.linears:
            student_forms.linears(student, adapter, choices.linears)

    grid = adapter.grid_of_call(
        pipeline.transformer.config,
        {
            "hidden_states": data.rows([0], ("latents",))["latents"],
            "encoder_hidden_states": data.empty["text"][None],
        },
    )
    kernel = "auto"
    if derivative is None:  # forward-mode derivatives and differences are taken in float32, by other kernels
        config = pipeline.transformer.config
        kernel = choose_fastest(
            processes, choices.batch, config.num_attention_heads, grid.video, config.attention_head_dim
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
        full=derivative == "difference",
        seed=choices.seed,
        shards=processes if spread else None,
        form=form,
    )
    if choices.init is not None:
        start_from(team, choices.init, base, learn=True)
    trainer = DistillationTrainer(processes, team, recipe, data, batch=choices.batch, seed=choices.seed)
    if state is not None:
        trainer.load_state_dict(state["trainer"])
    gap = check_derivative(team, data, choices.seed) if derivative == "jvp" else None
    watch = Watch(
        choices,
        recipe,
        trainer,
        Validation(encoder, shape, choices.captions, choices.batch if choices.compile else 0)
        if choices.captions
        else None,
        processes,
        {"settings": settings, "data": {"clips": len(data), "hash": data.hash}},
        state,
        stop_after=stop_after,
    )
    prepared = time.perf_counter() - started
    processes.say(f"{len(data)} clips and a team for {recipe.name} after {prepared:.0f} s")
    # Whoever stopped because it was enough, and was interrupted before the file was written, has nothing to add.
    steps = state["step"] if state is not None and watch.enough() else choices.steps
    fitted = train(
        watch.update,
        watch.save,
        Budget(choices.minutes, steps),
        processes,
        state,
        save_every=0.0 if trainer.sharded else choices.save_every,
        stop_after=stop_after,
        enough=watch.enough,
    )
    if stop_after is not None and not fitted["finished"]:
        return fitted
    student = trainer.averaged()
    artifact = Artifact(
        recipe=recipe.name,
        base=architecture(pipeline.transformer.config),
        sampler=recipe.sampler(shift),
        settings=recipe.settings(),
        teacher=identity,
        data=data.hash,
        provenance={"paper": recipe.paper, "updates": fitted["steps"]},
        **student_forms.told(team.student.module),
    )
    if processes.leads:
        save_student(choices.out, student, base, artifact, choices.store)
    processes.agree(0.0)  # the file is there
    # What is validated at the end is what was written, with the rounding of its storage.
    start_from(team, choices.out, base)
    final = {}
    if watch.validation is not None:
        sheet = choices.out.with_suffix(".png") if processes.leads else None
        final = watch.validation(team, recipe, sheet)
    record = {
        "machine": machine() | {"processes": processes.world},
        "recipe": recipe.name,
        "paper": recipe.paper,
        "settings": recipe.settings(),
        "choices": {k: v for k, v in vars(choices).items() if k not in ("out", "data", "init", "model")},
        "model": choices.model if choices.model == "tiny" else Path(choices.model).name,
        "init": {"file": choices.init.name, "sha256": settings["init"]} if choices.init else None,
        "teacher": identity,
        "data": {"clips": len(data), "hash": data.hash},
        "sampler": asdict(artifact.sampler),
        "attention_kernel": kernel,
        "prepared_seconds": round(prepared, 1),
        "derivative_gap": gap,
        "validation": final,
        "validations": watch.history,
        "bytes": choices.out.stat().st_size,
        "weights": tensors_digest(sorted(load_file(choices.out).items())).hex()[:16],
        **fitted,
    }  # fmt: skip
    if processes.leads:
        write_json(choices.out.with_suffix(".json"), record)
        checkpoint.unlink(missing_ok=True)
    right = f"accuracy {final['accuracy']:.4f}; " if final else ""
    processes.say(f"{right}wrote {choices.out}, {record['bytes'] / 1e6:.1f} MB")
    return record


def gather(
    recipe: Recipe,
    choices: Choices,
    encoder: Encoder,
    shape: ClipShape,
    processes: Processes,
    made: int | None = None,
) -> tuple[Samples, str]:
    """The data, the same in every process, and what they are: a folder's hash, or what clips are rendered from.

    Rendered clips are not told by their values, which differ by roundings where a GPU chooses other kernels.

    Args:
        made: clips that an interrupted run had; so many are made again, however long it takes.
    """
    if choices.data is not None:
        found = LatentShards.open(choices.data, encoder.pipeline, any_teacher="noise" not in recipe.fields)
        frames, height, width = (found.head.clip[name] for name in ("frames", "height", "width"))
        if (frames, height, width) != choices.size:
            asked = "x".join(map(str, choices.size))
            raise ConfigError(
                f"the clips in {choices.data} are {frames}x{height}x{width}, and {asked} were asked for; leave the "
                "size, or encode such clips."
            )
        small = found.bytes < 2 * 1024**3 and encoder.device.type == "cuda"
        return (found.load(encoder.device, recipe.fields) if small else found), found.hash
    if "noise" in recipe.fields:
        source: Source = TeacherSource(encoder, shape, seed=choices.seed)
    else:
        source = WorldSource(encoder, shape)
    parts, started, limit = [], time.perf_counter(), 60.0 * choices.data_minutes
    clips = choices.clips if made is None else made
    for start in range(0, clips, PORTION):
        parts.append(source.portion(start, min(start + PORTION, clips)))
        if made is None and processes.agree(time.perf_counter() - started) > limit:
            processes.say(f"{min(start + PORTION, clips)} clips made in {limit:.0f} s, no more")
            break
    fields = {name: torch.cat([p[name] for p in parts]).to(encoder.device) for name in recipe.fields}
    data = MemorySet(fields, source.empty())
    told = json.dumps(source.head(len(data), PORTION).key() | {"samples": len(data)}, sort_keys=True)
    return data, hashlib.sha256(told.encode()).hexdigest()[:16]


def start_from(team: Team, file: Path, base: dict[str, torch.Tensor], *, learn: bool = False) -> None:
    """Put a student file's weights into the student; what a delta does not name is the base's.

    Args:
        learn: LoRA layers go on with what the file adds to the base (`take_up`); else they are without effect.

    Raises:
        WeightsError: the file does not fit.
    """
    head = read_head(file)
    if head.is_delta and head.base != weights_hash(base):
        raise WeightsError(f"{file} holds what a student adds to other weights than this model's.")
    module = team.student.module
    found = student_tensors([file], lambda name: base.get(name, torch.zeros(())))
    tensors = base | dict(found)
    if wrong := sorted(k for k, v in base.items() if tensors[k].shape != v.shape):
        raise WeightsError(f"{wrong[0]} has another shape in {file} than in this model.")
    if strange := sorted(wear(module, tensors.items())):
        kind = "is of a flow map, and this recipe trains none"
        if strange[0].startswith(SPARSE):
            kind = "was trained with sparse attention; ask for the same one"
        why = kind if all(name.startswith(EXTRA) for name in strange) else "is of another architecture"
        raise WeightsError(f"{file} {why}: the student has no {strange[0]}.")
    if learn:
        take_up(module, tensors, base)


def check_derivative(team: Team, data: Samples, seed: int) -> float:
    """How far forward-mode derivatives of the student are from differences, at two clips; the same in every process.

    Raises:
        ConfigError: too far, or an operation has none.
    """
    rows = data.rows(range(min(2, len(data))), ("latents", "text"))
    clean, text = (rows[k].to(team.empty.device) for k in ("latents", "text"))
    chance = Chance(clean.device, seed, 0, "derivative")
    noise, s = chance.normal(clean), 0.25 + 0.5 * chance.uniform(clean)
    f = team.eager.velocity(text)
    if second_time.of(team.eager.module) is not None:
        flow_map, end = team.eager.flow_map(text), 0.5 * s
        f = lambda x, t: flow_map(x, t, end)  # noqa: E731
    with full_precision():
        gap = derivative_gap(f, interpolate(clean, noise, s), s, noise - clean.float())
    if not gap <= GAP:
        raise ConfigError(
            f"forward-mode derivatives of this network are off by {gap:.2f} against differences: an operation of it "
            "drops them without an error; ask for derivative=difference."
        )
    return round(gap, 6)


def digest(file: Path) -> str:
    """sha256 of a file, 64 hex digits."""
    with file.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()
