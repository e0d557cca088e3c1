"""8-bit linear layers with what stands around them, against bf16: one by one, and all of a Wan block together.

    python benchmarks/kernels/linears.py --shape wan1.3b --out linears.json --budget 200
    python benchmarks/kernels/linears.py --shape toy --device cpu

Single layers: cuBLAS bf16, then for INT8 and FP8 every backend of `vivace.kernels.scaled_matmul` on codes that are
there already (`matmul`) and with rounding the activations (`quantise_rows`), and fastvideo-kernel's INT8 linear (that
of TurboDiffusion: one scale to 128 x 128 numbers) where it is installed.

Block: everything of a Wan transformer block but attention itself, which stands in as tensors that were there before:
norm and modulation, q, k, v, output and gated residual; norm, query, text's key and value, output and residual; norm
and modulation, feed-forward with GELU, gated residual. bf16 as diffusers writes it, eager and compiled; 8 bits with
norm, modulation and GELU in the rounding pass and bias, gate and residual in the product's.

On a GPU the block also runs as CUDA graphs, all contenders alike: starting fourteen kernels from Python can take longer
than they do.

Everything is row by row, so some rows are held against float64 first (relative error; weights and activations random,
with outlier channels); what is wrong is not timed. Then all run in turns (CUDA events). Random weights: speed, not
quality.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Clock, Record, fastvideo_operations, graphed, summary

from vivace.kernels.api import candidates, timed
from vivace.kernels.quantise_rows.reference import prepared
from vivace.kernels.quantise_rows.spec import Before
from vivace.kernels.scaled_matmul.spec import OP, After


@dataclass(frozen=True)
class Shape:
    """Tokens, width, feed-forward width and text tokens of a transformer."""

    tokens: int
    width: int
    inner: int
    text: int


SHAPES = {
    "wan1.3b": Shape(32_760, 1536, 8960, 512),
    "wan14b": Shape(75_600, 5120, 13_824, 512),
    "toy": Shape(96, 64, 160, 16),
}
LIMIT = {"bf16": 2e-2, "int8": 5e-2, "fp8": 8e-2}
"""Relative error allowed of a layer; a block's, where errors of layers meet the residual, is the same."""
ROWS = 64
"""Rows that are held against float64."""
T = torch.Tensor
Linear = tuple[T, T]


def draw(generator: torch.Generator, *shape: int, device: str, outliers: bool = False) -> T:
    x = torch.randn(shape, generator=generator, device=device)
    if outliers:
        x[..., :: max(1, shape[-1] // 8)] *= 8.0
    return x.to(torch.bfloat16 if device == "cuda" else torch.float32)


class Block:
    """Weights and inputs of one block, and its ways of being computed."""

    def __init__(self, shape: Shape, device: str) -> None:
        make = torch.Generator(device).manual_seed(0)
        d, inner = shape.width, shape.inner
        new = functools.partial(draw, make, device=device)

        def linear(out: int, into: int) -> Linear:
            return new(out, into) / into**0.5, new(out) * 0.1

        self.qkv, self.out = linear(3 * d, d), linear(d, d)
        self.cross_q, self.cross_kv, self.cross_out = linear(d, d), linear(2 * d, d), linear(d, d)
        self.up, self.down = linear(inner, d), linear(d, inner)
        self.affine = new(d) * 0.1 + 1.0, new(d) * 0.1
        self.modulation = [0.3 * new(1, 1, d).float() for _ in range(6)]
        self.x, self.text = new(1, shape.tokens, d, outliers=True), new(1, shape.text, d)
        self.attended, self.crossed = new(1, shape.tokens, d), new(1, shape.tokens, d)
        self.linears = {
            n: getattr(self, n) for n in ("qkv", "out", "cross_q", "cross_kv", "cross_out", "up", "down")
        }

    def exact(self, rows: slice, dtype: torch.dtype = torch.float64) -> T:
        """The block's last hidden state at some rows."""
        x, attended, crossed = (t[:, rows].to(dtype) for t in (self.x, self.attended, self.crossed))
        w = {n: (a.to(dtype), b.to(dtype)) for n, (a, b) in self.linears.items()}
        _, _, gate, scale, shift, last = (m.to(dtype) for m in self.modulation)
        x = x + gate * F.linear(attended, *w["out"])
        x = x + F.linear(crossed, *w["cross_out"])
        y = prepared(x, Before("layer", 1e-6, scale=scale, shift=shift), dtype)
        return x + last * F.linear(F.gelu(F.linear(y, *w["up"]), approximate="tanh"), *w["down"])

    def plain(self) -> tuple[T, ...]:
        """As diffusers' WanTransformerBlock does it."""
        d, kind = (self.x.shape[-1],), self.x.dtype
        scale, shift, gate, more, up, last = self.modulation
        y = (F.layer_norm(self.x.float(), d, eps=1e-6) * (1 + scale) + shift).type_as(self.x)
        qkv = F.linear(y, *self.qkv)
        x = (self.x.float() + F.linear(self.attended, *self.out) * gate).type_as(self.x)
        y = F.layer_norm(x.float(), d, self.affine[0].float(), self.affine[1].float(), 1e-6).type_as(x)
        q, kv = F.linear(y, *self.cross_q), F.linear(self.text, *self.cross_kv)
        x = x + F.linear(self.crossed, *self.cross_out)
        y = (F.layer_norm(x.float(), d, eps=1e-6) * (1 + more) + up).type_as(x)
        y = F.linear(F.gelu(F.linear(y, *self.up), approximate="tanh"), *self.down)
        return (x.float() + y.float() * last).to(kind), qkv, q, kv

    def fused(
        self, kind: str, rows: Callable[..., Any], product: Callable[..., T]
    ) -> Callable[[], tuple[T, ...]]:
        """In 8 bits: weights are rounded beforehand, activations when they come."""
        w = {n: (*(t[0] for t in rows(a[None], kind)), b) for n, (a, b) in self.linears.items()}
        scale, shift, gate, more, up, last = self.modulation
        dtype = self.x.dtype

        def linear(name: str, x: T, before: Before, after: After) -> T:
            codes, own = rows(x, kind, before)
            return product(codes[0], own[0], *w[name][:2], w[name][2], after, dtype)[None]

        def run() -> tuple[T, ...]:
            qkv = linear("qkv", self.x, Before("layer", 1e-6, scale=scale, shift=shift), After())
            x = linear("out", self.attended, Before(), After(residual=self.x[0], gate=gate[0]))
            q = linear("cross_q", x, Before("layer", 1e-6, *self.affine), After())
            kv = linear("cross_kv", self.text, Before(), After())
            x = linear("cross_out", self.crossed, Before(), After(residual=x[0]))
            y = linear("up", x, Before("layer", 1e-6, scale=more, shift=up), After())
            return linear("down", y, Before(gelu=True), After(residual=x[0], gate=last[0])), qkv, q, kv

        return run


def relative(got: T, want: T) -> float:
    return float((got.double() - want).norm() / want.norm())


def backends(kind: str, context: dict[str, Any], skipped: dict[str, str]) -> dict[str, tuple[Any, Any]]:
    """Name -> (rounding, product) of what can run here."""
    rounding = next(c for c in candidates("quantise_rows") if not c.refuse(context) and not c.avoid(context))
    found = {}
    for c in candidates(OP):
        reason = c.refuse(context) or (
            c.avoid(context) if context["device"] == "cuda" or c.name == "triton" else None
        )
        if reason:
            skipped[f"{kind} {c.name}"] = reason
        else:
            found[c.name] = rounding.load(), c.load()
    return found


def fastest(kind: str, context: dict[str, Any]) -> tuple[Any, Any]:
    """Rounding, and each product by who is faster at it: cuBLAS where nothing follows it but a bias."""
    found = backends(kind, context, {})
    rows, ours = found["hopper"]
    vendor = found["vendor"][1]

    def product(a: T, sa: T, b: T, sb: T, bias: T | None, after: After, dtype: torch.dtype) -> T:
        plain = not after.gelu and after.residual is None
        return (vendor if plain else ours)(a, sa, b, sb, bias, after, dtype)

    return rows, product


def judged(
    runs: dict[str, Callable[[], Any]], pick: Callable[[Any], T], want: T, skipped: dict[str, str]
) -> dict[str, float]:
    """Errors of all; the wrong and the failing are taken out of `runs`."""
    errors = {}
    for name in list(runs):
        try:
            errors[name] = relative(pick(runs[name]()), want)
            if not errors[name] <= LIMIT[name.split()[0]]:
                skipped[name] = f"wrong: relative error {errors[name]:.2g}"
        # Other people's kernels fail in their own ways; the reason is part of the result.
        except Exception as error:
            skipped[name] = f"failed: {type(error).__name__}: {str(error).strip()[:200]}"
        if name in skipped:
            del runs[name]
    return errors


def single(x: T, weight: T, bias: T, device: str, skipped: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """A layer by every way there is."""
    runs: dict[str, Callable[[], Any]] = {"bf16 cublas": lambda: F.linear(x, weight, bias)}
    for kind in ("int8", "fp8"):
        context = {"device": device, "kind": kind, "columns": weight.shape[1], "features": weight.shape[0]}
        for name, (rows, product) in backends(kind, context, skipped).items():
            (a, sa), (b, sb) = rows(x, kind), rows(weight[None], kind)

            def alone(p: Any = product, a: T = a[0], sa: T = sa[0], b: T = b[0], sb: T = sb[0]) -> T:
                return p(a, sa, b, sb, bias, After(), x.dtype)[None]

            def whole(p: Any = product, r: Any = rows, k: str = kind, b: T = b[0], sb: T = sb[0]) -> T:
                codes, scale = r(x, k)
                return p(codes[0], scale[0], b, sb, bias, After(), x.dtype)[None]

            runs[f"{kind} matmul {name}"], runs[f"{kind} with rounding {name}"] = alone, whole
    if device == "cuda":
        name, (found, reason) = "int8 with rounding fastvideo", fastvideo_operations()
        if found is None:
            skipped[name] = reason
        else:
            from fastvideo_kernel import turbodiffusion_ops as turbo  # pyright: ignore[reportMissingImports]

            # Its product adds no bias; adding one afterwards is what its layer does too.
            codes, scale = turbo.int8_quant(weight)
            runs[name] = lambda: turbo.int8_linear(x[0], codes, scale)[None] + bias
    return runs


def measured(
    title: str, runs: dict[str, Any], errors: dict[str, float], flops: float, device: str, clock: Clock,
    skipped: dict[str, str], repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Time all in turns and tell."""
    timed(runs, device, 2, skipped, max(clock.left, 1.0))
    times = timed(
        {n: r for n, r in runs.items() if n not in skipped}, device, repeats, skipped, max(clock.left, 1.0)
    )
    rows = {n: summary(t) | {"error": errors[n]} for n, t in times.items() if n in errors}
    base = min((r["seconds"] for n, r in rows.items() if n.startswith("bf16")), default=0.0)
    print(f"\n{title}", flush=True)
    for name, row in sorted(rows.items(), key=lambda pair: pair[1]["seconds"]):
        row["flops_per_second"] = flops / row["seconds"]
        row["times_bf16"] = base / row["seconds"]
        print(
            f"  {name:34s} {row['seconds'] * 1e3:8.3f} ms  {row['flops_per_second'] / 1e12:7.1f} TFLOP/s  "
            f"{row['times_bf16']:5.2f} times the best bf16  error {row['error']:.1e}",
            flush=True,
        )
    for name, why in skipped.items():
        print(f"  {name}: {why}", flush=True)
    return {"title": title, "contenders": rows, "skipped": dict(skipped)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="wan1.3b")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--compile", choices=("inductor", "none"), default="inductor")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument(
        "--budget", type=float, default=200.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    clock, shape = Clock(args.budget), SHAPES[args.shape]
    record = Record(args.out, args.device, {"shape": args.shape, **vars(shape)})
    record.data["benchmark"] = "8-bit linear layers"
    with torch.no_grad():
        block = Block(shape, args.device)
        for name in ("out", "up", "down"):
            if clock.over:
                record.leave_out(name, "the budget was spent")
                continue
            weight, bias = block.linears[name]
            x = block.x if name != "down" else draw(
                torch.Generator(args.device).manual_seed(1), 1, shape.tokens, shape.inner, device=args.device
            )  # fmt: skip
            skipped: dict[str, str] = {}
            runs = single(x, weight, bias, args.device, skipped)
            want = F.linear(x[:, :ROWS].double(), weight.double(), bias.double())
            errors = judged(runs, lambda y: y[:, :ROWS], want, skipped)
            flops = 2.0 * shape.tokens * weight.numel()
            title = f"{shape.tokens:,} x {weight.shape[1]} -> {weight.shape[0]}"
            record.add(measured(title, runs, errors, flops, args.device, clock, skipped, args.repeats))
        skipped = {}
        runs = {"bf16 eager": block.plain}
        if args.compile != "none" and args.device == "cuda":
            runs["bf16 compiled"] = torch.compile(block.plain, dynamic=False)
        for kind in ("int8", "fp8"):
            context = {"device": args.device, "kind": kind, "columns": shape.width, "features": shape.width}
            for name, (rows, product) in backends(kind, context, skipped).items():
                runs[f"{kind} fused {name}"] = block.fused(kind, rows, product)
            if {f"{kind} fused hopper", f"{kind} fused vendor"} <= set(runs) and kind == "fp8":
                rows, product = fastest(kind, context)
                runs[f"{kind} fused hopper and vendor"] = block.fused(kind, rows, product)
        want = block.exact(slice(0, ROWS))
        errors = judged(runs, lambda y: y[0][:, :ROWS], want, skipped)
        if args.device == "cuda":
            graphs = {f"{n}, graph": graphed(r) for n, r in runs.items()}
            errors |= judged(graphs, lambda y: y[0][:, :ROWS], want, skipped)
            runs |= graphs
        flops = 2.0 * sum(
            w.numel() * (shape.text if n == "cross_kv" else shape.tokens)
            for n, (w, _) in block.linears.items()
        )
        record.add(
            measured(
                "a block but its attention", runs, errors, flops, args.device, clock, skipped, args.repeats
            )
        )


if __name__ == "__main__":
    main()
