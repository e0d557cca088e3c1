"""Material of pruning: latents of rendered clips with text embeddings, all on the device, and noisy calls made of them.

Clips are rendered on the device itself and encoded in bulk before training starts, so that nothing waits for data
afterwards. A pool is known by how many clips it holds: the same count gives the same clips again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vivace.tiny.train.clips import ClipShape
from vivace.tiny.train.common import Processes
from vivace.tiny.train.latents import embed_text, encode_clips, make_encoder, pool_mask, tokenize
from vivace.tiny.train.seeds import held_out
from vivace.tiny.train.text_to_video import FlowLoss
from vivace.tiny.whole_clip import config_of
from vivace.world import caption, sample_scenes

STREAM = 400
"""First stream of training scenes; other trainings draw from others."""
LEVELS = (0.15, 0.4, 0.65, 0.85, 0.97)
"""Noise levels at which a model is probed and measured: low ones shape details, high ones the layout."""


@dataclass
class Pool:
    """`latents` bf16 (N, z, n, h, w), `mask` uint8 (N, n, h, w), `text` (N, K, L, D), `empty` (L, D) of no prompt."""

    latents: Tensor
    mask: Tensor
    text: Tensor
    empty: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """`count` random clips: latents fp32, mask fp32 (B, 1, n, h, w), and the text of one of their captions."""
        device = self.latents.device
        pick = torch.randint(len(self), (count,), device=device)
        which = torch.randint(self.text.shape[1], (count,), device=device)
        return self.latents[pick].float(), self.mask[pick, None].float(), self.text[pick, which]


@dataclass(frozen=True)
class NoisyBatch:
    """Inputs of a transformer call: `x` (B, z, n, h, w), times `s` (B,) in (0, 1), text (B, L, D).

    `truth` is the flow-matching target noise - clean, `weight` (B, 1, n, h, w) what each place counts.
    The last `pairs` rows repeat the inputs of the first ones without their text.
    """

    x: Tensor
    s: Tensor
    text: Tensor
    truth: Tensor
    weight: Tensor
    pairs: int = 0

    def call(self, transformer: Any) -> Tensor:
        """The prediction (B, z, n, h, w)."""
        return transformer(
            hidden_states=self.x, timestep=1000.0 * self.s, encoder_hidden_states=self.text, return_dict=False
        )[0]


def noisy(pool: Pool, flow: FlowLoss, count: int, drop: float) -> NoisyBatch:
    """A training batch: noise levels as the model's own training draws them, a share `drop` of rows without text.

    Those rows are the others' twins, which lets the loss see the guided prediction.
    """
    pairs = min(round(drop * count), count // 2)
    clean, mask, text = pool.batch(count - pairs)
    s, noise = flow.times(len(clean), clean.device), torch.randn_like(clean)
    rows = torch.cat([torch.arange(len(clean)), torch.arange(pairs)]).to(clean.device)
    text = torch.cat([text, pool.empty.expand(pairs, -1, -1)])
    x = torch.lerp(clean, noise, s.view(-1, 1, 1, 1, 1))
    weight = 1.0 + flow.object_weight * mask
    return NoisyBatch(x[rows], s[rows], text, (noise - clean)[rows], weight[rows], pairs)


@torch.no_grad()
def gather(
    pipeline: Any,
    processes: Processes,
    shape: ClipShape,
    *,
    count: int,
    seconds: float = float("inf"),
    captions: int = 3,
    portion: int = 64,
) -> Pool:
    """Render, encode and embed `count` clips (in whole portions), or as many as fit into `seconds`."""
    data = encode_clips(
        pipeline.vae,
        pipeline.tokenizer,
        processes,
        shape,
        count=count,
        stream=STREAM + processes.rank,
        captions=captions,
        portion=min(portion, count),
        seconds=seconds,
    )
    flat = data.ids.long().flatten(0, 1)
    text = torch.cat([embed_text(pipeline.text_encoder, ids) for ids in flat.split(1024)])
    return Pool(data.latents, data.mask, text.view(*data.ids.shape, -1), _empty(pipeline, processes))


@torch.no_grad()
def held_out_batches(
    pipeline: Any, processes: Processes, shape: ClipShape, count: int, at_once: int = 16
) -> list[NoisyBatch]:
    """Clips that no training uses at every noise level, with text and without: the same noise at every call."""
    device, scenes = processes.device, sample_scenes(held_out("dev", count))
    encode, out = make_encoder(pipeline.vae, processes), []
    empty = _empty(pipeline, processes)
    draw = torch.Generator().manual_seed(0)
    for start in range(0, count, at_once):
        some = scenes[start : start + at_once]
        video, mask = shape.draw(some, device)
        clean = encode(video).float()
        weight = (
            1.0
            + FlowLoss().object_weight
            * pool_mask(mask, config_of(pipeline.vae).scale_factor_spatial)[:, None].float()
        )
        ids = tokenize(pipeline.tokenizer, [caption(s.attributes, s.seed) for s in some]).to(device)
        text = embed_text(pipeline.text_encoder, ids)
        for level in LEVELS:
            noise = torch.randn(clean.shape, generator=draw).to(device)
            x, s = torch.lerp(clean, noise, level), torch.full((len(some),), level, device=device)
            twice = [torch.cat([v, v]) for v in (x, s, noise - clean, weight)]
            both = torch.cat([text, empty.expand(len(some), -1, -1)])
            out.append(NoisyBatch(twice[0], twice[1], both, twice[2], twice[3], len(some)))
    return out


def _empty(pipeline: Any, processes: Processes) -> Tensor:
    ids = tokenize(pipeline.tokenizer, [""]).to(processes.device)
    return embed_text(pipeline.text_encoder, ids)[0]
