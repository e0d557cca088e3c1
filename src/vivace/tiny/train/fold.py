"""Rotate and even out the latent channels of a VAE, exactly, inside its own 1x1x1 convolutions.

A reconstruction loss leaves most of the latent's variance in one or two directions (brightness), and colour far below
the error floor of a generator trained on unit noise. Principal axes `U`, variances `v` over real clips and a diagonal
`D = v^-power / scale` give new latents `y = D U^T (z - mean)`. `quant_conv` is the last layer before the latent and
`post_quant_conv` the first one after it, both 1x1x1, so the change and its inverse are folded into them: decoding an
encoded clip is unchanged, up to rounding.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor


@torch.no_grad()
def fold_latents(
    vae: AutoencoderKLWan, moments: Tensor, power: float = 0.4, floor: float = 1e-3
) -> dict[str, list]:
    """Fold rotation and scaling measured on posterior `moments` (N, 2 z, n, h, w) of real clips into `vae` in place.

    `power` 0.5 makes all directions equally strong, 0 keeps their ratios; directions with less than `floor` times the
    largest variance count as dead and get no more gain than that. The new means are 0 and the variances add up to
    z, with `latents_mean` 0 and `latents_std` 1. The posterior's log-variance becomes a constant per channel, its
    average in the new axes: a rotated diagonal Gaussian is no longer diagonal. Returns the spectrum for the record.
    """
    means, logvars = moments.transpose(0, 1).flatten(1).double().chunk(2)
    channels, flat = len(means), means
    mean = flat.mean(dim=1)
    centred = flat - mean[:, None]
    variance, axes = torch.linalg.eigh(centred @ centred.T / centred.shape[1])
    variance, axes = variance.flip(0).clamp(min=0.0), axes.flip(1)
    gain = variance.clamp(min=float(variance[0]) * floor).pow(-power)
    gain = gain * (channels / (gain.square() * variance).sum()).sqrt()
    forward = gain[:, None] * axes.T
    inverse = axes / gain

    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant.bias is not None
    assert post.bias is not None
    weight, bias = quant.weight.double().flatten(1), quant.bias.double()
    quant.weight[:channels] = (forward @ weight[:channels]).view(channels, -1, 1, 1, 1).to(quant.weight)
    quant.bias[:channels] = (forward @ (bias[:channels] - mean)).to(quant.bias)
    noise = logvars.clamp(-30.0, 20.0).exp().mean(dim=1)
    quant.weight[channels:] = 0.0
    quant.bias[channels:] = (forward.square() @ noise).log().to(quant.bias)
    weight = post.weight.double().flatten(1)
    post.bias.add_((weight @ mean).to(post.bias))
    post.weight.copy_((weight @ inverse).view_as(post.weight).to(post.weight))
    vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    return {
        "variance_before": [float(v) for v in variance],
        "deviation_after": [float(d) for d in (gain * variance.sqrt())],
    }
