"""A folder of captioned videos: captions beside the files, and clips of one length, rate and size out of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vivace.core.errors import ConfigError

ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
CAPTION_FILES = ("captions.jsonl", "captions.txt")
_NAMES = ("file", "file_name", "video", "path")
_TEXTS = ("caption", "text", "prompt")
_UNTAGGED = 2
"""Code of an unknown matrix in H.264 (ITU-T H.273): taken as BT.709."""


@dataclass(frozen=True)
class Captioned:
    """One video and what it shows."""

    path: Path
    caption: str


def captioned(folder: str | Path) -> list[Captioned]:
    """The videos of a folder (and of those in it) with their captions, sorted by name.

    Captions come from `captions.jsonl` (an object a line with `file` and `caption`), else from `captions.txt` (a line
    each: the file's name, a tab or `|`, the caption), else from a .txt of the same name beside each video.

    Raises:
        ConfigError: there is no such folder, no video, or a video without a caption; the sentence names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; give one with videos and captions.")
    videos = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not videos:
        raise ConfigError(f"{folder} holds no videos ({', '.join(ENDINGS)}).")
    file = next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)
    if file is None:
        return [Captioned(v, _beside(v)) for v in videos]
    found: dict[str, str] = {}
    for name, text in _listed(file):
        if not (folder / name).is_file():
            raise ConfigError(f"{file} tells of {name}, which is not in {folder}; mend the line.")
        found[(folder / name).resolve().as_posix()] = text
    for video in videos:
        if video.resolve().as_posix() not in found:
            raise ConfigError(f"{file} has no caption for {video.relative_to(folder)}; add a line for it.")
    return [Captioned(v, found[v.resolve().as_posix()]) for v in videos]


def check(path: Path, frames: int, fps: float) -> None:
    """Look at a file's head alone.

    Raises:
        ConfigError: it cannot be read, or is shorter than `frames` at `fps`.
    """
    with _opened(path) as (container, stream):
        _start(container, stream, frames, fps)


def clip(path: Path, frames: int, height: int, width: int, fps: float) -> Tensor:
    """The middle of a video: uint8 (T, H, W, 3), at `fps`, centre crop to the shape's ratio, resized.

    Every moment takes the frame nearest to it, so a slower video repeats frames and a faster one loses some.

    Raises:
        ConfigError: the file cannot be read, or is shorter than the clip.
    """
    with _opened(path) as (container, stream):
        begin = _start(container, stream, frames, fps)
        origin = float((stream.start_time or 0) * stream.time_base)
        if begin > 0:
            container.seek(int((origin + begin) / stream.time_base), stream=stream)
        moments = [origin + begin + i / fps for i in range(frames)]
        decoded = (frame for frame in container.decode(stream) if frame.time is not None)
        if (first := next(decoded, None)) is None:
            raise ConfigError(f"the video {path} holds no frames; leave it out.")
        return torch.stack(list(_nearest(first, decoded, moments, height, width)))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; what goes wrong in reading it is one sentence."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ConfigError(f"{path} holds no video stream; leave it out.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (OSError, av.FFmpegError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(f"the video {path} cannot be read: {reason}; leave it out.") from None


def _start(container: Any, stream: Any, frames: int, fps: float) -> float:
    """Seconds at which the middle clip begins."""
    length, gap = _length(container, stream)
    needed = (frames - 1) / fps
    if length - gap < needed - 0.5 / fps:
        raise ConfigError(
            f"{container.name} is too short: {length:.2f} s, and {frames} frames at {fps:g} fps take "
            f"{needed + 1 / fps:.2f} s; leave it out, or ask for fewer frames or a higher --fps."
        )
    return max(0.0, (length - gap - needed) / 2)


def _length(container: Any, stream: Any) -> tuple[float, float]:
    """(seconds, seconds between frames)."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ConfigError(f"{container.name} tells no frame rate; write it again, or leave it out.")
    gap = float(1 / rate)
    if stream.duration is not None:
        return float(stream.duration * stream.time_base), gap
    if stream.frames:
        return stream.frames * gap, gap
    return (container.duration or 0) / 1e6, gap


def _nearest(
    first: Any, decoded: Iterator[Any], moments: list[float], height: int, width: int
) -> Iterator[Tensor]:
    """For each moment the decoded frame nearest to it; only those are converted, each once."""
    before, after = None, first
    kept: tuple[Any, Tensor] | None = None
    for moment in moments:
        while after is not None and after.time < moment:
            before, after = after, next(decoded, None)
        near = before
        if after is not None and (before is None or after.time - moment < moment - before.time):
            near = after
        if kept is None or kept[0] is not near:
            kept = (near, _fitted(_upright(near), height, width))
        yield kept[1]


def _upright(frame: Any) -> np.ndarray:
    """uint8 (H, W, 3), turned as a player would show it."""
    matrix = "ITU709" if frame.colorspace == _UNTAGGED else None
    pixels = frame.reformat(format="rgb24", src_colorspace=matrix).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


def _fitted(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 (H, W, 3) to uint8 (height, width, 3): the largest centred crop of that ratio, resized without aliasing."""
    h, w = pixels.shape[:2]
    scale = min(h / height, w / width)
    crop_h, crop_w = min(h, round(height * scale)), min(w, round(width * scale))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    image = torch.from_numpy(pixels[top : top + crop_h, left : left + crop_w]).permute(2, 0, 1)[None].float()
    if (crop_h, crop_w) != (height, width):
        image = F.interpolate(image, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return image[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def _beside(video: Path) -> str:
    file = video.with_suffix(".txt")
    if not file.is_file():
        raise ConfigError(
            f"{video} has no caption: write {file.name} beside it, or {' or '.join(CAPTION_FILES)} in its folder."
        )
    return _said(" ".join(_text(file).split()), video)


def _listed(file: Path) -> Iterator[tuple[str, str]]:
    """(name, caption) of every line that is not empty."""
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        if file.suffix == ".jsonl":
            name, text = _entry(line)
        else:
            name, _, text = line.partition("\t" if "\t" in line else "|")
        if not name.strip() or not text.strip():
            form = (
                '{"file": ..., "caption": ...}'
                if file.suffix == ".jsonl"
                else "a name, a tab or |, a caption"
            )
            raise ConfigError(f"line {number} of {file} is not {form}; mend it.")
        yield name.strip(), text.strip()


def _entry(line: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        name = next((entry[key] for key in _NAMES if key in entry), "")
        text = next((entry[key] for key in _TEXTS if key in entry), "")
    except (ValueError, TypeError):
        return "", ""
    return str(name), str(text)


def _said(caption: str, video: Path) -> str:
    if not caption:
        raise ConfigError(f"the caption of {video} is empty; say what it shows.")
    return caption


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{file} cannot be read: {reason}.") from None
