"""VBench's 16 dimensions by VBench's own code and weights, which the user brings (`vivace.evaluation.vbench`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vivace.evaluation import vbench, vbench_run
from vivace.evaluation.metrics.base import (
    Better,
    Context,
    Group,
    MetricCard,
    SampleMetric,
    Scope,
    Series,
)

if TYPE_CHECKING:
    import torch

_SAME = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
)
"""A frozen clip has the best value of the first four, and more motion than the exact run's is no gain."""


def _series(name: str) -> Series:
    return Series(
        name=f"vbench_{name}",
        better=Better.SAME if name in _SAME else Better.HIGHER,
        margin=0.03 if name == "dynamic_degree" else None,
        binary=name in ("dynamic_degree", "human_action"),
        about=f"vbench-official: raw score of {name.replace('_', ' ')}; empty on prompts that do not measure it.",
    )


class VBenchOfficial(SampleMetric):
    """Raw scores of VBench's dimensions; `vivace.evaluation.vbench.aggregate` makes its totals of their means."""

    card: ClassVar[MetricCard] = MetricCard(
        name="vbench_official",
        version=1,
        title="VBench (official code)",
        scope=Scope.SAMPLE,
        group=Group.ABSOLUTE,
        series=tuple(_series(name) for name in vbench.dimensions()),
        convention="vbench-official. VBench's package in an interpreter of its own, clips as H.264 at crf 0; its "
        "standard mode on its own prompts, each on that prompt's dimensions, its custom mode on all "
        "others; imaging quality with longer side 512; DINO, CLIP, RAFT, AMT-S, MUSIQ, GRiT, UMT, "
        "Tag2Text and ViCLIP as the user has them; dimensions whose weights are not in the folder stay "
        "empty.",
        sees=("noise", "flicker", "wrong_clip", "wrong_colour"),
        blind_to=("freeze", "stutter", "blur", "reverse"),
        cite="arXiv:2311.17982",
    )

    def missing(self) -> str:
        return super().missing() or vbench_run.missing()

    def sample(self, clips: torch.Tensor, context: Context) -> dict[str, list[float]]:
        import torch

        from vivace.core.errors import ConfigError

        if len(context.prompts) != len(clips):
            raise ConfigError(
                f"vbench_official needs one prompt a clip, got {len(context.prompts)} for {len(clips)} clips."
            )
        frames = [(clip * 255.0).round().to(torch.uint8).cpu().numpy() for clip in clips]
        scores = vbench_run.official(frames, context.prompts, fps=context.fps, device=str(self.device))
        return {f"vbench_{name}": values for name, values in scores.items()}
