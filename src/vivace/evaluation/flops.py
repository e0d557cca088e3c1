"""FLOPs of the stages around the transformer, counted on the meta device: no weights, no arithmetic.

The transformer is counted live by `vivace.core.counters`, with sparse and custom kernels by the blocks they visit. The
text encoder and the VAE run as they are, so their modules are built from their configurations on the meta device and
counted by torch's `FlopCounterMode`. There it sees attention too; on a CPU it counts none (torch 2.13), because the CPU
kernel has no registered formula.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vivace.core.quiet import quiet

if TYPE_CHECKING:
    from vivace.core.shapes import Workload
    from vivace.models.adapter import ModelDescription


def stage_flops(pipeline: Any, model: ModelDescription, workload: Workload) -> dict[str, float]:
    """FLOPs of encoding one prompt (both guidance branches) and of decoding one clip.

    Args:
        pipeline: its text encoders and VAE are read for their classes and configurations only.
        workload: the clip; `text` is the number of text tokens.

    Returns:
        `flops_text` and `flops_vae`; a stage that cannot be built on the meta device is left out.
    """
    out: dict[str, float] = {}
    text = 0.0
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(pipeline, name, None)
        if encoder is not None:
            text += encoder_flops(encoder, workload.text) * workload.branches
    if text:
        out["flops_text"] = text
    vae = getattr(pipeline, "vae", None)
    if vae is not None and model.adapter is not None:
        out["flops_vae"] = decoder_flops(vae, model.adapter.latent(model, workload))
    return out


def encoder_flops(encoder: Any, tokens: int) -> float:
    """FLOPs of one text encoder over one sequence of `tokens` tokens."""
    import torch

    with quiet(), torch.device("meta"):
        copy = type(encoder)(encoder.config).eval()
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # Without a mask: the library looks at a mask's values, and on the meta device there are none.
    return counted(lambda: copy(ids))


def decoder_flops(vae: Any, latent: tuple[int, int, int]) -> float:
    """FLOPs of decoding latents of (frames, height, width), one clip, with the VAE's own `decode`."""
    import torch

    with quiet(), torch.device("meta"):
        copy = type(vae).from_config(dict(vae.config)).eval()
    channels = vae.config.get("z_dim") or vae.config.get("latent_channels")
    z = torch.zeros(1, channels, *latent, device="meta")
    return counted(lambda: copy.decode(z, return_dict=False))


def counted(run: Any) -> float:
    """FLOPs that torch's counter sees in `run`, which must work on meta tensors."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())
