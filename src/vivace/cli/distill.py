"""`vivace distill`: train a few-step student by a recipe, or tell beforehand what that takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.cli.shared import options

if TYPE_CHECKING:
    from vivace.tiny.train.common import Processes
    from vivace.training.distillation.recipe import Recipe
    from vivace.training.distillation.run import Choices

MINUTES = 5.0
STUDENT, DATA, BUDGET, DRY = "The student", "The data", "How long", "Before it starts"


def distill(
    recipe: Annotated[
        str | None,
        typer.Option(help="How it is trained: see --list.", show_default=False, rich_help_panel=STUDENT),
    ] = None,
    model: options.Model = "tiny",
    output: Annotated[
        Path,
        typer.Option("--out", "--output", "-o", help="The student file to write.", rich_help_panel=STUDENT),
    ] = Path("student.safetensors"),
    student_steps: Annotated[
        int | None,
        typer.Option(
            "--student-steps",
            min=1,
            help="Evaluations of the student  \\[default: the recipe's]",
            show_default=False,
            rich_help_panel=STUDENT,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of the recipe; may be given several times.",
            show_default=False,
            rich_help_panel=STUDENT,
        ),
    ] = None,
    lora: Annotated[
        int,
        typer.Option(
            min=0, help="Train LoRA layers of this rank; 0 trains all weights.", rich_help_panel=STUDENT
        ),
    ] = 0,
    store: Annotated[
        str,
        typer.Option(
            help="What is written: int8-delta, int8, bf16, lora:RANK or int8-lora:RANK.",
            rich_help_panel=STUDENT,
        ),
    ] = "int8-delta",
    init: Annotated[
        Path | None,
        typer.Option(help="A student file to start from.", show_default=False, rich_help_panel=STUDENT),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of `vivace encode`  \\[default: clips of the world, rendered now]",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(
            metavar="FRAMES HEIGHT WIDTH",
            help="Of the clips  \\[default: those of --data, else the model's]",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    clips: Annotated[
        int, typer.Option(min=1, help="Without --data: clips to render.", rich_help_panel=DATA)
    ] = 4096,
    data_minutes: Annotated[
        float,
        typer.Option(min=0.0, help="Without --data: the longest time to render.", rich_help_panel=DATA),
    ] = 1.0,
    batch: Annotated[
        int, typer.Option(min=1, help="Clips of an update in each process.", rich_help_panel=DATA)
    ] = 64,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help=f"Of training  \\[default: {MINUTES:g}]",
            show_default=False,
            rich_help_panel=BUDGET,
        ),
    ] = None,
    updates: Annotated[
        int | None,
        typer.Option(min=1, help="In the place of --minutes.", show_default=False, rich_help_panel=BUDGET),
    ] = None,
    validate_every: Annotated[
        float,
        typer.Option(
            min=0.0, help="Seconds between validations; 0 for the end alone.", rich_help_panel=BUDGET
        ),
    ] = 0.0,
    patience: Annotated[
        int,
        typer.Option(
            min=0,
            help="Stop after so many validations without a better one; 0 never.",
            rich_help_panel=BUDGET,
        ),
    ] = 0,
    captions: Annotated[
        int,
        typer.Option(
            min=0,
            help="Held-out captions of a validation; 0 for none, as for clips that are not square.",
            rich_help_panel=BUDGET,
        ),
    ] = 32,
    attention: Annotated[
        str,
        typer.Option(
            help="Train with sparse attention: vsa, sla or block_topk.",
            show_default=False,
            rich_help_panel=STUDENT,
        ),
    ] = "",
    density: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="With --attention: share of the pairs.", rich_help_panel=STUDENT),
    ] = 0.25,
    block: Annotated[
        int, typer.Option(min=1, help="With --attention: tokens of a block.", rich_help_panel=STUDENT)
    ] = 64,
    linears: Annotated[
        str,
        typer.Option(
            help="Train with rounded linear layers: w8a8 or w8.", show_default=False, rich_help_panel=STUDENT
        ),
    ] = "",
    fsdp: Annotated[
        bool,
        typer.Option("--fsdp", help="Spread weights over the processes.", rich_help_panel=options.RUN),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of data and noise.", rich_help_panel=options.RUN)] = 0,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            help="Recompute blocks in backward passes: less memory, more time.",
            rich_help_panel=options.RUN,
        ),
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the blocks.", rich_help_panel=options.RUN)
    ] = False,
    device: options.Device = "auto",
    threads: options.Threads = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Tell memory, work, time and cost; nothing is loaded.", rich_help_panel=DRY
        ),
    ] = False,
    price: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="With --dry-run: of one GPU for an hour.",
            show_default=False,
            rich_help_panel=DRY,
        ),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the recipes.", rich_help_panel=DRY)] = False,
) -> None:
    """Train a few-step student, and write it with a plan that uses it.

    Interrupted, the same command goes on where it was. Several GPUs:
    torchrun --nproc-per-node N -m vivace distill ...
    """
    from vivace.cli import distill_told
    from vivace.core.errors import ConfigError

    if listed:
        distill_told.recipes()
        return
    if price is not None and not dry_run:
        raise ConfigError("--price is for --dry-run only; add it, or leave the price out.")
    if minutes is not None and updates is not None:
        raise ConfigError("--minutes and --updates are two ways to say how long; give one of them.")
    if recipe is None:
        from vivace.training.distillation.recipes import RECIPES

        raise ConfigError(
            f"--recipe is missing; choose one of {', '.join(RECIPES)} (see vivace distill --list)."
        )
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    chosen = recipe_of(recipe, settings or [], student_steps)
    from vivace.training.distillation.run import Choices

    choices = Choices(
        out=output,
        model=model,
        data=data,
        clips=clips,
        data_minutes=data_minutes,
        size=_shape(model, size or _of_data(data)),
        batch=batch,
        minutes=MINUTES if minutes is None else minutes,
        steps=updates,
        seed=seed,
        lora=lora,
        checkpointing=checkpointing,
        compile=compiled,
        store=store,
        init=init,
        validate_every=validate_every,
        patience=patience,
        captions=captions,
        attention=attention,
        density=density,
        block=block,
        linears=linears,
        fsdp=fsdp,
    )
    if dry_run:
        distill_told.dry_run(chosen, choices, device, price)
        return
    _train(chosen, choices, device)


def recipe_of(name: str, settings: list[str], steps: int | None = None) -> Recipe:
    """The recipe of a name, with settings `key=value` and with so many steps of the student.

    Raises:
        ConfigError: there is no such recipe or setting, or a value is of another kind; the sentence says what there is.
    """
    from dataclasses import fields
    from typing import get_type_hints

    from vivace.core.errors import ConfigError
    from vivace.training.distillation.recipes import find

    kind = find(name)
    kinds = get_type_hints(kind)
    known = {f.name: kinds[f.name] for f in fields(kind)}
    given: dict[str, Any] = {} if steps is None else {"steps": steps}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in known:
            about = f"{name} has no setting '{key}'" if equals else f"--set takes KEY=VALUE, not '{setting}'"
            raise ConfigError(f"{about}; the settings of {name} are {', '.join(known)}.")
        if key in given:
            twice = (
                "--student-steps says it too" if key == "steps" and steps is not None else "it is there twice"
            )
            raise ConfigError(f"--set {key} is one too many: {twice}.")
        given[key] = _value(key, text, known[key])
    return kind(**given)


def _value(key: str, text: str, kind: Any) -> Any:
    """A setting as its field's type wants it.

    Raises:
        ConfigError: it is of another kind.
    """
    import math
    from types import UnionType
    from typing import Union, get_args, get_origin

    from vivace.core.errors import ConfigError

    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for cast in (int, float, str):
        if cast in kinds:
            try:
                value = cast(text)
            except ValueError:
                continue
            if not isinstance(value, float) or math.isfinite(value):
                return value
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a word",
        type(None): "none",
    }
    wanted = " or ".join(words.get(k, str(k)) for k in kinds)
    raise ConfigError(f"--set {key} takes {wanted}, not '{text}'.")


def _of_data(data: Path | None) -> tuple[int, int, int] | None:
    """Frames, height and width of a folder's clips; None without a folder.

    Raises:
        VivaceError: there are no training data.
    """
    if data is None:
        return None
    from vivace.training.data.shards import Head

    clip = Head.read(data).clip
    return clip["frames"], clip["height"], clip["width"]


def _shape(model: str, size: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Frames, height and width; the model's own where nobody says.

    Raises:
        VivaceError: there is no such model, or it cannot make such clips.
    """
    from vivace.models.loading import describe

    described = describe(model)
    frames, height, width = size or (None, None, None)
    found = described.workload(frames=frames, height=height, width=width)
    if described.pixels is not None:
        described.pixels.check(found.frames, found.height, found.width)
    return found.frames, found.height, found.width


def _train(recipe: Recipe, choices: Choices, device: str) -> None:
    """The run; then its plan, and the line that uses it."""
    from rich.markup import escape

    from vivace.cli.shared.screen import facts, screen
    from vivace.core.errors import ConfigError, Interrupted
    from vivace.report.units import percent, seconds
    from vivace.report.units import size as told
    from vivace.training.distillation.run import run

    if choices.init is not None and not choices.init.is_file():
        raise ConfigError(f"there is no student file {choices.init} to start from.")
    if choices.captions:
        _check_clips(*choices.size)
    processes = _processes(device)
    try:
        record = run(recipe, choices, processes)
    except KeyboardInterrupt:
        checkpoint = choices.out.with_suffix(".ckpt")
        if not checkpoint.exists():
            raise Interrupted("interrupted before training began; nothing is kept.") from None
        raise Interrupted(
            f"interrupted; what was learned is kept in {checkpoint}: the same command goes on behind it."
        ) from None
    finally:
        _leave(processes)
    if not processes.leads:
        return
    plan = write_plan(choices.out)
    rows = facts()
    rows.add_row("updates", f"{record['steps']} in {seconds(record['seconds'])}")
    if record["validation"]:
        right = percent(record["validation"]["accuracy"])
        rows.add_row("accuracy", f"{right} of attributes, held-out captions")
    rows.add_row("size", told(record["bytes"]))
    out = screen()
    out.print(rows)
    line = f'vivace generate "a red sphere rolls left" --plan {plan}'
    line += "" if choices.model == "tiny" else f" --model {choices.model}"
    out.print(f"\n[bold]{escape(str(choices.out))}[/]  use it: {escape(line)}", soft_wrap=True)


def _check_clips(frames: int, height: int, width: int) -> None:
    """Refuse clips that the final validation could not look at, before they are trained on.

    Raises:
        ConfigError: the world's verifier cannot see such clips.
    """
    from vivace.core.errors import ConfigError
    from vivace.world.verifier import MIN_FRAMES

    if frames < MIN_FRAMES or height != width or height % 16:
        raise ConfigError(
            f"students are checked on square clips of {MIN_FRAMES} frames or more, with sides divisible by 16, not "
            f"{frames} x {height} x {width}; give such a --size, or --captions 0 to check nothing."
        )


def write_plan(student: Path) -> Path:
    """`NAME.plan.yaml` beside a student file: the student and the sampler that it was trained for.

    Raises:
        WeightsError: the student file is damaged.
    """
    from vivace.plans.plan import Plan
    from vivace.techniques.distillation.student import plan_of

    return Plan(plan_of(str(student)), name=student.stem).save(student.with_suffix(".plan.yaml"))


def _processes(device: str) -> Processes:
    """This process among those of `torchrun`, on the device that was asked for."""
    from dataclasses import replace

    import torch

    from vivace.cli.shared.run import device_here
    from vivace.core.errors import ConfigError
    from vivace.tiny.train.common import Processes

    place = torch.device(device_here(device))
    found = Processes.join()
    if device == "auto" or place == found.device:
        return found
    if found.world > 1:
        raise ConfigError("under torchrun every process takes the GPU of its number; leave --device out.")
    if place.type == "cuda":
        place = torch.device("cuda", place.index or 0)
        torch.cuda.set_device(place)
    return replace(found, device=place)


def _leave(processes: Processes) -> None:
    """Leave the group of processes that was joined."""
    import torch.distributed as dist

    if processes.world > 1 and dist.is_initialized():
        dist.destroy_process_group()
