"""What every training loop needs: processes, a clock that is the schedule, averaged weights, safe checkpoints."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from vivace.core.errors import WeightsError


@dataclass(frozen=True)
class Processes:
    """This process among those started by `torchrun`; alone without it."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls) -> Processes:
        """Reads the environment of `torchrun` and joins the group (NCCL on GPUs, gloo on CPUs)."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        else:
            device = torch.device("cpu")
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, world, device)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.leads:
            print(text, flush=True)

    def choose_attention(self, name: str) -> None:
        """`cudnn` leaves cuDNN as the only fused attention kernel; `auto` leaves the choice to torch."""
        if self.device.type == "cuda":
            for switch in (
                torch.backends.cuda.enable_flash_sdp,
                torch.backends.cuda.enable_mem_efficient_sdp,
            ):
                switch(name != "cudnn")

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """One all-reduce over all gradients laid end to end."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = _flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        flat.div_(self.world)
        torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(flat, gradients)))

    def agree(self, value: float) -> float:
        """The leader's value, in every process."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def same_weights(self, module: nn.Module) -> None:
        if self.world > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.data, 0)

    def autocast(self) -> torch.autocast:
        """bf16 on GPUs, nothing on CPUs."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


@dataclass
class Budget:
    """Progress of a run from 0 to 1: by wall time (`minutes`), or by `steps` where repeatability matters more.

    Time spent before an interruption counts (`spent` is part of the checkpoint).
    """

    minutes: float | None = None
    steps: int | None = None
    spent: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        return self.spent + time.perf_counter() - self.started

    def progress(self, step: int) -> float:
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, self.seconds() / (60.0 * (self.minutes or 1.0)))


def warm_cosine(progress: float, warm_up: float = 0.03, floor: float = 0.0) -> float:
    """Linear warm-up over the first part of the run, then half a cosine down to `floor`."""
    if progress < warm_up:
        return max(progress / warm_up, 0.02)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * (progress - warm_up) / (1.0 - warm_up)))


def warm_linear(progress: float, warm_up: float = 0.02) -> float:
    """Linear warm-up, then linear down to zero (the better decay for short runs, arXiv:2502.15938)."""
    return max(progress / warm_up, 0.02) if progress < warm_up else (1.0 - progress) / (1.0 - warm_up)


class AveragedWeights:
    """Exponential moving average of a module's parameters; early steps use a shorter window."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters: list[Tensor] = list(module.parameters())
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, self.parameters, 1.0 - decay)

    @torch.no_grad()
    def store(self) -> None:
        """Write the averages into the module."""
        torch._foreach_copy_(self.parameters, self.values)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        torch._foreach_copy_(
            self.values, [v.to(w.device) for v, w in zip(state["values"], self.values, strict=True)]
        )


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write to a file beside it, then rename: an interruption leaves the old checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    torch.save(state | {"random": random_state()}, partial)
    partial.replace(path)


def load_checkpoint(path: Path, processes: Processes) -> dict[str, Any] | None:
    """The state, with the random state restored; None when there is none. Raises `WeightsError` when damaged.

    The random state is the leader's; the other processes start a stream of their own from the step.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=processes.device, weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"the checkpoint {path} cannot be read ({error}); delete it to start afresh."
        ) from error
    if processes.leads:
        restore_random_state(state["random"])
    else:
        torch.manual_seed(1000 * state["step"] + processes.rank)
    return state


def random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def compiled(function: Callable, enabled: bool, say: Callable[[str], None] = print) -> Callable:
    """`torch.compile` with static shapes; if compilation fails at the first call, runs eagerly and says so."""
    if not enabled:
        return function
    torch._dynamo.config.recompile_limit = 64
    fast, state = torch.compile(function, dynamic=False), {"tried": False, "eager": False}

    def call(*arguments):
        if state["eager"]:
            return function(*arguments)
        if state["tried"]:
            return fast(*arguments)
        state["tried"] = True
        try:
            return fast(*arguments)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception:
            state["eager"] = True
            say("compilation failed, running eagerly:\n" + traceback.format_exc(limit=-3))
            return function(*arguments)

    return call


def round_to_bf16(*modules: nn.Module) -> None:
    """Every floating tensor to bf16, also those diffusers would rather keep in fp32: half the bytes on disk."""
    for module in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.data = tensor.data.bfloat16()


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def machine() -> dict[str, str]:
    """What the record says about where it was made."""
    import diffusers
    import transformers

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
