"""What one of two processes does in the test of agreement. A module of its own, so that a process starts quickly."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.distributed as dist

from vivace.techniques.caching.votes import mean_over

SEEN = ([0.1, 1.0], [0.3, math.inf])


def agree(rank: int, folder: str) -> None:
    """Join the group, agree on the mean, and write what was agreed and what this rank's values are afterwards."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    values = torch.tensor(SEEN[rank])
    agreed = mean_over(values, dist.group.WORLD)
    Path(folder, f"{rank}.json").write_text(json.dumps([agreed.tolist(), values.tolist()]))
    dist.destroy_process_group()
