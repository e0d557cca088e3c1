"""Starting a Triton kernel: its decorator hides from type checkers what a launch takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


def at_once(x: Any) -> bool:
    """Whether a kernel may be called past torch's dispatcher, whose way to a Python operation takes 0.2 ms.

    Only plain tensors on a GPU, where nobody traces, compiles, counts or fakes: those must see the operation.
    """
    import torch
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.is_cuda
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
    )


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    settings: dict[str, Any]


_records: list[list[Launch]] = []


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Run `kernel` over `grid`; `settings` are its constants, `num_warps` and the like."""
    # Multiply-adds are what the kernels are made of; from Triton 3.10 on they are to be asked for.
    settings.setdefault("enable_fp_fusion", True)
    if _records:
        _records[-1].append(Launch(kernel, grid, arguments, settings))
        return
    kernel[grid](*arguments, **settings)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Nothing is started inside; the launches are kept, so that kernels can be built without a GPU."""
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()
