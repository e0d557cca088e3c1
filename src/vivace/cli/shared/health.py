"""The checks behind `vivace doctor`, as plain data."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pkgutil
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vivace.core.env import cpu_flags, cpu_name, fast_bf16_cpu, versions
from vivace.report.units import size

if TYPE_CHECKING:
    from vivace.kernels.breakeven import BreakEven

ROOM = 512 * 2**20
"""Free space under which a comparison may not fit."""
CPU_TOKENS = 4096
"""Longest sequence that `attention` times on a CPU, where attention over a real clip takes minutes."""
_TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")
_EXTRAS = {
    "cv2": ("metrics by optical flow", "pip install 'vivace[eval]'"),
    "pyarrow": ("Parquet beside a report", "pip install 'vivace[eval]'"),
    "pycvvdp": ("ColorVideoVDP between clips", "pip install --no-deps cvvdp==0.5.7"),
    "cache_dit": ("the peers of cache-dit", "pip install 'vivace[peers]'"),
    "triton": ("GPU kernels", "pip install triton"),
    "pytest": ("the tests", "pip install 'vivace[dev]'"),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding. `state` is `good`, `fair` (works without it) or `bad` (the embedded model cannot run)."""

    section: str
    name: str
    state: str
    detail: str
    advice: str = ""


def examine() -> list[Check]:
    """All checks, in the order in which they are shown."""
    parts = (_software, _machine, _model, _kernels, _video, _extras, _weights, _space)
    return [check for part in parts for check in part()]


def attention(
    model: str = "tiny", tokens: int | None = None, heads: int | None = None, head_dim: int | None = None
) -> list[Check]:
    """Times dense and block-sparse attention here: at which densities a mask pays, and which kernels would run.

    Args:
        model: whose clip is timed at its default size; what is given beside it wins.
        tokens: at most `CPU_TOKENS` of them are timed on a CPU.

    Raises:
        ModelError, UnknownNameError: the model's shape is needed and not known.
    """
    import torch

    from vivace.core.errors import ModelError
    from vivace.kernels.breakeven import Shape, break_even

    if tokens is None or heads is None or head_dim is None:
        from vivace.models.loading import describe

        described = describe(model)
        grid = described.grid(described.workload())
        if grid is None:
            raise ModelError(
                f"{described.name} has no known token grid; give --tokens, --heads and --head-dim."
            )
        expert = described.experts[0]
        tokens, heads = tokens or grid.tokens, heads or expert.heads
        head_dim = head_dim or expert.head_dim
    gpu = torch.cuda.is_available()
    timed = tokens if gpu else min(tokens, CPU_TOKENS)
    block = 64
    # As the techniques do: a short sequence gets smaller blocks, so that there is something to choose from.
    while not gpu and block > 16 and timed < 16 * block:
        block //= 2
    shape = Shape(timed, heads, head_dim, block, "bfloat16" if gpu else "float32")
    found = break_even("block_attention", shape, "cuda" if gpu else "cpu")
    return list(_attention(found, tokens))


def _attention(found: BreakEven, tokens: int) -> Iterator[Check]:
    section = "Attention"
    shorter = f"{tokens:,} tokens asked for, which take minutes here" if tokens != found.shape.tokens else ""
    yield Check(section=section, name="timed", state="good", detail=str(found.shape), advice=shorter)
    yield Check(
        section=section,
        name="all pairs",
        state="good",
        detail=f"{found.dense_seconds * 1e3:.3g} ms by {found.dense.name}",
        advice=found.dense.why,
    )
    for density, seconds in found.points:
        faster = found.dense_seconds / seconds
        yield Check(
            section=section,
            name=f"{density:.0%} of them",
            state="good" if faster > 1.0 else "fair",
            detail=f"{seconds * 1e3:.3g} ms, "
            + (f"{faster:.2g}x faster" if faster > 1.0 else f"{1 / faster:.2g}x slower"),
        )
    pays = found.density
    yield Check(
        section=section,
        name="break-even",
        state="good" if pays > 0.0 else "fair",
        detail=f"a mask pays that keeps less than {pays:.0%} of the pairs"
        if pays > 0.0
        else f"no mask pays, not even one that keeps {found.points[0][0]:.0%} of the pairs",
    )
    yield Check(
        section=section, name="sparse kernel", state="good", detail=found.sparse.name, advice=found.sparse.why
    )


def _software() -> Iterator[Check]:
    for name, version in versions().items():
        yield Check(section="Software", name=name, state="good", detail=version)
    for name in ("torch", "diffusers", "transformers"):
        if name not in versions():
            yield Check(
                section="Software", name=name, state="bad", detail="missing", advice=f"pip install {name}"
            )


def _machine() -> Iterator[Check]:
    from vivace.core.env import environment

    facts = environment()
    flags = [f for f in _TELLING_FLAGS if f in cpu_flags()]
    cores, threads = facts["cores"], facts["threads"]
    yield Check(section="Machine", name="processor", state="good", detail=f"{cpu_name()}, {cores} cores")
    yield Check(
        section="Machine",
        name="instructions",
        state="good" if flags else "fair",
        detail=", ".join(flags) or "not listed by this system",
    )
    yield Check(
        section="Machine",
        name="bf16",
        state="good" if fast_bf16_cpu() else "fair",
        detail="native" if fast_bf16_cpu() else "emulated on this processor; fp32 is used",
    )
    yield Check(
        section="Machine",
        name="threads",
        state="good" if threads == cores else "fair",
        detail=f"{threads} of {cores}",
        advice="" if threads == cores else f"--threads {cores} uses all cores",
    )
    yield from _gpus()


def _gpus() -> Iterator[Check]:
    import torch

    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"{gpu.name}, {size(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
        yield Check(section="Machine", name=f"GPU {index}", state="good", detail=detail)
    if not torch.cuda.device_count():
        why = "none visible" if torch.version.cuda else "none; this torch is built for CPU"
        yield Check(section="Machine", name="GPU", state="fair", detail=why)


def _model() -> Iterator[Check]:
    from vivace.core.errors import VivaceError
    from vivace.tiny.load import WEIGHTS, verify_weights

    try:
        verify_weights(WEIGHTS)
        taken = sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file())
        yield Check(section="Embedded model", name="weights", state="good", detail=f"intact, {size(taken)}")
    except VivaceError as error:
        yield Check(section="Embedded model", name="weights", state="bad", detail=str(error))
    from vivace.cli.shared import judge

    reason = judge.missing()
    yield Check(
        section="Embedded model",
        name="verifier",
        state="fair" if reason else "good",
        detail=reason or "intact",
        advice="clips are not checked against their prompts" if reason else "",
    )


def _kernels() -> Iterator[Check]:
    """Which implementation of each operation can run here, and why not the others."""
    import torch

    import vivace.kernels
    from vivace.kernels.api import candidates

    device = "cuda" if torch.cuda.is_available() else "cpu"
    context = {"device": device, "dtype": "float32"}
    for op in pkgutil.iter_modules(vivace.kernels.__path__):
        if not op.ispkg:
            continue
        for candidate in candidates(op.name):
            refused, avoided = candidate.refuse(context), candidate.avoid(context)
            yield Check(
                section="Kernels",
                name=f"{op.name}: {candidate.name}",
                state="fair" if refused else "good",
                detail=refused or f"can run on {device}",
                advice=f"only when asked for by name: it {avoided}" if avoided and not refused else "",
            )


def _video() -> Iterator[Check]:
    try:
        import av
    except ImportError as error:
        yield Check(section="Video", name="PyAV", state="bad", detail=str(error), advice="pip install av")
        return
    there = "libx264" in av.codecs_available
    yield Check(
        section="Video",
        name="H.264",
        state="good" if there else "bad",
        detail=f"libx264 through PyAV {av.__version__}" if there else f"PyAV {av.__version__} has no libx264",
        advice="" if there else "install the av wheel: pip install --force-reinstall av",
    )


def _extras() -> Iterator[Check]:
    for name, (what, line) in _EXTRAS.items():
        there = importlib.util.find_spec(name) is not None
        yield Check(
            section="Optional",
            name=name,
            state="good" if there else "fair",
            detail=f"{_version(name)}, for {what}" if there else f"not installed; for {what}",
            advice="" if there else line,
        )


def _version(module: str) -> str:
    """The version of the package that a module comes from."""
    packages = importlib.metadata.packages_distributions().get(module, [module])
    return importlib.metadata.version(packages[0])


def _weights() -> Iterator[Check]:
    from vivace.evaluation import weights

    for name in weights.known:
        why = weights.missing(name)
        yield Check(
            section="Optional",
            name=name,
            state="fair" if why else "good",
            detail=f"{'not here' if why else 'here'}; {weights.known[name].title}",
            advice=weights.COMMAND if why else "",
        )


def _space() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    yield Check(
        section="Disk",
        name="free here",
        state="good" if free > ROOM else "fair",
        detail=size(free),
        advice="" if free > ROOM else "a comparison may not fit",
    )
    yield Check(section="Disk", name="python", state="good", detail=sys.executable)
