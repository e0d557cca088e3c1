"""Load the packaged weights of the embedded model, with errors that name the damaged file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import WanPipeline

from vivace.core.env import fast_bf16_cpu
from vivace.core.errors import WeightsError
from vivace.tiny.defaults import DEFAULTS

__all__ = ["DEFAULTS", "WEIGHTS", "fast_dtype", "load_tiny", "verify_weights"]

WEIGHTS = Path(__file__).parent / "weights"
MANIFEST = "manifest.json"
"""Written by the export: size and sha256 of every file of the folder."""


def load_tiny(dtype: torch.dtype | None = None, folder: Path | None = None) -> WanPipeline:
    """The trained pipeline on the CPU, in eval mode, with a quiet progress bar.

    `dtype` defaults to `fast_dtype()`. Raises `WeightsError`, naming the file, when one is missing or damaged.
    """
    folder = Path(folder or WEIGHTS)
    verify_weights(folder)
    with _quiet_loading():
        pipeline = WanPipeline.from_pretrained(folder, dtype=dtype or fast_dtype(), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fast_dtype() -> torch.dtype:
    """bf16 where the CPU multiplies it natively, else fp32: emulated bf16 is slower than fp32."""
    return torch.bfloat16 if fast_bf16_cpu() else torch.float32


def verify_weights(folder: Path) -> None:
    """Compare every file with the manifest; raises `WeightsError` at the first that differs."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise WeightsError(f"the embedded weights are not there: {manifest} is missing; reinstall vivace.")
    try:
        files = json.loads(manifest.read_text())
    except ValueError as error:
        raise WeightsError(f"{manifest} is damaged; reinstall vivace.") from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"the embedded weights are incomplete: {path} is missing; reinstall vivace.")
        if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            raise WeightsError(f"{path} is damaged (its checksum differs); reinstall vivace.")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No bars while loading; both libraries' settings are put back afterwards."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    modules = [m for m in (diffusers_logging, transformers_logging) if m.is_progress_bar_enabled()]
    for module in modules:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in modules:
            module.enable_progress_bar()
