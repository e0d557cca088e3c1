"""Rotary factors of some tokens, in the shapes that the families' blocks take."""

from __future__ import annotations

import pytest
import torch

from vivace.models.attention_parts import by_token, rotary_at


@pytest.mark.parametrize("shape", [(7, 4), (1, 7, 1, 4), (2, 7, 4)], ids=str)
def test_every_row_gets_the_factors_of_its_own_tokens(shape) -> None:
    factors = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 3, 6], [5, 1, 2]])
    got = rotary_at(factors, index)
    assert got.shape == ((2, 3, 1, 4) if len(shape) == 4 else (2, 3, 4))
    for row in range(2):
        own = factors.reshape(-1, 7, 4)[row if len(shape) == 3 else 0]
        for position, token in enumerate(index[row].tolist()):
            assert torch.equal(got[row, position].flatten(), own[token])


def test_factors_of_all_rows_or_of_each_stand_beside_the_heads() -> None:
    assert by_token(torch.zeros(7, 4)).shape == (1, 7, 1, 4)
    assert by_token(torch.zeros(2, 7, 4)).shape == (2, 7, 1, 4)
