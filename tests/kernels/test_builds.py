"""GPU kernels go through the compiler for old and new GPUs, in a process of its own: here Triton is interpreted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The largest of each kind; the script alone builds them all.
LARGEST = (
    "block_attention forward 128 x 128 with",
    "block_attention hopper 128 x 128 with",
    "block_select mass 0.9",
    "cluster_tokens 128 bfloat16",
    "cluster_tokens permute True",
    "low_bit_attention 64 fp8 dense",
    "low_bit_attention hopper 128 fp8 dense",
    "low_bit_attention hopper 128 bf16 with",
    "quantise_rows int8 gelu",
    "scaled_matmul int8 gated",
    "scaled_matmul hopper fp8 gated",
)
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels" / "build_kernels.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_build_for_their_gpus_without_spilling() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--only", *LARGEST]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    bad = [line for line in lines if "<-" in line or "not build" in line]
    assert run.returncode == 0, "\n".join(bad) or run.stderr
    assert any("hopper" in line for line in lines)
    assert any(line.startswith("sm_80") for line in lines)
