"""Building Triton kernels without a GPU: does the compiler take them for a target, and does it spill registers?

    for build in builds(lambda: forward(q, k, v, routes, scale), capability=90):
        assert build.spills == 0

The host function is run with its launches recorded instead of made (`vivace.kernels.launch`); every kernel that it
would start is compiled for the target, down to machine code. Results are not computed. Must run in a process in which
Triton's interpreter is off.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vivace.kernels.launch import Launch, recorded

_KINDS = {
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.float64": "fp64",
    "torch.int8": "i8",
    "torch.uint8": "u8",
    "torch.bool": "i1",
    "torch.int32": "i32",
    "torch.int64": "i64",
    "torch.float8_e4m3fn": "fp8e4nv",
    "torch.float8_e5m2": "fp8e5",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "num_ctas", "enable_fp_fusion")


@dataclass(frozen=True, slots=True)
class Build:
    """What the compiler made of one launch."""

    kernel: str
    capability: int
    registers: int
    spills: int
    """Bytes of a thread's stack: registers that went to memory."""
    shared: int
    """Bytes of shared memory."""
    products: int
    """Instructions of the tensor cores in the assembly."""
    serialized: str
    """Why the assembler makes products of Hopper wait for each other, which costs half of their speed; mostly ""."""


def builds(run: Callable[[], Any], capability: int) -> list[Build]:
    """Compile all kernels that `run` would start, for a compute capability such as 80 or 90."""
    with recorded() as launches:
        run()
    return [build(found, capability) for found in launches]


def build(found: Launch, capability: int) -> Build:
    """Compile one recorded launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    names = found.kernel.arg_names
    options = {k: v for k, v in found.settings.items() if k in _OPTIONS}
    constants = {k: v for k, v in found.settings.items() if k not in _OPTIONS}
    signature = dict(zip(names, map(_kind, found.arguments), strict=False))
    signature |= dict.fromkeys(constants, "constexpr")
    made = GluonASTSource if isinstance(found.kernel, GluonJITFunction) else ASTSource
    source = made(
        found.kernel,
        {n: signature[n] for n in names},
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs=_divisible(found.arguments),
    )
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spills = _assembled(compiled.asm["cubin"])
    return Build(
        found.kernel.fn.__name__,
        capability,
        registers,
        spills,
        compiled.metadata.shared,
        len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", ptx)),
        _serialized(ptx) if "wgmma.mma_async" in ptx else "",
    )


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    if hasattr(value, "block_shape"):
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
        return f"tensordesc<{_KINDS[str(value.base.dtype)]}{list(value.block_shape)}{layout}>"
    return "*" + _KINDS[str(value.dtype)]


def _divisible(arguments: tuple[Any, ...]) -> dict[tuple[int, ...], list[list[Any]]]:
    """What a launch tells the compiler of pointers and numbers: that they are multiples of 16."""
    found = {}
    for place, value in enumerate(arguments):
        pointer = hasattr(value, "data_ptr")
        if pointer or (isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0):
            found[(place,)] = [["tt.divisibility", 16]]
    return found


def _serialized(ptx: str) -> str:
    """The assembler's remark about products that it puts one behind the other."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        said = subprocess.run(
            [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file, "-o", file.with_suffix(".cubin")],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    found = re.search(r"instructions are serialized due to (.*?) in ", said)
    return "" if found is None else found[1]


def _assembled(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of its stack) as the machine code says."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        out = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    assert found is not None, out
    return int(found[1]), int(found[2])
