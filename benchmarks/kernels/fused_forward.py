"""A whole transformer forward on fused 8-bit layers (`fused_linear`), against exact and beside sparse attention.

    python benchmarks/kernels/fused_forward.py --layers 4 --out fused-forward.json --budget 85
    python benchmarks/kernels/fused_forward.py --tiny --device cpu                  (the same path, in a minute)

The same transformer (published shape, random weights, fewer layers) in sessions of its own for every contender: exact;
`fused_linear` in int8 and fp8 at each `fuse`; int8 through `quantized_linear` as the rival without fusion; sparse
attention at a density, alone and with fused layers. Eagerly and, where asked for, with compiled blocks. First each is
opened and warmed up, and the transformer's output is held against the exact one; then all run in turns (CUDA events
around the transformer's forward, a call of `--steps` steps each, the first step left out). Beside the times stand the
receipt's kernels with their reasons and the peak of memory. Random weights: the figures say how fast, and that nothing
is wrong; never how good.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from harness import Clock, Record, clear, summary
from parts import techniques
from transformer import Bench, understood, words

from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.base import Technique
from vivace.techniques.compression.fused_linear import FusedLinear
from vivace.techniques.compression.quantized_linear import QuantizedLinear

KINDS, FUSE = ("int8", "fp8"), ("layers", "ffn", "block")
WRONG = 0.05
"""Relative change of the transformer's output, against the same plan with layers as they were, that means a fault."""
Contender = tuple[str, bool, tuple[Technique, ...]]
"""Name, whether blocks are compiled, techniques."""


def contenders(bench: Bench, args: argparse.Namespace) -> Iterator[Contender]:
    """In the order of their worth, as the budget may end early."""
    compiled = args.compile != "none"

    def fused(kind: str = "int8", fuse: str = "block") -> FusedLinear:
        return FusedLinear(kind=kind, fuse=fuse, keep="device")

    yield "exact", False, ()
    if compiled:
        yield "exact", True, ()
    for kind in KINDS:
        yield f"{kind} block", False, (fused(kind),)
    if compiled:
        for kind in KINDS:
            yield f"{kind} block", True, (fused(kind),)
    found = techniques(bench.grid, args.block, args.density)
    for name in args.sparse or ("vsa", "jenga"):
        sparse = found[f"{name}, {args.block}"]
        yield name, False, (sparse,)
        yield f"{name} + int8 block", False, (sparse, fused())
        if compiled and name == "vsa":
            yield name, True, (sparse,)
            yield f"{name} + int8 block", True, (sparse, fused())
    for fuse in FUSE[:-1]:
        for kind in KINDS:
            yield f"{kind} {fuse}", False, (fused(kind, fuse),)
    yield "int8 quantized_linear", False, (QuantizedLinear(keep="device"),)


def base_of(name: str) -> str:
    """The contender that a contender's numbers are held against: the same attention, layers as they were."""
    return name.split(" + ")[0] if " + " in name else "exact"


class FusedBench(Bench):
    """`Bench` with several techniques at a time. Originals stay on the device, as all contenders share them."""

    def open_plan(
        self, stack: contextlib.ExitStack, plan: tuple[Technique, ...], compiled: bool
    ) -> tuple[Any, Any]:
        """A pipeline on the shared weights and the session that calls it."""
        pipe = self.pipeline()
        backend = self.args.compile if compiled else None
        session = accelerate(pipe, Plan(plan), model=self.model, counters=compiled, compile_backend=backend)
        for module in pipe.transformer.modules():
            kernel: Any = getattr(getattr(module, "processor", None), "kernel", None)
            if compiled and hasattr(kernel, "varies"):
                kernel.varies = False  # or the counters ask for its pairs after every block, and wait
        return pipe, stack.enter_context(session)

    def compare_all(self) -> None:
        """Everything: warm up, errors, times in turns."""
        outputs: dict[str, torch.Tensor] = {}
        made: dict[str, tuple[Any, Any]] = {}
        with contextlib.ExitStack() as stack:
            for name, compiled, plan in contenders(self, self.args):
                label = f"{name} [{'compiled' if compiled else 'eager'}]"
                try:
                    if self.clock.over:
                        raise TimeoutError("the budget was spent")
                    self.warm(stack, name, label, plan, compiled, outputs, made)
                # One contender must not cost the others their turn: its error is its result.
                except Exception as error:
                    self.record.leave_out(label, f"{type(error).__name__}: {str(error).strip()[:300]}")
                clear(self.device)
            times: dict[str, list[float]] = {label: [] for label in made}
            for turn in range(self.args.rounds):
                if turn and self.clock.over:
                    break
                for label, (pipe, session) in made.items():
                    times[label] += self.run(session, pipe.transformer)
        for label in made:
            self.rows[label] |= summary(times[label])
        self.told()

    def warm(
        self, stack: contextlib.ExitStack, name: str, label: str, plan: tuple[Technique, ...], compiled: bool,
        outputs: dict[str, torch.Tensor], made: dict[str, tuple[Any, Any]],
    ) -> None:  # fmt: skip
        """Open, build kernels and graphs, and hold the output against that of the base."""
        on_gpu = self.device == "cuda"
        own = contextlib.ExitStack()
        pipe, session = self.open_plan(own, plan, compiled)
        try:
            for _ in range(2 if compiled else 1):
                self.run(session, pipe.transformer)
            before = 0
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            seen: list[Any] = []
            hook = pipe.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0]))
            out = session(num_inference_steps=1, **self.call)
            hook.remove()
            row: dict[str, Any] = {"techniques": [t.to_dict() for t in plan]}
            row["kernels"] = [f"{k.op}: {k.choice} ({k.why})" for k in out.receipt.kernels]
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before if on_gpu else None
            got = seen[0].float()
            row["finite"] = bool(torch.isfinite(got).all())
            outputs.setdefault(name, got)
            if (want := outputs.get(base_of(name))) is not None:
                row["change"] = float((got - want).norm() / want.norm())
                row["against"] = base_of(name)
                # A sparse method changes the picture of random weights by itself, and may do so as it likes.
                expected = any(isinstance(t, (FusedLinear, QuantizedLinear)) for t in plan)
                row["wrong"] = not row["finite"] or (expected and row["change"] > WRONG)
        except BaseException:
            own.close()
            raise
        stack.push(own.pop_all())
        made[label] = pipe, session
        self.rows[label] = row
        self.record.save()
        told = "WRONG" if row.get("wrong") else f"change {row.get('change', math.nan):.2e}"
        print(f"{label}: {told}", flush=True)

    def told(self) -> None:
        """The table, fastest first, over exact run the same way."""
        bases = {w: self.rows.get(f"exact [{w}]", {}).get("seconds") for w in ("eager", "compiled")}
        print(f"\n{self.grid.tokens:,} tokens, {self.record.data['layers']} layers")
        for label, row in sorted(self.rows.items(), key=lambda pair: pair[1]["seconds"]):
            for way, base in bases.items():
                if base is not None:
                    row[f"over_exact_{way}"] = base / row["seconds"]
            ratios = "  ".join(
                f"{b / row['seconds']:5.2f}x exact {w}" for w, b in bases.items() if b is not None
            )
            peak = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 2**20:6.0f} MiB"
            wrong = "  WRONG" if row.get("wrong") else ""
            print(f"  {label:34s} {row['seconds'] * 1e3:9.2f} ms  {ratios}{peak}{wrong}", flush=True)
        self.record.save()


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for; returns the record."""
    parser = words(__doc__, 85.0)
    parser.add_argument("--block", type=int, choices=(64, 128), default=64, help="block of sparse attention")
    parser.add_argument("--sparse", action="append", help="sparse methods; default: vsa and jenga")
    args = understood(parser, argv)
    record = Record(args.out, args.device, vars(args))
    bench = FusedBench(args, record, Clock(args.budget))
    record.data["benchmark"] = "fused forward"
    known = [n.split(",")[0] for n in techniques(bench.grid, args.block, args.density)]
    if unknown := [n for n in args.sparse or () if n not in known]:
        parser.error(f"no sparse method is called {unknown[0]}; there are {', '.join(known)}.")
    bench.compare_all()
    return record.data


if __name__ == "__main__":
    main()
