"""A pipeline small enough to train in a test, and clips small enough to render in one."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanPipeline

from vivace.tiny.build import TinyConfig, build_pipeline

SMALL = TinyConfig(
    heads=2, head_dim=16, layers=2, ffn_dim=64, text_dim=32, text_layers=1, vae_dim=8, latent_channels=8
)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def small() -> TinyConfig:
    return SMALL


@pytest.fixture
def pipeline() -> WanPipeline:
    return build_pipeline(0, SMALL)
