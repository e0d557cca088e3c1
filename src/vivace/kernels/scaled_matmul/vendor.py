"""cuBLAS (or oneDNN) for the product; what comes behind it in further passes."""

from __future__ import annotations

import functools

import torch

from vivace.kernels.scaled_matmul.reference import finished
from vivace.kernels.scaled_matmul.spec import After

LEAST_ROWS = 17
"""torch._int_mm on a GPU refuses fewer rows."""


def run(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, bias: torch.Tensor | None,
    after: After, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """See `spec`."""
    plain = not after.gelu and after.residual is None
    if a.dtype == torch.float8_e4m3fn:
        y = _by_rows(a, a_scale, b, b_scale, bias)
        return y.to(dtype) if plain else finished(y.float(), after).to(dtype)
    rows = a.shape[0]
    if a.device.type == "cuda" and rows < LEAST_ROWS:
        a = torch.nn.functional.pad(a, (0, 0, 0, LEAST_ROWS - rows))
    y = torch._int_mm(a, b.t())[:rows].float() * a_scale[:, None] * b_scale
    if bias is not None:
        y = y + bias.float()
    return finished(y, after).to(dtype)


def _by_rows(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """cuBLAS's product with scales by rows: it comes out in bfloat16 only, and takes a bias of that dtype."""
    product = functools.partial(
        torch._scaled_mm,
        a,
        b.t(),
        a_scale[:, None],
        b_scale[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    if bias is None:
        return product()
    bias = bias.to(torch.bfloat16)
    try:
        return product(bias=bias)
    except RuntimeError as error:
        # Of few rows and long sums cuBLAS knows no product that adds a bias (70 rows of 8,960 on Hopper).
        if "NOT_SUPPORTED" not in str(error):
            raise
        return product() + bias
