"""The digest of tensors: every bit counts, layout does not."""

from __future__ import annotations

import pytest
import torch

from vivace.core.digest import CHUNK, tensors_digest


def of(*tensors):
    return tensors_digest([(str(i), t) for i, t in enumerate(tensors)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (7, 5), (300, 301)])
def test_any_changed_element_shows(dtype, shape):
    x = torch.zeros(shape, dtype=dtype)
    before = of(x)
    assert of(x.clone()) == before
    for at in {0, x.numel() // 2, x.numel() - 1} if x.numel() else ():
        y = x.clone()
        y.view(-1)[at] = 1
        assert of(y) != before


def test_long_tensors_are_joined_in_order():
    x = torch.arange(CHUNK * 5 + 3, dtype=torch.float32)
    before = of(x)
    swapped = x.clone()
    swapped[: 2 * CHUNK], swapped[2 * CHUNK : 4 * CHUNK] = x[2 * CHUNK : 4 * CHUNK], x[: 2 * CHUNK]
    assert len({before, of(swapped), of(x.flip(0)), of(x[:-1])}) == 4


def test_names_shapes_and_types_count_and_layout_does_not():
    x = torch.randn(8, 6)
    assert of(x.t().contiguous().t()) == of(x)
    assert of(torch.cat([torch.ones(1), x.view(-1)])[1:].view(8, 6)) == of(x)
    assert len({of(x), of(x.view(6, 8)), of(x.view(torch.int32)), of(x, x)}) == 4
    pair = [("a", x), ("b", x + 1)]
    assert tensors_digest(pair) == tensors_digest(pair[::-1])
    assert tensors_digest(pair) != tensors_digest([("a", x + 1), ("b", x)])


def test_tensors_without_values_are_refused():
    with pytest.raises(ValueError, match="meta"):
        of(torch.empty(3, device="meta"))
