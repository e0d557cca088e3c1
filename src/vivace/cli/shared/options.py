"""Options that commands share, declared once, and the request they add up to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

CLIP, RUN = "The clip", "How it runs"


class DType(StrEnum):
    """Precision of the weights and of the arithmetic."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


Prompt = Annotated[str, typer.Argument(help="What the clip shows.", show_default=False)]
Model = Annotated[
    str, typer.Option("--model", "-m", help="'tiny' (embedded), a folder, or a hub id.", rich_help_panel=RUN)
]
PlanName = Annotated[
    str,
    typer.Option("--plan", "-p", help="A preset (`vivace plan list`) or a YAML file.", rich_help_panel=RUN),
]
Seed = Annotated[
    int, typer.Option(min=0, help="Seed of the noise; equal seeds, equal clips.", rich_help_panel=CLIP)
]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Solver steps; wins over the plan's.", show_default=False, rich_help_panel=CLIP),
]
Frames = Annotated[
    int | None, typer.Option(help="Number of frames.", show_default=False, rich_help_panel=CLIP)
]
Height = Annotated[
    int | None, typer.Option(help="Height in pixels.", show_default=False, rich_help_panel=CLIP)
]
Width = Annotated[int | None, typer.Option(help="Width in pixels.", show_default=False, rich_help_panel=CLIP)]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0.0, help="Guidance scale; 1 switches it off.", show_default=False, rich_help_panel=CLIP
    ),
]
Fps = Annotated[
    float | None,
    typer.Option(
        min=0.1, max=1000, help="Frames per second of the file.", show_default=False, rich_help_panel=CLIP
    ),
]
Precision = Annotated[
    DType, typer.Option("--dtype", help="Precision; auto takes the fastest here.", rich_help_panel=RUN)
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:1 ...; auto takes a GPU if any.", rich_help_panel=RUN)
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads.", show_default=False, rich_help_panel=RUN)
]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line, before anything is looked up."""

    prompt: str
    model: str
    seed: int = 0
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    fps: float | None = None
    dtype: DType = DType.AUTO
    device: str = "auto"
    threads: int | None = None

    @property
    def shape(self) -> dict[str, Any]:
        """What was said of the clip, in the words of `Workload`."""
        names = ("frames", "height", "width", "steps", "guidance")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def mp4(path: Path) -> Path:
    """The path, if it names an mp4 file.

    Raises:
        ConfigError: it has another ending, or none.
    """
    from vivace.core.errors import ConfigError

    if path.suffix.lower() != ".mp4":
        raise ConfigError(f"the output {path} is no mp4 file; give a name that ends in .mp4.")
    return path
