"""What number formats do to one evaluation of a transformer: errors of the noise prediction, bytes, and seconds.

    python benchmarks/quant_error.py --out quant-error.json
    python benchmarks/quant_error.py --steps 20 --count 5 --threads 1 --only w8a8,nvfp4

The exact pipeline (the embedded model) makes one clip and some of its evaluations are recorded. Each is then repeated
with all linears of the blocks in one format at a time. `error` is |out - exact| / |exact|, root mean square over the
recorded evaluations, in bf16; `rounding` is what casting the model from fp32 to bf16 costs, for comparison.
Seconds are medians of an interleaved race and told only for what is not emulated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vivace import Plan, accelerate
from vivace.core.env import environment
from vivace.plans.quant_searching import RecordedCall, record_calls, record_maxima, replay
from vivace.techniques.compression.quantized_linear import QuantizedLinear
from vivace.tiny.defaults import call_arguments
from vivace.tiny.load import load_tiny

W4A8 = {"weights": "int4", "activations": "int8", "group": 64}
W4A4 = {"weights": "int4", "activations": "int4", "group": 64}
NVFP4 = {"weights": "nvfp4", "activations": "nvfp4"}
SETTINGS: dict[str, dict[str, Any]] = {
    "w8": {"weights": "int8", "activations": "none"},
    "w8a8": {"weights": "int8", "activations": "int8"},
    "w8a8-rotated": {"weights": "int8", "activations": "int8", "rotate": "hadamard"},
    "fp8": {"weights": "fp8", "activations": "fp8"},
    "mxfp8": {"weights": "mxfp8", "activations": "mxfp8"},
    "w4-channel": {"weights": "int4", "activations": "none"},
    "w4-g64": {"weights": "int4", "activations": "none", "group": 64},
    "w4-g32": {"weights": "int4", "activations": "none", "group": 32},
    "w4-nvfp4": {"weights": "nvfp4", "activations": "none"},
    "w4-mxfp4": {"weights": "mxfp4", "activations": "none"},
    "w4a8": W4A8,
    "w4a8-rotated": W4A8 | {"rotate": "hadamard"},
    "w4a8-smooth": W4A8 | {"smooth": 0.5},
    "w4a8-rank32": W4A8 | {"low_rank": 32},
    "w4a4": W4A4,
    "w4a4-rotated": W4A4 | {"rotate": "hadamard"},
    "w4a4-rotated-rank32": W4A4 | {"rotate": "hadamard", "low_rank": 32},
    "w4a4-smooth-rank32": W4A4 | {"smooth": 0.5, "low_rank": 32},
    "nvfp4": NVFP4,
    "nvfp4-rotated": NVFP4 | {"rotate": "hadamard"},
    "nvfp4-rank32": NVFP4 | {"low_rank": 32},
    "mxfp4-mxfp8": {"weights": "mxfp4", "activations": "mxfp8"},
}
PROMPT = "a large red sphere slides left on a checkered floor"


def outputs(pipe: Any, calls: list[RecordedCall]) -> list[torch.Tensor]:
    """What the transformer gives for every call, float32."""
    with torch.no_grad():
        return [replay(pipe.transformer, c).float() for c in calls]


def distance(got: list[torch.Tensor], exact: list[torch.Tensor]) -> tuple[float, list[float]]:
    """Root mean square of the relative errors, and each."""
    each = [float((g - e).norm() / e.norm()) for g, e in zip(got, exact, strict=True)]
    return (sum(v * v for v in each) / len(each)) ** 0.5, each


def cast(calls: list[RecordedCall], dtype: torch.dtype) -> list[RecordedCall]:
    """Calls with hidden states and text in another type."""
    names = ("hidden_states", "encoder_hidden_states")
    return [
        RecordedCall(c.expert, c.step, c.steps, c.values | {n: c.values[n].to(dtype) for n in names})
        for c in calls
    ]


def race(runs: dict[str, Any], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=12, help="of the recorded clip")
    parser.add_argument(
        "--count", type=int, default=3, help="steps whose conditional evaluations are recorded"
    )
    parser.add_argument("--frames", type=int, default=0, help="of the clip; the model's default when 0")
    parser.add_argument("--repeats", type=int, default=5, help="timed evaluations of each contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--backend", default="auto", help="kernel of the error table; reference has the same numbers"
    )
    parser.add_argument("--only", default="", help="settings by name, with commas")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = {k: v for k, v in SETTINGS.items() if k in (arguments.only or ",".join(SETTINGS)).split(",")}
    if unknown := set(filter(None, arguments.only.split(","))) - set(SETTINGS):
        parser.error(f"no setting is called {', '.join(sorted(unknown))}; they are {', '.join(SETTINGS)}.")
    # Recorded in fp32, where a CPU is fast; both precisions then see the same evaluations.
    single = load_tiny(dtype=torch.float32)
    options: dict[str, Any] = call_arguments() | {"num_inference_steps": arguments.steps}
    options |= {"num_frames": arguments.frames} if arguments.frames else {}
    # The first evaluation of a step is the conditional one.
    found = record_calls(single, [PROMPT], count=arguments.count, **options)
    calls = list({c.step: c for c in reversed(found)}.values())[::-1]
    scratch = tempfile.TemporaryDirectory()
    maxima = Path(scratch.name) / "maxima.safetensors"
    if any(s.get("smooth") for s in chosen.values()):
        record_maxima(single, [PROMPT], **options).save(maxima)
    pipe = load_tiny(dtype=torch.bfloat16)
    low = cast(calls, torch.bfloat16)
    exact_single, exact = outputs(single, calls), outputs(pipe, low)
    rows: dict[str, Any] = {"rounding": {"error": distance(exact, exact_single)[0]}}
    for name, settings in chosen.items():
        files = {"maxima": str(maxima)} if settings.get("smooth") else {}
        files["backend"] = arguments.backend
        with accelerate(pipe, Plan([QuantizedLinear(**settings, **files)])) as session:
            error, each = distance(outputs(pipe, low), exact)
            effects = session.receipt().techniques[0].effects
            kernels = [k.choice for k in session.receipt().kernels]
        bits = 16.0 * effects["bytes_after"] / effects["bytes_before"]
        rows[name] = {
            "settings": settings,
            "error": error,
            "errors": each,
            "bits": bits,
            "emulated": bool(effects["linears_emulated"]),
            "kernels": kernels,
        }
        print(f"{name:22s} error {error:8.4f}   {bits:5.2f} bits  {', '.join(kernels)}", flush=True)
    print(f"{'bf16 against fp32':22s} error {rows['rounding']['error']:8.4f}")
    seconds = speed(single, pipe, calls, low, arguments.repeats) if arguments.repeats else {}
    for name, value in seconds.items():
        print(f"{name:22s} {value:8.3f} s a transformer call")
    record = {
        "what": "quantisation error of one evaluation",
        "environment": environment(torch.device("cpu")),
        "threads": arguments.threads,
        "prompt": PROMPT,
        "clip": options,
        "calls": [(c.step, c.steps) for c in calls],
        "rows": rows,
        "seconds": seconds,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1, default=str) + "\n")


def speed(
    single: Any, pipe: Any, calls: list[RecordedCall], low: list[RecordedCall], repeats: int
) -> dict[str, float]:
    """Seconds of a transformer call: fp32 and bf16 exact, and with integer products, each in its precision."""
    pipes = {"fp32": (single, calls), "bf16": (pipe, low)}
    runs: dict[str, Any] = {}

    def run(owner: Any, call: RecordedCall) -> None:
        with torch.no_grad():
            replay(owner.transformer, call)

    quantised = {"w8a8": SETTINGS["w8a8"], "w4a8": SETTINGS["w4a8"]}
    sessions = []
    for name, (owner, recorded) in pipes.items():
        runs[name] = lambda o=owner, c=recorded[0]: run(o, c)
        for label, settings in quantised.items():
            # A pipeline of its own for each, so that all are ready at the same time.
            other = load_tiny(dtype=owner.transformer.dtype)
            plan = Plan([QuantizedLinear(**settings)])
            sessions.append(accelerate(other, plan, counters=False))
            runs[f"{label} int_mm, {name}"] = lambda o=other, c=recorded[0]: run(o, c)
    try:
        return race(runs, repeats)
    finally:
        for session in sessions:
            session.close()


if __name__ == "__main__":
    main()
