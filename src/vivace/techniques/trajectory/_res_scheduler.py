"""Schedulers that diffusers lacks: RES, and Heun on noise levels that a pipeline hands in.

Both lay out the flow schedule like diffusers' FlowMatchEulerDiscreteScheduler, shift by resolution included, or evenly
from 1 as its multistep schedulers do when only a number of steps is given. Legend: B batch; a velocity v and a sample
x are (B, ...) of one shape; x = (1 - sigma) x0 + sigma noise and v = noise - x0, so x0 = x - sigma v.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

_LAYOUT = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
    "time_shift_type",
)


def lay_out(
    config: Any, steps: int | None, sigmas: Any, mu: float | None, timesteps: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The flow schedule of a configuration: (sigmas (n + 1,) with the final 0, timesteps (n,)), float32 on the CPU."""
    layout = FlowMatchEulerDiscreteScheduler(**{k: config[k] for k in _LAYOUT})
    if sigmas is None and timesteps is None:
        if steps is None:
            raise ValueError("set_timesteps needs a number of steps, sigmas or timesteps")
        sigmas = np.linspace(1.0, 1.0 / config["num_train_timesteps"], steps + 1)[:-1]
    layout.set_timesteps(sigmas=sigmas, mu=mu, timesteps=timesteps)
    return torch.as_tensor(layout.sigmas), torch.as_tensor(layout.timesteps)


class FlowRESMultistepScheduler(SchedulerMixin, ConfigMixin):
    """RES of order 2, multistep (Refined Exponential Solver, arXiv 2308.02157), on the clean estimate x0.

    In lambda = log((1 - sigma) / sigma) the step from s to t = s + h is

        x_t = (sigma_t / sigma_s) x_s + (1 - sigma_t) int_0^h exp(u - h) x0(s + u) du.

    With x0 linear through this and the last evaluation the integral is exact:

        (1 - exp(-h)) x0_s + (h - 1 + exp(-h)) / h_before (x0_s - x0_before).

    These are the coefficients of DPM-Solver++ 2M in its `heun` form; its `midpoint` form takes h (1 - exp(-h)) / 2 for
    the second. The first step, and the last to sigma 0, are of order 1: Euler's on this path.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
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
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.sigmas, self.timesteps = torch.empty(0), torch.empty(0)
        self._restart()

    def _restart(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._before: torch.Tensor | None = None

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
        """Lay out the schedule; see `lay_out`. Noise levels stay on the CPU, timesteps go to the device."""
        self.sigmas, times = lay_out(self.config, num_inference_steps, sigmas, mu, timesteps)
        self.timesteps = times.to(device)
        self.num_inference_steps = len(times)
        self._restart()

    def _index(self, timestep: Any) -> int:
        if self._begin_index is not None:
            return self._begin_index
        return int((self.timesteps == float(timestep)).nonzero()[0])

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample itself."""
        return sample

    def scale_noise(self, sample: torch.Tensor, timestep: Any, noise: torch.Tensor) -> torch.Tensor:
        """A clean (B, ...) latent at the noise level of a timestep."""
        time = timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep
        sigma = float(self.sigmas[self._index(time) if self._step_index is None else self._step_index])
        return sigma * noise + (1.0 - sigma) * sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """One step: the velocity at (sample, timestep) to the next sample, in at least float32."""
        if self._step_index is None:
            self._step_index = self._index(timestep)
        i = self._step_index
        s, t = float(self.sigmas[i]), float(self.sigmas[i + 1])
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        clean = x - s * model_output.to(x.dtype)
        out = (t / s) * x + (1.0 - t / s) * clean
        if self._before is not None:
            out = out + _second(float(self.sigmas[i - 1]), s, t) * (clean - self._before)
        self._before, self._step_index = clean, i + 1
        out = out.to(sample.dtype)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]


def _second(before: float, s: float, t: float) -> float:
    """Weight of the difference of clean estimates; 0 where a step is infinitely long in log-SNR."""
    if before >= 1.0 or t <= 0.0:
        return 0.0
    h, h_before = _log_snr(t) - _log_snr(s), _log_snr(s) - _log_snr(before)
    return (1.0 - t) * (h + math.expm1(-h)) / h_before


def _log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma)


class FlowHeunScheduler(FlowMatchHeunDiscreteScheduler):
    """diffusers' Heun steps (order 2, two evaluations a step, one for the last) on the pipeline's noise levels.

    The parent takes a number of steps only, and ends on a step of its own from its smallest noise level.
    """

    @register_to_config
    def __init__(
        self,
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
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Lay out n steps; see `lay_out`. The 2 n - 1 timesteps are those of the evaluations."""
        levels, times = lay_out(self.config, num_inference_steps, sigmas, mu, timesteps)
        self.num_inference_steps = len(times)
        self.timesteps = torch.cat([times[:1], times[1:].repeat_interleave(2)]).to(device)
        self.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
        self.prev_derivative = self.dt = self.sample = None
        self._step_index = self._begin_index = None
