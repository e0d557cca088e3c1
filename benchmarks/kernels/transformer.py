"""A whole transformer forward with sparse attention against Amdahl's prediction, at real shapes with random weights.

    python benchmarks/kernels/transformer.py --shape wan1.3b --out forward.json --budget 500
    python benchmarks/kernels/transformer.py --shape wan14b --layers 4 --out forward-14b.json
    python benchmarks/kernels/transformer.py --tiny --device cpu                    (the same path, in a minute)

First every contender runs alone with its parts timed: how long attention takes in an exact forward, and in a sparse one
arranging, means, scores, selecting, attending, restoring. Its receipt must hold the pairs of the lists that its kernel
was given, and the density that was asked for. Then all run in turns (CUDA events around the transformer's forward, a
call of `--steps` steps each, the first step left out), eagerly and compiled. The prediction for a forward of T seconds
with A seconds of attention is T / (T - A + A * density); beside it the one with the sparse kernel's own time in the
place of A * density. Random weights: the figures say how fast, never how good.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from harness import Clock, Record, clear, summary
from parts import SHAPES, Parts, compare, kernel_seconds, listed_pairs, shortened, techniques, with_text

from vivace.core.env import Stopwatch
from vivace.core.shapes import TokenGrid
from vivace.models.describe import describe_pipeline
from vivace.models.families import by_class
from vivace.models.known import KNOWN
from vivace.models.random_weights import build_pipeline, embeddings
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.attention.dynamic import DynamicAttention
from vivace.techniques.base import Technique

OFF = 0.15
"""How far, relatively, a density may be from the one asked for: blocks are not all full, and lists are whole blocks."""


class Bench:
    """One shape: a transformer whose weights all contenders share, each with a pipeline and a session of its own."""

    def __init__(self, args: argparse.Namespace, record: Record, clock: Clock) -> None:
        self.args, self.record, self.clock = args, record, clock
        shape, self.device = SHAPES[args.shape], args.device
        clip, text = (shape.frames, shape.height, shape.width), shape.text
        changes: dict[str, Any] = {}
        if args.tiny:
            changes, clip, text = dict(shape.tiny), (33, 128, 128), 16
        known = KNOWN[shape.model]
        adapter = by_class(known.transformer_class)
        assert adapter is not None  # every known model has one
        depth = {key: known.transformer[key] for key in adapter.depth_keys.values()}
        layers = args.layers or (3 if args.tiny else sum(depth.values()))
        changes |= shortened(depth, layers)
        self.base = build_pipeline(shape.model, device=args.device, **changes)
        self.model = describe_pipeline(self.base)
        workload = self.model.workload(frames=clip[0], height=clip[1], width=clip[2]).with_(text=text)
        grid = self.model.grid(workload)
        assert grid is not None
        self.grid: TokenGrid = grid
        self.call = dict(zip(("num_frames", "height", "width"), clip, strict=True))
        self.call |= embeddings(self.base, 1, text) | {
            "output_type": "latent",
            adapter.guidance_argument: 1.0,
        }
        expert = adapter.expert("transformer", self.base.transformer)
        own = [site for site in expert.attentions if site.kind in ("self", "joint")]
        self.sites, self.heads = len(own), own[0].heads
        self.dense = float(self.heads) * grid.tokens**2 * self.sites
        record.data |= {
            "benchmark": "transformer forward",
            "shape": vars(shape) | {"tiny": args.tiny, "grid": str(grid), "tokens": grid.tokens},
            "layers": layers,
            "layers_of_the_model": sum(depth.values()),
            "weights": "random",
            "contenders": {},
        }
        self.rows: dict[str, dict[str, Any]] = record.data["contenders"]

    def pipeline(self) -> Any:
        """A pipeline of its own on the same weights."""
        old = self.base.transformer
        memo: dict[int, Any] = {id(x): x for x in (*old.parameters(), *old.buffers())}
        parts = self.base.components
        scheduler = type(self.base.scheduler).from_config(self.base.scheduler.config)
        new = type(self.base)(**{**parts, "transformer": copy.deepcopy(old, memo), "scheduler": scheduler})
        new.set_progress_bar_config(disable=True)
        return new

    def run(self, runner: Any, transformer: Any) -> list[float]:
        """Seconds of every forward but the first of one call; at least one."""
        watch, marks = Stopwatch(torch.device(self.device)), []
        hooks = [
            transformer.register_forward_pre_hook(lambda *a: marks.append(watch.mark())),
            transformer.register_forward_hook(lambda *a: marks.append(watch.mark())),
        ]
        try:
            runner(num_inference_steps=self.args.steps, **self.call)
        finally:
            for hook in hooks:
                hook.remove()
        spans = [watch.seconds(a, b) for a, b in zip(marks[::2], marks[1::2], strict=True)]
        return spans[1:] or spans

    def alone(self, name: str, technique: Any) -> None:
        """A contender's parts and receipt, eagerly; `technique` is None or diffusers' backend when exact."""
        parts, exact = Parts(self.device), not isinstance(technique, Technique)
        with contextlib.ExitStack() as stack:
            pipe, session = self.opened(stack, technique, counted=True)
            self.run(session, pipe.transformer)
            with parts.in_force(pipe.transformer, self.grid.tokens):
                forward = self.run(session, pipe.transformer)
            receipt = session.receipt()
        steps = receipt.nfe
        elsewhere = receipt.attention_pairs_dense - self.dense * steps
        pairs = (receipt.attention_pairs - elsewhere) / steps
        row = {"parts": parts.seconds(steps), "forward_with_marks": statistics.median(forward)}
        row |= {"density": pairs / self.dense, "kernels": [f"{k.op}: {k.choice}" for k in receipt.kernels]}
        if exact:
            row["agrees"] = abs(row["density"] - 1.0) < 1e-6
        else:
            plain = replace(self.grid, text=0)
            dynamic = isinstance(technique, DynamicAttention)
            asked = self.args.density if dynamic else technique.block_map(plain).density
            if dynamic:
                own, slots = (x / steps for x in listed_pairs(parts.lists))
                row["density_with_padding"] = slots / self.dense
            else:
                own = technique.block_map(self.grid).pairs(1, self.heads) * self.sites
            row["pairs_of_lists"] = own
            row["asked"] = with_text(asked, self.grid.video, self.grid.text)
            same = math.isclose(own, pairs, rel_tol=1e-6)
            row["agrees"] = same and math.isclose(row["density"], row["asked"], rel_tol=self.args.off)
            row["technique"] = technique.to_dict()
        self.rows[name] = row
        self.record.save()
        spent = ", ".join(f"{k} {v * 1e3:.3f}" for k, v in row["parts"].items())
        told = "agrees" if row["agrees"] else "DOES NOT AGREE"
        print(f"{name}: density {row['density']:.4f}, receipt {told}; ms of a forward: {spent}", flush=True)

    def opened(
        self,
        stack: contextlib.ExitStack,
        technique: Any,
        *,
        counted: bool,
        compiled: bool = False,
        asked: bool = True,
    ) -> tuple[Any, Any]:
        """A pipeline on the shared weights and what calls it; `asked`: compiled sites are asked for their pairs."""
        pipe = self.pipeline()
        if isinstance(technique, str):
            # `set_attention_backend` would set it for every other contender as well.
            for module in pipe.transformer.modules():
                if hasattr(processor := getattr(module, "processor", None), "_attention_backend"):
                    processor._attention_backend = AttentionBackendName(technique)  # type: ignore[union-attr]
        if not counted and not compiled and not isinstance(technique, Technique):
            return pipe, lambda **call: pipe(generator=torch.Generator().manual_seed(0), **call)
        plan = Plan([technique] if isinstance(technique, Technique) else [])
        backend = self.args.compile if compiled else None
        session = accelerate(pipe, plan, model=self.model, counters=counted, compile_backend=backend)
        if not asked:
            for module in pipe.transformer.modules():
                kernel: Any = getattr(getattr(module, "processor", None), "kernel", None)
                if hasattr(kernel, "varies"):
                    kernel.varies = False
        return pipe, stack.enter_context(session)

    def turns(self, contenders: Mapping[str, Any], compiled: list[str]) -> None:
        """All contenders in turns; medians into their rows."""
        made: dict[str, tuple[str, str, Any, Any]] = {}
        with contextlib.ExitStack() as stack:
            for name, technique in contenders.items():
                exact = not isinstance(technique, Technique)
                ways: dict[str, dict[str, bool]] = {"eager": {"counted": False}}
                if self.args.compile != "none" and (exact or name in compiled):
                    ways["compiled"] = {"counted": True, "compiled": True, "asked": False}
                    if not exact:
                        ways["eager, counted"] = {"counted": True}
                        ways["compiled, counted"] = {"counted": True, "compiled": True}
                for way, options in ways.items():
                    label = f"{name} [{way}]"
                    try:
                        if self.clock.over:
                            raise TimeoutError("the budget was spent")
                        pipe, runner = self.opened(stack, technique, **options)
                        for _ in range(2 if "compiled" in options else 1):  # kernels and graphs are built
                            self.run(runner, pipe.transformer)
                        made[label] = name, way, pipe, runner
                    # One contender must not cost the others their turn: its error is its result.
                    except Exception as error:
                        self.record.leave_out(label, f"{type(error).__name__}: {str(error).strip()[:300]}")
            times: dict[str, list[float]] = {label: [] for label in made}
            for turn in range(self.args.rounds):
                if turn and self.clock.over:
                    break
                for label, (_, _, pipe, runner) in made.items():
                    times[label] += self.run(runner, pipe.transformer)
        for label, (name, way, _, _) in made.items():
            self.rows[name].setdefault("times", {})[way] = summary(times[label])
        self.compared()

    def compared(self) -> None:
        """Measured against predicted speed-up of every sparse contender, over each exact one run the same way."""
        exact = {n: r for n, r in self.rows.items() if n.startswith("exact")}
        for name, row in self.rows.items():
            for way, took in row.get("times", {}).items() if name not in exact else ():
                for base, dense in exact.items():
                    total = dense.get("times", {}).get(way.removesuffix(", counted"), {}).get("seconds")
                    if total is None:
                        continue
                    found = compare(
                        total,
                        dense["parts"]["attend"],
                        row["density"],
                        kernel_seconds(row["parts"]),
                        took["seconds"],
                    )
                    row.setdefault("against", {})[f"{way}, {base}"] = found
                    print(
                        f"{name} [{way}] against {base}: {total * 1e3:.2f} -> {took['seconds'] * 1e3:.2f} ms, "
                        f"{found['speedup']:.3f}x, Amdahl {found['ideal']:.3f}x (reached {found['of_ideal']:.1%}), "
                        f"with the kernel's time {found['with_kernel']:.3f}x ({found['of_kernel']:.1%})",
                        flush=True,
                    )
        self.record.save()


def words(doc: str | None, budget: float) -> argparse.ArgumentParser:
    """The command line that benchmarks of whole forwards share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="wan1.3b")
    parser.add_argument("--layers", type=int, help="depth of the transformer; all layers by default")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=3, help="forwards of a call")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--compile", help="torch.compile backend, or none; default: inductor, eager on a processor"
    )
    parser.add_argument(
        "--budget", type=float, default=budget, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="a small clip and narrow layers, to try the script"
    )
    parser.add_argument("--out", type=Path)
    return parser


def understood(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with what cannot be refused in a sentence; compiling is made ready."""
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny --device cpu tries the script without one.")
    if min(args.steps, args.rounds, args.layers or 1) < 1 or not 0.0 < args.density < 1.0:
        parser.error("--steps, --rounds and --layers must be at least 1, and --density between 0 and 1.")
    args.compile = args.compile or ("inductor" if args.device == "cuda" else "eager")
    # Every contender compiles the same blocks for itself.
    torch._dynamo.config.recompile_limit = 512
    torch._dynamo.config.accumulated_recompile_limit = 4096
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for; returns the record."""
    parser = words(__doc__, math.inf)
    parser.add_argument(
        "--off", type=float, default=OFF, help="relative error allowed of a receipt's density"
    )
    parser.add_argument("--block", type=int, action="append", choices=(64, 128), help="default: both")
    parser.add_argument("--only", action="append", help="sparse contenders whose name begins so")
    parser.add_argument(
        "--compiled", action="append", help="sparse contenders that are also compiled; default: vsa"
    )
    args = understood(parser, argv)
    record = Record(args.out, args.device, vars(args))
    bench = Bench(args, record, Clock(args.budget))
    contenders: dict[str, Any] = {"exact, default": None, "exact, cudnn": "_native_cudnn"}
    for block in args.block or (64, 128):
        found = techniques(bench.grid, block, args.density)
        contenders |= {n: t for n, t in found.items() if n.startswith(tuple(args.only or [""]))}
    if len(contenders) == 2:
        parser.error(f"no sparse contender's name begins with {' or '.join(args.only)} at this shape.")
    for name, technique in dict(contenders).items():
        try:
            if bench.clock.over:
                raise TimeoutError("the budget was spent")
            bench.alone(name, technique)
        # A vendor's kernel or one of ours may fail in any way; the reason is part of the result.
        except Exception as error:
            record.leave_out(name, f"{type(error).__name__}: {str(error).strip()[:300]}")
            bench.rows.pop(name, None)
            del contenders[name]
        clear(args.device)
    chosen = tuple(args.compiled or ["vsa,"])
    bench.turns(contenders, [n for n in contenders if n.startswith(chosen)])
    return record.data


if __name__ == "__main__":
    main()
