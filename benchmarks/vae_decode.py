"""Seconds and errors of VAE decoding: plain diffusers, whole clip, fast decoding in its variants, a tiny decoder.

    python benchmarks/vae_decode.py --vae embedded --out benchmarks/results/vae-decode-cpu.json
    python benchmarks/vae_decode.py --vae wan2.1-1.3b --out benchmarks/results/vae-decode-wan.json   # on a GPU

`embedded` is the trained VAE of the package; other names are published configurations with random weights, which say
how fast and how near to plain diffusers, never how good. Contenders run in turns; times are CUDA events or the
monotonic clock, medians. Errors are in levels of 8 bits, against plain diffusers in float32 (without TF32), whose own
rounding in 16 bits is thus seen too. What a contender takes at its first call (compiling, converted weights) is kept
apart. cuDNN chooses its kernels by rule, as in diffusers, unless `--search` lets it measure them.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "kernels"))

import torch
from harness import Clock, Record, clear, summary

from vivace.core.env import fast_bf16_cpu
from vivace.kernels.api import timed
from vivace.models import tiny_decoder
from vivace.models.vae_decode import CAUSAL, DecodeOptions, VaeDecoder, compiler

LEVELS = 127.5
"""Steps of 8 bits in 1.0 of a picture from -1 to 1."""
Decode = Callable[[torch.Tensor], torch.Tensor]


def build(name: str, device: str, dtype: torch.dtype, tiny_sizes: bool) -> Any:
    """The VAE to decode with, in eval mode; `tiny_sizes` makes a published one small enough for a trial."""
    if name == "embedded":
        from vivace.tiny.load import load_tiny

        return load_tiny(dtype).vae.to(device)
    import diffusers

    from vivace.models.random_weights import known

    model = known(name)
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in model.vae.items()}
    if tiny_sizes:
        small = (
            {"base_dim": 8}
            if "base_dim" in config
            else {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}
        )
        config |= small
    torch.manual_seed(0)
    with torch.device(device):
        return getattr(diffusers, model.vae_class)(**config).to(dtype).eval()


def latents(vae: Any, options: argparse.Namespace, dtype: torch.dtype) -> torch.Tensor:
    """What is decoded: encoded scenes for the embedded VAE, unit normal numbers in the VAE's scale for others."""
    frames, height, width = options.size
    if options.vae == "embedded":
        from vivace.tiny.train.clips import ClipShape, to_model
        from vivace.tiny.train.seeds import held_out
        from vivace.tiny.whole_clip import encode_moments

        shape = ClipShape(frames=frames, height=height, width=width)
        video, _ = shape.render(held_out("vae", options.batch), torch.device(options.device))
        with torch.no_grad():
            return encode_moments(vae, to_model(video).to(dtype)).chunk(2, dim=1)[0].contiguous()
    sizes = tiny_decoder.TinyDecoderConfig.of(type(vae).__name__, vae.config)
    draw = torch.Generator().manual_seed(0)
    extent = ((frames - 1) // sizes.temporal + 1, height // sizes.spatial, width // sizes.spatial)
    z = torch.randn(options.batch, sizes.latent_channels, *extent, generator=draw)
    unit = tiny_decoder.build(type(vae).__name__, vae.config)
    return (z * unit.std + unit.mean).to(options.device, dtype)


def fast(vae: Any, **settings: Any) -> tuple[Decode, dict[str, Any]]:
    """Fast decoding with settings, and these for the record."""
    options = DecodeOptions(**settings)
    return VaeDecoder(vae, options), asdict(options)


def tiny(
    vae: Any, file: Path | None, dtype: torch.dtype, device: str, mode: str
) -> tuple[Decode, dict[str, Any]]:
    """A tiny decoder: the file's, or one of the usual sizes with random weights."""
    kind = type(vae).__name__
    torch.manual_seed(0)
    net = tiny_decoder.load(file) if file is not None else tiny_decoder.build(kind, vae.config)
    net = net.to(device, dtype).eval().requires_grad_(False)
    if (compile := compiler(DecodeOptions(compile=mode))) is not None:
        net.compile_blocks(compile)
    parameters = sum(p.numel() for p in net.parameters())
    said = {
        "trained": file is not None,
        "config": asdict(net.config),
        "parameters": parameters,
        "compile": mode,
    }
    return net.decode, said


def contenders(
    vae: Any, options: argparse.Namespace, dtype: torch.dtype
) -> dict[str, Callable[[], tuple[Decode, dict[str, Any]]]]:
    """Everything that is timed, by name; built one at a time."""
    gib, modes = options.max_gib, ["default", "max-autotune"][: options.compile]
    out: dict[str, Callable[[], tuple[Decode, dict[str, Any]]]] = {
        "plain": lambda: (lambda z: vae.decode(z, return_dict=False)[0], {})
    }
    low = "float16" if dtype == torch.bfloat16 else "bfloat16"
    for memory in ("off", "on"):
        label = "fast" if memory == "off" else "fast, channels last"
        out[label] = lambda m=memory: fast(vae, channels_last=m, fused="off", max_gib=gib)
    if type(vae).__name__ in CAUSAL and options.device != "cpu":
        out["fast, fused"] = lambda: fast(vae, max_gib=gib)
        out["fast, fused, 4 GiB"] = lambda: fast(vae)
    # A processor that emulates bfloat16 takes minutes, and says nothing about those that do not.
    if options.device != "cpu" or fast_bf16_cpu():
        label = (
            f"fast, fused, {low}"
            if type(vae).__name__ in CAUSAL and options.device != "cpu"
            else f"fast, {low}"
        )
        out[label] = lambda: fast(vae, dtype=low, max_gib=gib)
    for mode in modes:
        out[f"fast, compiled ({mode})"] = lambda m=mode: fast(vae, compile=m, max_gib=gib)
    if type(vae).__name__ in CAUSAL:
        from vivace.tiny.whole_clip import decode_latents

        out["whole clip"] = lambda: (lambda z: decode_latents(vae, z), {})
        for chunk in (1, 4):
            out[f"fast, {chunk} latent frames"] = lambda c=chunk: fast(vae, chunk=c, max_gib=gib)
        side = max(4, options.size[2] // vae.config.scale_factor_spatial // 3)
        out["fast, 4 latent frames, 3 tiles across"] = lambda: fast(vae, chunk=4, tile=side, max_gib=gib)
    for mode in ("off", *modes):
        label = "tiny" if mode == "off" else f"tiny, compiled ({mode})"
        out[label] = lambda m=mode: tiny(vae, options.tiny, dtype, options.device, m)
    return {
        n: c for n, c in out.items() if n == "plain" or not options.only or any(o in n for o in options.only)
    }


def errors(got: torch.Tensor, want: torch.Tensor) -> dict[str, float]:
    """Largest and mean error in levels of 8 bits, and the largest as a share of the picture's deviation."""
    off = (got.float() - want.float()).abs()
    spread = float(want.float().std())
    largest = float(off.max())
    return {
        "max_levels": largest * LEVELS,
        "mean_levels": float(off.mean()) * LEVELS,
        "relative": largest / spread,
    }


def truth(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """Frames of plain diffusers in float32, from the same weights and latents."""
    exact = copy.deepcopy(vae).float()
    return exact.decode(z.float(), return_dict=False)[0]


def measure(
    vae: Any, z: torch.Tensor, options: argparse.Namespace, record: Record, clock: Clock
) -> dict[str, Any]:
    """Errors, first calls, peaks, then times in turns; what fails is left out with its reason."""
    dtype, device, gpu = z.dtype, options.device, options.device == "cuda"
    runs: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    record.add({"vae": type(vae).__name__, "latents": list(z.shape), "contenders": rows})
    want = truth(vae, z)
    clear(device)
    for name, make in contenders(vae, options, dtype).items():
        if clock.over:
            record.leave_out(name, "the budget was spent")
            continue
        try:
            decode, said = make()
            before = torch.cuda.memory_allocated() if gpu else 0
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            got = decode(z)
            if gpu:
                torch.cuda.synchronize()
            first = time.perf_counter() - started
            peak = torch.cuda.max_memory_allocated() - before if gpu else None
            row = {"settings": said, "first_seconds": first, "peak_bytes": peak, "errors": errors(got, want)}
            if isinstance(decode, VaeDecoder):
                row["pieces"] = str(decode.pieces(z))
            del got
            rows[name], runs[name] = row, lambda d=decode: d(z)
            record.save()
        # Compilers and memory fail in their own ways; the reason is part of the result.
        except Exception as error:
            if name == "plain":
                raise
            record.leave_out(name, f"failed: {type(error).__name__}: {str(error).strip()[:300]}")
        clear(device)
    failed: dict[str, str] = {}
    timed(runs, device, 1, failed, budget=max(clock.left / 4, 1.0))
    left = {n: r for n, r in runs.items() if n not in failed}
    for name, times in timed(left, device, options.repeats, failed, budget=max(clock.left, 1.0)).items():
        rows[name] |= summary(times)
    for name, why in failed.items():
        record.leave_out(name, why)
    record.save()
    return rows


def table(rows: dict[str, Any]) -> str:
    """Fastest first."""
    done = sorted((n for n in rows if "seconds" in rows[n]), key=lambda n: rows[n]["seconds"])
    plain = rows["plain"]["seconds"]
    lines = [f"{'':44s} {'s':>9s} {'IQR':>8s} {'plain/it':>8s} {'first s':>8s} {'max':>9s} {'GiB':>6s}"]
    for name in done:
        r = rows[name]
        peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.2f}"
        lines.append(
            f"{name:44s} {r['seconds']:9.4f} {r['iqr']:8.4f} {plain / r['seconds']:8.2f} {r['first_seconds']:8.2f} "
            f"{r['errors']['max_levels']:9.3g} {peak:>6s}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--vae", default="embedded", help="'embedded', or a published configuration")
    out.add_argument("--size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    out.add_argument("--batch", type=int, default=1)
    out.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    out.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on a GPU, else float32"
    )
    out.add_argument("--tiny", type=Path, help="weights of a tiny decoder; random ones without")
    out.add_argument("--tiny-vae", action="store_true", help="few channels, for a trial without a GPU")
    out.add_argument(
        "--compile", type=int, choices=(0, 1, 2), default=None, help="modes: none, default, both"
    )
    out.add_argument("--search", action="store_true", help="let cuDNN measure its kernels first")
    out.add_argument("--max-gib", type=float, default=24.0, help="bound on activations of a piece")
    out.add_argument("--only", nargs="*", default=[], help="contenders whose names hold one of these words")
    out.add_argument("--repeats", type=int, default=7)
    out.add_argument("--budget", type=float, default=480.0, help="seconds for all")
    out.add_argument("--out", type=Path)
    return out


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, keep the record; returns its data."""
    options = parser().parse_args(given)
    options.size = tuple(options.size or ((29, 128, 128) if options.vae == "embedded" else (81, 480, 832)))
    gpu = options.device == "cuda"
    options.compile = (2 if gpu else 0) if options.compile is None else options.compile
    dtype = getattr(torch, options.dtype or ("bfloat16" if gpu else "float32"))
    if gpu:
        torch.backends.cudnn.benchmark = options.search
        torch.backends.cudnn.allow_tf32 = False
    clock = Clock(options.budget)
    said = {k: v for k, v in vars(options).items() if k not in ("out", "tiny")} | {"dtype": str(dtype)}
    record = Record(options.out, options.device, said | {"tiny": options.tiny and options.tiny.name})
    record.data["benchmark"] = "VAE decoding"
    with torch.no_grad():
        vae = build(options.vae, options.device, dtype, options.tiny_vae)
        z = latents(vae, options, dtype)
        rows = measure(vae, z, options, record, clock)
    print(table(rows), flush=True)
    return record.data


if __name__ == "__main__":
    main()
