"""Every GPU kernel through the compiler, for every GPU generation it is for; needs no GPU.

    python benchmarks/kernels/build_kernels.py [--capability 80 90] [--only block_attention]

Prints registers, spilled bytes, shared memory and tensor-core instructions of each kernel, and fails (exit code 1)
where one does not compile, spills, has no product on the tensor cores where it should, or, in a kernel made for Hopper,
products that wait for each other though they are asynchronous.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator

import torch

from vivace.kernels.block_attention.spec import Routes
from vivace.testing.builds import Build, builds

SPILLS = 384
"""Bytes of spilled registers that are no matter: compilers differ by as much, and a product's last pass over its tile
comes once in thousands of instructions."""


def attention(block: int, dim: int, sizes: bool, bias: bool) -> tuple[torch.Tensor, ...]:
    """q, k, v, routes and a bias of a small call."""
    q, k, v = (torch.zeros(1, 2, 4 * block, dim, dtype=torch.bfloat16) for _ in range(3))
    real = torch.full((1, 1, 4), block, dtype=torch.int32) if sizes else None
    routes = Routes.of_mask(torch.ones(1, 2, 4, 4, dtype=torch.bool), real, block)
    return q, k, v, routes, torch.zeros(1, 4 * block) if bias else None  # type: ignore[return-value]


def cases(capability: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, what launches kernels) for a GPU generation."""
    from vivace.kernels.block_attention import triton as blocks
    from vivace.kernels.block_select import triton as choose

    for block, dim, sizes, bias in (
        (64, 64, False, False),
        (64, 128, False, False),
        (128, 128, False, False),
        (128, 128, True, True),
    ):
        q, k, v, routes, extra = attention(block, dim, sizes, bias)
        label = f"{block} x {dim}" + (" with sizes and bias" if sizes else "")
        tuned = blocks.tuning(block, dim, (capability // 10, capability % 10))
        run = functools.partial(blocks.forward, q, k, v, routes, 0.1, extra)
        yield f"block_attention forward {label}", functools.partial(run, tuned=tuned)
        if capability >= 90 and not sizes:
            engine = blocks.Tuning(8 if block == 128 else 4, 3, 64, tma=True)
            yield f"block_attention forward, tma, {label}", functools.partial(run, tuned=engine)
        lse = torch.zeros(q.shape[:3])
        back = functools.partial(
            blocks.backward, q, k, v, routes, 0.1, extra, q, lse, q, lse, capability < 90
        )
        yield f"block_attention backward {label}", back
        if capability == 90:
            from vivace.kernels.block_attention import hopper

            fast = functools.partial(hopper.forward, q, k, v, routes, 0.1, extra)
            yield f"block_attention hopper {label}", fast
    if capability >= 90:  # FP8 products began a generation before
        yield from low_bit(capability == 90)
    for mass in (0.0, 0.9):
        scores = torch.zeros(1, 2, 500, 500)
        pick = functools.partial(choose.select, scores, 50, mass, None, 4, True)
        yield f"block_select mass {mass:g}", pick
    yield from clusters()
    yield from linears(capability)
    yield from decoder_passes()


def linears(capability: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """8-bit products with what follows them, and the rounding before."""
    from vivace.kernels.quantise_rows import triton as rows
    from vivace.kernels.quantise_rows.spec import Before
    from vivace.kernels.scaled_matmul import triton as plain
    from vivace.kernels.scaled_matmul.spec import After

    kinds = {"int8": torch.int8} | ({"fp8": torch.float8_e4m3fn} if capability >= 89 else {})
    modulated = Before("layer", 1e-6, scale=torch.zeros(1, 1, 1536), shift=torch.zeros(1, 1, 1536))
    for kind in kinds:
        for what, width, before in (("modulated", 1536, modulated), ("gelu", 8960, Before(gelu=True))):
            x = torch.zeros(1, 64, width, dtype=torch.bfloat16)
            yield f"quantise_rows {kind} {what}", functools.partial(rows.run, x, kind, before)
    runs = {"": plain.run}
    if capability == 90:
        from vivace.kernels.scaled_matmul import hopper

        runs["hopper "] = hopper.run
    residual = torch.zeros(512, 1536, dtype=torch.bfloat16)
    for (kind, dtype), (name, run) in itertools.product(kinds.items(), runs.items()):
        a, b = (torch.zeros(n, 1536, dtype=dtype) for n in (512, 1536))
        for what, after in (
            ("plain", After()),
            ("gelu", After(gelu=True)),
            ("gated", After(residual=residual, gate=torch.zeros(2, 1536))),
        ):
            scales = torch.zeros(512), torch.zeros(1536)
            call = functools.partial(
                run, a, scales[0], b, scales[1], torch.zeros(1536), after, torch.bfloat16
            )
            yield f"scaled_matmul {name}{kind} {what}", call


def decoder_passes() -> Iterator[tuple[str, Callable[[], object]]]:
    """What stands between the convolutions of a video decoder."""
    from vivace.kernels.pixel_rows import triton as rows

    for channels, dtype in ((96, torch.bfloat16), (384, torch.float16)):
        x = torch.zeros(1, channels, 2, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
        vector = torch.zeros(channels, dtype=dtype)
        yield f"norm_silu {channels}", functools.partial(rows.norm_silu, x, vector, vector, None, 2)
        yield f"add_rows {channels}", functools.partial(rows.add_rows, x, x.clone(), vector)
        yield f"double_pixels {channels}", functools.partial(rows.double_pixels, x)


def clusters() -> Iterator[tuple[str, Callable[[], object]]]:
    """k-means, and rows in the order that it gives."""
    from vivace.kernels.cluster_tokens import triton as means

    for dim, dtype in (
        (64, torch.bfloat16),
        (128, torch.bfloat16),
        (128, torch.float32),
        (256, torch.float32),
    ):
        x = torch.zeros(1, 2, 5000, dim, dtype=dtype)
        centres, gone = torch.zeros(1, 2, 1000, dim), torch.zeros(5000, dtype=torch.bool)
        name = f"cluster_tokens {dim} {str(dtype).removeprefix('torch.')}"
        yield name, functools.partial(means.cluster, x, centres, 1, gone)
    order = torch.zeros(1, 2, 5000, dtype=torch.int32)
    for back in (False, True):
        yield f"cluster_tokens permute {back}", functools.partial(means.permute, x, order, back)


def low_bit(hopper: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Dense and routed 8-bit attention; on a Hopper GPU by its own kernel too."""
    from vivace.kernels.low_bit_attention import triton as low

    forwards = {"": low.forward}
    if hopper:
        from vivace.kernels.low_bit_attention import hopper as fast

        forwards["hopper "] = fast.forward
    for (name, forward), (block, pv) in itertools.product(
        forwards.items(), ((64, "fp8"), (128, "fp8"), (64, "bf16"), (128, "bf16"))
    ):
        if (name, block, pv) == ("", 128, "bf16"):
            continue
        for sizes in (False, True):
            q, k, v, routes, _ = attention(block, 128, sizes, False)
            for lists in (None, routes):
                if sizes and lists is None:
                    continue
                run = functools.partial(forward, q, k, v, lists, 0.1, None, "int8", pv, block, 32)
                what = "dense" if lists is None else "with sizes" if sizes else "lists"
                yield f"low_bit_attention {name}{block} {pv} {what}", run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--only", nargs="+", default=[""], help="names that begin so")
    args = parser.parse_args()
    bad = seen = 0
    for capability in args.capability:
        for name, run in cases(capability):
            if not name.startswith(tuple(args.only)):
                continue
            seen += 1
            try:
                made = builds(run, capability)
            except Exception as error:  # a compiler's errors are of many kinds
                bad += 1
                print(f"sm_{capability}  {name:52s} does not build: {str(error).splitlines()[-1][:90]}")
                continue
            for b in made:
                late = b.serialized != "" and "hopper" in name
                wrong = b.spills > SPILLS or late or (needs_products(name, b.kernel) and not b.products)
                bad += wrong
                print(told(name, b) + ("  <-" if wrong else ""), flush=True)
    if not seen:
        parser.error(f"no kernel's name begins with {' or '.join(args.only)}.")
    sys.exit(1 if bad else 0)


def needs_products(name: str, kernel: str) -> bool:
    """Whether a kernel is there to multiply matrices; exact products of float32 are not made on the tensor cores."""
    return "float32" not in name and kernel.startswith(
        ("_forward", "_backward", "_attend", "_assign", "_matmul")
    )


def told(name: str, b: Build) -> str:
    """One line."""
    return (
        f"sm_{b.capability}  {name:52s} {b.kernel:18s} {b.registers:4d} registers {b.spills:5d} bytes spilled "
        f"{b.shared:7d} bytes shared {b.products:4d} products{' one by one: ' + b.serialized if b.serialized else ''}"
    )


if __name__ == "__main__":
    main()
