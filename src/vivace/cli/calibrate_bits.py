"""`vivace calibrate --technique quantized_linear`: activation maxima, errors of formats, and which layer gets which."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from vivace.cli.calibrate_target import Check
    from vivace.cli.shared.run import Job
    from vivace.kernels.quant_linear.spec import Recipe
    from vivace.models.adapter import LinearSite
    from vivace.plans.solving import Trial
    from vivace.techniques.compression.activation_maxima import ActivationMaxima
    from vivace.techniques.compression.mixed_bits import BitErrors, MixedBits
    from vivace.techniques.compression.quantized_linear import QuantizedLinear

TECHNIQUE = "quantized_linear"
BUDGETS = ("bits", "bytes", "loss")
"""What `--target` may bound: average bits of a weight with its scales, bytes of all, relative error of the latent."""
FILES = ("mixed", "maxima")
FORMATS = "int4+int8"
GROUP = 64
"""Weights that share a scale in formats below 8 bits, where the user says nothing."""
CALLS = 4
Wish = tuple[str, float]


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        technique: with the user's settings, without files.
        candidates: ways to quantise a layer that are measured.
        by: `layer`, `role` or `block`: what gets a format by itself.
        calls: recorded steps of every prompt.
        wish: the budget; None for activation maxima alone.
    """

    technique: QuantizedLinear
    candidates: tuple[Recipe, ...]
    by: str
    calls: int
    wish: Wish | None


@dataclass(frozen=True)
class Answer:
    """A choice of formats, where it lies, and what a real run with it lost."""

    chosen: MixedBits
    technique: QuantizedLinear
    trial: Trial | None = None

    @property
    def error(self) -> float:
        """Predicted, of one evaluation."""
        return self.chosen.told["error"]


def is_quantised(technique: str) -> bool:
    """Whether a `--technique` (a name, perhaps with settings) is the one whose formats are chosen."""
    return technique.partition("@")[0] == TECHNIQUE


def wish_of(text: str) -> Wish:
    """`bits=5` as ("bits", 5.0).

    Raises:
        ConfigError: another word, or a number that no model can have.
    """
    from vivace.core.errors import ConfigError

    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if name not in BUDGETS or not 0.0 < number < float("inf"):
        raise ConfigError(
            f"the target '{text}' of {TECHNIQUE} is none of bits=X (average bits of a weight), bytes=X (of all "
            "weights) and loss=X (relative error of the final latent), with X above 0."
        )
    return name, number


def wanted(text: str, target: str | None) -> Wanted:
    """The technique by its name, with settings: `quantized_linear@smooth=0.5,formats=int4+int8,by=role`.

    Raises:
        ConfigError: a setting that it does not have or that a file gives, formats that do not exist, or nothing to do.
    """
    import yaml

    from vivace.core.errors import ConfigError
    from vivace.kernels.quant_linear.spec import Recipe
    from vivace.plans.quant_searching import UNITS
    from vivace.techniques.base import registry

    rest = text.partition("@")[2]
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key in FILES:
            raise ConfigError(
                f"'{part}' is no setting that {TECHNIQUE} can be calibrated with; write key=value, and leave out "
                f"{' and '.join(FILES)}."
            )
        values[key] = yaml.safe_load(value)
    formats, by, calls = (
        str(values.pop(k, d)) for k, d in (("formats", FORMATS), ("by", "layer"), ("calls", CALLS))
    )
    if by not in UNITS or not calls.isdigit() or int(calls) < 1:
        raise ConfigError(
            f"by is one of {', '.join(UNITS)} and calls a number from 1 on, not {by} and {calls}."
        )
    smooth = values.pop("smooth", 0.0)
    found = registry[TECHNIQUE]
    technique: Any = found.from_dict({"_version": found.version, **values})
    technique = technique.replace(smooth=smooth)
    if target is None and not technique.smooth:
        raise ConfigError(
            f"{TECHNIQUE} needs a --target (bits=5, bytes=4e9 or loss=0.05) for formats layer by layer, or smooth "
            f"above 0 ({TECHNIQUE}@smooth=0.5) for activation maxima."
        )
    rotate, rank = technique.rotate == "hadamard", technique.low_rank
    try:
        candidates = tuple(
            Recipe(
                weights=name,
                activations=technique.activations,
                group=(technique.group or GROUP * (name == "int4")) if name.startswith("int") else 0,
                rotate=rotate,
                low_rank=rank,
            )
            for name in formats.split("+")
        )
    except ValueError as error:
        raise ConfigError(f"formats={formats}: {error}.") from None
    wish = None if target is None else wish_of(target)
    # The last figure of a format's name is the bits of its codes; scales come on top, by the layers' shapes.
    least = min(int(recipe.weights[-1]) for recipe in candidates)
    if wish is not None and wish[0] == "bits" and wish[1] <= least:
        raise ConfigError(
            f"no mix of {formats.replace('+', ' and ')} has {wish[1]:g} bits a weight: codes take {least} and scales "
            "come on top; ask for more, or give other formats."
        )
    return Wanted(technique, candidates, by, int(calls), wish)


def calibrate_and_tell(
    job: Job,
    prompts: Sequence[str],
    unseen: str,
    asked: Wanted,
    *,
    seed: int,
    output: Path,
    plan_file: Path | None,
    verify: bool,
    part: Path,
) -> None:
    """Record, measure, choose, write and say what came of it.

    Args:
        job: model, shape and steps of the exact runs.
        prompts: one exact run each.
        unseen: a prompt that is not among them, for the trial.
        asked: what for.
        output: the file of formats; maxima and measured errors go beside it.
        plan_file: where a plan with the files is written.
        verify: whether it is tried, and a loss corrected.
        part: file of the finished layers; the caller says what an interrupt leaves.

    Raises:
        PlanError: the model's linears cannot be addressed.
        ConfigError: the budget cannot be met; the sentence says what can.
    """
    from rich.markup import escape

    from vivace.cli.calibrate_target import Check
    from vivace.cli.shared.output import Outputs
    from vivace.cli.shared.run import load
    from vivace.cli.shared.screen import facts, screen
    from vivace.plans.plan import Plan

    smoothed, measures = bool(asked.technique.smooth), asked.wish is not None
    kept = {"mixed": output} if measures else {}
    kept |= {"maxima": beside(output, "maxima.safetensors")} if smoothed else {}
    kept |= {"errors": beside(output, "errors.json")} if measures else {}
    told, answer = facts(), None
    with Outputs() as outputs:
        hidden = {name: outputs.reserve(path) for name, path in kept.items()}
        written = outputs.reserve(plan_file) if plan_file is not None else None
        pipeline = load(job)
        technique, maxima = asked.technique, None
        if smoothed:
            maxima = _maxima(job, pipeline, prompts, seed)
            maxima.save(hidden["maxima"])
            technique = technique.replace(maxima=str(hidden["maxima"]))
            told.add_row("maxima", f"of the inputs of {len(maxima.layers)} layers")
        check = Check(job, pipeline, unseen, seed + len(prompts))
        if asked.wish is not None:
            errors = _errors(job, pipeline, prompts, asked, maxima, seed, part)
            errors.save(hidden["errors"])
            answer = _answered(
                errors, replace(asked, technique=technique), hidden["mixed"], check if verify else None
            )
            answer.chosen.save(hidden["mixed"])
            _tell(told, asked, errors, answer)
            trial = answer.trial
        else:
            trial = check.trial(technique, 0.0, loss=True) if verify else None
        told.add_row(
            "measured",
            "not checked"
            if trial is None
            else f"relative error {trial.loss:.4g} of the latent: {escape(unseen)}",
        )
        if (
            asked.wish is not None
            and asked.wish[0] == "loss"
            and trial is not None
            and trial.loss > asked.wish[1]
        ):
            told.add_row("", "no choice that was tried keeps the error; the nearest is kept")
        if written is not None:
            # The plan may be used from another folder.
            files = {name: str(kept[name].resolve()) for name in FILES if name in kept}
            Plan([asked.technique.replace(**files)], name="mixed" if measures else "smoothed").save(written)
    part.unlink(missing_ok=True)
    out = screen()
    out.print(told)
    out.print()
    for path in kept.values():
        out.print(f"[bold]{escape(str(path))}[/]", soft_wrap=True)
    if plan_file is not None:
        out.print(
            f"[bold]{escape(str(plan_file))}[/]  a plan: --plan {escape(str(plan_file))}", soft_wrap=True
        )


def beside(output: Path, ending: str) -> Path:
    """`mixed.json` -> `mixed.maxima.safetensors`."""
    return output.with_name(f"{output.stem}.{ending}")


def _maxima(job: Job, pipeline: object, prompts: Sequence[str], seed: int) -> ActivationMaxima:
    from vivace.cli.calibrate_masks import Lines
    from vivace.plans.quant_searching import record_maxima

    with contextlib.ExitStack() as stack:
        lines = Lines(len(prompts), job.workload.steps, stack, "maxima ")
        lines.open()
        return record_maxima(pipeline, prompts, model=job.model, seed=seed, on_step=lines.on_step, **job.call)


def _errors(
    job: Job,
    pipeline: object,
    prompts: Sequence[str],
    asked: Wanted,
    maxima: ActivationMaxima | None,
    seed: int,
    part: Path,
) -> BitErrors:
    """Errors of every candidate at every unit, with a line that counts units."""
    from dataclasses import asdict

    from vivace.calibration.artifact import key_of, prompts_digest
    from vivace.cli.calibrate_masks import Lines
    from vivace.cli.shared.screen import screen
    from vivace.plans.quant_searching import measure_errors, record_calls
    from vivace.techniques.compression.linears import takes_role

    options: dict[str, Any] = {"model": job.model, "seed": seed, "count": asked.calls}
    t = asked.technique

    def takes(site: LinearSite, depth: int) -> bool:
        return t.skip_blocks <= site.block < depth - t.skip_blocks and takes_role(t.roles, site.role)

    header = {
        "key": asdict(key_of(job.model, pipeline, job.workload)),
        "prompts": prompts_digest(prompts),
        "seed": seed,
    }
    with contextlib.ExitStack() as stack:
        lines = Lines(len(prompts), job.workload.steps, stack, "calls ")
        lines.open()
        calls = record_calls(pipeline, prompts, on_step=lines.on_step, **options, **job.call)
    with screen(stderr=True).status("[quiet]measuring layers") as status:
        return measure_errors(
            pipeline,
            calls,
            asked.candidates,
            by=asked.by,
            backend=asked.technique.backend,
            takes=takes,
            maxima=maxima,
            smooth=asked.technique.smooth,
            on_unit=lambda number, total: status.update(f"[quiet]measuring {number + 1} of {total}"),
            part=part,
            header=header,
        )


def _answered(errors: BitErrors, asked: Wanted, hidden: Path, check: Check | None) -> Answer:
    """The choice, tried in a real run; one under a loss is corrected until the run keeps it."""
    from vivace.plans.solving import best, within

    assert asked.wish is not None
    name, value = asked.wish

    def chosen(bound: float) -> Answer:
        budget: dict[str, Any] = {"nbytes" if name == "bytes" else name: bound}
        found = errors.choose(**budget)
        return Answer(found, asked.technique)

    def tried(answer: Answer) -> Trial:
        assert check is not None
        answer.chosen.save(hidden)
        trial = check.trial(answer.technique.replace(mixed=str(hidden)), 0.0, loss=True)
        # Of choices that keep the loss, the smallest is the best.
        return replace(trial, counted=1.0 / answer.chosen.told["bytes"])

    if check is None:
        return chosen(value)
    if name != "loss":
        answer = chosen(value)
        return replace(answer, trial=tried(answer))
    runs = within(chosen, tried, value)
    kept = best([t for _, t in runs], loss=value)
    return replace(next(a for a, t in runs if t is kept), trial=kept)


def _tell(rows: Table, asked: Wanted, errors: BitErrors, answer: Answer) -> None:
    """What was asked for, and which layers get what."""
    assert asked.wish is not None
    from vivace.report.units import size

    name, value = asked.wish
    rows.add_row(
        "asked",
        {
            "bits": f"{value:g} bits of a weight at most",
            "bytes": f"{size(value)} of weights at most",
            "loss": f"a relative error of {value:g} at most",
        }[name],
    )
    counted = f"{len(errors.units)} units, {len(errors.candidates)} formats, {len(errors.calls)} evaluations"
    rows.add_row("measured on", counted)
    layers = Counter("as it was" if s is None else s["weights"] for s in answer.chosen.layers.values())
    for format, number in sorted(layers.items()):
        rows.add_row(format, f"{number} of {len(answer.chosen.layers)} layers")
    told = answer.chosen.told
    full = sum(errors.full_bytes)
    rows.add_row("weights", f"{size(told['bytes'])} of {size(full)}, {told['bits']:.2f} bits each")
    rows.add_row("predicted", f"error {told['error']:.4g} of one evaluation")
