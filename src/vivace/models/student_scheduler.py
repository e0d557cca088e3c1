"""The scheduler of few-step students: fixed noise levels, and the three ways in which students are sampled.

Legend: x = (1 - s) x0 + s n and v = n - x0, both (B, ...), so x0 = x - s v; s is this level and t the next one, in the
end 0.

    flow, flow_map   x_t = x_s + (t - s) v      Euler on the ODE; for a flow map v is the mean velocity from s to t
    consistency      x_t = (1 - t) (x_s - s v) + t n'      n' is fresh noise (Consistency Models, arXiv 2303.01469,
                     algorithm 1, on the straight path; DMD2, arXiv 2405.14867, section 4.5)

Pipelines for flow models hand their scheduler no generator. So a sample's fresh noise is a function of the noise that
it began with and of the step: one seed gives one clip, whatever else is in the batch, and it is not the noise that it
began with, also where latents and a generator of the same seed are given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from vivace.models.student_artifact import SOLVERS, noise_levels

_SEEN = 4096
"""Values of a sample's first noise that its fresh noise depends on."""


def stretched(levels: Sequence[float], steps: int) -> tuple[float, ...]:
    """Noise levels for another number of steps: linear between the given ones and the final 0."""
    if steps == len(levels):
        return tuple(levels)
    places = np.linspace(0.0, len(levels), steps + 1)[:-1]
    return tuple(np.interp(places, np.arange(len(levels) + 1), [*levels, 0.0]).tolist())


def first_seeds(sample: Tensor) -> list[int]:
    """A seed for each row of (B, ...), from the row's values alone."""
    rows = sample.detach().reshape(sample.shape[0], -1)
    rows = rows[:, :: max(1, rows.shape[1] // _SEEN)][:, :_SEEN].float().cpu().contiguous()
    return [int.from_bytes(hashlib.sha256(r.numpy().tobytes()).digest()[:7], "big") for r in rows]


def fresh_noise(seeds: Sequence[int], step: int, like: Tensor) -> Tensor:
    """Noise of the shape of `like` (B, ...), row by row from (seed, step); float32 on its device."""
    rows = []
    for seed in seeds:
        mixed = hashlib.sha256(f"{seed} {step}".encode()).digest()[:7]
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(mixed, "big"))
        rows.append(torch.randn(like.shape[1:], generator=generator))
    return torch.stack(rows).to(like.device)


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """See the module.

    Args:
        solver: `flow`, `consistency` or `flow_map`.
        steps: evaluations; None for as many as there are levels.
        levels: noise levels in falling order, without the final 0; None for even ones under the shift.
        shift: flow shift of even levels. A pipeline's shift by resolution (mu) takes its place where
            `use_dynamic_shifting` is set.
        others: settings that pipelines read from their scheduler.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        solver: str = "flow",
        steps: int | None = None,
        levels: tuple[float, ...] | None = None,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
    ) -> None:
        if solver not in SOLVERS:
            raise ValueError(f"the solver is one of {', '.join(SOLVERS)}, not {solver!r}")
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.sigmas, self.timesteps = torch.empty(0), torch.empty(0)
        self.callers_steps: Callable[[], bool] = lambda: False
        """Whether the number of steps that a pipeline asks for is the caller's own and counts."""
        self._restart()

    def _restart(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._seeds: list[int] | None = None

    @property
    def step_index(self) -> int | None:
        """Steps done; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where a pipeline said that it starts."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this step of the schedule."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Lay out the schedule: float32 noise levels (n + 1,) on the CPU, timesteps (n,) on the device.

        Levels of the caller's own and timesteps are taken as they are. The even levels that pipelines hand in say
        only how many; that number counts where `callers_steps()` says so, and else the student's own does.
        """
        train = self.config["num_train_timesteps"]
        if timesteps is not None:
            levels = tuple(float(t) / train for t in timesteps)
        elif sigmas is not None and not _even(sigmas):
            levels = tuple(float(s) for s in sigmas)
        else:
            asked = num_inference_steps or (None if sigmas is None else len(sigmas))
            levels = self._levels(asked, mu)
        self.sigmas = torch.tensor([*levels, 0.0])
        self.timesteps = (self.sigmas[:-1] * train).to(device)
        self.num_inference_steps = len(levels)
        self._restart()

    def _levels(self, asked: int | None, mu: float | None) -> tuple[float, ...]:
        own, given = self.config["levels"], self.config["steps"]
        steps = asked if asked and (self.callers_steps() or not (own or given)) else given or len(own or ())
        if not steps:
            raise ValueError("set_timesteps needs a number of steps, sigmas or timesteps")
        if own:
            return stretched(own, steps)
        shift = self.config["shift"]
        if mu is not None and self.config["use_dynamic_shifting"]:
            shift = math.exp(mu) if self.config["time_shift_type"] == "exponential" else mu
        return noise_levels(steps, shift)

    def index_for_timestep(self, timestep: Any) -> int:
        """The step of the schedule that a timestep belongs to."""
        distance = (self.timesteps.float().cpu() - float(timestep)).abs()
        return int(distance.argmin())

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """A clean (B, ...) latent at the noise level of a timestep."""
        time = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
        sigma = float(self.sigmas[self.index_for_timestep(time)])
        return sigma * noise + (1.0 - sigma) * sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """As `scale_noise`, in the order of arguments of diffusers' multistep schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step: the velocity at (sample, timestep) to the next sample, in at least float32.

        Args:
            generator: draws the fresh noise where it is given (a list has one for each sample).
        """
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        i = self._step_index
        s, t = float(self.sigmas[i]), float(self.sigmas[i + 1])
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        v = model_output.to(x.dtype)
        if self.config["solver"] == "consistency":
            out = x - s * v
            if t > 0.0:
                out = (1.0 - t) * out + t * self._noise(sample, i, generator).to(x.dtype)
        else:
            out = x + (t - s) * v
        self._step_index = i + 1
        out = out.to(sample.dtype)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _noise(self, sample: Tensor, step: int, generator: Any) -> Tensor:
        if generator is not None:
            from diffusers.utils.torch_utils import randn_tensor

            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
        if self._seeds is None:
            self._seeds = first_seeds(sample)
        return fresh_noise(self._seeds, step, sample)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]


def _even(sigmas: Any) -> bool:
    """Whether noise levels are the even ones from 1 that pipelines hand to their scheduler."""
    given = np.asarray(sigmas, dtype=np.float64)
    n = len(given)
    grids = (np.linspace(1.0, 1.0 / n, n), np.linspace(1.0, 0.0, n + 1)[:-1])
    return any(np.array_equal(given, g) for g in grids)
