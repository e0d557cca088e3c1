"""Trained tensors of attention sites, from one safetensors file: `<address of the site>.<name>` for every site.

An address is that of `AttentionSite.site`, e.g. `transformer.blocks.3.attn1`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.core.errors import WeightsError

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]


def misfit(file: str, sites: Iterable[str], shapes: Shapes) -> str:
    """Why a file does not hold tensors of these names and shapes for all sites and no others; empty when it does.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    wanted = {f"{site}.{name}": shape for site in sites for name, shape in shapes.items()}
    with _opened(file) as reader:
        found = {key: tuple(reader.get_slice(key).get_shape()) for key in reader.keys()}  # noqa: SIM118
    for key, shape in wanted.items():
        if key not in found:
            return f"{file} holds no {key}."
        if found[key] != shape:
            return f"{file}: {key} is {found[key]}, and this model needs {shape}."
    extra = sorted(set(found) - set(wanted))
    return f"{file} holds {extra[0]}, which no sparse site of this model has." if extra else ""


def read(file: str, site: str, names: Iterable[str], device: Any) -> dict[str, torch.Tensor]:
    """The tensors of one site by name, in float32.

    Raises:
        WeightsError: the file is missing or damaged, or does not hold them.
    """
    out = {}
    with _opened(file) as reader:
        held = set(reader.keys())
        for name in names:
            if (key := f"{site}.{name}") not in held:
                raise WeightsError(f"{file} holds no {key}.")
            out[name] = reader.get_tensor(key).float().to(device)
    return out


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    place = Path(file).expanduser()
    if not place.is_file():
        raise WeightsError(f"{place} is missing; give a .safetensors file of trained tensors.")
    try:
        handle = safe_open(str(place), framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{place} cannot be read as safetensors ({error}); copy it again.") from None
    with handle as reader:
        yield reader
