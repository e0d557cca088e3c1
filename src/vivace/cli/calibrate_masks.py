"""`vivace calibrate --technique sparse_vdit`: search the attention masks of a model's heads, into a file."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from vivace.cli.shared.run import Job
    from vivace.core.context import Clock
    from vivace.core.receipt import StepRecord
    from vivace.techniques.attention.headwise import HeadwiseSparse

PATTERNED = ("sparse_vdit", "sliding_tile", "efficient_vdit")
"""Techniques whose heads (or layers) choose from patterns; the module of each offers its `PATTERNS`."""
ORDERED = ("paro",)
"""Techniques whose heads have orders of the axes, and masks."""
MASKED = (*PATTERNED, *ORDERED)
OF_SEARCH = ("mass", "density")
"""Settings of `paro` that belong to the search: what the masks hold, or how dense they are."""


@dataclass(frozen=True)
class Wanted:
    """What is searched for.

    Attributes:
        technique: with the user's settings, without a file.
        search: arguments of the search.
    """

    technique: HeadwiseSparse
    search: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the technique."""
        return self.technique.card.name


def is_masked(technique: str) -> bool:
    """Whether a `--technique` (a name, perhaps with settings) is one whose masks are searched."""
    return technique.partition("@")[0] in MASKED


def wanted(text: str) -> Wanted:
    """A technique by its name, with settings: `sparse_vdit@density=0.4`, `paro@mass=0.8,block=64`.

    Raises:
        ConfigError: a setting that it does not have or that a search gives.
    """
    import yaml

    from vivace.core.errors import ConfigError
    from vivace.techniques.base import registry

    name, _, rest = text.partition("@")
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key == "file":
            raise ConfigError(
                f"'{part}' is no setting that {name} can be searched with; write key=value, and leave out file."
            )
        values[key] = yaml.safe_load(value)
    search: dict[str, Any] = {}
    if name in ORDERED:
        search = {key: values.pop(key) for key in OF_SEARCH if key in values}
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in search.values()):
            raise ConfigError(f"mass and density of {name} are shares from 0 to 1.")
    found = registry[name]
    technique: Any = found.from_dict({"_version": found.version, **values})
    return Wanted(technique, search | {"block": technique.block})


def search_and_tell(
    job: Job,
    prompts: Sequence[str],
    unseen: str,
    sought: Wanted,
    *,
    seed: int,
    output: Path,
    plan_file: Path | None,
    verify: bool,
) -> None:
    """Search, write and say what came of it.

    Args:
        job: model, shape and steps of the exact runs.
        prompts: one exact run each.
        unseen: a prompt that is not among them, for the trial.
        plan_file: where a plan with the masks is written.
        verify: whether it is tried.

    Raises:
        PlanError: the model's attention cannot be addressed.
    """
    from rich.markup import escape

    from vivace.cli.calibrate_target import Check
    from vivace.cli.shared.output import Outputs
    from vivace.cli.shared.run import load
    from vivace.cli.shared.screen import screen
    from vivace.plans.plan import Plan

    trial = None
    with Outputs() as outputs:
        hidden = outputs.reserve(output)
        written = outputs.reserve(plan_file) if plan_file is not None else None
        pipeline = load(job)
        _searched(job, pipeline, prompts, sought, seed).save(hidden)
        technique = sought.technique.replace(file=str(hidden))
        told = _told(technique, job)
        if verify:
            trial = Check(job, pipeline, unseen, seed + len(prompts)).trial(technique, 0.0, loss=True)
            told.add_row(
                "counted",
                f"{trial.counted:.2f} times less work, relative error {trial.loss:.4g}: {escape(unseen)}",
            )
        if written is not None:
            # The plan may be used from another folder.
            Plan([technique.replace(file=str(output.resolve()))], name="masked").save(written)
    out = screen()
    out.print(told)
    out.print(f"\n[bold]{escape(str(output))}[/]", soft_wrap=True)
    if plan_file is not None:
        out.print(
            f"[bold]{escape(str(plan_file))}[/]  a plan: --plan {escape(str(plan_file))}", soft_wrap=True
        )


@dataclass
class Lines:
    """One progress line for each prompt; what runs tells of steps only."""

    prompts: int
    steps: int
    stack: contextlib.ExitStack
    what: str = ""
    _lines: list[Any] = field(default_factory=list)
    _done: int = 0

    def open(self) -> None:
        from vivace.cli.shared.progress import Steps

        self.stack.pop_all().close()
        number = self._done // self.steps + 1
        self._lines[:] = [
            self.stack.enter_context(Steps(f"{self.what}{number} of {self.prompts}", self.steps))
        ]

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        if self._done and self._done % self.steps == 0:
            self.open()
        self._done += 1
        self._lines[0].on_step(clock, record)


def _searched(job: Job, pipeline: object, prompts: Sequence[str], sought: Wanted, seed: int) -> Any:
    """The file of masks: `MaskFile` or `OrderFile`."""
    import importlib

    from vivace.plans.mask_searching import search_masks, search_orders

    with contextlib.ExitStack() as stack:
        lines = Lines(len(prompts), job.workload.steps, stack)
        lines.open()
        common = {"model": job.model, "seed": seed, "on_step": lines.on_step, **job.call, **sought.search}
        if sought.name in ORDERED:
            return search_orders(pipeline, prompts, **common)
        patterns = importlib.import_module(f"vivace.techniques.attention.{sought.name}").PATTERNS
        return search_masks(pipeline, prompts, patterns, **common)


def _told(technique: Any, job: Job) -> Table:
    """What was found: which patterns the heads get with the technique's settings, or what the masks hold."""
    from rich.markup import escape

    from vivace.cli.shared.screen import facts
    from vivace.techniques.attention.axis_orders import OrderFile
    from vivace.techniques.attention.mask_file import MaskFile

    rows = facts()
    ordered = technique.card.name in ORDERED
    found: Any = (OrderFile if ordered else MaskFile).load(technique.file)
    k = found.key
    rows.add_row("model", f"{k.family}, {k.model_hash}")
    rows.add_row("clip", f"{k.frames} frames of {k.width}x{k.height}, guidance {k.guidance:g}")
    rows.add_row("prompts", f"{found.prompts}, seeds from {found.seed}, {k.steps} steps each")
    if ordered:
        blocks = [found.mask(e, i) for e, masks in found.masks.items() for i in range(len(masks))]
        dense = sum(float(b.mean()) for b in blocks) / len(blocks)
        rows.add_row("masks", f"{dense:.1%} of the blocks, which hold {found.mass:.1%} of the probability")
        return rows
    given = [
        n
        for expert, layers in found.shape().items()
        for i, heads in enumerate(layers)
        for n in technique.assigned(expert, i, heads)
    ]
    for number, heads in sorted(Counter(given).items()):
        share = f"{found.densities[number]:.1%} of the pairs"
        rows.add_row(escape(found.patterns[number]), f"{heads} of {len(given)} heads, {share}")
    mean = sum(found.densities[n] for n in given) / len(given)
    rows.add_row("together", f"{mean:.1%} of the pairs of a clip like these")
    return rows
