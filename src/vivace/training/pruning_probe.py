"""Importance by probing: take one block, head or group of channels out at a time, and see what the prediction loses.

Two figures for each: the squared error of the prediction relative to the whole model's, and the rise of the
flow-matching loss against the true target (a bound on the likelihood, hence "ELBO"), both averaged over noise levels,
with text and without. Units are really taken out, by the same edits that prune (`vivace.models.pruning.cut`), so that
a norm over heads is seen to change.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.core.surgery import Surgery
from vivace.models.pruned_costs import counted, unit_costs
from vivace.models.pruned_file import base_hash
from vivace.models.pruning import Anatomy, Kept, Unit, cut
from vivace.tiny.train.common import Processes, write_json
from vivace.training.pruning_data import NoisyBatch

FORM, VERSION = "vivace importance", 1


@torch.no_grad()
def channel_groups(
    whole: Anatomy, batches: list[NoisyBatch], processes: Processes, groups: int
) -> dict[str, list[list[int]]]:
    """Channels of each feed-forward in `groups` groups of equal size, the weakest first.

    A channel's strength is the size of its activation times the length of its column in the projection out.
    """
    energy: dict[str, Tensor] = {}
    hooks = []
    for path, part in whole.feed_forwards.items():

        def seen(module: Any, args: Any, path: str = path) -> None:
            value = args[0].float().square().flatten(0, -2).sum(0)
            energy[path] = energy.get(path, torch.zeros_like(value)) + value

        hooks.append(part.columns[0].module.register_forward_pre_hook(seen))
    try:
        for batch in batches:
            with processes.autocast():
                batch.call(whole.expert.module)
    finally:
        for hook in hooks:
            hook.remove()
    out = {}
    for path, part in whole.feed_forwards.items():
        if part.size % groups:
            raise ConfigError(f"{part.size} channels do not make {groups} equal groups; give a divisor.")
        weight: Any = part.columns[0].module.weight
        order = (energy[path] * weight.float().square().sum(0)).argsort().tolist()
        each = part.size // groups
        out[path] = [sorted(order[i : i + each]) for i in range(0, part.size, each)]
    return out


class Probe:
    """A table of importance that is filled unit by unit, and can be taken up again from its file.

    Args:
        whole: the transformer.
        batches: held-out calls; their content is part of the settings' hash.
        processes: where it runs.
        path: the JSON file, written after every `save_every` seconds.
        settings: what else the figures depend on, for people.

    Raises:
        ConfigError: the file belongs to another model or other settings.
    """

    def __init__(
        self,
        whole: Anatomy,
        batches: list[NoisyBatch],
        processes: Processes,
        path: Path,
        settings: Mapping[str, Any],
    ) -> None:
        self.whole, self.batches, self.processes, self.path = whole, batches, processes, path
        content = hashlib.sha256(json.dumps(dict(settings), sort_keys=True, default=str).encode())
        for batch in batches:
            # Rounded, because an encoder on another device gives the last bits otherwise.
            content.update(json.dumps([len(batch.x), round(float(batch.x.float().abs().mean()), 2)]).encode())
        head = {"format": FORM, "version": VERSION, "base": base_hash(whole.expert.module)}
        self.table: dict[str, Any] = head | {
            "settings": dict(settings),
            "settings_hash": content.hexdigest()[:16],
            "groups": None,
            "flops": None,
            "units": {},
        }
        if path.is_file():
            self._take_up(read(path))

    def _take_up(self, found: dict[str, Any]) -> None:
        if found["base"] != self.table["base"]:
            raise ConfigError(f"{self.path} was measured on another model; give another file, or delete it.")
        if found["settings_hash"] != self.table["settings_hash"]:
            raise ConfigError(
                f"{self.path} was measured with other settings; give another file, or delete it."
            )
        self.table = found

    @torch.no_grad()
    def run(
        self,
        kinds: Iterable[str],
        groups: int,
        *,
        save_every: float = 10.0,
        stop_after: int | None = None,
        say: Callable[[str], None] = print,
    ) -> dict[str, Any]:
        """Fill the table; what is in it already is not measured again. Returns it.

        Args:
            kinds: of `vivace.models.pruning.KINDS`.
            groups: groups of channels in each feed-forward.
            stop_after: units after which to stop as an interruption would (for tests).
        """
        whole, table = self.whole, self.table
        if table["groups"] is None:
            table["groups"] = channel_groups(whole, self.batches[: 2 * 5], self.processes, groups)
        units = whole.units(table["groups"], kinds)
        costs = unit_costs(whole, units, self._count())
        exact, base = self._predictions(), 0.0
        base = self._flow(exact)
        table["flow_whole"] = base
        started, saved, done = time.perf_counter(), time.perf_counter(), 0
        for unit in units:
            if unit.name in table["units"]:
                continue
            edit = Surgery()
            try:
                cut(edit, whole, whole.everything().without(unit, whole))
                got = self._predictions()
            finally:
                edit.close()
            errors = [
                float((g - e).square().sum() / e.square().sum()) for g, e in zip(got, exact, strict=True)
            ]
            table["units"][unit.name] = {
                "kind": unit.kind,
                "path": unit.path,
                "members": list(unit.members),
                "error": sum(errors) / len(errors),
                "flow": self._flow(got) - base,
                "flops": costs[unit],
            }
            done += 1
            if time.perf_counter() - saved > save_every or done == stop_after:
                self.save()
                saved = time.perf_counter()
                say(f"probed {len(table['units'])}/{len(units)} in {saved - started:.0f} s")
            if done == stop_after:
                return table
        self.save()
        return table

    def save(self) -> None:
        """Write the table; an interruption leaves the earlier file whole."""
        if self.processes.leads:
            partial = self.path.with_suffix(".partial")
            write_json(partial, self.table)
            partial.replace(self.path)

    def _count(self) -> Any:
        first = self.batches[0]
        call = {
            "hidden_states": first.x[:1],
            "timestep": 1000.0 * first.s[:1],
            "encoder_hidden_states": first.text[:1],
        }
        with self.processes.autocast():
            counts = counted(self.whole.expert, call)
        self.table["flops"] = counts.flops
        return counts

    def _predictions(self) -> list[Tensor]:
        out = []
        for batch in self.batches:
            with self.processes.autocast():
                out.append(batch.call(self.whole.expert.module).float())
        return out

    def _flow(self, got: list[Tensor]) -> float:
        losses = [float((g - b.truth).square().mean()) for g, b in zip(got, self.batches, strict=True)]
        return sum(losses) / len(losses)


@torch.no_grad()
def drop_blocks(
    whole: Anatomy,
    batches: list[NoisyBatch],
    processes: Processes,
    depth: int,
    say: Callable[[str], None] = print,
) -> Kept:
    """Take out one block after another until `depth` are left, each time the one that does least harm then.

    What two blocks are worth together is not the sum of what each is worth, so that every round probes anew.

    Raises:
        ConfigError: the model cannot have so many blocks.
    """
    if not len(whole.lists) <= depth <= len(whole.blocks):
        raise ConfigError(
            f"the model has {len(whole.blocks)} blocks; keep {len(whole.lists)} of them or more."
        )
    module: Any = whole.expert.module
    kept = whole.everything()

    def predictions() -> list[Tensor]:
        with processes.autocast():
            return [batch.call(module).float() for batch in batches]

    exact = predictions()
    while len(kept.blocks) > depth:
        errors: dict[str, float] = {}
        for paths in whole.lists.values():
            stay = [p for p in paths if p in kept.blocks]
            for path in stay if len(stay) > 1 else ():
                edit = Surgery()
                try:
                    cut(edit, whole, kept.without(Unit("block", path), whole))
                    pairs = zip(predictions(), exact, strict=True)
                    errors[path] = sum(float((g - e).square().sum() / e.square().sum()) for g, e in pairs)
                finally:
                    edit.close()
        worst = min(errors, key=lambda p: errors[p])
        say(f"takes out {worst}: error {errors[worst] / len(batches):.4f}")
        kept = kept.without(Unit("block", worst), whole)
    return kept


def read(path: Path) -> dict[str, Any]:
    """A table of importance.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a table of importance ({error}).") from None
    if not isinstance(found, dict) or found.get("format") != FORM or found.get("version") != VERSION:
        raise ConfigError(
            f"{path} is no table of importance; make one with `python -m vivace.training.pruning probe`."
        )
    return found


def scores_and_costs(
    table: Mapping[str, Any], kinds: Iterable[str], measure: str = "error"
) -> tuple[dict[Unit, float], dict[Unit, float]]:
    """Harm (`error` or `flow`, at least 0) and FLOPs of each unit of some kinds in a table."""
    wanted, scores, costs = set(kinds), {}, {}
    for row in table["units"].values():
        if row["kind"] in wanted:
            unit = Unit(row["kind"], row["path"], tuple(row["members"]))
            scores[unit], costs[unit] = max(float(row[measure]), 0.0), float(row["flops"])
    return scores, costs
