"""The entry point: the list of commands, and what every error looks like from outside.

An error somebody can mend is one sentence on stderr and exit code 2. A traceback is a bug of ours.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import vivace
from vivace.cli import (
    bench,
    calibrate,
    compare,
    compare_records,
    distill,
    doctor,
    encode,
    generate,
    methods,
    plan,
    report,
)
from vivace.cli.shared.screen import fail
from vivace.core.errors import VivaceError

MAKE, TRAIN, MEASURE, KNOW, HERE = (
    "Make videos",
    "Train",
    "Measure",
    "Plans and methods",
    "This machine",
)
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_USAGE: type[Exception] = typer.BadParameter.__mro__[1]
"""Base of every complaint about the command line itself."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)

app = typer.Typer(
    name="vivace",
    help="Play any video diffusion model faster, and know what it cost.",
    epilog='Start with: [bold]vivace compare "a red sphere slides left" --plan fast -o out[/bold]',
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate", rich_help_panel=MAKE)(generate.generate)
app.command("compare", rich_help_panel=MAKE)(compare.compare)
app.command("encode", rich_help_panel=TRAIN)(encode.encode)
app.command("distill", rich_help_panel=TRAIN)(distill.distill)
app.command("bench", rich_help_panel=MEASURE)(bench.bench)
app.command("calibrate", rich_help_panel=MEASURE)(calibrate.calibrate)
app.command("report", rich_help_panel=MEASURE)(report.report)
app.command("compare-records", rich_help_panel=MEASURE)(compare_records.compare_records)
app.add_typer(plan.app, name="plan", rich_help_panel=KNOW)
app.add_typer(methods.app, name="methods", rich_help_panel=KNOW)
app.command("doctor", rich_help_panel=HERE)(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"vivace {vivace.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Play any video diffusion model faster, and know what it cost."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` by default) and return its exit code.

    0 done, 1 the machine is not ready (`doctor`), 2 bad input, 130 interrupted, 143 terminated.
    """
    _any_terminal()
    _quiet_libraries()
    _terminate_tidily()
    try:
        code = app(None if arguments is None else list(arguments), prog_name="vivace", standalone_mode=False)
        sys.stdout.flush()
        # Typer turns an interrupt into this exit code by itself, without a word.
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except VivaceError as error:
        return fail(str(error), error.exit_code)
    except _USAGE as error:
        return fail(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted; unfinished files were removed.", INTERRUPTED)
    except BrokenPipeError:
        # Somebody closed the pipe (`vivace methods | head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if (sentence := _no_room(error)) is None:
            raise
        return fail(sentence)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        return fail(
            "there is not enough memory for this clip; use fewer --frames or a smaller --height and --width."
        )


def _usage(error: Any) -> str:
    """A complaint about the command line in one line, with where to look."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "vivace"
    text = " ".join(error.format_message().split()).rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; see `{path} --help`."


def _no_room(error: OSError) -> str | None:
    place = f" {error.filename}" if error.filename else ""
    if error.errno in _FULL:
        return f"there is no space left to write{place}; free some space or choose another folder with -o."
    if error.errno in _FORBIDDEN:
        return f"no permission to use{place}; choose another folder or change its permissions."
    return None


def _any_terminal() -> None:
    """A terminal that cannot show a character shows a question mark instead of our traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _quiet_libraries() -> None:
    """Other people's progress bars and import notes do not belong between our lines; a user's own setting wins."""
    for name, value in (
        ("DIFFUSERS_VERBOSITY", "error"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        # torchao reports kernels it was not built with, torch what of torchao's it calls deprecated.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _terminate_tidily() -> None:
    """A polite kill unwinds like an interrupt, so that unfinished files are removed."""

    def stop(*_: object) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
