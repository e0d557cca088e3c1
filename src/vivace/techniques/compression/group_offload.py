"""Group offload: a few blocks, or one layer, on the device at a time; the other weights in main memory or on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.errors import ConfigError
from vivace.core.footprint import Footprint
from vivace.core.shapes import Workload
from vivace.models.adapter import ModelDescription
from vivace.techniques.base import Card, Cite, Paradigm, Problem, Stage, Target, Technique, exclusive, knob
from vivace.techniques.compression import placing

NAME = "group_offload"


@dataclass(frozen=True, kw_only=True)
class GroupOffload(Technique):
    """Weights come to the device group by group, just before they are used, and leave right after.

    Groups are diffusers' own `ModuleGroup`s (host, disk, pinned memory and streams are its work), loaded and dropped
    from wrappers in the ledger instead of its hook registry, whose chain breaks when somebody leaves out of order. The
    wrappers lie outside compiled block bodies and inside the caches, so a block that a cache skips is not loaded.

    With a GPU and `prefetch`, the next group's copy runs on a stream of its own while this one computes. Groups of
    single layers lie inside the block bodies, which then cannot be compiled.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Keeps a few blocks' weights on the device at a time: the least memory, a copy of all weights a step.",
        objective="memory of the device",
        # Between compiled bodies and caches; what changes weights has been applied by then.
        stage=Stage.COMPILE,
        claims=(exclusive("placement"),),
        packages=("accelerate",),
        lossless=True,
        cite=Cite(
            title="Group offloading (diffusers' enable_group_offload)",
            code="https://github.com/huggingface/diffusers",
            differs="its groups, called from the ledger; inside the caches, so that skipped blocks are not copied; "
            "files of a session lie in a folder of their own and go with it",
        ),
    )

    level: str = knob("block", choices=("block", "leaf"))
    """`block`: blocks together, the rest of a component while it runs. `leaf`: every layer for itself."""
    blocks: int = knob(1, low=1, high=64)
    """Blocks in a group."""
    prefetch: bool = True
    """Copy the next group while this one computes (GPU, `block` level); takes pinned memory of the model's size."""
    to: str = knob("host", choices=("host", "disk"))
    """Where weights wait: main memory, or files."""
    device: str = placing.AUTO
    """Where groups run: `auto` for this machine's GPU. With `cpu`, only `to: disk` saves anything."""
    folder: str = ""
    """Where files are kept while the session lasts; the system's temporary folder by default."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        import torch

        if torch.cuda.is_available():
            return (cls(), cls(level="leaf"))
        return (cls(device="cpu", to="disk"), cls(device="cpu", to="disk", level="leaf"))

    def check(self, model: ModelDescription) -> list[Problem]:
        if why := placing.device_complaint(self.device):
            return [self.problem("device", why)]
        if self.device == "cpu" and self.to == "host":
            why = "weights would wait where they are used; set to: disk, or leave it out."
            return [self.problem("pointless", why)]
        return []

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        ahead = 2 if self.prefetch else 1
        return replace(
            base, placement="group_offload", window=self.blocks * ahead if self.level == "block" else 0
        )

    def apply(self, target: Target) -> None:
        device = placing.accelerator(self.device)
        if device is None:
            raise ConfigError(f"{NAME}: {placing.NO_DEVICE}")
        found = placing.components(target.pipeline)
        store = Store(self, device)
        known = {e.name: [b.module for b in e.blocks] for e in target.experts}
        holders: list[Holder] = []
        for name, module in found.items():
            holder = Holder(target, store, name, module, known.get(name))
            holders.append(holder)
            target.edit.set(module, "_hf_hook", _marker(device), on_undo=holder.restore)
            for method in placing.entries(name, module):
                target.edit.wrap(module, holder.around_component, method)
            for i, group in enumerate(holder.inner):
                for member in group.members:
                    target.edit.wrap(member, holder.around_member(i, last=member is group.members[-1]))
        for holder in holders:
            holder.drop()
        target.report(NAME, "groups", sum(1 + len(h.inner) for h in holders))
        target.report(NAME, "bytes_waiting", sum(h.bytes for h in holders))


def _marker(device: Any) -> Any:
    """What diffusers asks where a component computes."""
    from accelerate.hooks import ModelHook

    hook = ModelHook()
    hook.execution_device = device  # type: ignore[attr-defined]
    return hook


class Store:
    """Where the groups of a session wait: the settings that all of them share, and the folder of their files."""

    def __init__(self, settings: GroupOffload, device: Any) -> None:
        import torch

        self.settings, self.device = settings, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and settings.prefetch else None
        if settings.level == "leaf":
            self.stream = None
        self._folder: Path | None = None
        self._users = 0

    def file_folder(self) -> str | None:
        """The folder of this session, made on first use; None for main memory."""
        if self.settings.to == "host":
            return None
        if self._folder is None:
            home = self.settings.folder or None
            if home is not None:
                Path(home).mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="vivace-offload-", dir=home))
        return str(self._folder)

    def enter(self) -> None:
        """One more component waits here."""
        self._users += 1

    def leave(self) -> None:
        """A component has its weights back; with the last one the files go."""
        self._users -= 1
        if self._users == 0 and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class Group:
    """Tensors that come and go together, and the modules before whose call they have to be there."""

    def __init__(
        self, store: Store, members: list[Any], tensors: tuple[list[Any], list[Any]], name: str
    ) -> None:
        self.members, self.here = members, True
        self._store, self._name, self._tensors = store, name, tensors
        self._group: Any = None

    def _made(self) -> Any:
        if self._group is None:
            import torch
            from diffusers.hooks.group_offloading import ModuleGroup

            parameters, buffers = self._tensors
            # Tensors are given one by one: a module as a whole would get new buffers.
            self._group = ModuleGroup(
                modules=[],
                parameters=parameters,
                buffers=buffers,
                offload_device=torch.device("cpu"),
                onload_device=self._store.device,
                offload_leader=self.members[-1],
                onload_leader=self.members[0],
                stream=self._store.stream,
                non_blocking=self._store.stream is not None,
                offload_to_disk_path=self._store.file_folder(),
                group_id=self._name,
            )
        return self._group

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        return sum(t.nbytes for kind in self._tensors for t in kind)

    def load(self) -> bool:
        """Begin to bring the tensors; whether they were away."""
        if self.here:
            return False
        self._made().onload_()
        self.here = True
        return True

    def wait(self) -> None:
        """Until they are there."""
        if self._store.stream is not None:
            self._store.stream.synchronize()

    def drop(self) -> None:
        """Let the tensors go where they wait."""
        if self.here and any(self._tensors):
            self._made().offload_()
            self.here = False


class Holder:
    """One component: the group of what lies outside its blocks, and those of its blocks or layers."""

    def __init__(
        self, target: Target, store: Store, name: str, module: Any, blocks: list[Any] | None
    ) -> None:
        self._target, self._store = target, store
        tied = placing.tied(module)
        taken = {id(t) for t in tied}
        self.inner: list[Group] = []
        outer: tuple[list[Any], list[Any]] = [], []
        if name == "vae":
            # A decoder that goes frame by frame would send for every layer once a frame.
            outer = placing.owned(list(module.modules()), taken)
        elif store.settings.level == "leaf":
            outer = placing.owned([module], taken)
            for path, part in module.named_modules():
                tensors = placing.owned([part], taken)
                if any(tensors):
                    self.inner.append(Group(store, [part], tensors, f"{name}.{path}"))
        else:
            blocks = blocks or placing.blocks_of(module)
            inside = {id(m) for block in blocks for m in block.modules()}
            outer = placing.owned([m for m in module.modules() if id(m) not in inside], taken)
            step = store.settings.blocks
            for i in range(0, len(blocks), step):
                members = blocks[i : i + step]
                tensors = placing.owned([m for block in members for m in block.modules()], taken)
                self.inner.append(Group(store, members, tensors, f"{name}.{i}"))
        # Pipelines read a VAE's statistics and the like from outside: buffers beside the blocks never leave.
        self._outer = Group(store, [module], ([*outer[0], *tied], []), name)
        self._stay = outer[1]
        self._back = placing.putting_back(module)
        self._dropped = False

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        return self._outer.bytes + sum(g.bytes for g in self.inner)

    def drop(self) -> None:
        """Everything leaves the device for the first time."""
        self._store.enter()
        self._dropped = True
        for tensor in self._stay:
            tensor.data = tensor.data.to(self._store.device)
        for group in (self._outer, *self.inner):
            group.drop()

    def restore(self) -> None:
        """Everything comes back, to where it was, and stays."""
        if self._dropped:
            for group in (self._outer, *self.inner):
                group.load()
                group.wait()
            self._store.leave()
            self._dropped = False
        self._back()

    def around_component(self, old: Callable[..., Any]) -> Callable[..., Any]:
        """The outer group is there while the component runs; afterwards nothing of the component is.

        Groups of skipped blocks that were sent for, or whose last block a cache skipped, are still there at the end.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            nested = self._outer.here
            if self._outer.load():
                self._outer.wait()
                self._target.report(NAME, "loads", 1)
            try:
                return old(*args, **kwargs)
            finally:
                if not nested:
                    for group in (self._outer, *self.inner):
                        group.drop()

        return call

    def around_member(self, index: int, *, last: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Around a block or a layer: its group comes before, the next one is sent for, and its own leaves after."""
        group = self.inner[index]
        following = self.inner[index + 1] if index + 1 < len(self.inner) else None

        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if group.load():
                    self._target.report(NAME, "loads", 1)
                group.wait()
                if following is not None and self._store.stream is not None and following.load():
                    self._target.report(NAME, "prefetches", 1)
                try:
                    return old(*args, **kwargs)
                finally:
                    if last:
                        group.drop()

            return call

        return make
