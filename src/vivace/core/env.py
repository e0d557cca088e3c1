"""The environment fingerprint and the stopwatch: where a number was measured, and how."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "torchao", "triton", "numpy")


def cache_folder(part: str) -> Path:
    """Where files of one kind are kept between runs: in the folder named by `VIVACE_CACHE`, or `~/.cache/vivace`."""
    return Path(os.environ.get("VIVACE_CACHE") or Path.home() / ".cache" / "vivace") / part


@functools.cache
def cpu_name() -> str:
    """The processor's model name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next(
                (line.partition(":")[2].strip() for line in f if line.startswith("model name")), "unknown"
            )
    except OSError:
        return platform.processor() or "unknown"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags, empty where the system does not list them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            line = next((line for line in f if line.startswith(("flags", "Features"))), "")
            return frozenset(line.partition(":")[2].split())
    except OSError:
        return frozenset()


def fast_bf16_cpu() -> bool:
    """Whether bf16 matrix products are faster than fp32 ones on this processor."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide numbers."""
    out = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def environment(device: Any = None) -> dict[str, Any]:
    """Hardware and software as plain data, with a `fingerprint` over all of it."""
    import torch

    info: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": versions(),
        "device": str(device) if device is not None else "cpu",
    }
    if device is not None and getattr(device, "type", str(device)).startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        info |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    text = json.dumps(info, sort_keys=True)
    return info | {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:12]}


class Stopwatch:
    """Marks in time that cost no synchronisation: CUDA events on a GPU, the monotonic clock elsewhere."""

    def __init__(self, device: Any) -> None:
        self._cuda = getattr(device, "type", "cpu") == "cuda"

    def mark(self) -> Any:
        """A point in time of the work queued so far."""
        if not self._cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        """Seconds between two marks; waits for the second on a GPU."""
        if not self._cuda:
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1000.0
