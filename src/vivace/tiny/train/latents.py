"""Clips as the transformer sees them: normalised latents, object masks at latent size, and token ids of captions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from vivace.tiny.defaults import TEXT_LENGTH
from vivace.tiny.train.clips import ClipShape, to_model
from vivace.tiny.train.common import Processes
from vivace.tiny.whole_clip import config_of, encode_moments
from vivace.world import caption, sample_scenes
from vivace.world.splits import train_seeds


@dataclass
class LatentSet:
    """`latents` bf16 (N, z, n, h, w), `mask` uint8 (N, n, h, w), `ids` int16 (N, K, L): K captions of each clip."""

    latents: Tensor
    mask: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """`count` random clips, each with one of its captions."""
        device = self.latents.device
        pick = torch.randint(len(self), (count,), device=device)
        which = torch.randint(self.ids.shape[1], (count,), device=device)
        return self.latents[pick], self.mask[pick], self.ids[pick, which].long()

    def save(self, path: Path) -> None:
        torch.save({"latents": self.latents, "mask": self.mask, "ids": self.ids}, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> LatentSet:
        return cls(**torch.load(path, map_location=device, weights_only=True))


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Tensor:
    """Token ids (B, 64), padded with the id 0, as `WanPipeline` makes them."""
    return tokenizer(
        prompts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def embed_text(text_encoder: UMT5EncoderModel, ids: Tensor, pad: int = 0) -> Tensor:
    """Embeddings (B, L, D) that are zero after the end of the prompt, like `WanPipeline._get_t5_prompt_embeds`."""
    mask = ids != pad
    hidden = text_encoder(ids, mask.long()).last_hidden_state
    return hidden * mask[..., None].to(hidden.dtype)


def pool_mask(mask: Tensor, spatial: int) -> Tensor:
    """bool (B, T, H, W) -> uint8 (B, n, H / s, W / s): 1 where a latent's pixels hold any of an object."""
    first = mask[:, :1].float()
    rest = mask[:, 1:].unflatten(1, (-1, 4)).float().amax(dim=2)
    return F.max_pool2d(torch.cat([first, rest], dim=1), spatial).to(torch.uint8)


def normalise(vae: AutoencoderKLWan, moments: Tensor) -> Tensor:
    """Posterior means in the scale the transformer works in."""
    config = config_of(vae)
    mean = moments[:, : config.z_dim]
    shape = (1, -1, 1, 1, 1)
    centre = torch.tensor(config.latents_mean, device=mean.device).view(shape)
    spread = torch.tensor(config.latents_std, device=mean.device).view(shape)
    return (mean.float() - centre) / spread


def make_encoder(vae: AutoencoderKLWan, processes: Processes) -> Callable[[Tensor], Tensor]:
    """uint8 clips (B, T, H, W, 3) -> bf16 normalised latents, by the whole-clip pass (faster than the rendering)."""

    @torch.no_grad()
    def encode(video: Tensor) -> Tensor:
        with processes.autocast():
            return normalise(vae, encode_moments(vae, to_model(video))).bfloat16()

    return encode


def encode_clips(
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
    shape: ClipShape,
    *,
    count: int,
    stream: int,
    captions: int = 3,
    portion: int = 32,
    seconds: float = float("inf"),
) -> LatentSet:
    """Render and encode `count` clips (rounded up to portions), or as many as fit into `seconds`."""
    encode, latents, masks, ids = make_encoder(vae, processes), [], [], []
    started = time.perf_counter()
    for start in range(0, count, portion):
        scenes = sample_scenes(train_seeds(start, portion, stream))
        video, mask = shape.draw(scenes, processes.device)
        latents.append(encode(video))
        masks.append(pool_mask(mask, config_of(vae).scale_factor_spatial))
        texts = [caption(s.attributes, captions * s.seed + k) for s in scenes for k in range(captions)]
        ids.append(tokenize(tokenizer, texts).to(torch.int16).view(portion, captions, -1))
        if processes.agree(time.perf_counter() - started) > seconds:
            break
    return LatentSet(torch.cat(latents), torch.cat(masks), torch.cat(ids).to(processes.device))
