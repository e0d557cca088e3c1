"""Dynamic latent frame rate (VGDFR): where neighbouring latent frames move little, the network sees one for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.footprint import Footprint
from vivace.core.shapes import TokenGrid, Workload
from vivace.models.adapter import BlockCall, Expert, ModelDescription, Need, RootCall
from vivace.techniques.base import (
    Card,
    Cite,
    Estimate,
    Paradigm,
    Problem,
    RootHandler,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
    reads,
)
from vivace.techniques.compression.reduction import KINDS, known_rows, own_backend

if TYPE_CHECKING:
    import torch

    Streams = tuple[torch.Tensor, torch.Tensor | None]

NAME = "latent_frame_rate"
RESTORES = ("residual", "interpolate", "repeat")


@dataclass(slots=True, eq=False)
class Clip:
    """What is known of the generation.

    Attributes:
        clean: the last guided prediction of the clean latents, float32 (B, C, T, H, W).
        runs: for every sample the sizes of its groups of frames, in order; empty before the probe is over.
        rotary: factors of all tokens, as a block takes them.
    """

    clean: torch.Tensor | None = None
    runs: tuple[tuple[int, ...], ...] = ()
    rotary: Any = None


@dataclass(frozen=True, kw_only=True)
class LatentFrameRate(Technique):
    """After `probe` full steps the latent frames that move least against their neighbours are merged in the network.

    With x0 the clean latents as predicted one step earlier, n = (z - (1 - s) x0) / s the noise in them and g a group of
    k frames, the network sees z_g = (1 - s) mean x0 + s sum n / sqrt(k), whose noise is as strong as any frame's. From
    its prediction x0' = z_g - s v_g every frame gets v_i = (z_i - x0_i') / s, so the sampler keeps all frames. A group
    has the rotary position of its middle frame. The first latent frame, which stands for one picture, is never merged.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Merges latent frames with little motion between them for most of the steps.",
        objective="fewer frames per network evaluation",
        stage=Stage.TRAJECTORY,
        claims=(exclusive("tokens.set"), reads("attention.kernel"), reads("sampler.solver")),
        needs=(Need.ORDERED_BLOCKS, Need.ATTENTION_SITES, Need.TOKEN_GRID, Need.FLOW_SCHEDULER),
        cite=Cite(
            title="VGDFR: Diffusion-based Video Generation with Dynamic Latent Frame Rate",
            arxiv="2504.12259",
            code="https://github.com/thu-nics/VGDFR",
            differs="motion is measured on predicted clean latents and not on decoded frames; a fixed share of the "
            "frames is merged, those that move least, so that the samples of a batch stay in one call; the sampler "
            "keeps all frames, and merging happens anew in every network call; rotary positions are the same in all "
            "layers",
        ),
    )

    share: float = knob(0.25, low=0.0, high=0.75, identity=0.0, monotone="flops")
    """Share of the latent frames that the network does not see."""
    longest: int = knob(2, low=2, high=4)
    """Most frames that become one."""
    probe: int = knob(4, low=1, high=50)
    """First steps with all frames; motion is measured after them."""
    full_last: int = knob(2, low=0, high=50)
    """Last steps with all frames."""
    restore: str = knob("residual", choices=RESTORES)
    """x0' of a merged frame: the group's plus what the frame differed from the group by before, between the groups'
    middles, or the group's."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (
            cls(share=0.4, probe=2, full_last=1),
            cls(share=0.5, probe=1, longest=4, restore="interpolate"),
        )

    @property
    def warmup(self) -> int:
        """The plan compares it with the number of steps."""
        return self.probe

    def merges(self, step: int, steps: int) -> bool:
        """Whether a step runs on merged frames."""
        return self.probe <= step < steps - self.full_last

    def left_out(self, frames: int) -> int:
        """How many latent frames the network does not see: all but the first can be in a group."""
        most = max(0, frames - 1 - -(-(frames - 1) // self.longest))
        return min(int(self.share * frames + 0.5), most)

    # -- before anything runs -------------------------------------------------------------------------------------

    def check(self, model: ModelDescription) -> list[Problem]:
        if model.adapter is None:
            return []  # the plan says that there is no token grid
        if any(kind in model.pipeline_class for kind in ("ImageToVideo", "VideoToVideo")) or any(
            e.config.get("out_channels") not in (None, e.config.get("in_channels")) for e in model.experts
        ):
            message = "the picture or video it starts from has frames of its own; use it for text-to-video."
            return [self.problem("condition", f"{model.name} cannot merge frames: {message}")]
        workload = model.workload()
        if model.adapter.patch(model.experts[0].config)[0] != 1 or not model.takes_latents(workload):
            message = "its transformer does not take latents of one frame per token; leave it out."
            return [self.problem("packed", f"{model.name} cannot merge frames: {message}")]
        grid = _grid(model, workload)
        if not self.left_out(grid.frames):
            message = f"share={self.share:g} of {grid.frames} latent frames is none; make the clip longer or raise it."
            return [self.problem("pointless", message, "warning")]
        return []

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        steps = next((s for o in others if isinstance(s := getattr(o, "steps", None), int)), None)
        steps = steps or model.workload().steps
        if self.is_identity or self.probe >= steps or self.probe + self.full_last < steps:
            return []
        message = (
            f"{self.probe} steps at the start and {self.full_last} at the end see all frames, so with {steps} steps "
            "nothing can be gained; lower probe or full_last, or leave it out."
        )
        return [self.problem("pointless", message, "warning")]

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact NFE and blocks; exact pairs where text is attended to apart; bounds for FLOPs."""
        if model.adapter is None or not workload.steps or self.is_identity:
            return base
        part = max(0, workload.steps - self.probe - self.full_last) / workload.steps
        grid, kinds = _grid(model, workload), list(model.adapter.attention.values())
        ratio = 1.0 - self.left_out(grid.frames) / grid.frames
        if "joint" in kinds:
            # Attention among text tokens alone, whose share is not known, costs the same at every length.
            return base.scaled(1 - part * (1 - ratio**2), 1.0, fields=("attention_pairs", "flops"))
        crossed = kinds.count("cross") * workload.text
        whole = kinds.count("self") * grid.video
        pairs = ratio * (whole * ratio + crossed) / (whole + crossed)
        # Outside attention a text token, and the timestep, cost at most what a video token does.
        fixed = (workload.text + 1) / (grid.video + workload.text + 1)
        flops = []
        for end, rest_ratio in ((0, ratio), (1, ratio + (1 - ratio) * fixed)):
            attention = 4.0 * model.experts[0].head_dim * base.attention_pairs[end]
            rest = base.flops[end] - attention
            flops.append(attention * (1 - part * (1 - pairs)) + rest * (1 - part * (1 - rest_ratio)))
        out = base.scaled(1 - part * (1 - pairs), fields=("attention_pairs",))
        return Estimate(out.nfe, out.blocks_run, out.attention_pairs, (flops[0], flops[1]))

    # -- running --------------------------------------------------------------------------------------------------

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        """The predicted clean latents of the batch, in float32; the first steps run all frames, so nothing shrinks."""
        if self.is_identity:
            return base
        return replace(base, kept=base.kept + workload.batch * (base.output // base.size) * 4)

    def apply(self, target: Target) -> None:
        signature = inspect.signature(target.scheduler.step)
        target.edit.wrap(target.scheduler, lambda old: self._step(target, signature, old), "step")
        for expert in target.experts:
            for site in expert.attentions:
                if site.kind in KINDS and getattr(site.module.processor, "kernel", None) is None:
                    # Samples of a batch have positions of their own, which not every model's own processor takes.
                    target.set_kernel(site, PlainAttention(own_backend(site)))
            now = Now()
            target.around_expert(expert, self._handler(target, expert, now))
            for block in expert.blocks:
                target.around_block(block, self._around_block(target, now))

    def _clip(self, target: Target) -> Clip:
        return target.store.whole(NAME, "clip", Clip)

    def _step(
        self, target: Target, signature: inspect.Signature, old: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The solver's step; what it was given says how the clean clip looks."""
        clock = target.clock

        def step(*args: Any, **kwargs: Any) -> Any:
            out = old(*args, **kwargs)
            if not clock.running or not (
                self.merges(clock.step, clock.num_steps) or self.merges(clock.step + 1, clock.num_steps)
            ):
                return out
            now, later = (self.merges(clock.step + i, clock.num_steps) for i in (0, 1))
            call, clip = signature.bind(*args, **kwargs).arguments, self._clip(target)
            sample = call["sample"].float()
            clip.clean = sample - clock.sigma * call["model_output"].float() if later else None
            if clip.clean is not None and not clip.runs:
                count = self.left_out(sample.shape[2])
                clip.runs = tuple(least_motion(m, count, self.longest) for m in motion(clip.clean))
            if now != later:
                # What caches remember has another length from now on.
                target.store.clear()
                target.store.whole(NAME, "clip", lambda: clip)
            return out

        return step

    def _handler(self, target: Target, expert: Expert, now: Now) -> RootHandler:
        clock, adapter = target.clock, target.adapter
        assert adapter is not None

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            evaluation, clip = clock.evaluation, self._clip(target)
            assert evaluation is not None  # handlers are called inside an evaluation only
            hidden, who = call.values["hidden_states"], known_rows(target, call.rows)
            merging = self.merges(clock.step, clock.num_steps) and self.left_out(hidden.shape[2]) > 0
            if not merging or clip.clean is None or who is None:
                return run(call)
            samples = [sample for _, sample in who]
            groups = Groups([clip.runs[i] for i in samples], hidden.device)
            clean, full = clip.clean[samples], adapter.grid_of_call(expert.config, call.values)
            values = dict(call.values)
            values["hidden_states"] = groups.merged(hidden, clean, clock.sigma)
            grid = adapter.grid_of_call(expert.config, values)
            if (time := values.get("timestep")) is not None and time.ndim == 2:
                # A timestep for every token: without a picture they are all the same.
                values["timestep"] = time[:, :1].expand(-1, grid.video)
            evaluation.grid = grid
            evaluation.variant += (NAME,)
            text = grid.text
            evaluation.lengths = {grid.video: full.video, grid.video + text: full.video + text}
            now.rotary = groups.rotary(clip.rotary, full)
            evaluation.mark(NAME)
            target.report(NAME, "frames_left_out", (full.frames - grid.frames) * call.rows)
            try:
                out = run(RootCall(values, call.rows))
            finally:
                now.rotary, evaluation.lengths = None, {}
            found = values["hidden_states"].float() - clock.sigma * out.float()
            return self._restored(hidden, clean, found, groups, clock.sigma).to(out.dtype)

        return handler

    def _restored(
        self, z: torch.Tensor, clean: torch.Tensor, found: torch.Tensor, groups: Groups, sigma: float
    ) -> torch.Tensor:
        """Velocities of all frames (B, C, T, H, W) from the groups' clean latents (B, C, G, H, W)."""
        if self.restore == "interpolate":
            x0 = groups.interpolated(found)
        else:
            x0 = groups.repeated(found)
            if self.restore == "residual":
                x0 = x0 + clean - groups.repeated(groups.sums(clean) / groups.axis(groups.sizes))
        return (z.float() - x0) / sigma

    def _around_block(self, target: Target, now: Now) -> Callable[..., Streams]:
        """Rotary factors: those of all frames are remembered in full steps, and merged steps pick from them."""

        def handler(call: BlockCall, run: Callable[[BlockCall], Streams]) -> Streams:
            name = call.layout.rotary
            if (factors := call.values.get(name)) is None:
                return run(call)
            if now.rotary is not None:
                return run(BlockCall(call.layout, call.values | {name: now.rotary}, call.signature))
            clip = self._clip(target)
            if clip.rotary is None:
                clip.rotary = factors
            return run(call)

        return handler


@dataclass(slots=True, eq=False)
class Now:
    """The evaluation under way: rotary factors of the merged frames, or None where all frames run."""

    rotary: Any = None


class Groups:
    """Which neighbouring frames are one, for every row.

    Args:
        runs: for every row the sizes of its groups, in order; equally many for all rows.
        device: of the tables.
    """

    def __init__(self, runs: Sequence[tuple[int, ...]], device: Any) -> None:
        import torch

        self.sizes = torch.tensor(runs, device=device)  # (B, G)
        self.starts = self.sizes.cumsum(1) - self.sizes
        self.longest = max(max(sizes) for sizes in runs)
        numbers = [[g for g, size in enumerate(sizes) for _ in range(size)] for sizes in runs]
        self.of_frame = torch.tensor(numbers, device=device)  # (B, T)

    @staticmethod
    def axis(x: torch.Tensor) -> torch.Tensor:
        """(B, N) beside latents (B, C, N, H, W)."""
        return x[:, None, :, None, None]

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """Sums over the frames of every group: (B, C, T, H, W) to (B, C, G, H, W)."""
        total = _frames(x, self.starts)
        for i in range(1, self.longest):
            inside = self.axis(self.sizes > i)
            total = total + _frames(x, (self.starts + i).clamp_max(x.shape[2] - 1)) * inside
        return total

    def merged(self, z: torch.Tensor, clean: torch.Tensor, sigma: float) -> torch.Tensor:
        """Noisy latents of the groups, in `z`'s dtype: means of the clean ones, with noise as strong as one frame's."""
        number = self.axis(self.sizes).float()
        out = self.sums(z.float()) / number.sqrt()
        out = out + (1.0 - sigma) * (1.0 / number - 1.0 / number.sqrt()) * self.sums(clean)
        return out.to(z.dtype)

    def repeated(self, x: torch.Tensor) -> torch.Tensor:
        """Every frame gets its group's: (B, C, G, H, W) to (B, C, T, H, W)."""
        return _frames(x, self.of_frame)

    def interpolated(self, x: torch.Tensor) -> torch.Tensor:
        """Every frame gets what lies between the middles of the groups around it, the outermost ones' beyond them."""
        import torch

        last = self.sizes.shape[1] - 1
        middles = self.starts + (self.sizes - 1) / 2
        mine = middles.gather(1, self.of_frame)
        place = torch.arange(self.of_frame.shape[1], device=x.device) - mine
        other = (self.of_frame + place.sign().long()).clamp(0, last)
        gap = (middles.gather(1, other) - mine).abs()
        weight = self.axis(torch.where(gap > 0, place.abs() / gap.clamp_min(1.0), 0.0))
        return _frames(x, self.of_frame) * (1 - weight) + _frames(x, other) * weight

    def rotary(self, factors: Any, grid: TokenGrid) -> Any:
        """The rotary factors of every group's middle frame, from those of all frames of `grid`."""
        if factors is None:
            return None
        import torch

        from vivace.models.attention_parts import rotary_at

        frame = grid.height * grid.width
        middles = self.starts + (self.sizes - 1) // 2
        tokens = middles[:, :, None] * frame + torch.arange(frame, device=middles.device)
        return tuple(rotary_at(f, tokens.flatten(1)) for f in factors)


def _frames(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Frames of (B, C, T, H, W), chosen for every row by (B, N)."""
    return x.gather(2, Groups.axis(index).expand(-1, x.shape[1], -1, *x.shape[3:]))


def motion(clean: torch.Tensor) -> list[list[float]]:
    """Mean squared change from each frame to the next, for every sample of (B, C, T, H, W); waits for the device."""
    return (clean[:, :, 1:] - clean[:, :, :-1]).square().mean(dim=(1, 3, 4)).tolist()


def least_motion(changes: Sequence[float], count: int, longest: int) -> tuple[int, ...]:
    """Sizes of groups of frames such that the changes inside groups are least in sum.

    Args:
        changes: from each frame to the next, T - 1 of them.
        count: frames that are merged into the one before them; groups are T - count.
        longest: most frames of a group. The first frame is a group by itself.

    Raises:
        ValueError: so many frames cannot be merged.
    """
    # Best cost and choice for (joints made, joints in a row up to here), boundary by boundary.
    states: dict[tuple[int, int], tuple[float, tuple[bool, ...]]] = {(0, 0): (0.0, (False,))}
    for change in changes[1:]:
        after: dict[tuple[int, int], tuple[float, tuple[bool, ...]]] = {}
        for (made, row), (cost, joints) in states.items():
            options = [((made, 0), cost, False)]
            if made < count and row + 1 < longest:
                options.append(((made + 1, row + 1), cost + change, True))
            for key, total, joint in options:
                if key not in after or total < after[key][0]:
                    after[key] = (total, (*joints, joint))
        states = after
    ends = [state for (made, _), state in states.items() if made == count]
    if not ends:
        raise ValueError(
            f"{count} of {len(changes) + 1} frames cannot be merged in groups of at most {longest}."
        )
    sizes = [1]
    for joint in min(ends)[1][: len(changes)]:
        if joint:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return tuple(sizes)


class PlainAttention:
    """The model's own attention, for a processor that takes rotary factors of every row."""

    def __init__(self, backend: Any) -> None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        self._dispatch, self._backend = dispatch_attention_fn, backend

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        return self._dispatch(q, k, v, attn_mask=mask, backend=self._backend)


def _grid(model: ModelDescription, workload: Workload) -> TokenGrid:
    grid = model.grid(workload)
    assert grid is not None
    return grid
