"""What a distillation would take: memory by part, floating-point operations and time of an update, before it starts.

The team is assembled from the model's configuration on the meta device, and every role's turn of the very recipe runs
there, forwards and backwards: nothing is computed, what is made is counted. So recipes of one's own are told as well,
and neither weights nor memory are needed.

What the meta device does not have is stood in for: fused attention (it keeps queries, keys, values, its output and a
float for each query, and recomputes the scores in its backward pass), and on a GPU's behalf autocast to bf16 (matrix
products in bf16 with copies of their weights, norms in float32). A condition on values counts as false.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vivace.core.errors import ConfigError, ModelError
from vivace.core.live_bytes import LiveBytes
from vivace.core.quiet import quiet
from vivace.core.shapes import Workload
from vivace.models import pruning
from vivace.models.adapter import ModelDescription
from vivace.training.chance import Chance
from vivace.training.data.samples import Batch
from vivace.training.distillation.recipe import Recipe, Turn
from vivace.training.distillation.team import Network, Team, assemble
from vivace.training.distillation.trainer import parameters_of

MFU = 0.35
"""Share of the peak that updates are expected to reach on a GPU."""
UPDATES = 120
"""Over so many updates turns are counted: a multiple of the usual ratios of critic to student."""
FEW = {False: (2, 3), True: (3, 4)}
"""Blocks that stand for a deeper model, without and with a discriminator, which looks at three of them."""
META = torch.device("meta")


@dataclass(frozen=True)
class Estimate:
    """Of one process.

    Attributes:
        parts: bytes by part. All but `activations` (the most that a turn holds beside them) are there all the time.
        flops: of an update, the mean over updates. plain_flops: those among them that are in float32.
        forward_flops: of one clip through the transformer.
        turns: role -> how often it learns in an update, on the mean.
    """

    parts: Mapping[str, int]
    flops: float
    plain_flops: float
    forward_flops: float
    turns: Mapping[str, float]

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(self.parts.values())

    def seconds(self, peak: float, plain_peak: float | None = None, mfu: float = MFU) -> float:
        """Of an update.

        Args:
            peak, plain_peak: FLOP/s of the device in the type that networks compute in, and in float32.
            mfu: share of them that is reached.
        """
        plain = self.plain_flops / (plain_peak or peak)
        return ((self.flops - self.plain_flops) / peak + plain) / mfu


def estimate(
    model: ModelDescription,
    recipe: Recipe,
    workload: Workload,
    *,
    batch: int,
    lora: int = 0,
    checkpointing: bool = False,
    mixed: bool = True,
) -> Estimate:
    """Memory and work of an update of `batch` clips.

    Args:
        model: only its configurations are used. workload: frames, height, width and text tokens.
        mixed: as on a GPU, in bf16 with float32 weights; else all in float32.

    Raises:
        ModelError: the transformer cannot be built or called without its pipeline.
        ConfigError: the recipe goes by values of tensors, which are not there.
    """
    depth, built = model.depth, _built(model, recipe)
    how = (model, recipe, workload, batch, lora, checkpointing, mixed)
    rows = [_Rehearsal(*how, blocks).taken() for blocks in built]
    few, many = rows[0], rows[-1]
    share = (depth - built[0]) / (built[-1] - built[0]) if len(built) > 1 else 0.0
    work = [a + share * (b - a) for a, b in zip(few, many, strict=True)]
    whole = _Rehearsal(*how, depth)
    parts = standing(whole.team) | {"activations": round(work[0])}
    return Estimate(parts, work[1], work[2], work[3], whole.turns)


def _built(model: ModelDescription, recipe: Recipe) -> tuple[int, ...]:
    """Depths that are rehearsed: everything is linear in the depth, where there is one list of blocks."""
    keys, few = model.adapter.depth_keys if model.adapter is not None else (), FEW["head" in recipe.roles]
    return few if len(keys) == 1 and model.depth > few[-1] else (model.depth,)


class _Rehearsal:
    """A team on the meta device, with so many blocks, that has its turns."""

    def __init__(
        self,
        model: ModelDescription,
        recipe: Recipe,
        workload: Workload,
        batch: int,
        lora: int,
        checkpointing: bool,
        mixed: bool,
        blocks: int,
    ) -> None:
        self.recipe, self.stand = recipe, _Stand()
        with quiet():
            transformer, lists, call = _transformer(model, workload, blocks)
            team = assemble(
                transformer,
                lists,
                recipe.roles,
                empty=call["encoder_hidden_states"][0],
                guidance=recipe.guidance or workload.guidance,
                shift=float(model.scheduler.get("flow_shift") or model.scheduler.get("shift") or 1.0),
                device=META,
                lora=lora,
                checkpointing=checkpointing,
            )
        self.team = _prepared(team, list(lists), self.stand, mixed)
        kinds = {"latents": call["hidden_states"], "noise": call["hidden_states"]}
        kinds["text"] = call["encoder_hidden_states"]
        self.batch: Batch = {
            name: torch.empty((batch, *kinds[name].shape[1:]), device=META, dtype=torch.bfloat16)
            for name in recipe.fields
        }
        counted = [role for update in range(1, UPDATES + 1) for role in recipe.turns(update)]
        self.turns = {role: counted.count(role) / UPDATES for role in team.learners()}

    def taken(self) -> tuple[float, float, float, float]:
        """Bytes of activations; FLOPs of an update, those in float32, and those of a forward pass of one clip.

        Raises:
            ConfigError: the recipe goes by values.
        """
        flops = plain = most = 0.0
        try:
            for role, often in self.turns.items():
                if not often:
                    continue
                chance = _Chance(last=True)
                with LiveBytes() as live:
                    turns = [self._turn(role, chance)]
                most = max(most, live.peak)
                # Work is linear in the number of the step that is drawn, so that the ends' mean is the mean.
                if chance.drawn:
                    turns.append(self._turn(role, _Chance(last=False)))
                flops += often * sum(work.total for work in turns) / len(turns)
                plain += often * sum(work.plain for work in turns) / len(turns)
        except RuntimeError as error:
            told = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"what {self.recipe.name} takes cannot be told before it runs ({told})."
            ) from error
        work = _Work()
        x, text = self.batch["latents"][:1].float(), self.batch["text"][:1]
        with torch.no_grad(), self.stand.adding(work), work:
            self.team.teacher.velocity(text)(x, torch.empty(1, device=META))
        return float(most), flops, plain, work.total

    def _turn(self, role: str, chance: _Chance) -> _Work:
        """The work of a role's turn."""
        # Gradients are there, so that a backward pass adds to them and they are not counted as activations.
        for modules in self.team.learners().values():
            for p in parameters_of(modules):
                p.grad = p.detach()
        gc.collect()
        work = _Work()
        with self.stand.adding(work), work:
            # After a warm-up, if there is one, and with everything that depends on progress in force.
            loss, _ = getattr(self.recipe, role)(Turn(self.team, self.batch, chance, UPDATES, 0.5))
            loss.backward()
        return work


def standing(team: Team) -> dict[str, int]:
    """Bytes that a team takes all the time, by part, with AdamW's two moments and averaged weights."""
    learners = team.learners()
    trained = sum(_size(p) for modules in learners.values() for p in parameters_of(modules))
    seen: set[int] = set()
    parts = {
        "teacher": _held([team.teacher.module], seen),
        "student": _held([team.student.module, team.eager.module], seen),
        "critic": _held(learners.get("critic", []), seen),
        "gradients": trained,
        "optimizers": 2 * trained,
        "averaged weights": sum(_size(p) for p in parameters_of(learners["student"])),
    }
    return {name: size for name, size in parts.items() if size}


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _held(modules: list[nn.Module], seen: set[int]) -> int:
    """Bytes of parameters and buffers that were not counted yet."""
    total = 0
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if (key := tensor.untyped_storage()._cdata) not in seen:
                seen.add(key)
                total += tensor.untyped_storage().nbytes()
    return total


def _transformer(model: ModelDescription, workload: Workload, blocks: int) -> tuple[Any, Any, dict[str, Any]]:
    """The transformer with so many blocks on the meta device, its block lists, and a call of one clip.

    Raises:
        ModelError: as `estimate`.
    """
    import diffusers

    if model.adapter is None:
        raise ModelError(
            f"{model.pipeline_class} has no adapter, so what it takes is not known before it runs."
        )
    expert, keys = model.experts[0], model.adapter.depth_keys.values()
    shallow = dict.fromkeys(keys, blocks) if len(keys) == 1 else {}
    with META:
        build = getattr(diffusers, expert.class_name)
        module = build.from_config({**expert.config, **shallow}).float().eval()
    call = model.adapter.dummy_call(model, workload.with_(batch=1), META, torch.float32)
    if strange := sorted(set(call) - {"hidden_states", "timestep", "encoder_hidden_states"}):
        raise ModelError(
            f"students of {model.pipeline_class} cannot be trained: it asks for {', '.join(strange)}."
        )
    return module, pruning.anatomy(model.adapter, module).lists, call


class _Chance(Chance):
    """Draws nothing; whole numbers are the first or the last."""

    def __init__(self, last: bool) -> None:
        super().__init__("cpu", 0, 0)
        self.last, self.drawn = last, False

    def normal(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, device=like.device)

    def uniform(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape[0], device=like.device)

    def spread(self, like: Tensor) -> Tensor:
        return self.uniform(like)

    def below(self, high: int) -> int:
        self.drawn = True
        return high - 1 if self.last else 0


class _Work(TorchDispatchMode):
    """Adds up FLOPs as torch's counter does: `total`, and of these `plain` in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.plain = 0.0

    def add(self, flops: float, like: Tensor) -> None:
        self.total += flops
        self.plain += flops if like.dtype == torch.float32 else 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            operand = next(a for a in args if isinstance(a, Tensor))
            self.add(float(formula(*args, **kwargs, out_val=out)), operand)
        return out


class _Attention(torch.autograd.Function):
    """Fused attention without numbers: two matrix products, and five in the backward pass."""

    @staticmethod
    def forward(ctx: Any, work: _Work, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, tokens, _ = query.shape
        out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(rows, heads, tokens, dtype=torch.float32)
        ctx.work, ctx.product = work, 2.0 * rows * heads * tokens * key.shape[2] * query.shape[-1]
        ctx.save_for_backward(query, key, value, out, sums)
        work.add(2.0 * ctx.product, query)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        ctx.work.add(5.0 * ctx.product, query)
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Stand(TorchFunctionMode):
    """Stands in for what the meta device does not have: fused attention, autocast to bf16, truths.

    `low` is whether a network that computes in bf16 is running. A weight is cast once in a call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.low = False
        self._work = _Work()
        self._cast: dict[int, Tensor] = {}

    @contextmanager
    def adding(self, work: _Work) -> Iterator[None]:
        """In force, and what attention takes is added to `work`."""
        self._work = work
        with self:
            yield

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Networks compute in bf16."""
        before, self.low = self.low, True
        try:
            yield
        finally:
            self.low = before
            self._cast.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            return False
        if self.low and (kind := _KINDS.get(func)) is not None:
            args = tuple(self._to(a, kind) for a in args)
            kwargs = {k: self._to(v, kind) for k, v in kwargs.items()}
        # Forward-mode derivatives ask for the unfused formula, and get it.
        if func is F.scaled_dot_product_attention and torch.backends.cuda.flash_sdp_enabled():
            names = ("query", "key", "value")
            q, k, v = (kwargs[n] if n in kwargs else args[i] for i, n in enumerate(names))
            return _Attention.apply(self._work, q, k, v)
        return func(*args, **kwargs)

    def _to(self, value: Any, kind: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == kind:
            return value
        if kind == torch.float32 or not (value.is_leaf and value.requires_grad):
            return value.to(kind)
        if id(value) not in self._cast:
            self._cast[id(value)] = value.to(kind)
        return self._cast[id(value)]


_LOW = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.matmul, torch.bmm)
_HIGH = (F.layer_norm, F.group_norm, F.rms_norm, F.softmax)
_KINDS: dict[Any, torch.dtype] = dict.fromkeys(_LOW, torch.bfloat16) | dict.fromkeys(_HIGH, torch.float32)
"""What autocast does to the arguments of functions."""


class _Mixed(Network):
    """A network under the autocast that is stood in for."""

    stand: _Stand

    def _precision(self, x: Tensor) -> AbstractContextManager[Any]:
        return self.stand.autocast()


def _prepared(team: Team, lists: list[str], stand: _Stand, mixed: bool) -> Team:
    """The team as it is on a device: with `mixed` the teacher in bf16, student and critic under autocast."""

    def network(old: Network) -> Network:
        _recomputed(old.module, lists, stand, mixed)
        if not mixed:
            return old
        new = _Mixed(old.module, mixed=True, lists=old.lists, layers=old.layers)
        new.stand = stand
        return new

    _recomputed(team.eager.module, lists, stand, False)
    if mixed:
        nn.Module.to(team.teacher.module, torch.bfloat16)
    critic = None if team.critic is None else network(team.critic)
    return replace(team, student=network(team.student), critic=critic)


def _recomputed(module: Any, lists: list[str], stand: _Stand, low: bool) -> None:
    """Blocks that a backward pass recomputes run as before: no mode of the caller's is in force there."""
    before: list[bool] = []

    def enter(*_: Any) -> None:
        before.append(stand.low)
        stand.low = low
        stand.__enter__()

    def leave(*_: Any) -> None:
        stand.__exit__(None, None, None)
        stand.low = before.pop()

    for name in lists:
        for block in getattr(module, name):
            block.register_forward_pre_hook(enter)
            block.register_forward_hook(leave, always_call=True)
