"""Trained tensors of attention sites, from one safetensors file: `<address of the site>.<name>` for every site.

An address is that of `AttentionSite.site`, e.g. `transformer.blocks.3.attn1`. In a student file the same names stand
behind `sparse_attention.`, beside the student's weights. Students that come with the package are known by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.core.errors import WeightsError
from vivace.models.student_artifact import SPARSE

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
        keys = _keys(reader)
        found = {name: tuple(reader.get_slice(key).get_shape()) for name, key in keys.items()}
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
        keys = _keys(reader)
        for name in names:
            if (key := f"{site}.{name}") not in keys:
                raise WeightsError(f"{file} holds no {key}.")
            out[name] = reader.get_tensor(keys[key]).float().to(device)
    return out


def _keys(reader: Any) -> dict[str, str]:
    """`<site>.<name>` -> the tensor's name in the file; of a student file only what belongs to attention sites."""
    keys = list(reader.keys())
    student = {key.removeprefix(SPARSE): key for key in keys if key.startswith(SPARSE)}
    return student or {key: key for key in keys}


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    place = Path(file).expanduser()
    if not place.is_file():
        from vivace.models.student import shipped_students

        place = shipped_students().get(file, place)
    if not place.is_file():
        raise WeightsError(f"{place} is missing; give a .safetensors file of trained tensors.")
    try:
        handle = safe_open(str(place), framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{place} cannot be read as safetensors ({error}); copy it again.") from None
    with handle as reader:
        yield reader
