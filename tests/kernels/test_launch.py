"""Kernels are called past torch's dispatcher only where nobody must see the operation."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vivace.kernels.launch import at_once


def test_processors_and_fakes_go_through_the_dispatcher() -> None:
    assert not at_once(torch.zeros(2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(2, device="cuda")
    assert fake.is_cuda
    assert not at_once(fake)
    assert not at_once(torch.empty(2, device="meta"))
