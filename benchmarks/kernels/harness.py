"""What the kernel benchmarks share: inputs, the truth for some rows, times in turns, and a record that is never lost.

A record is one JSON file that is written anew after every configuration, so that a run that is cut off keeps what it
has measured.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vivace.core.env import environment
from vivace.kernels.api import timed

PACKAGES = (
    "flash-attn",
    "sageattention",
    "fastvideo-kernel",
    "triton",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
)
FASTVIDEO = "fastvideo_kernel._C.fastvideo_kernel_ops"
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def fastvideo_operations() -> tuple[Any, str]:
    """fastvideo-kernel's compiled operations (ThunderKittens, INT8), or None and the reason.

    The package goes over to Triton without a word where this library does not load, so it is asked for by name. Its
    functions for several GPUs need a newer NCCL than torch may bring; bound lazily, they are in nobody's way.
    """
    if importlib.util.find_spec("fastvideo_kernel") is None:
        return None, "fastvideo-kernel is not installed"
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        return importlib.import_module(FASTVIDEO), ""
    except ImportError as error:
        return None, f"its compiled library does not load: {str(error)[-160:]}"
    finally:
        sys.setdlopenflags(flags)


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph: its kernels without the time that starting them takes. Inputs must stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


@dataclass(frozen=True)
class Size:
    """One attention call: `video` tokens and `text` tokens behind them, one batch row."""

    name: str
    video: int
    heads: int
    dim: int
    text: int = 0

    @property
    def tokens(self) -> int:
        return self.video + self.text

    def __str__(self) -> str:
        text = f"+{self.text}" if self.text else ""
        return f"{self.name}: {self.video:,}{text} tokens x {self.heads} heads x {self.dim}"


def plain_inputs(size: Size, dtype: torch.dtype, device: str) -> QKV:
    """Independent normal numbers, (1, S, H, D)."""
    random = torch.Generator(device).manual_seed(0)
    shape = (1, size.tokens, size.heads, size.dim)
    q, k, v = (torch.randn(shape, generator=random, device=device).to(dtype) for _ in range(3))
    return q, k, v


def outlier_inputs(size: Size, dtype: torch.dtype, device: str) -> QKV:
    """Tensors with what makes real ones hard to round, (1, S, H, D).

    Neighbouring tokens are alike; every head's keys share a large mean in some channels; a few channels of queries,
    keys and values are many times larger than the rest; a few keys draw most of the attention.
    """
    random = torch.Generator(device).manual_seed(1)
    s, h, d = size.tokens, size.heads, size.dim

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device)

    def smooth() -> torch.Tensor:
        coarse = draw(1, -(-s // 16), h, d).repeat_interleave(16, 1)[:, :s]
        return (0.8 * coarse + 0.6 * draw(1, s, h, d)).contiguous()

    q, k, v = smooth(), smooth(), smooth()
    few = max(1, d // 32)
    q[..., :few] *= 3.0
    k[..., few : 2 * few] *= 4.0
    k += 6.0 * draw(1, 1, h, d) * (torch.arange(d, device=device) % 8 == 0)
    k[:, :: max(1, s // 4)] *= 2.0
    v[..., -few:] *= 20.0
    return q.to(dtype), k.to(dtype), v.to(dtype)


INPUTS: Mapping[str, Callable[[Size, torch.dtype, str], QKV]] = {
    "random": plain_inputs,
    "outliers": outlier_inputs,
}


@dataclass(frozen=True)
class Truth:
    """The exact result in float64 for some rows of some heads."""

    rows: torch.Tensor
    heads: tuple[int, ...]
    values: torch.Tensor
    """(len(heads), len(rows), D)."""

    @classmethod
    def of(cls, qkv: QKV, seen: Callable[[int, torch.Tensor], torch.Tensor] | None, rows: int = 48) -> Truth:
        """`seen(head, rows)` gives bool (rows, S), the keys of every row; None: all of them."""
        q, k, v = qkv
        s, h, d = q.shape[1:]
        chosen = torch.linspace(0, s - 1, min(rows, s), device=q.device).long()
        heads = tuple(sorted({0, h // 2, h - 1}))
        values = []
        for head in heads:
            scores = q[0, chosen, head].double() @ k[0, :, head].double().T / d**0.5
            if seen is not None:
                scores = scores.masked_fill(~seen(head, chosen), float("-inf"))
            values.append(scores.softmax(-1) @ v[0, :, head].double())
        return cls(chosen, heads, torch.stack(values))

    def errors(self, out: torch.Tensor) -> dict[str, float]:
        """Of an output (1, S, H, D): relative L2 error, and the largest one as a share of the largest value."""
        got = torch.stack([out[0, self.rows, head].double() for head in self.heads])
        off = got - self.values
        relative = float(off.norm() / self.values.norm())
        return {"relative": relative, "max": float(off.abs().max() / self.values.abs().max())}


@dataclass
class Contender:
    """A kernel at one configuration.

    Attributes:
        build: from (1, S, H, D) tensors, the call that is timed and what turns its result into (1, S, H, D). All that
            is done once for a clip, or belongs to another kernel (arranging tokens), is done here, untimed.
        pairs: query-key pairs that it visits, all heads together.
        truth: name of the truth it is held against, `dense` or `sparse`.
        limit: relative error from which on it counts as wrong.
    """

    name: str
    build: Callable[[QKV], tuple[Callable[[], Any], Callable[[Any], torch.Tensor]]]
    pairs: float
    truth: str = "dense"
    limit: float = 2e-2
    result: dict[str, Any] = field(default_factory=dict)


class Clock:
    """The time that may be spent."""

    def __init__(self, budget: float) -> None:
        self.end = time.monotonic() + budget

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def over(self) -> bool:
        return self.left <= 0.0


class Record:
    """Everything that was measured, and what was not and why; saved after every step."""

    def __init__(self, out: Path | None, device: str, options: Mapping[str, Any]) -> None:
        self.out = out
        found = {}
        for name in PACKAGES:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        self.data: dict[str, Any] = {
            "benchmark": "attention kernels",
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            # Folders of the machine say nothing to anybody else.
            "arguments": [Path(a).name if os.sep in a else a for a in sys.argv[1:]],
            "options": dict(options),
            "environment": environment(torch.device(device)),
            "packages": found,
            "configurations": [],
            "left_out": [],
        }
        self.save()

    def add(self, configuration: dict[str, Any]) -> None:
        self.data["configurations"].append(configuration)
        self.save()

    def leave_out(self, what: str, why: str) -> None:
        self.data["left_out"].append({"what": what, "why": why})
        self.save()
        print(f"left out: {what} ({why})", flush=True)

    def save(self) -> None:
        """Write the file in one piece: a reader never sees half of it."""
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1, default=str) + "\n")
        os.replace(part, self.out)


def matmul(device: str) -> tuple[Callable[[], Any], float]:
    """A square product in bfloat16 (float32 on a processor), the roof that kernels are held against, and its FLOPs."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (768, torch.float32)
    random = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=random, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * n**3


def clear(device: str) -> None:
    """Give back what the last configuration held."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def check(
    contenders: Sequence[Contender],
    inputs: Mapping[str, QKV],
    truths: Mapping[tuple[str, str], Truth],
    clock: Clock,
    skipped: dict[str, str],
) -> list[Contender]:
    """Errors of every contender on all inputs; those that fail, are wrong, or have no time left are skipped."""
    good = []
    for contender in contenders:
        if clock.over:
            skipped[contender.name] = "the budget was spent"
            continue
        errors: dict[str, dict[str, float]] = {}
        try:
            for name, qkv in inputs.items():
                run, tokens = contender.build(qkv)
                errors[name] = truths[contender.truth, name].errors(tokens(run()))
        # Other people's kernels fail in their own ways; the reason is part of the result.
        except Exception as error:
            skipped[contender.name] = f"failed: {type(error).__name__}: {str(error).strip()[:300]}"
            continue
        contender.result["errors"] = errors
        worst = max(e["relative"] for e in errors.values())
        # Also true of what is no number.
        if not worst <= contender.limit:
            skipped[contender.name] = (
                f"wrong: relative error {worst:.2g}, at most {contender.limit:g} expected"
            )
            contender.result["wrong"] = True
            continue
        good.append(contender)
    return good


def time_all(
    contenders: Sequence[Contender],
    qkv: QKV,
    dim: int,
    device: str,
    repeats: int,
    clock: Clock,
    skipped: dict[str, str],
) -> float:
    """Times of all contenders in turns, into their `result`; returns the matmul's FLOP/s of the same rounds."""
    runs: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int | None] = {}
    for contender in contenders:
        try:
            run, _ = contender.build(qkv)
            before = 0
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            run()
            peaks[contender.name] = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
            runs[contender.name] = run
        # A kernel that gave its result once can still be out of memory beside the others' inputs.
        except Exception as error:
            skipped[contender.name] = f"failed: {type(error).__name__}: {str(error).strip()[:300]}"
    product, flops = matmul(device)
    runs["matmul"] = product
    timed(runs, device, 2, skipped, budget=max(clock.left, 1.0))
    times = timed(
        {n: r for n, r in runs.items() if n not in skipped}, device, repeats, skipped, max(clock.left, 1.0)
    )
    roof = flops / statistics.median(times["matmul"])
    for contender in contenders:
        if contender.name not in times:
            continue
        row = summary(times[contender.name])
        rate = 4.0 * dim * contender.pairs / row["seconds"]
        contender.result |= row | {
            "flops_per_second": rate,
            "roofline": rate / roof,
            "peak_bytes": peaks[contender.name],
        }
    return roof


def table(title: str, contenders: Sequence[Contender], skipped: Mapping[str, str], roof: float) -> str:
    """A configuration as text, fastest first."""
    done = sorted((c for c in contenders if "seconds" in c.result), key=lambda c: c.result["seconds"])
    dense = min((c.result["seconds"] for c in done if c.truth == "dense"), default=None)
    lines = [f"\n{title}  (matmul {roof / 1e12:.3g} TFLOP/s)"]
    head = ("", "ms", "IQR", "TFLOP/s", "roof", "dense/it", "MiB", "error", "max", "outliers", "max")
    rows: list[tuple[str, ...]] = [head]
    for c in done:
        r, e = c.result, c.result["errors"]
        peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.0f}"
        ratio = "" if dense is None else f"{dense / r['seconds']:.2f}"
        rows.append(
            (c.name, f"{r['seconds'] * 1e3:.3f}", f"{r['iqr'] * 1e3:.3f}", f"{r['flops_per_second'] / 1e12:.3g}",
             f"{r['roofline']:.0%}", ratio, peak,
             *(f"{e[n][k]:.1e}" for n in INPUTS for k in ("relative", "max")))
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells))
    lines += [f"  {name}: {why}" for name, why in skipped.items()]
    return "\n".join(lines)


def time_steps(
    steps: Mapping[str, Callable[[], Any]], device: str, repeats: int, clock: Clock, skipped: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Median and IQR in seconds of calls in turns. A call that fails goes to `skipped` with the reason."""
    timed(steps, device, 2, skipped, budget=max(clock.left, 1.0))
    times = timed(
        {n: r for n, r in steps.items() if n not in skipped}, device, repeats, skipped, max(clock.left, 1.0)
    )
    return {name: summary(t) for name, t in times.items()}


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median and IQR of seconds."""
    low, middle, high = (
        statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [*times] * 3
    )
    return {"seconds": middle, "iqr": high - low, "repeats": len(times)}
