"""Weight bytes of a published transformer in each number format, and what one forward with them takes on a GPU.

    python benchmarks/weight_memory.py --model wan2.1-14b --formats bf16,int8,int4,nvfp4         (no GPU: bytes only)
    python benchmarks/weight_memory.py --model wan2.1-14b --device cuda --out weight-memory.json  (81x480x832)

Without a GPU the whole transformer is counted on the meta device, and one block is built for real, with random
weights, and quantised: its bytes stand for those of all blocks. With `--device cuda` (or `--forward` on a processor)
all layers are built in 16 bits and converted one by one, a layer's weight being dropped as soon as its codes exist, and
one forward at `--shape` is run for each format: allocated bytes with nothing but weights, the allocator's peak, and
seconds of the second of two forwards. Beside it stands what `vivace doctor` would predict. A format is
WEIGHTS[/ACTIVATIONS][@GROUP], such as int8/int8, int4@128 or nvfp4; int4 has groups of 64 if none is given. Activations
stay in 16 bits if none are given; formats that the GPU does not multiply are then widened layer by layer, so their time
says nothing, and their peak holds one widened layer.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vivace.core.env import environment
from vivace.core.footprint import Part
from vivace.core.live_bytes import LiveBytes
from vivace.kernels.api import select
from vivace.kernels.quant_linear.spec import OP, Recipe
from vivace.models.families import by_class
from vivace.models.known import KNOWN, KnownModel
from vivace.plans.memory import exact
from vivace.techniques.compression.linears import layer_bytes

FULL = "bf16"
FORMATS = "bf16,int8,int8/int8,fp8,fp8/fp8,int4,nvfp4,mxfp8,mxfp4"
GROUP = 64
GIB = 2.0**30


def recipe_of(text: str) -> Recipe | None:
    """`int4/int8@64` as a recipe; None for 16 bits. Raises ValueError where there is none."""
    if text == FULL:
        return None
    formats, _, group = text.partition("@")
    weights, _, activations = formats.partition("/")
    size = int(group) if group else GROUP * (weights == "int4")
    return Recipe(weights=weights, activations=activations or "none", group=size)


def with_layers(known: KnownModel, layers: int | None) -> KnownModel:
    """The model with fewer layers, of every list of blocks at most so many."""
    adapter = by_class(known.transformer_class)
    assert adapter is not None  # every known model has one
    if layers is None:
        return known
    fewer = {
        k: min(layers, known.transformer[k]) for k in adapter.depth_keys.values() if k in known.transformer
    }
    return replace(known, transformer={**known.transformer, **fewer})


def quantise(expert: Any, recipe: Recipe | None, device: str, put: bool = True) -> tuple[int, int]:
    """Codes in the place of the blocks' linears where `put`, one by one; bytes of their weights before and after."""
    before = after = 0
    for site in (s for s in expert.linears if s.role != "other"):
        linear: Any = site.module
        before += linear.weight.nbytes
        if recipe is None:
            after += linear.weight.nbytes
            continue
        features = math.gcd(linear.in_features, linear.out_features)
        new = select(OP, device=device, recipe=recipe, features=features).run(linear, recipe)
        bias = 0 if new.bias is None else new.bias.nbytes
        after += nbytes(new) - bias
        if put:
            setattr(site.parent, site.name, new)
    return before, after


def keep_wide(module: Any) -> Any:
    """What the class keeps in fp32 is widened, as loading does."""
    kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    for path, parameter in module.named_parameters():
        if any(word in kept for word in path.split(".")):
            parameter.data = parameter.data.float()
    return module


def predicted(part: Part, recipe: Recipe | None) -> int:
    """Bytes of all weights of a transformer in a format, by arithmetic."""
    if recipe is None:
        return part.weights
    sizes = {x.site: layer_bytes(recipe, x.inputs, x.outputs) for x in part.linears if x.role != "other"}
    return part.resized(sizes).weights


def nbytes(module: Any) -> int:
    """Of parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def one_block(known: KnownModel) -> Any:
    """The transformer with one block of every list, as an expert with addressed sites."""
    adapter = by_class(known.transformer_class)
    assert adapter is not None
    module = with_layers(known, 1).build_transformer(dtype=torch.bfloat16)
    return adapter.expert("transformer", module)


def forward(
    known: KnownModel, recipe: Recipe | None, clip: tuple[int, int, int], device: str
) -> dict[str, Any]:
    """Bytes and seconds of one forward of the whole model: the allocator's on a GPU, live tensors' on a processor."""
    adapter = by_class(known.transformer_class)
    assert adapter is not None
    gc.collect()
    on_gpu, start = device == "cuda", time.perf_counter()
    free = torch.cuda.memory_allocated() if on_gpu else 0
    module = keep_wide(known.build_transformer(device=device, dtype=torch.bfloat16))
    quantise(adapter.expert("transformer", module), recipe, device)
    gc.collect()
    built = time.perf_counter() - start
    weights = torch.cuda.memory_allocated() - free if on_gpu else nbytes(module)
    model = known.describe()
    workload = model.workload(frames=clip[0], height=clip[1], width=clip[2]).with_(batch=1)
    call = adapter.dummy_call(model, workload, device, torch.bfloat16)
    inputs = sum(v.nbytes for v in call.values() if isinstance(v, torch.Tensor))
    base, seconds = torch.cuda.memory_allocated() if on_gpu else 0, []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    watched = contextlib.nullcontext() if on_gpu else LiveBytes()
    with watched as live:
        for _ in range(2):
            start = time.perf_counter()
            out = module(**call, return_dict=False)[0]
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    working = torch.cuda.max_memory_allocated() - base if live is None else live.peak
    return {
        "tensors_bytes": nbytes(module),
        "weights_bytes": weights,
        "inputs_bytes": inputs,
        "working_bytes": working,
        "peak_bytes": weights + inputs + working,
        "build_seconds": built,
        "forward_seconds": seconds[-1],
        "finite": bool(torch.isfinite(out).all()),
    }


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for; returns the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(KNOWN), default="wan2.1-14b")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--forward", action="store_true", help="run one forward on a processor too")
    parser.add_argument("--shape", default="81x480x832", help="FRAMESxHEIGHTxWIDTH of the forward")
    parser.add_argument("--layers", type=int, help="depth of the transformer; all layers by default")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds after which no format is begun"
    )
    parser.add_argument("--out", type=Path, help="a JSON record, written after every format")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; leave --device out to count bytes only.")
    if args.layers is not None and args.layers < 1:
        parser.error("--layers is 1 or more.")
    try:
        recipes = {name: recipe_of(name) for name in args.formats.split(",")}
        frames, height, width = map(int, args.shape.split("x"))
    except ValueError as error:
        parser.error(f"a format or the shape is wrong: {error}.")
    start, known = time.perf_counter(), with_layers(KNOWN[args.model], args.layers)
    runs, model = args.forward or args.device == "cuda", known.describe()
    clip = (frames, height, width) if runs else (5, 64, 64)
    # Weights do not depend on the clip; what a forward makes is counted at the shape that is run.
    workload = model.workload(frames=clip[0], height=clip[1], width=clip[2])
    only = {"transformer": model.configs["transformer"]}
    alone = replace(model, configs=only, components={"transformer": known.transformer_class})
    part = exact(alone, workload).part("transformer")
    record: dict[str, Any] = {
        "benchmark": "weight memory",
        "model": args.model,
        "layers": len(part.blocks),
        "shape": args.shape if runs else None,
        "device": args.device,
        "weights": "random",
        "environment": environment(torch.device(args.device)),
        "formats": {},
    }
    linears = sum(x.bytes for x in part.linears if x.role != "other")
    print(
        f"{args.model}, {len(part.blocks)} blocks: {part.weights / GIB:.2f} GiB in 16 bits, of which linears of the "
        f"blocks {linears / GIB:.2f} GiB",
        flush=True,
    )
    block = None if runs else one_block(known)
    for name, recipe in recipes.items():
        if time.perf_counter() - start > args.budget:
            record.setdefault("left_out", {})[name] = "the budget was spent"
            continue
        row: dict[str, Any] = {"predicted_weights_bytes": predicted(part, recipe)}
        if block is not None:
            before, after = quantise(block, recipe, "cpu", put=False)
            row |= {"block_linears_before": before, "block_linears_after": after}
            # Blocks of one list are alike; of every list the first was built.
            if len(set(part.blocks)) == 1:
                row["weights_bytes"] = part.weights + len(part.blocks) * (after - before)
        else:
            row["predicted_peak_bytes"] = row["predicted_weights_bytes"] + part.working
            try:
                row |= forward(known, recipe, clip, args.device)
            # One format must not cost the others their turn: its error is its result.
            except (RuntimeError, ValueError, TypeError) as error:
                row["failed"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        record["formats"][name] = row
        told = ", ".join(
            f"{k.removesuffix('_bytes')} {v / GIB:.2f} GiB" if k.endswith("bytes") else f"{k} {v}"
            for k, v in row.items()
            if k.endswith("bytes") or k in ("forward_seconds", "failed")
        )
        print(f"{name}: {told}", flush=True)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record, indent=1))
    return record


if __name__ == "__main__":
    main()
