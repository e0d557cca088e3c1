"""Triton's interpreter, made to run here: kernels on a CPU, one program after the other, for tests.

Call `interpret()` before the first module with Triton kernels is imported: a kernel is interpreted or compiled as it
was defined.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import numpy as np


def interpret() -> str:
    """Switch Triton's interpreter on where there is no GPU.

    Returns:
        Why kernels cannot be interpreted here; empty when they can, or when a GPU runs them.
    """
    import torch

    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if torch.cuda.is_available():
        return ""
    os.environ["TRITON_INTERPRET"] = "1"
    _mend()
    _interpret_the_library()
    return ""


def _mend() -> None:
    """What Triton 3.6's interpreter cannot do: scalars under numpy 2.4, products of bfloat16, rounding (it cuts)."""
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    old: Any = interpreter._patch_lang_tensor
    if getattr(old, "mended", False):
        return

    def patched(tensor: Any, scope: Any) -> None:
        old(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched.mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
    builder: Any = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def wide(handle: Any) -> Any:
        """bfloat16 is kept as the bits of an integer there."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    builder.create_dot = create_dot

    to_float, cast = builder.create_fp_to_fp, builder.cast_impl

    def rounded(source: Any, kind: torch.dtype, bits: torch.dtype, to: Any) -> Any:
        """To the nearest, as a GPU does; within the range of e4m3, at which it saturates."""
        data = torch.from_numpy(wide(source).data.astype(np.float32))
        data = data.clamp(-448.0, 448.0) if kind == torch.float8_e4m3fn else data
        return interpreter.TensorHandle(data.to(kind).view(bits).numpy().view(f"u{bits.itemsize}"), to)

    def create_fp_to_fp(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        if kind.scalar != tl.float8e4nv or source.dtype.scalar not in (tl.float32, tl.float16, tl.bfloat16):
            return to_float(self, source, kind, rounding)
        return rounded(source, torch.float8_e4m3fn, torch.uint8, tl.float8e4nv)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, kind)
        return rounded(source, torch.bfloat16, torch.int16, tl.bfloat16)

    builder.create_fp_to_fp, builder.cast_impl = create_fp_to_fp, cast_impl


def _interpret_the_library() -> None:
    """Triton's own functions (`tl.sum` and others) are kernels too; somebody may have imported them before."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    done: dict[int, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("triton.language") and module is not None:
            for key, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    mine = done.setdefault(id(value), InterpretedFunction(value.fn))
                    setattr(module, key, mine)
