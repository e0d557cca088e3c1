"""Student weights in a file: full, or as what a student adds to its base, and the sums of several such files.

One safetensors file, in diffusers' naming. Its metadata hold the head and the artefact as JSON. Of a tensor NAME there
is one of

    NAME                                its values as they are (with int8 codes also NAME::scale, a row each)
    NAME::delta                         student - base (with int8 codes also NAME::scale)
    NAME::down (r, in), NAME::up (out, r)   student - base as a product up @ down
                                            (with int8 codes up @ diag (NAME::scale) @ down)

Tensors that a delta file does not name are the base's own. Codes are symmetric with one scale for an output channel.
A file without a head is a plain set of weights and reads as one. `second_time.*` are the weights of a flow map's second
time embedding (`vivace.models.second_time`), which the base does not have; they are kept as they are.

Deltas of students that were trained apart from one base add up, after TurboDiffusion (arXiv 2512.16093, section 3.2).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vivace.core.errors import ConfigError, WeightsError
from vivace.models.pruned_file import quantised
from vivace.models.student_artifact import KEY, SPARSE, Artifact, metadata

HEAD, FORM, VERSION = "vivace_student", "vivace-student", 1
STORES = ("int8-delta", "int8", "bf16")
"""Beside these `lora:RANK` and `int8-lora:RANK`."""
LORA = re.compile(r"(int8-)?lora:([1-9][0-9]*)")
EXTRA = ("second_time.", SPARSE)
"""Names that a base does not have begin so."""
DELTA, SCALE, DOWN, UP = "::delta", "::scale", "::down", "::up"
_EXACT_SVD = 2048
"""Matrices with a smaller side of at most this are decomposed exactly, larger ones by a randomised range finder."""
_TENSORS, _VALUES = 16, 1024

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Head:
    """How a file stores its tensors, and the hash of the weights that its deltas belong to (`weights_hash`)."""

    store: str = ""
    base: str = ""

    @property
    def is_delta(self) -> bool:
        """Whether the file holds only what a student adds to its base."""
        return self.store == "int8-delta" or LORA.fullmatch(self.store) is not None


def students_folder() -> Path:
    """Where the students lie that come with the package."""
    from vivace.tiny.load import WEIGHTS

    return WEIGHTS / "students"


def shipped_students() -> dict[str, Path]:
    """Files of the students that come with the package, by name."""
    return {f.stem: f for f in sorted(students_folder().glob("*.safetensors"))}


def weights_hash(state: State) -> str:
    """Sixteen hex digits of a few values of a state dict, rounded to bf16: equal in fp32 and bf16, on any device."""
    digest = hashlib.sha256()
    tensors = {
        k: v for k, v in state.items() if v.is_floating_point() and v.numel() and not k.startswith(EXTRA)
    }
    names = sorted(tensors)
    places = np.linspace(0, len(names) - 1, min(_TENSORS, len(names))).round().astype(int)
    for key in (names[i] for i in dict.fromkeys(places.tolist())):
        flat = tensors[key].detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES].bfloat16().float().cpu()
        digest.update(key.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


# -- writing ----------------------------------------------------------------------------------------------------------


def save_student(
    path: str | Path,
    student_state: State,
    base_state: State | None,
    artifact: Artifact,
    store: str = "int8-delta",
) -> Path:
    """Write a student's state dict; an interruption leaves an earlier file whole.

    Args:
        path: the file; folders are made.
        student_state: in diffusers' naming, with `second_time.*` for a flow map.
        base_state: of the teacher, for the stores that hold deltas; else it is not used.
        artifact: goes into the file's metadata.
        store: `int8-delta`, `int8` (codes for weights of two and more dimensions, the rest as it is), `bf16`, or
            `lora:RANK` (deltas of matrices by singular values in bf16, the other deltas in full), `int8-lora:RANK` (the
            same with codes for the singular vectors, the other deltas in bf16).

    Raises:
        ConfigError: there is no such store.
        WeightsError: a delta is wanted and the base is missing or of other names or shapes.
    """
    head = Head(store)
    check_store(store)
    if not head.is_delta:
        tensors = _whole(student_state, store)
        return _write(path, tensors, head, artifact)
    if base_state is None:
        raise WeightsError(
            f"store {store!r} holds deltas, so the base's weights are needed; give base_state."
        )
    own = {k: v for k, v in student_state.items() if not k.startswith(EXTRA)}
    if wrong := sorted(set(own) ^ set(base_state)):
        raise WeightsError(f"the student and its base do not have the same tensors, e.g. {wrong[0]}.")
    if wrong := sorted(k for k, v in own.items() if v.shape != base_state[k].shape):
        raise WeightsError(f"{wrong[0]} has another shape in the student than in its base.")
    deltas, plain = {}, {k: v for k, v in student_state.items() if k.startswith(EXTRA)}
    for name, value in own.items():
        if not value.is_floating_point():
            plain[name] = value
        elif not torch.equal(value, base_state[name].to(value)):
            deltas[name] = value.detach().float() - base_state[name].detach().to(value.device).float()
    tensors = {k: v.detach().cpu().contiguous() for k, v in plain.items()} | _packed(deltas, store)
    return _write(path, tensors, Head(store, weights_hash(base_state)), artifact)


def merge_students(
    paths: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    *,
    store: str = "int8-delta",
    artifact: Artifact | None = None,
    base_state: State | None = None,
) -> Path:
    """Write the student whose delta is the weighted sum of others'; all must come from one base.

    Trained tensors of sparse attention are the weighted mean over the students that have them.

    Args:
        paths, weights: the students and the factors of their deltas.
        out: the file to write.
        store: `int8-delta`, `lora:RANK` or `int8-lora:RANK`.
        artifact: of the new file; left out, the first one's that says how to sample, with `recipe` `merge`.
        base_state: the base's weights; needed where a file holds full weights.

    Raises:
        ConfigError: no students, or not one factor for each, or a store without deltas.
        WeightsError: the students have different bases, or two bring a second time embedding.
    """
    if not paths or len(paths) != len(weights):
        raise ConfigError(
            f"{len(paths)} students and {len(weights)} weights; give one weight for each student."
        )
    check_store(store)
    if not Head(store).is_delta:
        raise ConfigError("a merged student is stored as int8-delta, lora:RANK or int8-lora:RANK.")
    files, known = [Path(p) for p in paths], "" if base_state is None else weights_hash(base_state)
    total: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    shares: dict[str, float] = {}
    for file, factor in zip(files, weights, strict=True):
        head = read_head(file)
        if head.is_delta:
            known = known or head.base
            if head.base != known:
                raise WeightsError(
                    f"{file} was trained from another base than {files[0]}; their deltas do not add."
                )
        elif base_state is None:
            raise WeightsError(
                f"{file} holds full weights, so the base's are needed to merge it; give base_state."
            )
        for name, delta in _deltas(file, base_state):
            if not name.startswith(EXTRA) and delta.is_floating_point():
                total[name] = total[name] + factor * delta if name in total else factor * delta
            elif name.startswith(SPARSE) and delta.is_floating_point():
                before, known_share = plain.get(name, 0.0), shares.get(name, 0.0)
                plain[name], shares[name] = before + factor * delta.float(), known_share + factor
            elif name in plain and not torch.equal(plain[name], delta):
                raise WeightsError(
                    f"{name} differs between the students and cannot be added; merge one that has it."
                )
            else:
                plain[name] = delta
    for name, share in shares.items():
        if not share:
            raise WeightsError(f"the weights of the students that have {name} add up to 0; give others.")
        plain[name] = plain[name] / share
    return _write(out, plain | _packed(total, store), Head(store, known), artifact or _merged(files, weights))


def _merged(files: Sequence[Path], weights: Sequence[float]) -> Artifact:
    said = [a for f in files if (a := Artifact.of(f)) is not None]
    first = next((a for a in said if a.sampler.steps or a.sampler.sigmas), said[0] if said else Artifact())
    parts = [{"file": f.name, "weight": w} for f, w in zip(files, weights, strict=True)]
    recipes = [{"recipe": a.recipe, "settings": dict(a.settings)} for a in said]
    # Students are trained in different forms one by one, and their sum runs in all of them.
    attention = next((a.attention for a in said if a.attention), {})
    linears = next((a.linears for a in said if a.linears), {})
    settings = {"parts": parts, "recipes": recipes}
    return dataclasses.replace(first, recipe="merge", settings=settings, attention=attention, linears=linears)


def check_store(store: str) -> None:
    """Refuse a way to store students that there is not.

    Raises:
        ConfigError: as said; the sentence lists the ways.
    """
    if store not in STORES and not LORA.fullmatch(store):
        ways = ", ".join((*STORES, "lora:RANK", "int8-lora:RANK"))
        raise ConfigError(f"a student is stored as one of {ways}, not {store!r}.")


def _rank(store: str) -> int:
    """Rank of a store of factors; 0 for the others."""
    found = LORA.fullmatch(store)
    return int(found[2]) if found else 0


def _whole(state: State, store: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        value = value.detach().cpu()
        if not value.is_floating_point():
            tensors[name] = value.contiguous()
        elif store == "bf16":
            tensors[name] = value.to(torch.bfloat16).contiguous()
        elif value.ndim >= 2 and name.endswith("weight") and not name.startswith(EXTRA):
            codes, scale = quantised(value)
            tensors[name], tensors[name + SCALE] = codes.contiguous(), scale
        else:
            tensors[name] = value.contiguous()
    return tensors


def _packed(deltas: State, store: str) -> dict[str, Tensor]:
    """Deltas as int8 codes, or as factors of a rank, also as codes; what is small anyway stays as it is."""
    rank, codes = _rank(store), not store.startswith("lora")
    tensors: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        matrix = name.endswith("weight") and (delta.ndim == 2 if rank else delta.ndim >= 2)
        if not matrix or (rank and rank >= min(delta.shape)):
            small = delta.bfloat16() if rank and codes else delta
            tensors[name + DELTA] = small.cpu().contiguous()
        elif rank:
            up, down = low_rank(delta, rank)
            if codes:
                # One scale for each singular vector: those of both factors can be multiplied.
                (right, wide), (left, high) = quantised(down), quantised(up.mT)
                up, down = left.mT, right
                tensors[name + SCALE] = (wide * high).cpu()
            else:
                up, down = up.bfloat16(), down.bfloat16()
            tensors[name + DOWN], tensors[name + UP] = down.cpu().contiguous(), up.cpu().contiguous()
        else:
            values, scale = quantised(delta)
            tensors[name + DELTA], tensors[name + SCALE] = values.cpu().contiguous(), scale.cpu()
    return tensors


def low_rank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best up (out, r) @ down (r, in) of a matrix, the root of the singular values in each."""
    if min(delta.shape) <= _EXACT_SVD:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta, q=min(rank + 16, *delta.shape), niter=4)
        vh = v.mT
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _write(path: str | Path, tensors: dict[str, Tensor], head: Head, artifact: Artifact) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"format": FORM, "version": VERSION, "store": head.store, "base": head.base}
    partial = path.with_suffix(path.suffix + ".partial")
    save_file(tensors, partial, metadata={HEAD: json.dumps(said), KEY: artifact.to_json()})
    partial.replace(path)
    return path


# -- reading ----------------------------------------------------------------------------------------------------------


def read_head(file: Path) -> Head:
    """The head alone; an empty one for a plain set of weights.

    Raises:
        WeightsError: the file or its head is damaged, or of a newer version.
    """
    text = metadata(file).get(HEAD)
    if text is None:
        return Head()
    try:
        said = json.loads(text)
        version, head = int(said["version"]), Head(str(said["store"]), str(said["base"]))
        if said["format"] != FORM:
            raise ValueError(said["format"])
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"{file} has a damaged head; get the file again.") from None
    if version > VERSION:
        raise WeightsError(f"{file} has version {version} and this Vivace reads {VERSION}; update Vivace.")
    return head


def student_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the files give or change, from their headers.

    Raises:
        WeightsError: a file is damaged, or a tensor lacks a part; the sentence names it.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _opened(file) as reader:
            parts = {k: tuple(reader.get_slice(k).get_shape()) for k in reader.keys()}  # noqa: SIM118
        for key, shape in parts.items():
            name, _, kind = key.partition("::")
            if not kind or key.endswith(DELTA):
                shapes[name] = shape
            elif key.endswith(UP):
                if name + DOWN not in parts:
                    raise WeightsError(f"{file} lacks {name}{DOWN}; it is incomplete.")
                shapes[name] = (shape[0], parts[name + DOWN][1])
    return shapes


def student_tensors(files: Sequence[Path], base: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the student's tensors, one at a time; `base(name)` gives the base's.

    Sums are made in float32 on the base's device and are not rounded to its type here.

    Raises:
        WeightsError: a file is damaged; the sentence names it.
    """
    for file in files:
        with _opened(file) as reader:
            keys = set(reader.keys())
            for name in sorted({k.partition("::")[0] for k in keys}):
                value, is_delta = _unpacked(reader, keys, name)
                if is_delta:
                    there = base(name)
                    value = there.detach().float() + value.to(there.device)
                yield name, value


def _deltas(file: Path, base_state: State | None) -> Iterator[tuple[str, Tensor]]:
    """Deltas of a file in float32; what is no delta and has no base comes as it is."""
    with _opened(file) as reader:
        keys = set(reader.keys())
        for name in sorted({k.partition("::")[0] for k in keys}):
            value, is_delta = _unpacked(reader, keys, name)
            if not is_delta and value.is_floating_point() and base_state is not None and name in base_state:
                value = value.float() - base_state[name].detach().cpu().float()
            yield name, value


def _unpacked(reader: safe_open, keys: set[str], name: str) -> tuple[Tensor, bool]:
    """(values, whether they are a delta) of one tensor; codes and factors come out in float32."""
    if name + UP in keys:
        up, down = reader.get_tensor(name + UP).float(), reader.get_tensor(name + DOWN).float()
        return (up * reader.get_tensor(name + SCALE) if name + SCALE in keys else up) @ down, True
    is_delta = name + DELTA in keys
    value = reader.get_tensor(name + DELTA if is_delta else name)
    value = value.float() if is_delta and value.dtype == torch.bfloat16 else value
    if name + SCALE in keys:
        value = value.float() * reader.get_tensor(name + SCALE).view(-1, *[1] * (value.ndim - 1))
    return value, is_delta


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file} cannot be read as safetensors ({error}); copy or download it again."
        ) from None
