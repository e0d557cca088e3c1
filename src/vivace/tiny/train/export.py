"""Carry trained weights home: pack them into few small files, unpack them into a diffusers folder with a manifest."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from vivace.core.errors import OutputError, WeightsError
from vivace.tiny.build import TinyConfig, build_pipeline
from vivace.tiny.load import MANIFEST, WEIGHTS, sha256
from vivace.tiny.train.common import round_to_bf16

PARTS = ("transformer", "vae", "text_encoder")
LARGEST = 16 * 2**20
"""No file of the package is larger (bytes), so that it passes through every code host."""


def pack(pipeline: WanPipeline, folder: Path, largest: int = 15 * 2**20) -> list[Path]:
    """Write all weights as bf16 into `weights-1.safetensors`, `-2` ... of at most `largest` bytes each."""
    tensors = {
        f"{part}.{name}": tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for part in PARTS
        for name, tensor in unique_tensors(getattr(pipeline, part)).items()
    }
    files: list[dict[str, torch.Tensor]] = [{}]
    room = largest - 2**16  # for the header
    for name, tensor in tensors.items():
        if tensor.nbytes > room:
            files.append({})
            room = largest - 2**16
        files[-1][name] = tensor
        room -= tensor.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"weights-{index}.safetensors" for index in range(1, len(files) + 1)]
    for path, part in zip(paths, files, strict=True):
        save_file(part, path)
    return paths


def unpack(folder: Path, config: TinyConfig | None = None, words: Iterable[str] | None = None) -> WanPipeline:
    """The pipeline of packed weights, fp32. Raises `WeightsError` when they do not fit the configuration."""
    paths = sorted(folder.glob("weights-*.safetensors"))
    if not paths:
        raise WeightsError(f"{folder} holds no weights-*.safetensors; pack a trained pipeline there first.")
    tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    pipeline = build_pipeline(0, config, words)
    for part in PARTS:
        module = getattr(pipeline, part)
        found = {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
        expected = unique_tensors(module)
        wrong = [n for n in expected.keys() | found.keys() if n not in found or n not in expected]
        wrong += [n for n in expected.keys() & found.keys() if expected[n].shape != found[n].shape]
        if wrong:
            raise WeightsError(f"{folder}: the {part} does not fit the configuration (first: {min(wrong)}).")
        module.load_state_dict(found, strict=False)
    return pipeline


def _empty(kind: Any, folder: Path) -> Any:
    """A module of the configuration in `folder`, with random weights."""
    return kind.from_config(kind.load_config(folder))


def read_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> WanPipeline:
    """A diffusers folder as `from_pretrained(dtype=)` gives it, on machines without `accelerate` too.

    `from_pretrained` of the transformer needs that package, because parts of it stay in fp32 in every dtype.
    """
    parts = {
        "transformer": _empty(WanTransformer3DModel, folder / "transformer"),
        "vae": _empty(AutoencoderKLWan, folder / "vae"),
        "text_encoder": UMT5EncoderModel(UMT5Config.from_pretrained(folder / "text_encoder")),
    }
    for part, module in parts.items():
        tensors = {n: t for path in (folder / part).glob("*.safetensors") for n, t in load_file(path).items()}
        expected = unique_tensors(module)
        if tensors.keys() != expected.keys():
            raise WeightsError(
                f"{folder / part} does not hold the weights of its configuration; train it again."
            )
        module.load_state_dict(tensors, strict=False)
        kept = getattr(module, "_keep_in_fp32_modules", None) if part == "transformer" else None
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point() and not any(word in (kept or ()) for word in name.split(".")):
                tensor.data = tensor.data.to(dtype)
        module.eval()
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        scheduler=cast(Any, UniPCMultistepScheduler.from_pretrained(folder / "scheduler")),
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unique_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without tied copies (UMT5 shares its embedding with its stack)."""
    kept, seen = {}, set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[name] = tensor
    return kept


def export(pipeline: WanPipeline, folder: Path = WEIGHTS) -> dict[str, dict[str, int | str]]:
    """Replace `folder` by the bf16 pipeline in diffusers layout with its manifest; returns the manifest.

    Raises `OutputError` when a file comes out larger than 16 MiB; `folder` is then left as it was.
    """
    fresh = folder.with_name(folder.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    write_pipeline(pipeline, fresh)
    manifest = {}
    for path in sorted(p for p in fresh.rglob("*") if p.is_file()):
        name, size = path.relative_to(fresh).as_posix(), path.stat().st_size
        if size > LARGEST:
            raise OutputError(f"{name} has {size} bytes, more than {LARGEST}; use smaller shards.")
        manifest[name] = {"bytes": size, "sha256": sha256(path)}
    (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)
    return manifest


def write_pipeline(pipeline: WanPipeline, folder: Path) -> None:
    """The pipeline in bf16, diffusers layout, in shards below 16 MiB; the weights of `pipeline` are bf16 afterwards."""
    round_to_bf16(*(getattr(pipeline, part) for part in PARTS))
    pipeline.save_pretrained(folder, max_shard_size="14MB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pipeline", type=Path, help="diffusers folder that the training wrote")
    source.add_argument("--packed", type=Path, help="folder of weights-*.safetensors")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--pack-to", type=Path, help="write packed weights there instead of the package")
    target.add_argument("--folder", type=Path, default=WEIGHTS, help="where the package keeps its weights")


def main(arguments: argparse.Namespace) -> None:
    if arguments.pipeline:
        pipeline = read_pipeline(arguments.pipeline, torch.float32)
    else:
        pipeline = unpack(arguments.packed)
    if arguments.pack_to:
        for path in pack(pipeline, arguments.pack_to):
            print(f"{path} {path.stat().st_size / 2**20:.1f} MiB")
        return
    manifest = export(pipeline, arguments.folder)
    total = sum(int(entry["bytes"]) for entry in manifest.values())
    print(f"{arguments.folder}: {len(manifest)} files, {total / 2**20:.1f} MiB")
