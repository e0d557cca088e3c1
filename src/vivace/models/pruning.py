"""What can be taken out of a transformer, and taking it out for good: blocks, attention heads, feed-forward channels.

Everything is found through the adapter's block lists, attention sites and roles of linears. A removal changes true
shapes: the block list is shorter, the linears are smaller, nothing is masked. It is written as edits of a ledger, so
that a probe can put back what it took, and a technique can undo it.

Paths are those inside the transformer (`blocks.3`, `blocks.3.attn1`, `blocks.3.ffn`), always of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from vivace.core.errors import ConfigError
from vivace.core.surgery import Surgery
from vivace.models.adapter import Adapter, Expert, LinearSite

KINDS = ("block", "head", "channels")
_ROWS, _COLUMNS = ("q", "k", "v", "in"), ("out",)
_HEAD_FACTS = ("heads", "inner_dim", "kv_inner_dim", "inner_kv_dim", "sliceable_head_dim")
"""Attributes of diffusers' attention modules that grow with the number of heads."""
_ROTATED_TOGETHER = {"LTXVideoTransformer3DModel"}
"""Classes whose rotary factors run over all heads at once: heads of their self-attention are not alike."""
_CHANNEL_KEYS = {"WanTransformer3DModel": "ffn_dim"}
"""Configuration key of the feed-forward width, where the class has one."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Something that can be removed: a whole block, one head of an attention, a group of channels."""

    kind: str
    path: str
    members: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Its key in tables: groups of channels do not overlap, so that their first member tells them apart."""
        return self.path if self.kind == "block" else f"{self.path}:{self.members[0]}"


@dataclass(frozen=True)
class Kept:
    """What stays: block paths in running order, and heads and channels by path, where not all of them stay."""

    blocks: tuple[str, ...]
    heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    channels: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)

    def without(self, unit: Unit, anatomy: Anatomy) -> Kept:
        """With one unit less; the parts of a block that goes are forgotten."""
        if unit.kind == "block":
            gone = unit.path + "."
            return Kept(
                tuple(b for b in self.blocks if b != unit.path),
                {k: v for k, v in self.heads.items() if not k.startswith(gone)},
                {k: v for k, v in self.channels.items() if not k.startswith(gone)},
            )
        if unit.kind == "head":
            left = self.heads.get(unit.path, tuple(range(anatomy.attentions[unit.path].size)))
            return Kept(self.blocks, {**self.heads, unit.path: _minus(left, unit)}, self.channels)
        left = self.channels.get(unit.path, tuple(range(anatomy.feed_forwards[unit.path].size)))
        return Kept(self.blocks, self.heads, {**self.channels, unit.path: _minus(left, unit)})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        tables = {
            "heads": {k: list(v) for k, v in self.heads.items()},
            "channels": {k: list(v) for k, v in self.channels.items()},
        }
        return {"blocks": list(self.blocks), **tables}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: it is something else.
        """
        try:
            tables = [{str(k): tuple(map(int, v)) for k, v in data[t].items()} for t in ("heads", "channels")]
            return cls(tuple(map(str, data["blocks"])), *tables)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"this does not say what a pruned model keeps ({error!r}).") from None


def _minus(left: Sequence[int], unit: Unit) -> tuple[int, ...]:
    return tuple(i for i in left if i not in unit.members)


@dataclass(frozen=True, slots=True)
class Part:
    """A module with `size` heads or channels that can go one by one.

    `rows` and `columns` are linears whose outputs and inputs belong to them; `norms` are norms over all of them;
    `repeats` is how often they occur in the rows (2 in a gated feed-forward).
    """

    path: str
    block: str
    module: nn.Module
    size: int
    rows: tuple[LinearSite, ...]
    columns: tuple[LinearSite, ...]
    norms: tuple[nn.Module, ...] = ()
    repeats: int = 1


@dataclass(frozen=True)
class Anatomy:
    """The removable parts of one transformer, by path; attentions and feed-forwards that cannot be cut are left out."""

    expert: Expert
    lists: Mapping[str, tuple[str, ...]]
    """Block-list attribute -> paths of its blocks."""
    depth_keys: Mapping[str, str]
    attentions: Mapping[str, Part]
    feed_forwards: Mapping[str, Part]

    @property
    def blocks(self) -> tuple[str, ...]:
        """All block paths in running order."""
        return tuple(b for paths in self.lists.values() for b in paths)

    def everything(self) -> Kept:
        """The whole model."""
        return Kept(self.blocks)

    def units(
        self, groups: Mapping[str, Sequence[Sequence[int]]], kinds: Iterable[str] = KINDS
    ) -> list[Unit]:
        """All removable units; `groups` tells which channels of a feed-forward go together."""
        out: list[Unit] = []
        if "block" in kinds:
            out += [Unit("block", b) for paths in self.lists.values() if len(paths) > 1 for b in paths]
        if "head" in kinds:
            out += [
                Unit("head", p, (h,)) for p, a in self.attentions.items() if a.size > 1 for h in range(a.size)
            ]
        if "channels" in kinds:
            out += [Unit("channels", p, tuple(g)) for p in self.feed_forwards for g in groups.get(p, ())]
        return out


def anatomy(adapter: Adapter, module: nn.Module, name: str = "transformer") -> Anatomy:
    """Look a live transformer over."""
    expert = adapter.expert(name, module)
    lists: dict[str, tuple[str, ...]] = {}
    for attribute in adapter.layouts:
        if len(children := getattr(module, attribute, ())):
            lists[attribute] = tuple(f"{attribute}.{i}" for i in range(len(children)))
    paths = [path for group in lists.values() for path in group]
    cut = len(name) + 1
    together = type(module).__name__ in _ROTATED_TOGETHER
    attentions: dict[str, Part] = {}
    for site in expert.attentions:
        path, block = site.site[cut:], paths[site.index]
        part = _attention(expert, path, block, site.module, site.heads, site.head_dim)
        if part is not None and not (together and site.kind == "self"):
            attentions[path] = part
    feed_forwards = {
        site.site[cut:]: part
        for site in expert.feed_forwards
        if (part := _feed_forward(expert, site.site[cut:], paths[site.index], site.module))
    }
    return Anatomy(expert, lists, adapter.depth_keys, attentions, feed_forwards)


def _inside(expert: Expert, path: str) -> list[LinearSite]:
    prefix = f"{expert.name}.{path}."
    return [x for x in expert.linears if x.site.startswith(prefix)]


def _sides(linears: list[LinearSite]) -> tuple[tuple[LinearSite, ...], tuple[LinearSite, ...]] | None:
    """(those that write heads or channels, those that read them); None where a role is unknown."""
    ends = [x.role.rpartition(".")[2] for x in linears]
    if not linears or any(e not in _ROWS + _COLUMNS for e in ends):
        return None
    return (
        tuple(x for x, e in zip(linears, ends, strict=True) if e in _ROWS),
        tuple(x for x, e in zip(linears, ends, strict=True) if e in _COLUMNS),
    )


def _attention(
    expert: Expert, path: str, block: str, module: nn.Module, heads: int, head_dim: int
) -> Part | None:
    """The attention at `path`, or None where its heads cannot be told apart or leave through another module."""
    sides = _sides(_inside(expert, path))
    width = heads * head_dim
    if sides is None or not sides[1] or getattr(module, "fused_projections", False):
        return None
    rows, columns = sides
    if any(_linear(x).out_features != width for x in rows) or any(
        _linear(x).in_features != width for x in columns
    ):
        return None
    norms = []
    for name, child in module.named_children():
        weight = getattr(child, "weight", None)
        if "norm" not in name or weight is None or weight.shape[0] == head_dim != width:
            continue
        if weight.ndim != 1 or weight.shape[0] != width:
            return None
        norms.append(child)
    return Part(path, block, module, heads, rows, columns, tuple(norms))


def _feed_forward(expert: Expert, path: str, block: str, module: nn.Module) -> Part | None:
    sides = _sides(_inside(expert, path))
    if sides is None or len(sides[0]) != 1 or len(sides[1]) != 1:
        return None
    size = _linear(sides[1][0]).in_features
    repeats, odd = divmod(_linear(sides[0][0]).out_features, size)
    return None if odd else Part(path, block, module, size, *sides, repeats=repeats)


def _linear(site: LinearSite) -> nn.Linear:
    return site.module  # type: ignore[return-value]


# -- taking out ---------------------------------------------------------------------------------------------------


def cut(
    edit: Surgery,
    whole: Anatomy,
    kept: Kept,
    tensors: Mapping[str, Tensor] | None = None,
    keep: str = "device",
) -> None:
    """Change a live transformer to what is kept, through a ledger.

    Args:
        edit: the ledger; its `close` or `undo` gives the whole model back.
        whole: the transformer as it is.
        kept: what stays.
        tensors: the pruned model's state dict; what stays of the present weights when left out.
        keep: where originals wait (`Surgery.weight`); "host" also frees the weights of blocks that go.

    Raises:
        ConfigError: `kept` names something that the transformer does not have, or leaves nothing of it.
    """
    _check(whole, kept)
    module: Any = whole.expert.module
    gone = [b for b in whole.blocks if b not in kept.blocks]
    parts = [(whole.attentions[p], k) for p, k in kept.heads.items()]
    parts += [(whole.feed_forwards[p], k) for p, k in kept.channels.items()]
    for part, members in parts:
        for owner, leaf, axis, index in _slices(part, members):
            if tensors is None:
                old = getattr(owner, leaf)
                edit.weight(owner, leaf, old.detach().index_select(axis, index.to(old.device)), keep=keep)
        for owner, attribute, value in _facts(part, len(members)):
            edit.set(owner, attribute, value)
    if keep == "host":
        for path in gone:
            for child in module.get_submodule(path).modules():
                for leaf, weight in list(child.named_parameters(recurse=False)):
                    edit.weight(child, leaf, weight.detach().new_empty(0), keep=keep)
    for attribute, paths in whole.lists.items():
        stay = [module.get_submodule(p) for p in paths if p in kept.blocks]
        if len(stay) < len(paths):
            edit.swap(module, attribute, nn.ModuleList(stay).train(module.training))
    edit.set(module, "_internal_dict", FrozenDict({**module.config, **config_changes(whole, kept)}))
    for key, tensor in (tensors or {}).items():
        path, _, leaf = key.rpartition(".")
        owner = module.get_submodule(path)
        old = getattr(owner, leaf)
        tensor = tensor.to(device=old.device, dtype=old.dtype)
        if leaf in owner._parameters:
            edit.weight(owner, leaf, tensor, keep=keep)
        else:
            edit.set(owner, leaf, tensor)


def config_changes(whole: Anatomy, kept: Kept) -> dict[str, int]:
    """Entries of the configuration that tell the new sizes: depths, and the feed-forward width where it is one."""
    changes = {
        whole.depth_keys[attribute]: sum(p in kept.blocks for p in paths)
        for attribute, paths in whole.lists.items()
    }
    key = _CHANNEL_KEYS.get(type(whole.expert.module).__name__)
    widths = {
        len(kept.channels.get(p, range(part.size)))
        for p, part in whole.feed_forwards.items()
        if part.block in kept.blocks
    }
    if key is not None and len(widths) == 1:
        changes[key] = widths.pop()
    return changes


def carved(adapter: Adapter, module: nn.Module, kept: Kept) -> nn.Module:
    """A smaller copy of a transformer with what is kept of its weights, ready to be trained; the original stays."""
    import copy

    small = copy.deepcopy(module)
    cut(Surgery(), anatomy(adapter, small), kept)
    return small.requires_grad_(True)


def _check(whole: Anatomy, kept: Kept) -> None:
    unknown = set(kept.blocks) - set(whole.blocks)
    unknown |= (set(kept.heads) - set(whole.attentions)) | (set(kept.channels) - set(whole.feed_forwards))
    if unknown:
        raise ConfigError(f"{min(unknown)} is nothing that can be cut in this transformer.")
    for paths in whole.lists.values():
        if not any(p in kept.blocks for p in paths):
            raise ConfigError(
                f"all blocks of {paths[0].rpartition('.')[0]} are taken out; keep at least one."
            )
    for part, members in [
        *((whole.attentions[p], m) for p, m in kept.heads.items()),
        *((whole.feed_forwards[p], m) for p, m in kept.channels.items()),
    ]:
        if part.block not in kept.blocks:
            raise ConfigError(f"{part.path} lies in a block that is taken out.")
        if (
            not members
            or list(members) != sorted(set(members))
            or not 0 <= members[0] <= members[-1] < part.size
        ):
            raise ConfigError(
                f"{part.path} has {part.size} members; keep some of 0 to {part.size - 1} in order."
            )


def _slices(part: Part, members: Sequence[int]) -> Iterator[tuple[nn.Module, str, int, Tensor]]:
    """(module, parameter, axis, what stays along it) of everything that has the part's heads or channels."""
    for site in part.rows:
        index = _index(members, part.size * part.repeats, _linear(site).out_features, part.repeats)
        yield site.module, "weight", 0, index
        if _linear(site).bias is not None:
            yield site.module, "bias", 0, index
    for site in part.columns:
        yield site.module, "weight", 1, _index(members, part.size, _linear(site).in_features)
    for norm in part.norms:
        for leaf, weight in norm.named_parameters(recurse=False):
            yield norm, leaf, 0, _index(members, part.size, weight.shape[0])


def _index(members: Sequence[int], size: int, width: int, repeats: int = 1) -> Tensor:
    """Positions along an axis of `width` that belong to `members`, when it holds `size` of equal length."""
    each = width // size
    starts = [(r * (size // repeats) + m) * each for r in range(repeats) for m in members]
    return (torch.tensor(starts)[:, None] + torch.arange(each)).flatten()


def _facts(part: Part, count: int) -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, value) of everything that tells the part's size."""

    def scaled(value: int) -> int:
        return value * count // part.size

    for site in part.rows:
        yield site.module, "out_features", scaled(_linear(site).out_features)
    for site in part.columns:
        yield site.module, "in_features", scaled(_linear(site).in_features)
    for norm in part.norms:
        shape = getattr(norm, "normalized_shape", None)
        if shape is not None:
            yield norm, "normalized_shape", (scaled(shape[0]),)
    for attribute in _HEAD_FACTS:
        value = vars(part.module).get(attribute)
        if isinstance(value, int) and not isinstance(value, bool) and value % part.size == 0:
            yield part.module, attribute, scaled(value)


# -- choosing -----------------------------------------------------------------------------------------------------


def choose(
    whole: Anatomy,
    scores: Mapping[Unit, float],
    costs: Mapping[Unit, float],
    total: float,
    keep: float,
    *,
    even: bool = True,
    slack: float = 0.02,
    start: Kept | None = None,
) -> Kept:
    """Take out what matters least per FLOP, until `keep` of the FLOPs are left.

    Args:
        scores: harm of taking each unit out alone; what is not in it stays.
        costs: FLOPs of each unit; `total` of the transformer.
        keep: share of the FLOPs to keep, in (0, 1].
        even: heads and channels go from all blocks alike, so that the result has one width; the least important ones
            of each block go first.
        slack: how far below `keep` the last step may fall.
        start: blocks that are left already; no more of them go then.

    Raises:
        ConfigError: the units cannot make the model so small.
    """
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"keep a share of the FLOPs above 0 and up to 1, not {keep:g}.")
    kept, left = start or whole.everything(), total
    gone: set[Unit] = {Unit("block", b) for b in whole.blocks if b not in kept.blocks}
    if unknown := gone - costs.keys():
        raise ConfigError(f"the cost of {min(u.path for u in unknown)} is not known; probe blocks too.")
    left -= sum(costs[u] for u in gone)
    if start is not None:
        scores = {u: v for u, v in scores.items() if u.kind != "block"}
    while left > keep * total:
        best: tuple[float, float, tuple[Unit, ...]] | None = None
        for step in _steps(whole, scores, kept, gone, even):
            saved = sum(_left(costs, u, gone) for u in step)
            harm = sum(_left(scores, u, gone) for u in step) / max(saved, 1e-30)
            if left - saved >= (keep - slack) * total and (best is None or harm < best[0]):
                best = harm, saved, step
        if best is None:
            break
        for unit in best[2]:
            kept = kept.without(unit, whole)
            gone.add(unit)
        left -= best[1]
    if left > (keep + slack) * total:
        raise ConfigError(
            f"these units leave {left / total:.2f} of the FLOPs at least; keep more than {keep:g}, or probe "
            "smaller units or more kinds of them."
        )
    return kept


def _left(table: Mapping[Unit, float], unit: Unit, gone: set[Unit]) -> float:
    """A unit's cost or harm; of a block, what its parts that are gone already have not taken."""
    value = table[unit]
    if unit.kind == "block":
        value -= sum(table[u] for u in gone if u.kind != "block" and u.path.startswith(unit.path + "."))
    return max(value, 0.0)


def _steps(
    whole: Anatomy, scores: Mapping[Unit, float], kept: Kept, gone: set[Unit], even: bool
) -> Iterator[tuple[Unit, ...]]:
    """What may be taken out next, as units that go together."""
    rounds: dict[str, list[list[Unit]]] = {}
    for attribute, paths in whole.lists.items():
        stay = [p for p in paths if p in kept.blocks]
        if len(stay) > 1:
            yield from ((u,) for p in stay if (u := Unit("block", p)) in scores)
        parts = [*whole.attentions.values(), *whole.feed_forwards.values()]
        for part in (p for p in parts if p.block in stay):
            mine = sorted(
                (u for u in scores if u.path == part.path and u not in gone), key=lambda u: scores[u]
            )
            if len(mine) < 2:  # one member stays
                continue
            if even:
                leaf = part.path.removeprefix(part.block)
                rounds.setdefault(f"{attribute}{leaf}", []).append(mine)
            else:
                yield from ((u,) for u in mine)
    for key, members in rounds.items():
        attribute = key.partition(".")[0]
        if len(members) == sum(p in kept.blocks for p in whole.lists[attribute]):
            yield tuple(m[0] for m in members)
