"""The record: one immutable JSON document for one contender on one task on one machine.

A speed-up is never stored; it is computed from two records whose task, model and environment are equal. Fidelity to the
exact run, absolute quality and distribution distances are kept apart. Values of single samples lie in a file beside the
record (`Samples`), so that every interval can be computed again. This module imports no torch.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vivace.core.errors import ConfigError

VERSION = 1
Kind = Literal["exact", "steps", "plan", "peer", "floor", "seed"]
"""`exact`: the task's baseline. `steps`: the exact run with fewer solver steps, the control every cache needs. `plan`:
a plan of ours. `peer`: somebody else's acceleration. `floor`: the exact run again with another kernel or precision (the
noise floor). `seed`: the exact run with other seeds (the ceiling of a paired distance)."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Contender(_Frozen):
    """Who ran. `settings` is the plan as data, the peer's configuration, or the number of steps."""

    name: str
    """Unique within a task and an environment, e.g. `fast`, `steps=18`, `diffusers.first_block_cache@threshold=0.1`."""
    kind: Kind
    label: str = ""
    family: str = ""
    """The survey's paradigm: step distillation, efficient attention, model compression, feature caching, trajectory;
    `composite` for several, empty for the baseline."""
    settings: dict[str, Any] = Field(default_factory=dict)
    group: str = ""
    """Contenders that differ in one knob only share a group; a group is one curve in a plot."""
    knob: str = ""
    """Name and value of the knob that tells a contender from others of its group, e.g. `threshold=0.1`."""
    package: str = ""
    package_version: str = ""
    techniques: tuple[str, ...] = ()
    """Names of our techniques in force."""
    notes: tuple[str, ...] = ()
    """What a reader must know: known defects of a peer, why these settings."""


class Model(_Frozen):
    """What was run."""

    name: str
    pipeline: str
    family: str = ""
    weights: Literal["trained", "random"]
    sha256: str = ""
    """Of the weights (trained) or of the configuration and the seed (random)."""
    dtype: str


class TaskRef(_Frozen):
    """Which task, by name and version, and the hash of everything it says."""

    name: str
    sha256: str


class Spread(_Frozen):
    """A timed quantity: seconds of n runs. `values` are in order of execution."""

    median: float
    q1: float
    q3: float
    n: int
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Median and quartiles of at least one value."""
        ordered = sorted(values)
        return cls(
            median=_quantile(ordered, 0.5),
            q1=_quantile(ordered, 0.25),
            q3=_quantile(ordered, 0.75),
            n=len(ordered),
            values=tuple(values),
        )


class Timing(_Frozen):
    """A timed run: warm, eager or compiled, no counters. Seconds of one call that makes `batch` clips."""

    stages: dict[str, Spread]
    """text, denoise, vae, other, total."""
    batch: int
    warmups: int
    cold: float | None = None
    """Seconds of the first call in this process, compilation and autotuning included."""
    compile_seconds: float | None = None
    """Cold minus warm median where something was compiled; None where nothing was."""
    setup_seconds: float | None = None
    """Seconds to put the plan or the peer in force, once."""
    interleaved_with: tuple[str, ...] = ()
    """The contenders whose runs alternated with these in one process, in order."""
    clock: str = "wall"
    """`cuda events` or `wall`."""
    clips: tuple[str, ...] = ()
    """Ids of the samples that were made, in the order of the values."""
    shortfall: str = ""
    """What the protocol asks for and this run did not do, e.g. fewer repeats, and why."""


class Memory(_Frozen):
    """Bytes of one call in a process of its own measurement window."""

    peak_allocated: int | None = None
    peak_reserved: int | None = None
    resident: int | None = None
    """Peak resident set of the process, on a CPU."""
    weights: int = 0
    cache: int = 0
    by_stage: dict[str, int] = Field(default_factory=dict)
    """Peak allocated bytes while a stage ran; only where the allocator tells (GPU)."""


class Energy(_Frozen):
    """Joules of one call, by NVML's counter; `idle_watts` has been taken off `net`."""

    joules: float
    net: float
    idle_watts: float
    window_seconds: float
    how: str = "nvmlDeviceGetTotalEnergyConsumption"


class Estimate(_Frozen):
    """A mean with its 95 % interval over prompts. Infinite and undefined values are left out and counted."""

    mean: float | None
    low: float | None
    high: float | None
    prompts: int
    samples: int
    median: float | None = None
    worst: float | None = None
    left_out: int = 0
    p: float | None = None
    how: str = "t interval on prompt means"


class MetricRef(_Frozen):
    """Which metric, at which version, resting on which weights."""

    name: str
    version: int
    group: str
    series: tuple[str, ...]
    backbone: str = ""
    backbone_sha256: str = ""


class Quality(_Frozen):
    """Estimates by series, the three questions kept apart; what could not be measured, with the reason."""

    fidelity: dict[str, Estimate] = Field(default_factory=dict)
    absolute: dict[str, Estimate] = Field(default_factory=dict)
    distribution: dict[str, Estimate] = Field(default_factory=dict)
    metrics: tuple[MetricRef, ...] = ()
    skipped: dict[str, str] = Field(default_factory=dict)
    reference: str = ""
    """Name of the contender that fidelity and distribution were measured against."""


class Record(_Frozen):
    """See the module's docstring."""

    vivace_record: int = VERSION
    created: str
    """UTC, ISO 8601, seconds."""
    code: dict[str, Any]
    """`version`, `commit`, `dirty`."""
    contender: Contender
    model: Model
    task: TaskRef
    environment: dict[str, Any]
    """As `vivace.core.env.environment`; two runs are comparable only when the fingerprints are equal."""
    counts: dict[str, float] = Field(default_factory=dict)
    """Of one clip, from the audit run (mean over the audited clips): nfe, nfe_requested, blocks_run, blocks_total,
    attention_pairs(_dense), flops, flops_dense, cache_hits, full_equivalents (flops over the flops of one full
    evaluation)."""
    counted: str = ""
    """How the audit run was made: clips, batch, eager."""
    timing: Timing | None = None
    memory: Memory | None = None
    energy: Energy | None = None
    quality: Quality | None = None
    samples: str = ""
    """sha256 of the sample file, empty when there is none."""
    clips: dict[str, str] = Field(default_factory=dict)
    """A few clips to look at: sample id -> file below the store, H.264, for eyes only."""
    command: str = ""
    """What to type to repeat it."""
    warnings: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """First 16 digits of the sha256 of the record's canonical JSON: the name of its file."""
        return hashlib.sha256(canonical(self.to_dict()).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; NaN and infinities are kept as Python floats."""
        return self.model_dump(mode="python")

    def to_json(self) -> str:
        """Indented JSON, keys in the order of the schema."""
        return json.dumps(self.to_dict(), indent=1, default=list) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a field is missing, unknown or of another type, or a newer Vivace wrote it.
        """
        if data.get("vivace_record", 0) > VERSION:
            raise ConfigError(
                f"the record has version {data['vivace_record']} and this Vivace reads up to {VERSION}; update Vivace."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise ConfigError(f"this is no Vivace record: {where}: {first['msg'].lower()}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A record from its file.

        Raises:
            ConfigError: no such file, no JSON, or no record.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the record {path}; check the path.") from error
        except ValueError as error:
            raise ConfigError(
                f"the file {path} is not JSON; give a record that `vivace bench` wrote."
            ) from error
        if not isinstance(data, dict):
            raise ConfigError(f"the file {path} holds no record; give one that `vivace bench` wrote.")
        return cls.from_dict(data)


class Samples(_Frozen):
    """Values of single samples, one entry per sample in every column, in the task's order.

    `prompt` and `k` name the sample: prompt index within the task and repeat. NaN: does not apply. A column is a series
    of a metric, a count (`count.flops`) or a stage's seconds (`seconds.denoise`).
    """

    ids: tuple[str, ...]
    """`<prompt index>.<k>`"""
    prompt: tuple[int, ...]
    k: tuple[int, ...]
    seed: tuple[int, ...]
    columns: dict[str, tuple[float, ...]]
    hashes: tuple[str, ...] = ()
    """sha256 (16 digits) of the uint8 frames of every sample."""
    curves: dict[str, tuple[tuple[float, ...], ...]] = Field(default_factory=dict)
    """Per-step or per-frame curves of some samples, e.g. `latent_error` by step."""

    def to_bytes(self) -> bytes:
        """Compressed canonical JSON; numbers rounded to 7 significant digits; equal data give equal bytes."""
        data = self.model_dump(mode="python")
        data["columns"] = {n: [_short(v) for v in c] for n, c in data["columns"].items()}
        data["curves"] = {n: [[_short(v) for v in r] for r in c] for n, c in data["curves"].items()}
        return gzip.compress(canonical(data).encode(), compresslevel=9, mtime=0)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of `to_bytes`."""
        return cls.model_validate(json.loads(gzip.decompress(data)))


def canonical(data: Any) -> str:
    """JSON without spaces and with sorted keys: equal data, equal text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), default=list)


def _short(value: float) -> float:
    return value if not math.isfinite(value) else float(f"{value:.7g}")


def _quantile(ordered: Sequence[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
