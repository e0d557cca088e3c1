"""What a pipeline really takes, by stage, to compare with what `vivace.plans.memory` predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vivace.core.footprint import DECODE, DENOISE, STAGES, TEXT
from vivace.core.live_bytes import LiveBytes
from vivace.core.surgery import Surgery

_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def measured_peaks(pipeline: Any, generate: Callable[[], Any]) -> dict[str, int]:
    """Peak bytes of live tensors by stage, weights and buffers of all components among them.

    Counted on any device, to the byte (`vivace.core.live_bytes`); weights are taken to lie on one device.

    Args:
        pipeline: a diffusers video pipeline.
        generate: makes one clip with it, to decoded frames.
    """
    edit, live = Surgery(), LiveBytes()
    peaks: dict[str, int] = dict.fromkeys(STAGES, 0)

    def watched(stage: str, before: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if before:
                    peaks[before] = max(peaks[before], live.peak)
                live.reset()
                out = old(*args, **kwargs)
                peaks[stage] = max(peaks[stage], live.peak)
                live.reset()
                return out

            return call

        return make

    for name in _ENCODERS:
        if (encoder := getattr(pipeline, name, None)) is not None:
            edit.wrap(encoder, watched(TEXT))
    edit.wrap(pipeline.scheduler, watched(TEXT), "set_timesteps")
    edit.wrap(pipeline.vae, watched(DECODE, before=DENOISE), "decode")
    try:
        with live:
            generate()
    finally:
        edit.close()
    parts = [m for m in pipeline.components.values() if isinstance(m, nn.Module)]
    weights = sum(t.nbytes for m in parts for t in (*m.parameters(), *m.buffers()))
    return {stage: weights + peak for stage, peak in peaks.items()}
