"""The calibration artefact: one JSON file of what was measured of a model's exact run, and the key it is valid for.

A calibration says something about one set of weights, one shape and one trajectory. The key holds all of that; an
artefact with another key is refused with a sentence that says which part differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from vivace.core.errors import ConfigError

FORMAT = "vivace-calibration"
VERSION = 1
COMMAND = "vivace calibrate"
LEVELS = (5, 25, 50, 75, 95)
"""Percentiles over prompts that are kept."""
_EXPERTS = ("transformer", "transformer_2")
_TENSORS, _VALUES = 16, 1024
"""How many tensors of a transformer are looked at, and how many values of each."""
_SOLVER = (
    "solver_order",
    "solver_type",
    "algorithm_type",
    "predict_x0",
    "lower_order_final",
    "final_sigmas_type",
)
"""Settings of a scheduler that say how it integrates; the others in `_NOISE` say where its steps lie."""
_NOISE = (
    "flow_shift",
    "shift",
    "use_flow_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "shift_terminal",
    "time_shift_type",
    "prediction_type",
    "timestep_spacing",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
    "num_train_timesteps",
)


class _Described(Protocol):
    @property
    def family(self) -> str: ...


class _Workload(Protocol):
    @property
    def frames(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def guidance(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a calibration is valid for. `scheduler` says where the steps lie, `solver` how they are integrated."""

    model_hash: str
    family: str
    frames: int
    height: int
    width: int
    scheduler: str
    solver: str
    steps: int
    guidance: float

    def differences(self, other: Key, parts: Collection[str] = ()) -> list[str]:
        """Phrases such as `steps 50 and not 30`: this key's value, then the other's. `parts`: names; () for all."""
        out = []
        for f in fields(self):
            if parts and f.name not in parts:
                continue
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            same = abs(mine - theirs) < 1e-6 if isinstance(mine, float) else mine == theirs
            if not same:
                out.append(f"{f.name.replace('_', ' ')} {mine} and not {theirs}")
        return out


def key_of(model: _Described, pipeline: Any, workload: _Workload) -> Key:
    """The key of a workload on a live pipeline as it now is.

    Ask before a technique has put other weights in place: quantised weights are other weights.

    Args:
        model: the pipeline's description.
        pipeline: a diffusers pipeline with a `transformer` and a `scheduler`.
        workload: shape, steps and guidance.
    """
    config = dict(getattr(pipeline.scheduler, "config", {}))
    kind = type(pipeline.scheduler).__name__
    return Key(
        model_hash=model_hash(pipeline),
        family=model.family,
        frames=workload.frames,
        height=workload.height,
        width=workload.width,
        scheduler=_settings(kind, config, _NOISE),
        solver=_settings(kind, config, _SOLVER),
        steps=workload.steps,
        guidance=float(workload.guidance),
    )


def model_hash(pipeline: Any) -> str:
    """Sixteen hex digits of the transformers' configurations and of a few values of their weights.

    The values are rounded to bf16 first, so that fp32 and bf16 copies of one checkpoint agree, on any device.
    """
    digest = hashlib.sha256()
    for name in _EXPERTS:
        if (module := getattr(pipeline, name, None)) is None:
            continue
        config = {k: v for k, v in dict(module.config).items() if not k.startswith("_")}
        digest.update(json.dumps([name, config], sort_keys=True, default=str).encode())
        tensors = {k: v for k, v in module.state_dict().items() if v.is_floating_point() and v.numel()}
        names = sorted(tensors)
        places = np.linspace(0, len(names) - 1, min(_TENSORS, len(names))).round().astype(int)
        for key in (names[i] for i in dict.fromkeys(places.tolist())):
            flat = tensors[key].detach().reshape(-1)
            values = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES].bfloat16().float().cpu()
            digest.update(key.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def content(path: str | Path, what: str, form: str, version: int, command: str) -> dict[str, Any]:
    """The table in one of our JSON files, after its head has been checked.

    Args:
        path: the file.
        what: it holds, for people.
        form, version: the head's `format` and `version`.
        command: what makes such a file.

    Raises:
        ConfigError: there is no such file, or it is something else; the sentence says what to do.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {what} {path}; make it with `{command} -o {path}`.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a {what} ({error}).") from None
    if not isinstance(data, dict) or data.get("format") != form:
        raise ConfigError(f"{path} is no {what}; make one with `{command}`.")
    if data.get("version") != version:
        raise ConfigError(
            f"{path} has format {data.get('version')} and this Vivace reads {version}; "
            f"make it again with `{command}`."
        )
    return data


def noise_schedule(kind: str, config: Mapping[str, Any]) -> str:
    """What `Key.scheduler` says of a scheduler class and its settings."""
    return _settings(kind, config, _NOISE)


def _settings(kind: str, config: Mapping[str, Any], names: Iterable[str]) -> str:
    said = [f"{n}={config[n]}" for n in sorted(names) if config.get(n) is not None and config[n] is not False]
    return " ".join([kind, *said])


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What was measured of one expert and one branch (`cond` or `uncond`), means over prompts.

    Every list has one entry for each step in `steps`, which are the steps that this expert ran. A first entry has no
    predecessor: 1 for the ratio, 0 elsewhere. A change is relative L1, mean |x_t - x_(t-1)| / mean |x_(t-1)|.
    """

    steps: list[int]
    residual_ratio: list[float]
    """MagCache: mean over tokens of |r_t| / |r_(t-1)|, r the stack's residual (output minus input)."""
    residual_ratio_std: list[float]
    """Standard deviation of that ratio over tokens."""
    time_change: list[float]
    """Of the time embedding handed to the first block."""
    first_block_change: list[float]
    """Of the first block's residual."""
    output_change: list[float]
    """Of the stack's residual."""
    tea_polynomial: list[float] = field(default_factory=list)
    """TeaCache: output_change as a polynomial of time_change, highest power first, five coefficients."""
    block_change: list[list[float]] = field(default_factory=list)
    """[step][block]: of a block's own residual."""
    block_sensitivity: list[float] = field(default_factory=list)
    """[block]: mean of block_change over the steps that have a predecessor."""
    percentiles: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Of a curve (by its name) over prompts: percentile -> list over steps."""


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What online caches look at in one clip, conditional branch: every step beside every step before it.

    A pair table is [step][earlier step], a row of as many values as there are earlier steps; 0 where another expert
    ran the earlier one.
    """

    first_block: list[list[float]]
    """Relative L1 change of the first block's residual, mean |r_t - r_s| / mean |r_s|."""
    inputs: list[list[float]]
    """Mean |x_t - x_s| of the network's inputs."""
    outputs: list[list[float]]
    """Mean |v_t - v_s| of its outputs."""
    sizes: list[float]
    """Mean |v_t|, one a step."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One artefact. `gram` is the (2n, 2n) matrix of `vivace.calibration.gram`, mean over prompts.

    `curves` is by expert, then by branch. Every list over all steps has `key.steps` entries, `sigmas` one more.
    """

    key: Key
    prompts: int
    prompts_sha256: str
    seed: int
    vivace: str
    sigmas: list[float]
    timesteps: list[float]
    gram: list[list[float]]
    curves: dict[str, dict[str, Curves]]
    signals: list[Signals] = field(default_factory=list)
    """One for each clip; empty in files of earlier versions."""
    costs: dict[str, list[float]] = field(default_factory=dict)
    """By expert: share of the run's FLOPs that each block takes. What is missing to 1 lies outside of the blocks."""

    @property
    def matrix(self) -> np.ndarray:
        """`gram` as (2n, 2n) float64."""
        return np.asarray(self.gram, dtype=np.float64)

    def matches(self, key: Key) -> bool:
        """Whether it is valid for a run."""
        return not self.key.differences(key)

    def problems(self, key: Key, parts: Collection[str] = ()) -> list[str]:
        """One sentence for a run it is not valid for; empty when it is. `parts`: what of the key binds; () for all."""
        if not (found := self.key.differences(key, parts)):
            return []
        told = "; ".join(found)
        return [f"the calibration was made for {told}: make one for this run with `{COMMAND}`."]

    @property
    def guided(self) -> bool:
        """Whether both branches were evaluated."""
        return any("uncond" in branches for branches in self.curves.values())

    @property
    def starts(self) -> list[int]:
        """Steps at which an expert begins."""
        return sorted(min(c["cond"].steps) for c in self.curves.values() if "cond" in c)

    def joined(self, branch: str, curve: str) -> list[float]:
        """A curve over all steps, from the expert that ran each.

        Raises:
            ConfigError: the branch was not measured.
        """
        out = [0.0] * self.key.steps
        found = [c[branch] for c in self.curves.values() if branch in c]
        if not found:
            raise ConfigError(f"the calibration holds no {branch} branch; it was made without one.")
        for curves in found:
            for step, value in zip(curves.steps, getattr(curves, curve), strict=True):
                out[step] = value
        return out

    def to_json(self) -> str:
        """The file's text."""
        head = {"format": FORMAT, "version": VERSION}
        return json.dumps(head | _rounded(asdict(self)), allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the file; folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            ConfigError: there is no such file, or it is no artefact of this version; the sentence says what to do.
        """
        data = content(path, "calibration", FORMAT, VERSION, COMMAND)
        try:
            return cls._from(data)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); make it again with `{COMMAND}`.") from None

    @classmethod
    def _from(cls, data: dict[str, Any]) -> Self:
        optional = {f.name for f in fields(cls) if f.default_factory is not MISSING}
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data or f.name not in optional}
        values["key"] = Key(**data["key"])
        values["curves"] = {
            expert: {branch: Curves(**c) for branch, c in branches.items()}
            for expert, branches in data["curves"].items()
        }
        values["signals"] = [Signals(**clip) for clip in data.get("signals", [])]
        out = cls(**values)
        n = out.key.steps
        if any(len(table) != n for clip in out.signals for table in vars(clip).values()):
            raise ValueError(f"{n} steps need {n} rows in every table of signals")
        if out.matrix.shape != (2 * n, 2 * n) or len(out.sigmas) != n + 1:
            raise ValueError(f"{n} steps need {n + 1} sigmas and a {2 * n} x {2 * n} Gram matrix")
        for curves in (c for branches in out.curves.values() for c in branches.values()):
            _check_curves(curves, n)
        return out


def _check_curves(curves: Curves, steps: int) -> None:
    if any(not 0 <= s < steps for s in curves.steps):
        raise ValueError(f"a step lies outside of {steps} steps")
    for name in (
        "residual_ratio",
        "residual_ratio_std",
        "time_change",
        "first_block_change",
        "output_change",
    ):
        if len(getattr(curves, name)) != len(curves.steps):
            raise ValueError(f"{name} has not one value for each step")


def prompts_digest(prompts: Sequence[str]) -> str:
    """sha256 of the prompts, one a line."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def _rounded(value: Any) -> Any:
    """Floats with twelve digits: the Gram matrix's small differences need them."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
