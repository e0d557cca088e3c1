"""Two clips of one request, measured against each other: frame metrics, and what of the prompt they show."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.cli.shared.judge import attribute_checks
from vivace.cli.shared.run import Job, Made
from vivace.cli.shared.screen import screen

if TYPE_CHECKING:
    from vivace.evaluation.frames import FrameMetric
    from vivace.plans.plan import Plan
    from vivace.report.compare_page import AttributeCheck, ComparePage

GAIN = 4.0
"""Factor of the difference pictures. Fixed, so that two reports can be compared by eye."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An exact and a fast run and everything that was measured on them."""

    job: Job
    plan: Plan
    exact: Made
    fast: Made
    metrics: tuple[FrameMetric, ...]
    checks: tuple[AttributeCheck, ...]
    unchecked: str
    """Why the prompt's attributes were not checked; empty when they were."""
    gain: float = GAIN

    @property
    def fps(self) -> float:
        """Frames per second of the clips."""
        return self.job.fps

    @property
    def speed_up(self) -> float:
        """Wall time of the exact run over that of the fast one, text encoding and decoding included."""
        return self.exact.receipt.stages["total"] / self.fast.receipt.stages["total"]

    @property
    def flops_share(self) -> float | None:
        """FLOPs of the fast run's transformer over the exact run's."""
        whole = self.exact.receipt.flops
        return self.fast.receipt.flops / whole if whole else None

    @property
    def receipts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both receipts as plain data; on a CPU without peak memory, which is the process's and so that of both."""
        both = (self.exact.receipt, self.fast.receipt)
        keep = self.fast.receipt.environment.get("device", "cpu") != "cpu"
        exact, fast = (r.to_dict() if keep else r.to_dict() | {"peak_bytes": None} for r in both)
        return exact, fast

    @property
    def warnings(self) -> list[str]:
        """What the receipts warn of."""
        return list(dict.fromkeys([*self.exact.receipt.warnings, *self.fast.receipt.warnings]))

    def right(self, which: str) -> int:
        """How many of the attributes that the prompt states a clip shows; `which` is `exact` or `fast`."""
        return sum(bool(c.holds(getattr(c, which))) for c in self.checks)

    @property
    def asked(self) -> int:
        """How many attributes the prompt states."""
        return sum(c.wanted is not None for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; the receipts are files of their own."""
        request = dataclasses.asdict(self.job.request) | dataclasses.asdict(self.job.workload)
        return {
            "request": request | {"fps": self.fps},
            "plan": self.plan.to_dict(),
            "speed_up": self.speed_up,
            "flops_share": self.flops_share,
            "seconds": {
                n: m.receipt.stages["total"] for n, m in (("exact", self.exact), ("fast", self.fast))
            },
            "setup_seconds": {"exact": self.exact.setup, "fast": self.fast.setup},
            "metrics": [_finite(dataclasses.asdict(m)) for m in self.metrics],
            "attributes": [dataclasses.asdict(c) for c in self.checks],
            "attributes_unchecked": self.unchecked,
        }

    def page(self, exact_mp4: bytes, fast_mp4: bytes) -> ComparePage:
        """The report's content, with the clips in it."""
        from vivace.report.compare_page import ComparePage, QualityCurve

        frames, height, width = self.exact.frames.shape[:3]
        return ComparePage(
            prompt=self.job.request.prompt,
            seed=self.job.request.seed,
            model=self.job.model.name,
            plan=self.plan.name,
            fps=self.fps,
            frames=frames,
            height=height,
            width=width,
            exact_video=exact_mp4,
            fast_video=fast_mp4,
            difference_video=self._difference(),
            difference_gain=self.gain,
            exact_receipt=self.receipts[0],
            fast_receipt=self.receipts[1],
            quality=[QualityCurve(**dataclasses.asdict(m)) for m in self.metrics],
            attributes=self.checks,
            command=_command(),
            warnings=[self.unchecked] if self.unchecked else [],
        )

    def _difference(self) -> bytes:
        from vivace.evaluation.video import heat_map, write_mp4

        heat = heat_map(self.exact.frames, self.fast.frames, gain=self.gain)
        with tempfile.TemporaryDirectory() as folder:
            return write_mp4(Path(folder) / "difference.mp4", heat, self.fps).read_bytes()


def measure(job: Job, plan: Plan, exact: Made, fast: Made, lpips_weights: Path | None = None) -> Pair:
    """Measure a pair.

    Raises:
        WeightsError: the named LPIPS weights cannot be read.
    """
    from vivace.evaluation.frames import FrameMetric
    from vivace.evaluation.metrics import FrameError, lpips, psnr, ssim

    with screen(stderr=True).status("[quiet]comparing"):
        metrics: list[FrameMetric] = [psnr(exact.frames, fast.frames)]
        try:
            metrics.append(ssim(exact.frames, fast.frames))
        except FrameError as error:
            metrics.append(
                FrameMetric(name="ssim", version="", unit="", higher_is_better=True, skipped=str(error))
            )
        metrics.append(lpips(exact.frames, fast.frames, weights=lpips_weights))
        checks, unchecked = attribute_checks(job, exact.frames, fast.frames)
    return Pair(
        job=job,
        plan=plan,
        exact=exact,
        fast=fast,
        metrics=tuple(metrics),
        checks=checks,
        unchecked=unchecked,
    )


def _finite(data: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity: the PSNR of equal frames is written as null."""
    infinity = float("inf")

    def mend(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [mend(v) for v in value]
        return None if value == infinity else value

    return {key: mend(value) for key, value in data.items()}


def _command() -> str:
    return shlex.join(["vivace", *sys.argv[1:]])
