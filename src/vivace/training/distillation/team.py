"""The networks of a distillation: teacher, student, critic and discriminator, as the callables that objectives take.

The teacher is the pipeline's own transformer, frozen and in the type it runs in. Student and critic (the model of the
student's clips that distribution matching needs) start as copies in float32 and compute in bf16 on GPUs. A
discriminator reads the critic's hidden states, where there is a critic, or those of a copy of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vivace.core.errors import ConfigError
from vivace.models import second_time
from vivace.tiny.train.common import Processes
from vivace.training.data.samples import Batch
from vivace.training.distillation.sharding import shard, sharded
from vivace.training.distillation.student_forms import plain
from vivace.training.distillation.weights import add_lora, full_precision, lower, seeded, tied
from vivace.training.losses.adversarial import DiscriminatorHead
from vivace.training.losses.paths import FlowMap, Velocity, guided
from vivace.training.pruning_repair import tapped

SCALE = 1000.0
"""Transformers take times from 0 to this."""
Seen = Callable[[Tensor, Tensor], tuple[Tensor, list[Tensor]]]
"""(x, s) -> velocity and hidden states (B, N, C)."""


class Network:
    """A transformer as a velocity field, a flow map, or something whose hidden states are looked at.

    Args:
        module: takes `hidden_states`, `timestep` and `encoder_hidden_states`.
        mixed: compute in bf16 under autocast (weights in float32 on a GPU).
        full: compute in float32 whatever is around, without TF32: for derivatives by differences.
        lists: attributes of the module that hold its blocks; `layers`: numbers of the blocks that are looked at.
    """

    def __init__(
        self,
        module: Any,
        *,
        mixed: bool = False,
        full: bool = False,
        lists: Iterable[str] = (),
        layers: Iterable[int] = (),
    ) -> None:
        self.module, self.mixed, self.full = module, mixed, full
        self.lists, self.layers = list(lists), list(layers)

    def velocity(self, text: Tensor) -> Velocity:
        """v (x, s) with captions (B, L, D)."""
        return lambda x, s: self._call(x, s, text)

    def flow_map(self, text: Tensor) -> FlowMap:
        """u (x, s, r) of a student with a second time, with captions (B, L, D)."""
        second = second_time.of(self.module)
        if second is None:
            raise ConfigError("this network has no second time embedding, so it is no flow map.")

        def call(x: Tensor, s: Tensor, r: Tensor) -> Tensor:
            second.gap = s - r
            return self._call(x, s, text)

        return call

    def seen(self, text: Tensor) -> Seen:
        """Velocity and hidden states (x, s), with captions (B, L, D)."""

        def call(x: Tensor, s: Tensor) -> tuple[Tensor, list[Tensor]]:
            with tapped(self.module, self.lists, self.layers) as states:
                velocity = self._call(x, s, text)
                found = list(states)
            if sharded(self.module):
                # FSDP gathers what is in no block when a gradient of the module's own output arrives; see to that.
                link = 0.0 * velocity.sum()
                found = [state + link.to(state) for state in found]
            return velocity, found

        return call

    def _call(self, x: Tensor, s: Tensor, text: Tensor) -> Tensor:
        kind = torch.float32 if self.mixed else self.module.dtype
        with self._precision(x):
            return self.module(
                hidden_states=x.to(kind),
                timestep=SCALE * s,
                encoder_hidden_states=text.to(kind),
                return_dict=False,
            )[0].float()

    @contextmanager
    def _precision(self, x: Tensor) -> Iterator[None]:
        device = x.device.type
        if self.mixed:
            with torch.autocast(device, torch.bfloat16):
                yield
        elif self.full:
            with torch.autocast(device, enabled=False), full_precision():
                yield
        else:
            yield


@dataclass
class Team:
    """Who takes part.

    Attributes:
        student: learns. `eager` is the same weights without compiled blocks, in float32, for derivatives.
        teacher: frozen.
        critic: models the student's clips; None where no recipe needs it.
        head: of the discriminator, on the critic's hidden states.
        empty: caption embeddings (L, D) of the empty prompt.
        guidance: of the teacher.
        shift: of the teacher's times.
    """

    student: Network
    eager: Network
    teacher: Network
    critic: Network | None
    head: DiscriminatorHead | None
    empty: Tensor
    guidance: float
    shift: float

    def guided(self, batch: Batch, scale: float | None = None) -> Velocity:
        """The teacher under guidance, one call for both prompts; no gradient."""
        text, scale = batch["text"], self.guidance if scale is None else scale
        plain = self.teacher.velocity(text)
        both = self.teacher.velocity(torch.cat([text, self.empty.to(text).expand_as(text)]))

        @torch.no_grad()
        def velocity(x: Tensor, s: Tensor) -> Tensor:
            if scale == 1.0:
                return plain(x, s)
            cond, uncond = both(torch.cat([x, x]), torch.cat([s, s])).chunk(2)
            return guided(cond, uncond, scale)

        return velocity

    def judge(self, batch: Batch) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(x, s) -> the critic's velocity and the discriminator's logits."""
        if self.critic is None or self.head is None:
            raise ConfigError("this team has no discriminator.")
        look, head = self.critic.seen(batch["text"]), self.head

        def call(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            velocity, states = look(x, s)
            return velocity, head([state.float() for state in states])

        return call

    def opinion(self, batch: Batch) -> Callable[[Tensor, Tensor], tuple[Tensor, list[Tensor]]]:
        """(x, s) -> the discriminator's logits and the hidden states (B, N, C) that it read them from."""
        if self.critic is None or self.head is None:
            raise ConfigError("this team has no discriminator.")
        look, head = self.critic.seen(batch["text"]), self.head

        def call(x: Tensor, s: Tensor) -> tuple[Tensor, list[Tensor]]:
            states = [state.float() for state in look(x, s)[1]]
            return head(states), states

        return call

    def learners(self) -> dict[str, list[nn.Module]]:
        """Modules that learn, by role."""
        found: dict[str, list[nn.Module]] = {"student": [self.student.module]}
        if self.critic is not None:
            found["critic"] = [self.critic.module, *([self.head] if self.head is not None else [])]
        return found


def assemble(
    transformer: Any,
    lists: Mapping[str, Any],
    roles: frozenset[str],
    *,
    empty: Tensor,
    guidance: float,
    shift: float,
    device: torch.device,
    lora: int = 0,
    checkpointing: bool = False,
    compiled: bool = False,
    full: bool = False,
    seed: int = 0,
    shards: Processes | None = None,
    form: Callable[[Any], None] | None = None,
) -> Team:
    """The team that a recipe needs.

    Args:
        transformer: the teacher, float32.
        lists: block-list attributes -> their blocks.
        roles: of `critic`, `head`, `second_time`.
        lora: rank of the student's and critic's LoRA layers; 0 trains all weights.
        checkpointing: recompute blocks in backward passes.
        compiled: compile the blocks.
        full: `eager` computes without TF32, as differences need.
        seed: of the first values of what is new (LoRA layers, the head); the global random state is left alone.
        shards: processes to spread student, critic and teacher over; None for none. `eager` is then the student
            itself, for differences alone.
        form: puts into the student what it is trained with (`student_forms`).
    """
    mixed = device.type == "cuda"
    # What is spread goes to the device block by block, from the CPU.
    place = device if shards is None else torch.device("cpu")
    count = sum(len(blocks) for blocks in lists.values())
    # A quarter, the half and three quarters of the way: texture, objects, scene.
    layers = sorted({max(0, count * k // 4 - 1) for k in (2, 3, 4)})

    def learner() -> Any:
        module = copy.deepcopy(transformer).float().to(place).train()
        module.requires_grad_(True)
        if lora:
            with seeded(seed, device):
                add_lora(module, lora)
        if checkpointing:
            module.enable_gradient_checkpointing()
        return module

    student = learner()
    if "second_time" in roles:
        second_time.attach(student)
    if form is not None:
        form(student)
    twin = plain(tied(student)) if shards is None else student
    critic = learner() if "critic" in roles else None
    head = None
    if "head" in roles:
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        with seeded(seed, device):
            head = DiscriminatorHead(width, len(layers)).to(place)
    teacher = copy.deepcopy(transformer).to(place).eval().requires_grad_(False)
    if mixed:
        lower(teacher)
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        for module in (student, teacher, critic):
            if module is not None:
                one = not lora and not checkpointing and shards is None
                module.compile_repeated_blocks(fullgraph=one, dynamic=False)
    if shards is not None:
        for module in (student, teacher, critic):
            if module is not None:
                shard(module, shards, lists)
        if head is not None:
            head.to(device)  # small, and its query is used apart from its inputs, which FSDP's hooks miss
    look = {"lists": list(lists), "layers": layers}
    return Team(
        student=Network(student, mixed=mixed),
        eager=Network(twin, full=full),
        teacher=Network(teacher),
        critic=None if critic is None else Network(critic, mixed=mixed, **look),
        head=head,
        empty=empty.to(device),
        guidance=guidance,
        shift=shift,
    )
