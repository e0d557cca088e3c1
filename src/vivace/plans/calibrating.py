"""Making a calibration: the exact pipeline runs in a session, and a recorder watches what passes from step to step.

The recorder is a technique that changes nothing and is in no registry. Of one clip it keeps the network's outputs, in
host memory, and of the step before what the next is compared with; block residuals are looked at in at most
`TOKENS` tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vivace.calibration.artifact import (
    LEVELS,
    Calibration,
    Curves,
    Signals,
    key_of,
    prompts_digest,
)
from vivace.calibration.gram import gram, mean_gram
from vivace.core.context import COND, FUSED, UNCOND
from vivace.core.errors import ConfigError, ModelError
from vivace.models.adapter import Block, BlockCall, Expert, ModelDescription, RootCall
from vivace.models.describe import describe_pipeline
from vivace.plans.engine import StepListener
from vivace.plans.plan import Plan
from vivace.plans.session import Session, accelerate
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Target, Technique, reads

if TYPE_CHECKING:
    import torch

NAME = "calibration_recorder"
TOKENS = 4096
"""Most tokens of a block's residual that are compared."""
PAIR_TOKENS, PAIR_VALUES = 1024, 1 << 18
"""Most tokens of a first block's residual, and most values of a latent, that are compared between any two steps."""
CHANGES = ("residual_ratio", "time_change", "first_block_change", "output_change")
_PAIRS = ("first_block", "inputs", "outputs")
_SCALARS = (*CHANGES, "residual_ratio_std")
_DEGREE = 4
LEAST_STEPS = 3
"""Fewest steps that a calibration says something about."""
Lane = tuple[str, str]
"""(expert, branch)"""


@dataclass
class Clip:
    """What was seen of one clip."""

    outputs: dict[str, list[np.ndarray]] = field(default_factory=lambda: {COND: [], UNCOND: []})
    """By branch, one output (1, C, T, H, W) for each step."""
    rows: dict[Lane, list[dict[str, Any]]] = field(default_factory=dict)
    """By expert and branch, one entry for each step that the expert ran."""
    before: dict[Lane, dict[str, Any]] = field(default_factory=dict)
    """What the last step left behind to compare with."""
    kept: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _PAIRS})
    """What online caches look at, by table, of every conditional evaluation so far: (expert, thinned tensor)."""
    signals: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in (*_PAIRS, "sizes")})
    """The tables of `Signals`."""
    costs: dict[str, list[float]] = field(default_factory=dict)
    """By expert, share of the run's FLOPs that each block took."""
    sigmas: tuple[float, ...] = ()
    timesteps: tuple[float, ...] = ()


class Finished:
    """Clips that are done, in memory and, where a file is given, in a file that an interrupted run leaves behind.

    Args:
        file: JSON; what it holds counts only if it was written for the same `header`.
        header: what is being calibrated, as plain data.
    """

    def __init__(self, file: Path | None, header: dict[str, Any]) -> None:
        self._file, self._header = file, json.loads(json.dumps(header))
        self.grams: list[np.ndarray] = []
        self.clips: list[Clip] = []
        if file is not None and file.is_file():
            self._read(file)

    def _read(self, file: Path) -> None:
        try:
            data = json.loads(file.read_text())
            if data["header"] != self._header:
                return
            for saved in data["clips"]:
                rows = {(expert, branch): row for expert, branch, row in saved["rows"]}
                clip = Clip(
                    rows=rows,
                    sigmas=tuple(saved["sigmas"]),
                    timesteps=tuple(saved["timesteps"]),
                    signals=saved["signals"],
                    costs=saved["costs"],
                )
                self.clips.append(clip)
                self.grams.append(np.array(saved["gram"]))
        except (ValueError, KeyError, TypeError):
            # Cut off while being written, or somebody else's: begin again.
            self.clips, self.grams = [], []

    def add(self, matrix: np.ndarray, clip: Clip) -> None:
        """One more clip; its tensors are let go."""
        clip.outputs.clear()
        clip.before.clear()
        clip.kept.clear()
        self.grams.append(matrix)
        self.clips.append(clip)
        if self._file is None:
            return
        clips = [
            {
                "gram": g.tolist(),
                "rows": [[*lane, row] for lane, row in c.rows.items()],
                "sigmas": [float(s) for s in c.sigmas],
                "timesteps": [float(t) for t in c.timesteps],
                "signals": c.signals,
                "costs": c.costs,
            }
            for g, c in zip(self.grams, self.clips, strict=True)
        ]
        fresh = self._file.with_name(self._file.name + ".new")
        fresh.write_text(json.dumps({"header": self._header, "clips": clips}))
        fresh.replace(self._file)


@dataclass
class Sink:
    """Where the recorder writes; `clip` is the clip under way."""

    clip: Clip = field(default_factory=Clip)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorder(Technique):
    """Watches an exact run. It changes nothing, and stands in no plan file."""

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.CACHING,
        summary="Records what changes from step to step.",
        objective="knowledge",
        stage=Stage.CACHE,
        claims=(reads("block.output"),),
        needs=(Need.ORDERED_BLOCKS,),
        cite=Cite(title="Vivace"),
        lossless=True,
    )
    sink: Sink = field(default_factory=Sink)

    def to_dict(self) -> dict[str, Any]:
        return {"_type": self.type_name(), "_version": self.version}

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            seen: dict[str, Any] = {}
            target.around_expert(expert, self._around_expert(target, expert, seen))
            for block in expert.blocks:
                last = block is expert.blocks[-1]
                target.around_block(block, self._around_block(block, last, seen))

    def _around_expert(self, target: Target, expert: Expert, seen: dict[str, Any]) -> Any:
        clock, sink = target.clock, self.sink

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            seen.clear()
            seen["blocks"] = []
            sample = run(call)
            clip = sink.clip
            clip.sigmas, clip.timesteps = clock.sigmas, clock.timesteps
            half = call.rows // 2
            lanes = {UNCOND: slice(0, half), COND: slice(half, call.rows)}
            if clock.branch != FUSED:
                lanes = {clock.branch: slice(0, call.rows)}
            for branch, rows in lanes.items():
                clip.outputs[branch].append(sample[rows].detach().float().cpu().numpy())
                now = {k: [t[rows] for t in v] if isinstance(v, list) else v[rows] for k, v in seen.items()}
                lane = (expert.name, branch)
                row = compare(now, clip.before.get(lane)) | {"step": clock.step}
                clip.rows.setdefault(lane, []).append(row)
                clip.before[lane] = now
                if branch == COND:
                    looks = {"first_block": now.get("first"), "outputs": sample[rows].detach()}
                    note(clip, expert.name, looks | {"inputs": call.values["hidden_states"][rows].detach()})
            seen.clear()
            target.report(NAME, "evaluations_seen", len(lanes))
            return sample

        return handler

    @staticmethod
    def _around_block(block: Block, last: bool, seen: dict[str, Any]) -> Any:
        def handler(call: BlockCall, run: Callable[[BlockCall], Any]) -> Any:
            hidden = call.hidden
            if block.index == 0:
                seen["start"] = hidden
                # As TeaCache's signal: where blocks get no time embedding, it looks at their input.
                time = hidden if call.time is None else call.time
                if time.shape[0] == hidden.shape[0]:
                    seen["time"] = time.detach().clone()
            out, text = run(call)
            residual = (out - hidden).detach()
            if block.index == 0:
                seen["first"] = residual
            stride = max(1, -(-residual.shape[1] // TOKENS))
            seen["blocks"].append(residual[:, ::stride].clone() if stride > 1 else residual)
            if last:
                seen["stack"] = (out - seen.pop("start")).detach()
            return out, text

        return handler


def compare(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """One step beside the step before: the curves' values, and `block_change` as a list."""
    import torch

    blocks = len(now["blocks"])
    if before is None:
        return dict.fromkeys(_SCALARS, 0.0) | {"residual_ratio": 1.0, "block_change": [0.0] * blocks}
    norms = [x["stack"].float().norm(dim=-1) for x in (now, before)]
    ratio = norms[0] / norms[1].clamp_min(1e-12)
    found = {
        "residual_ratio": ratio.mean(),
        "residual_ratio_std": ratio.std(correction=0),
        "first_block_change": change(now["first"], before["first"]),
        "output_change": change(now["stack"], before["stack"]),
    }
    if "time" in now:
        found["time_change"] = change(now["time"], before["time"])
    blockwise = [change(a, b) for a, b in zip(now["blocks"], before["blocks"], strict=True)]
    # One wait for the device.
    values = torch.stack([*found.values(), *blockwise]).tolist()
    row: dict[str, Any] = {"time_change": 0.0} | dict(zip(found, values, strict=False))
    return row | {"block_change": values[len(found) :]}


def change(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Relative L1 change, mean |now - before| / mean |before|, a float32 scalar on the device."""
    now, before = now.float(), before.float()
    return (now - before).abs().mean() / before.abs().mean().clamp_min(1e-12)


def note(clip: Clip, expert: str, looks: dict[str, torch.Tensor]) -> None:
    """One more row of the clip's signals: this evaluation beside all earlier ones of the same expert."""
    import torch

    values, lengths = [], []
    for name, tensor in looks.items():
        # An odd stride, so that not always the same channels or columns are taken.
        if name == "first_block":
            stride = max(1, -(-tensor.shape[1] // PAIR_TOKENS)) | 1
            thin = tensor[:, ::stride] if tensor.shape[1] > PAIR_TOKENS else tensor
        else:
            flat = tensor.reshape(-1)
            thin = flat[:: -(-flat.numel() // PAIR_VALUES) | 1] if flat.numel() > PAIR_VALUES else flat
        thin = thin.clone()
        earlier, zero = clip.kept[name], torch.zeros((), device=thin.device)
        for other, before in earlier:
            moved = (thin - before).abs().mean(dtype=torch.float32) if other == expert else zero
            if name == "first_block" and other == expert:
                moved = moved / before.abs().mean(dtype=torch.float32).clamp_min(1e-12)
            values.append(moved)
        lengths.append(len(earlier))
        earlier.append((expert, thin))
    values.append(looks["outputs"].abs().mean(dtype=torch.float32))
    told = torch.stack(values).tolist()
    for name, length in zip(looks, lengths, strict=True):
        clip.signals[name].append(told[:length])
        told = told[length:]
    clip.signals["sizes"].append(told[0])


def _costs(session: Session) -> dict[str, list[float]]:
    """By expert, the share of the last run's FLOPs that each block took; empty where nothing was counted."""
    blocks = {e.name: [b.site for b in e.blocks] for e in session.engine.experts}
    total = session.meter.dense(blocks).flops_dense
    outside = session.meter.dense({}).flops_dense
    if not total:
        return {}
    return {
        expert: [(session.meter.dense({expert: [site]}).flops_dense - outside) / total for site in sites]
        for expert, sites in blocks.items()
    }


def calibrate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    model: ModelDescription | None = None,
    seed: int = 0,
    on_step: StepListener | None = None,
    on_prompt: Callable[[int, str], None] | None = None,
    part: Path | None = None,
    **call: Any,
) -> Calibration:
    """Run the exact pipeline once for each prompt and keep what was measured.

    Args:
        pipeline: a diffusers pipeline that no session holds.
        prompts: one clip each; more prompts, steadier means.
        model: its description; found from the pipeline when left out.
        seed: of the first clip; clip i gets seed + i.
        on_step: called after every step, as in a session.
        on_prompt: called with (number, prompt) before every clip.
        part: file that finished clips are kept in, so that an interrupted calibration goes on behind them. The caller
            deletes it.
        call: the pipeline's arguments (steps, shape, guidance); what is left out is the model's default.

    Raises:
        ConfigError: no prompts, or fewer than `LEAST_STEPS` steps.
        PlanError: the model's blocks cannot be addressed.
        ModelError: the pipeline did not run as a trajectory of steps.
        ShapeError: a shape the model cannot make.
    """
    if not prompts:
        raise ConfigError("a calibration needs at least one prompt.")
    model = model or describe_pipeline(pipeline)
    workload = model.asked(call)
    if workload.steps < LEAST_STEPS:
        raise ConfigError(
            f"{workload.steps} steps leave nothing to compare; calibrate with {LEAST_STEPS} steps or more."
        )
    call = {"num_inference_steps": workload.steps, "output_type": "latent"} | call
    recorder = Recorder()
    key = key_of(model, pipeline, workload)
    log = Finished(part, {"key": asdict(key), "prompts": prompts_digest(prompts), "seed": seed})
    grams, clips = log.grams, log.clips
    with accelerate(pipeline, Plan([recorder]), model=model, on_step=on_step) as session:
        for i, prompt in enumerate(prompts):
            if i < len(clips):
                continue
            if on_prompt is not None:
                on_prompt(i, prompt)
            clip = recorder.sink.clip = Clip()
            session(prompt, seed=seed + i, **call)
            clip.costs = _costs(session)
            log.add(_gram(clip, workload.steps), clip)
    import vivace

    return Calibration(
        key=key,
        prompts=len(prompts),
        prompts_sha256=prompts_digest(prompts),
        seed=seed,
        vivace=vivace.__version__,
        sigmas=_sigmas(clips[0], pipeline.scheduler),
        timesteps=[float(t) for t in clips[0].timesteps],
        gram=mean_gram(grams).tolist(),
        curves=_curves(clips),
        signals=[_signals(clip) for clip in clips],
        costs=clips[0].costs,
    )


def _signals(clip: Clip) -> Signals:
    """The clip's tables with six digits: they are compared with thresholds."""

    def short(values: list[Any]) -> list[Any]:
        return [short(v) if isinstance(v, list) else float(f"{v:.6g}") for v in values]

    return Signals(**{name: short(table) for name, table in clip.signals.items()})


def _gram(clip: Clip, steps: int) -> np.ndarray:
    cond, uncond = clip.outputs[COND], clip.outputs[UNCOND]
    if len(cond) != steps or len(uncond) not in (0, steps):
        raise ModelError(
            f"{len(cond)} conditional and {len(uncond)} unconditional evaluations were seen in {steps} steps; "
            "a calibration needs one of each kind a step."
        )
    return gram(np.stack(cond), np.stack(uncond) if uncond else None)


def _sigmas(clip: Clip, scheduler: Any) -> list[float]:
    """Noise levels (n + 1); the share of the training timesteps where the scheduler has none."""
    n = len(clip.timesteps)
    if len(clip.sigmas) >= n:
        return ([float(s) for s in clip.sigmas] + [0.0])[: n + 1]
    trained = float(scheduler.config.get("num_train_timesteps", 1000))
    return [float(t) / trained for t in clip.timesteps] + [0.0]


def _curves(clips: Sequence[Clip]) -> dict[str, dict[str, Curves]]:
    out: dict[str, dict[str, Curves]] = {}
    for expert, branch in clips[0].rows:
        rows = [clip.rows[expert, branch] for clip in clips]
        values = {name: np.array([[r[name] for r in clip] for clip in rows]) for name in _SCALARS}
        blocks = np.array([[r["block_change"] for r in clip] for clip in rows]).mean(0)
        out.setdefault(expert, {})[branch] = Curves(
            steps=[r["step"] for r in rows[0]],
            **{name: v.mean(0).tolist() for name, v in values.items()},
            tea_polynomial=fit(values["time_change"][:, 1:].ravel(), values["output_change"][:, 1:].ravel()),
            block_change=blocks.tolist(),
            block_sensitivity=(blocks[1:] if len(blocks) > 1 else blocks).mean(0).tolist(),
            percentiles={
                name: {str(p): np.percentile(values[name], p, axis=0).tolist() for p in LEVELS}
                for name in CHANGES
            },
        )
    return out


def fit(time_change: np.ndarray, output_change: np.ndarray) -> list[float]:
    """TeaCache's polynomial, five coefficients, highest power first; of a lower degree where few points differ."""
    points = len(np.unique(time_change.round(9)))
    if not points:
        return [0.0] * (_DEGREE + 1)
    found = np.polyfit(time_change, output_change, min(_DEGREE, points - 1))
    return np.concatenate([np.zeros(_DEGREE + 1 - len(found)), found]).tolist()
