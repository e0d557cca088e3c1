"""`vivace encode`: training data as latents on disk, from the rendered world, from videos, or from a teacher."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.cli.shared import options
from vivace.cli.shared.options import DType, Request

if TYPE_CHECKING:
    from vivace.training.data.sources import Source
    from vivace.training.data.writing import ShardWriter

COUNT = 256
"""Clips of the world, where nobody says how many."""
PER_SHARD = {"world": 64, "videos": 64, "teacher": 16}
"""Few for a teacher, because an interruption loses what is finished of a shard."""
TOLD = 5
"""Videos that are left out of which each gets a line."""
DATA, SAMPLER = "The data", "The teacher"


class From(StrEnum):
    """Where clips come from."""

    WORLD = "world"
    VIDEOS = "videos"
    TEACHER = "teacher"


def encode(
    output: Annotated[
        Path, typer.Option("--out", "--output", "-o", help="The folder to write.", rich_help_panel=DATA)
    ],
    kind: Annotated[
        From,
        typer.Option(
            "--from",
            help="world: rendered clips; videos: a folder of videos with captions; teacher: pairs of noise and what "
            "the model makes of it.",
            rich_help_panel=DATA,
        ),
    ] = From.WORLD,
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="With --from videos: the folder. Captions: captions.jsonl, captions.txt, or a .txt beside each video.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = "tiny",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A text file, one prompt a line  \\[default: captions of the world]",
            show_default=False,
            rich_help_panel=SAMPLER,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Clips  \\[default: all videos, every prompt once, {COUNT} of the world]",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(
            metavar="FRAMES HEIGHT WIDTH",
            help="Of the clips  \\[default: the model's]",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=1000,
            help="With --from videos: frames per second of the clips  \\[default: the model's]",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Chooses scenes, captions and noise.", rich_help_panel=DATA)
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Solver steps  \\[default: the model's]", show_default=False, rich_help_panel=SAMPLER
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Guidance scale  \\[default: the model's]",
            show_default=False,
            rich_help_panel=SAMPLER,
        ),
    ] = None,
    states: Annotated[
        int, typer.Option(min=0, help="Keep so many states on the way as well.", rich_help_panel=SAMPLER)
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Clips at a time.", rich_help_panel=options.RUN)] = 4,
    shard: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Clips of a file; an interruption loses one file's at most  \\[default: 64, of a teacher 16]",
            show_default=False,
            rich_help_panel=options.RUN,
        ),
    ] = None,
    dtype: options.Precision = DType.AUTO,
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Make training data: latents with text embeddings, in safetensors shards.

    Interrupted, the same command goes on behind the last finished shard; with a larger --count it adds clips.
    """
    from rich.markup import escape

    from vivace.cli.shared.screen import facts, screen, warn
    from vivace.core.errors import ConfigError
    from vivace.report.units import seconds
    from vivace.report.units import size as told
    from vivace.training.data.writing import ShardWriter, fill

    _check_options(kind, folder, {"--prompts": prompts, "--states": states, "--steps": steps}, guidance, fps)
    texts = _prompts(prompts) if prompts is not None else []
    frames, height, width = size or (None, None, None)
    request = Request(
        prompt="",
        model=model,
        seed=seed,
        steps=steps,
        frames=frames,
        height=height,
        width=width,
        guidance=guidance,
        fps=fps,
        dtype=dtype,
        device=device,
        threads=threads,
    )
    line = Line()
    source = _source(request, kind, folder, texts, states, line)
    refused = getattr(source, "refused", [])
    for sentence in refused[:TOLD]:
        warn(f"left out: {sentence}")
    if len(refused) > TOLD:
        warn(f"{len(refused) - TOLD} more videos are left out.")
    samples = count or source.count or len(texts) or COUNT
    if source.count is not None and samples > source.count:
        raise ConfigError(
            f"{samples} clips are asked for and {source.count} videos can be used; lower --count, or leave it out."
        )
    writer = ShardWriter(output, source.head(samples, shard or PER_SHARD[kind]))
    missing = sum(span.stop - span.start for span in writer.todo())
    started = time.perf_counter()
    with _kept(writer), line.shown(samples, samples - missing):
        made = fill(writer, source, batch, line.advance)
    spent = time.perf_counter() - started
    rows = facts()
    for name in made.fields:
        about = made.head.fields[name]
        rows.add_row(name, f"{about['dtype']}, {' x '.join(map(str, about['shape']))}")
    rows.add_row("bytes", told(made.bytes))
    rows.add_row("time", f"{seconds(spent)} for {missing} samples" if missing else "all was there already")
    out = screen()
    out.print(rows)
    out.print(
        f"\n[bold]{escape(str(output))}[/]  [quiet]{len(made)} samples, hash {made.hash}[/]",
        soft_wrap=True,
    )


class Line:
    """The progress line: samples done, the time left, and where a teacher stands in its steps."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._row: Any = None

    @contextlib.contextmanager
    def shown(self, total: int, done: int) -> Iterator[None]:
        """Draws it on stderr until the block ends."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from vivace.cli.shared.screen import screen

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=screen(stderr=True)) as self._progress:
            self._row = self._progress.add_task("encoding", total=total, completed=done)
            yield

    def advance(self, samples: int) -> None:
        """So many more samples are made."""
        self._progress.update(self._row, advance=samples, description="encoding")

    def on_step(self, step: int) -> None:
        """The teacher ended a step of the portion it is at."""
        self._progress.update(self._row, description=f"step {step}")


@contextlib.contextmanager
def _kept(writer: ShardWriter) -> Iterator[None]:
    """An interrupt says what is kept; a folder that stays empty is removed."""
    from vivace.core.errors import Interrupted

    try:
        yield
    except KeyboardInterrupt:
        done = writer.done
        if not done:
            raise
        raise Interrupted(
            f"interrupted; unfinished files were removed. {done} of {writer.head.samples} samples are kept in "
            f"{writer.folder}: the same command goes on behind them."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            writer.folder.rmdir()  # only when nothing is in it


def _source(
    request: Request, kind: From, folder: Path | None, texts: list[str], states: int, line: Line
) -> Source:
    """The model loaded, with what is needed of it on the device, as a source of samples."""
    from vivace.cli.shared.run import DEFAULT_FPS, Job, device_here, load
    from vivace.core.errors import ModelError
    from vivace.models.loading import describe
    from vivace.tiny.train.clips import ClipShape
    from vivace.training.data.encoding import Encoder
    from vivace.training.data.sources import TeacherSource, VideoSource, WorldSource
    from vivace.training.data.videos import captioned

    # What is wrong with the shape or the captions is told before weights are read.
    model = describe(request.model)
    workload = model.workload(**request.shape)
    if model.pixels is None:
        raise ModelError(f"Vivace knows no family of {model.pipeline_class}; give another model.")
    model.pixels.check(workload.frames, workload.height, workload.width)
    if folder is not None:
        captioned(folder)
    fps = float(request.fps or model.defaults.get("fps", DEFAULT_FPS))
    place = device_here(request.device)
    # Without a teacher the transformer stays in main memory, whatever its size.
    home = place if kind is From.TEACHER else "cpu"
    pipeline = load(Job(replace(request, device=home), model, workload, fps))
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if (part := getattr(pipeline, name, None)) is not None:
            part.to(place)
    encoder = Encoder(pipeline, place)
    shape = ClipShape(frames=workload.frames, height=workload.height, width=workload.width)
    if kind is From.TEACHER:
        return TeacherSource(
            encoder,
            shape,
            texts,
            steps=request.steps,
            guidance=request.guidance,
            seed=request.seed,
            states=states,
            on_step=line.on_step,
        )
    if folder is not None:
        return VideoSource(encoder, shape, folder, fps)
    return WorldSource(encoder, shape, request.seed)


def _check_options(
    kind: From, folder: Path | None, teachers: dict[str, Any], guidance: float | None, fps: float | None
) -> None:
    """Options of one source are not silently ignored by another."""
    from vivace.core.errors import ConfigError

    if (folder is None) == (kind is From.VIDEOS):
        raise ConfigError(
            "--from videos needs the folder: vivace encode --from videos DIR --out DIR."
            if folder is None
            else f"a folder ({folder}) is for --from videos only; leave it out, or add that."
        )
    if kind is not From.VIDEOS and fps is not None:
        raise ConfigError("--fps is for --from videos only; leave it out.")
    given = [name for name, value in {**teachers, "--guidance": guidance}.items() if value not in (None, 0)]
    if kind is not From.TEACHER and given:
        raise ConfigError(f"{given[0]} is for --from teacher only; leave it out.")


def _prompts(file: Path) -> list[str]:
    from vivace.core.errors import ConfigError

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"the prompt file {file} cannot be read: {reason}.") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"the prompt file {file} holds no prompt; write one a line.")
    return found
