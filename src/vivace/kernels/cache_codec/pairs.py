"""Keys and values of attention in few bits, as KIVI (arXiv 2402.02750) groups them: for caches of streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vivace.kernels.cache_codec.reference import pack, unpack
from vivace.kernels.cache_codec.spec import Packed


@dataclass(frozen=True, slots=True, eq=False)
class PackedPair:
    """Keys and values (B, S, H, D), the oldest tokens in few bits and the newest as they were.

    Attributes:
        keys: of the old tokens, a scale for each channel and group of tokens; None where there are none.
        values: of the old tokens, a scale for each token and group of channels.
        new_keys, new_values: (B, R, H, D), the newest tokens.
    """

    keys: Packed | None
    values: Packed | None
    new_keys: torch.Tensor
    new_values: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        packed = sum(p.nbytes for p in (self.keys, self.values) if p is not None)
        return packed + self.new_keys.nbytes + self.new_values.nbytes

    @property
    def tokens(self) -> int:
        """S."""
        return self.new_keys.shape[1] + (0 if self.keys is None else self.keys.shape[1])


def pack_keys(k: torch.Tensor, form: str = "int2", group: int = 32) -> Packed:
    """Keys (B, S, H, D): `group` tokens of a channel of a head share a scale. Errors as `pack`."""
    return pack(k, form, group, axis=-3)


def pack_values(v: torch.Tensor, form: str = "int2", group: int = 32) -> Packed:
    """Values (B, S, H, D): `group` channels of a token of a head share a scale. Errors as `pack`."""
    return pack(v, form, group, axis=-1)


def pack_pair(
    k: torch.Tensor, v: torch.Tensor, form: str = "int2", group: int = 32, residual: int = 0
) -> PackedPair:
    """Keys and values in few bits but for the newest tokens.

    Args:
        k, v: (B, S, H, D).
        form: of `spec.FORMS`.
        group: tokens (keys) or channels (values) that share a scale, 1 or more.
        residual: least number of newest tokens that stay as they are; those that fill no group of keys do as well.

    Raises:
        ValueError: the tensors do not fit each other, or as `pack`.
        RuntimeError: gradients are asked for.
    """
    if k.ndim != 4 or k.shape[:3] != v.shape[:3] or v.ndim != 4:
        raise ValueError(f"keys and values are (B, S, H, D), not {tuple(k.shape)} and {tuple(v.shape)}.")
    if group < 1 or residual < 0:
        raise ValueError(f"groups have one token at least, and a residual is no debt: {group}, {residual}.")
    old = max(0, k.shape[1] - residual) // group * group
    # Clones: views would keep the whole tensors in memory.
    new = k[:, old:].clone(), v[:, old:].clone()
    if not old:
        return PackedPair(None, None, *new)
    return PackedPair(pack_keys(k[:, :old], form, group), pack_values(v[:, :old], form, group), *new)


def unpack_pair(pair: PackedPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, S, H, D)."""
    if pair.keys is None or pair.values is None:
        return pair.new_keys, pair.new_values
    keys = torch.cat([unpack(pair.keys), pair.new_keys], dim=1)
    return keys, torch.cat([unpack(pair.values), pair.new_values], dim=1)
