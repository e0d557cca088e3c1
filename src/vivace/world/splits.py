"""Which seeds belong to which split: the only place that says so. The three ranges are disjoint.

Whatever is trained on the world (the verifier, the autoencoder, the text-to-video model) samples scenes and captions
from `TRAIN` alone. `VALIDATION` may be looked at while training; `TEST` is for reported numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

TRAIN = range(2**31)
VALIDATION = range(2**31, 2**31 + 2**20)
TEST = range(2**31 + 2**20, 2**31 + 2**21)


def train_seeds(start: int, count: int, stream: int = 0) -> Sequence[int]:
    """`count` training seeds from position `start` of a stream; streams are far apart in `TRAIN` (it wraps around)."""
    first = start + stream * 100_000_007
    return [TRAIN[(first + i) % len(TRAIN)] for i in range(count)]
