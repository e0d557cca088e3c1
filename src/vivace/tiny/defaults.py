"""How the embedded model is called. Imports no torch, so that the command line can read it."""

from __future__ import annotations

from types import MappingProxyType

FRAMES, HEIGHT, WIDTH, FPS = 29, 128, 128, 8
TEXT_LENGTH = 64

DEFAULTS = MappingProxyType(
    {
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": 50,
        "guidance_scale": 4.0,
        "max_sequence_length": TEXT_LENGTH,
        "fps": FPS,
    }
)
"""Call arguments of the exact run, and `fps`, the rate at which its frames are played."""


def call_arguments() -> dict[str, int | float]:
    """`DEFAULTS` without `fps`: what `WanPipeline.__call__` takes."""
    return {name: value for name, value in DEFAULTS.items() if name != "fps"}
