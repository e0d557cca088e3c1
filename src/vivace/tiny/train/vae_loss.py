"""The objective of the VAE: squared error where it matters, and a rate that keeps all latent channels alive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from vivace.tiny.whole_clip import Conv, decode_latents, encode_moments


@dataclass(frozen=True, kw_only=True)
class VaeLoss:
    """Weights of the terms; all errors are of pixel values in [0, 1].

    `rate` multiplies the KL divergence *per latent element*: `DiagonalGaussianDistribution.kl` sums three of the four
    axes of a clip's latent, so it is not used. Noise on top of the posterior's own teaches the decoder to bear the
    errors of the transformer.
    """

    object_weight: float = 7.0
    chroma: float = 1.0
    gradient: float = 0.1
    rate: float = 5e-5
    extra_noise: float = 0.05
    conv: Conv = "stack"

    def __call__(
        self, vae: AutoencoderKLWan, video: Tensor, mask: Tensor, noise: Tensor, warm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss and, for the record, (squared error, that on objects, KL per element).

        `video`: uint8 (B, T, H, W, 3); `mask`: bool (B, T, H, W); `noise`: (B, z, n, h, w); `warm`: the KL warm-up.
        """
        target = video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
        mean, logvar = encode_moments(vae, target, self.conv).float().chunk(2, dim=1)
        logvar = logvar.clamp(-30.0, 20.0)  # as DiagonalGaussianDistribution does
        spread = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        deviation = (logvar.exp() + (self.extra_noise * spread) ** 2).sqrt()
        output = decode_latents(vae, mean + deviation * noise, self.conv, clamp=False).float()
        error = (output - target) / 2.0
        inside = mask[:, None].float()
        weight = 1.0 + self.object_weight * inside
        colour = error - error.mean(dim=1, keepdim=True)  # what is left when brightness is right
        square = error.square()
        loss = (weight * (square + self.chroma * colour.square())).mean()
        for axis in (3, 4):
            loss = loss + self.gradient * torch.diff(error, dim=axis).square().mean()
        rate = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        on_objects = (square * inside).sum() / (3.0 * inside.sum() + 1.0)
        return loss + self.rate * warm * rate, torch.stack([square.mean(), on_objects, rate]).detach()
