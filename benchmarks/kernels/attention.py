"""Attention kernels against each other on one device: block-sparse, dense and 8-bit, and what choosing blocks costs.

    python benchmarks/kernels/attention.py --sparse --dense --routing --out attention.json --budget 500
    python benchmarks/kernels/attention.py --sparse --dense --routing --device cpu        (toy sizes)
    python benchmarks/kernels/attention.py --sparse --dense --routing --interpret         (Triton's interpreter, tiny)

Every configuration first holds all contenders against float64 on some rows, with independent random numbers and with
tensors that have outliers as real ones do; what is wrong is not timed. Then all are timed in turns on the same inputs
(CUDA events), beside a bfloat16 matmul of the same rounds: FLOP/s are of the pairs that are really visited, `roof` is
their share of the matmul's. What cannot run, or finds no time left, stands in the record with the reason. Kernels of
`vivace.kernels` are found by operation, so a new one takes part without a change here.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    INPUTS,
    QKV,
    Clock,
    Contender,
    Record,
    Size,
    Truth,
    check,
    clear,
    fastvideo_operations,
    table,
    time_all,
    time_steps,
)

from vivace.kernels.api import Candidate, candidates
from vivace.kernels.block_attention.layout import Layout
from vivace.kernels.block_attention.spec import Routes

SIZES = {
    s.name: s
    for s in (
        Size("wan1.3b", 32_760, 12, 128),
        Size("wan14b", 75_600, 40, 128),
        Size("hunyuan", 118_800, 24, 128, text=256),
        Size("toy", 500, 2, 32, text=40),
        Size("tiny", 120, 2, 32),
    )
}
LARGE = ("wan1.3b", "wan14b", "hunyuan")
NOT_TIMED = {"reference": "for reading and for tests, not for speed"}
ROUNDS = 0.1
"""Relative error that a kernel in 8 bits may have on these inputs; exact ones: `Contender.limit`."""
FASTVIDEO_BLOCK = 64
REFERENCES = ("cudnn", "flash")
"""Dense vendors that stand beside the sparse kernels."""

Built = tuple[Callable[[], Any], Callable[[Any], torch.Tensor]]


@dataclass
class Setup:
    """Where and at what size things are measured."""

    size: Size
    device: str
    dtype: torch.dtype

    def context(self, **more: Any) -> dict[str, Any]:
        """What the candidates judge by."""
        name = str(self.dtype).removeprefix("torch.")
        return {"device": self.device, "dtype": name, "head_dim": self.size.dim, "mask": False, **more}

    @property
    def all_pairs(self) -> float:
        return float(self.size.heads) * self.size.tokens**2

    @cached_property
    def inputs(self) -> dict[str, QKV]:
        return {name: make(self.size, self.dtype, self.device) for name, make in INPUTS.items()}


class Mask:
    """Tokens in blocks in their own order, and random lists of video blocks for every head; text sees and is seen."""

    def __init__(self, size: Size, block: int, density: float, device: str) -> None:
        video, text = (-(-n // block) for n in (size.video, size.text))
        slots = np.full((video + text) * block, -1, dtype=np.int64)
        slots[: size.video] = np.arange(size.video)
        slots[video * block :][: size.text] = np.arange(size.video, size.tokens)
        self.layout = Layout(slots.reshape(-1, block), text, device)
        kept = min(video, max(1, round(density * video)))
        random = torch.Generator(device).manual_seed(2)
        draw = torch.rand(size.heads, video, video, generator=random, device=device)
        draw.diagonal(dim1=1, dim2=2).fill_(2.0)
        keep = torch.ones(size.heads, video + text, video + text, dtype=torch.bool, device=device)
        keep[:, :video, :video] = False
        keep[:, :video, :video].scatter_(2, draw.topk(kept, dim=2).indices, True)
        self.keep, self.block = keep, block
        self.routes = Routes.of_mask(keep[None], self.layout.sizes, block)
        self.pairs = self.routes.pairs(self.layout.counts, 1, size.heads)
        self.density = kept / video

    def seen(self, head: int, rows: torch.Tensor) -> torch.Tensor:
        """Keys that rows of a head see, bool (rows, S)."""
        block_of = self.layout.back // self.block
        return self.keep[head][block_of[rows]][:, block_of]


# -- contenders -----------------------------------------------------------------------------------------------------


def fitting(
    op: str, context: dict[str, Any], skipped: dict[str, str], *, named: bool = False, prefix: str = ""
) -> Iterator[Candidate]:
    """Candidates of an operation that can run; `named` also takes those that are used only when asked for."""
    if importlib.util.find_spec(f"vivace.kernels.{op}") is None:
        skipped[prefix or op] = f"vivace.kernels has no operation {op}"
        return
    for candidate in candidates(op):
        reason = NOT_TIMED.get(candidate.name) or candidate.refuse(context)
        if reason or (not named and (reason := candidate.avoid(context))):
            skipped[f"{prefix}{candidate.name}"] = str(reason)
        else:
            yield candidate


def ours(setup: Setup, mask: Mask, skipped: dict[str, str]) -> Iterator[Contender]:
    """Kernels of `block_attention`, and of `low_bit_attention` over the same lists, its rounding timed with it."""
    for op, prefix, modes, limit in (
        ("block_attention", "", {}, 2e-2),
        ("low_bit_attention", "int8 fp8 ", {"pv": "fp8"}, ROUNDS),
        ("low_bit_attention", "int8 bf16 ", {"pv": "bf16"}, ROUNDS),
    ):
        for candidate in fitting(
            op, setup.context(block=mask.block, **modes), skipped, named=setup.device == "cuda", prefix=prefix
        ):
            if candidate.name == "gather" and setup.device == "cuda":
                skipped[candidate.name] = "copies every list's keys: for processors"
                continue

            def build(
                qkv: QKV, load: Callable[..., Any] = candidate.load, modes: dict[str, Any] = modes
            ) -> Built:
                run, (q, k, v) = load(), (mask.layout.arrange(x) for x in qkv)
                return lambda: run(q, k, v, mask.routes, **modes), lambda out: mask.layout.restore(out[0])

            yield Contender(prefix + candidate.name, build, mask.pairs, "sparse", limit)


@functools.cache
def compiled_flex(
    size: Size, block: int, device: str
) -> tuple[Callable[..., Any], Callable[..., torch.Tensor]]:
    """Compiled flex_attention and what masks the padding; the same objects at every density, so compiled once."""
    from torch.nn.attention.flex_attention import flex_attention

    layout = Mask(size, block, 0.0, device).layout
    real = torch.zeros(layout.blocks * block, dtype=torch.bool, device=device)
    real[layout.back] = True

    def not_padding(b: Any, h: Any, q: Any, kv: torch.Tensor) -> torch.Tensor:
        return real[kv]

    # Every size and block is compiled for itself, and only so many are kept.
    torch._dynamo.reset()
    return torch.compile(flex_attention, fullgraph=True, dynamic=False), not_padding


def flex(setup: Setup, mask: Mask, skipped: dict[str, str]) -> Iterator[Contender]:
    """Compiled flex_attention with the very lists as its block mask; padding is masked inside the partial blocks."""
    if setup.device != "cuda":
        skipped["flex_attention"] = "compiles for long on a processor: needs a GPU here"
        return
    from torch.nn.attention.flex_attention import BlockMask

    compiled, not_padding = compiled_flex(setup.size, mask.block, str(mask.keep.device))
    full = (mask.layout.counts == mask.block)[None, None]
    lists = [Routes.of_mask((mask.keep & part)[None], None, mask.block) for part in (~full, full)]
    counted = [x for part in lists for x in (part.count, part.index)]
    block_mask = BlockMask.from_kv_blocks(*counted, BLOCK_SIZE=mask.block, mask_mod=not_padding)
    # Its own tiles are larger than blocks of 64, and it refuses a mask that is finer than they are.
    options: Any = {"BLOCK_M": 64, "BLOCK_N": 64} if mask.block < 128 else None

    def build(qkv: QKV) -> Built:
        q, k, v = (mask.layout.arrange(x) for x in qkv)
        return (
            lambda: compiled(q, k, v, block_mask=block_mask, kernel_options=options),
            mask.layout.restore,
        )

    yield Contender("flex_attention", build, mask.pairs, "sparse")


def fastvideo(setup: Setup, mask: Mask, skipped: dict[str, str]) -> Iterator[Contender]:
    """fastvideo-kernel's block-sparse attention over the same lists: ThunderKittens, and Triton, its other way."""
    names = {"fastvideo ThunderKittens": "sm90", "fastvideo Triton": "triton"}
    wrong = {
        "fastvideo-kernel is not installed": importlib.util.find_spec("fastvideo_kernel") is None,
        "needs a GPU": setup.device != "cuda",
        f"its blocks have {FASTVIDEO_BLOCK} tokens, not {mask.block}": mask.block != FASTVIDEO_BLOCK,
        f"it takes heads of 64 or 128 dimensions, not {setup.size.dim}": setup.size.dim not in (64, 128),
    }
    reason = next((sentence for sentence, holds in wrong.items() if holds), None)
    for name, way in names.items():
        missing = reason or (fastvideo_operations()[1] if way == "sm90" else "")
        if missing:
            skipped[name] = missing
            continue

        def build(qkv: QKV, way: str = way) -> Built:
            from fastvideo_kernel import block_sparse_attn as package  # pyright: ignore[reportMissingImports]

            module = sys.modules[package.__module__]
            run = getattr(module, f"block_sparse_attn_{way}")
            q, k, v = (mask.layout.arrange(x).contiguous() for x in qkv)
            longest = int(mask.routes.count.max())
            index, count = mask.routes.index[..., :longest].contiguous(), mask.routes.count
            sizes = mask.layout.counts.int()
            return lambda: run(q, k, v, index, count, sizes)[0], mask.layout.restore

        yield Contender(name, build, mask.pairs, "sparse")


def dense(setup: Setup, skipped: dict[str, str], names: tuple[str, ...] | None = None) -> Iterator[Contender]:
    """Vendors of `dense_attention`; all of them, also those that round, or the named ones."""
    context = setup.context(scores=int(setup.all_pairs))
    for candidate in fitting("dense_attention", context, skipped, named=True):
        if names is not None and candidate.name not in names:
            continue
        if candidate.name in ("math", "flex") and (reason := candidate.avoid(context)):
            skipped[candidate.name] = reason
            continue

        def build(qkv: QKV, load: Callable[..., Any] = candidate.load) -> Built:
            run = load()
            return lambda: run(*qkv), lambda out: out

        limit = ROUNDS if candidate.name == "sage" else 2e-2
        yield Contender(candidate.name, build, setup.all_pairs, "dense", limit)


def low_bit(setup: Setup, skipped: dict[str, str]) -> Iterator[Contender]:
    """Our 8-bit kernels over all pairs, in each mode."""
    for qk, pv, block in (
        ("int8", "fp8", 64),
        ("int8", "fp8", 128),
        ("int8", "bf16", 64),
        ("int8", "bf16", 128),
    ):
        prefix, modes = f"{qk} {pv} {block} ", {"qk": qk, "pv": pv, "block": block}
        for candidate in fitting("low_bit_attention", setup.context(**modes), skipped, prefix=prefix):

            def build(
                qkv: QKV, load: Callable[..., Any] = candidate.load, modes: dict[str, Any] = modes
            ) -> Built:
                run, (q, k, v) = load(), (x.transpose(1, 2) for x in qkv)
                return lambda: run(q, k, v, **modes), lambda out: out[0].transpose(1, 2)

            yield Contender(prefix + candidate.name, build, setup.all_pairs, "dense", ROUNDS)


# -- sections -------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The run: what was asked for, the time, and the record."""

    record: Record
    clock: Clock
    device: str
    repeats: int

    def measure(
        self, title: str, setup: Setup, found: list[Contender], skipped: dict[str, str], mask: Mask | None
    ) -> None:
        """Check, time, print and record one configuration."""
        truths = {("dense", name): Truth.of(qkv, None) for name, qkv in setup.inputs.items()}
        if mask is not None:
            truths |= {("sparse", n): Truth.of(qkv, mask.seen) for n, qkv in setup.inputs.items()}
        good = check(found, setup.inputs, truths, self.clock, skipped)
        clear(self.device)
        roof = time_all(
            good, setup.inputs["random"], setup.size.dim, self.device, self.repeats, self.clock, skipped
        )
        print(table(title, found, skipped, roof), flush=True)
        self.record.add(
            {
                "section": "dense" if mask is None else "sparse",
                "size": {k: getattr(setup.size, k) for k in ("name", "video", "text", "heads", "dim")},
                "dtype": str(setup.dtype),
                "block": None if mask is None else mask.block,
                "density": 1.0 if mask is None else mask.density,
                "pairs": setup.all_pairs if mask is None else mask.pairs,
                "matmul_flops_per_second": roof,
                "contenders": {c.name: c.result for c in found},
                "skipped": skipped,
            }
        )
        clear(self.device)

    def sparse(self, setup: Setup, block: int, density: float) -> None:
        """Block-sparse kernels at one density, with dense ones beside them."""
        mask = Mask(setup.size, block, density, self.device)
        skipped: dict[str, str] = {}
        beside: dict[str, str] = {}
        found = [
            *ours(setup, mask, skipped),
            *flex(setup, mask, skipped),
            *fastvideo(setup, mask, skipped),
            *dense(setup, beside, REFERENCES),
        ]
        skipped |= {name: why for name, why in beside.items() if name in REFERENCES}
        self.measure(
            f"sparse {setup.size}, blocks of {block}, {mask.density:.1%}", setup, found, skipped, mask
        )

    def dense(self, setup: Setup) -> None:
        """Everybody over all pairs."""
        skipped: dict[str, str] = {}
        found = [*dense(setup, skipped), *low_bit(setup, skipped)]
        self.measure(f"dense {setup.size}", setup, found, skipped, None)

    def routing(self, setup: Setup, block: int, density: float) -> None:
        """What choosing the blocks costs beside attending to them: arranging, means, scores, selecting, restoring."""
        mask = Mask(setup.size, block, density, self.device)
        layout, size = mask.layout, setup.size
        video, scale = layout.video_blocks, size.dim**-0.5
        top = min(video, max(1, math.ceil(density * video - 1e-9)))
        q, k, v = setup.inputs["random"]
        qa, ka, va = (layout.arrange(x) for x in (q, k, v))

        def means() -> tuple[torch.Tensor, torch.Tensor]:
            return layout.mean(qa), layout.mean(ka)

        mq, mk = (m[:, :, :video] for m in means())
        scores = mq @ mk.transpose(-1, -2) * scale
        skipped: dict[str, str] = {}
        steps: dict[str, Callable[[], Any]] = {
            "arrange q, k, v": lambda: [layout.arrange(x) for x in (q, k, v)],
            "arrange q, k, v, with means": lambda: [
                layout.arrange_pooled(q),
                layout.arrange_pooled(k),
                layout.arrange(v),
            ],
            "means of q, k alone": means,
            "scores of means": lambda: mq @ mk.transpose(-1, -2) * scale,
            "torch.topk": lambda: torch.topk(scores, top, dim=-1),
            "torch.topk, in rising order": lambda: torch.topk(scores, top, dim=-1).indices.sort(-1),
            "restore": lambda: layout.restore(qa),
        }
        for candidate in candidates("block_select"):
            # Here the reference is what a plain torch implementation costs.
            if reason := candidate.refuse(setup.context(blocks=layout.blocks)):
                skipped[f"block_select {candidate.name}"] = reason
                continue
            run, text = candidate.load(), layout.text_blocks
            steps[f"block_select {candidate.name}, top"] = lambda run=run, text=text: run(
                scores, top, text=text
            )
            steps[f"block_select {candidate.name}, mass 0.9"] = lambda run=run, text=text: run(
                scores, 1, 0.9, text=text
            )
        for candidate in fitting("block_attention", setup.context(block=block), skipped):
            if candidate.name != "gather" or self.device == "cpu":
                run = candidate.load()
                steps[f"attend: {candidate.name}"] = lambda run=run: run(qa, ka, va, mask.routes)
        rows = time_steps(steps, self.device, self.repeats, self.clock, skipped)
        attend = min((r["seconds"] for n, r in rows.items() if n.startswith("attend: ")), default=None)
        print(f"\nrouting {size}, blocks of {block}, {mask.density:.1%}")
        for name, row in rows.items():
            row["share_of_attending"] = None if attend is None else row["seconds"] / attend
            beside = "" if attend is None else f"{row['seconds'] / attend:8.1%} of attending"
            print(f"  {name:34s} {row['seconds'] * 1e3:10.3f} ms  {beside}", flush=True)
        for name, why in skipped.items():
            print(f"  {name}: {why}")
        self.record.add(
            {
                "section": "routing",
                "size": {n: getattr(size, n) for n in ("name", "video", "text", "heads", "dim")},
                "dtype": str(setup.dtype),
                "block": block,
                "density": mask.density,
                "top": top,
                "steps": rows,
                "skipped": skipped,
            }
        )
        clear(self.device)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for section in ("sparse", "dense", "routing"):
        parser.add_argument(
            f"--{section}", action="store_true", help=f"run the {section} section (default: all)"
        )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument(
        "--interpret", action="store_true", help="run Triton kernels in its interpreter, on the CPU"
    )
    parser.add_argument(
        "--size", action="append", choices=list(SIZES), help="default: the three large ones, or toy"
    )
    parser.add_argument(
        "--block", action="append", type=int, help="default: 64 and 128; 16 and 32 at toy sizes"
    )
    parser.add_argument("--density", action="append", type=float, help="default: 0.05, 0.1, 0.2, 0.5")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()

    if asked.interpret:
        from vivace.testing.interpreter import interpret

        if reason := interpret():
            parser.error(reason)
    device = asked.device or ("cuda" if torch.cuda.is_available() and not asked.interpret else "cpu")
    small = device == "cpu"
    sizes = asked.size or (["tiny"] if asked.interpret else ["toy"] if small else list(LARGE))
    blocks = asked.block or ([16] if asked.interpret else [16, 32] if small else [64, 128])
    densities = asked.density or ([0.2] if asked.interpret else [0.05, 0.1, 0.2, 0.5])
    every = not (asked.sparse or asked.dense or asked.routing)
    record = Record(asked.out, device, {"sizes": sizes, "blocks": blocks, "densities": densities})
    bench = Bench(record, Clock(asked.budget), device, asked.repeats)

    for name in sizes:
        setup = Setup(SIZES[name], device, torch.float32 if small else torch.bfloat16)
        work: list[tuple[str, Callable[[], None]]] = []
        if asked.dense or every:
            work.append((f"dense {name}", lambda s=setup: bench.dense(s)))
        for block in blocks:
            for density in densities:
                where = f"{name}, blocks of {block}, {density:.0%}"
                if asked.sparse or every:
                    work.append(
                        (f"sparse {where}", lambda s=setup, b=block, d=density: bench.sparse(s, b, d))
                    )
                if asked.routing or every:
                    work.append(
                        (f"routing {where}", lambda s=setup, b=block, d=density: bench.routing(s, b, d))
                    )
        for what, run in work:
            if bench.clock.over:
                record.leave_out(what, "the budget was spent")
                continue
            try:
                run()
            # One configuration must not cost the others their turn: its error is its result.
            except (RuntimeError, ValueError) as error:
                record.leave_out(what, f"failed: {type(error).__name__}: {str(error).strip()[:300]}")
                clear(device)
        del setup, work
    if asked.out is not None:
        print(f"\nwritten to {asked.out}")


if __name__ == "__main__":
    main()
