"""Which seeds of the world's splits are for what; training, choosing and reporting never share one."""

from __future__ import annotations

from vivace.world.splits import TEST, VALIDATION

STREAMS = {"vae": 100, "text_to_video": 200}
HELD_OUT = {
    "prompts": (TEST, 0),
    "vae": (TEST, 100_000),
    "dev": (VALIDATION, 0),
    "vae_statistics": (VALIDATION, 100_000),
}


def training_stream(kind: str, rank: int) -> int:
    """The stream of `train_seeds` that one process draws from."""
    return STREAMS[kind] + rank


def held_out(purpose: str, count: int) -> list[int]:
    """`count` seeds that no training uses."""
    split, start = HELD_OUT[purpose]
    return list(split[start : start + count])
