"""Clips as files and as pictures: H.264 in and out (PyAV), side by side with a heat map, contact sheets.

An mp4 is for eyes. The codec itself costs quality even at fine settings, so metrics take the frames, not the
file.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vivace.core.errors import ConfigError, OutputError, UnavailableError, VivaceError
from vivace.evaluation.frames import FrameError, check_same_shape, check_uint8

if TYPE_CHECKING:
    from PIL.Image import Image

BT709 = 1
"""Code of ITU-R BT.709 for matrix, primaries and transfer in H.264 (ITU-T H.273)."""
VIEW_HEIGHT = 384
"""Panels of `side_by_side` are enlarged by the whole factor that brings them nearest to this height."""
KEY_FRAME_DISTANCE = 12
"""Short, so that scrubbing and single steps in a browser decode a few frames only."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HEAT_COLOURS = ((0, 0, 0), (52, 18, 92), (140, 30, 110), (222, 68, 62), (250, 158, 40), (255, 244, 190))
"""Equal spacing from no difference to full scale; rises in lightness, so it also reads in grey."""


class VideoError(VivaceError, ValueError):
    """A video file that cannot be read."""


def write_mp4(path: str | Path, frames: np.ndarray, fps: float | Fraction, crf: int = 16) -> Path:
    """Writes an H.264 mp4 (yuv420p, BT.709, index first) and returns its path.

    The file appears under its name only when complete: it is written beside it and renamed, and removed after
    any exception, an interrupt included. One encoder thread, so equal frames give equal bytes whatever the
    number of cores.

    Args:
        path: where to; missing folders are made.
        frames: uint8 `(T, H, W, 3)`; an odd height or width grows by one repeated row or column.
        fps: frames per second, kept exactly (as a fraction).
        crf: x264 constant rate factor, 0 (best) to 51.

    Raises:
        FrameError: the frames are not uint8 `(T, H, W, 3)`.
        ConfigError: fps or crf is out of range.
        UnavailableError: this build of PyAV has no x264.
        OutputError: the file cannot be written: no space, no permission, no such place.
    """
    import av

    frames = _pad_even(check_uint8(frames))
    rate = _exact_rate(fps)
    if not 0 <= crf <= 51:
        raise ConfigError(f"crf must be from 0 to 51, got {crf}; 16 is close to transparent")
    if "libx264" not in av.codecs_available:
        raise UnavailableError("this build of PyAV has no libx264 encoder; install the av wheel from PyPI")
    target = Path(path)
    with _renamed_when_complete(target) as partial:
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with av.open(str(partial), "w", format="mp4", options=options) as container:
            stream = container.add_stream("libx264", rate=rate)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.gop_size = KEY_FRAME_DISTANCE
            stream.options = {"crf": str(crf), "preset": "medium", "threads": "1"}
            codec = stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = BT709
            codec.color_range = 1  # limited ("MPEG") range, what every player expects of yuv420p
            codec.time_base = 1 / rate
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                # Without this the conversion is BT.601 and saturated colours shift in every player.
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                frame.pts, frame.time_base = index, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return target


def read_mp4(path: str | Path) -> tuple[np.ndarray, float]:
    """All frames as uint8 `(T, H, W, 3)` and the frames per second of a file's first video stream.

    Raises:
        VideoError: the file is missing, not a video, or damaged.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video stream; give an mp4 file")
            stream = container.streams.video[0]
            # Files of others may carry another matrix; an untagged one (2) is taken as BT.709.
            frames = [
                frame.reformat(
                    format="rgb24", src_colorspace="ITU709" if frame.colorspace == 2 else None
                ).to_ndarray()
                for frame in container.decode(stream)
            ]
            rate = stream.average_rate
    except (OSError, av.FFmpegError) as error:
        raise VideoError(
            f"cannot read the video {path}: {_reason(error)}; check the path or write it again"
        ) from error
    if not frames or not rate:
        raise VideoError(f"the video {path} holds no frames; write it again")
    return np.stack(frames), float(rate)


def heat_map(exact: np.ndarray, fast: np.ndarray, *, gain: float) -> np.ndarray:
    """Mean absolute RGB difference times `gain`, in false colour: uint8 `(T, H, W, 3)`.

    Black is equal; the lightest colour is a mean difference of 255 / gain levels or more.
    Raises `FrameError` on unequal or non-uint8 clips and `ConfigError` unless gain is positive.
    """
    exact, fast = check_uint8(exact, "exact frames"), check_uint8(fast, "fast frames")
    check_same_shape(exact, fast)
    if not gain > 0:
        raise ConfigError(
            f"the heat map's gain must be positive, got {gain}; 1 shows differences as they are"
        )
    levels = np.abs(exact.astype(np.int16) - fast.astype(np.int16)).mean(axis=-1) * gain
    return _heat_table()[levels.round().clip(0, 255).astype(np.uint8)]


def side_by_side(
    exact: np.ndarray,
    fast: np.ndarray,
    *,
    gain: float,
    labels: tuple[str, str] = ("exact", "fast"),
) -> np.ndarray:
    """One clip of three labelled panels: exact | fast | heat map of the difference.

    Small clips are enlarged by a whole factor for comfortable viewing: the pictures smoothly (bicubic), the
    heat map pixel by pixel (nearest), because it is a measurement.

    Args:
        exact, fast: uint8 `(T, H, W, 3)` of equal shape.
        gain: factor of the heat map; it is written on the panel.
        labels: names of the first two panels.

    Returns:
        uint8 `(T, H', W', 3)`.

    Raises:
        FrameError: the clips are not uint8 `(T, H, W, 3)` or differ in shape.
        ConfigError: gain is not positive.
    """
    from PIL import Image

    heat = heat_map(exact, fast, gain=gain)
    height, width = exact.shape[1:3]
    scale = max(1, round(VIEW_HEIGHT / height))
    size = (width * scale, height * scale)
    gap = 4
    strip = _label_strip((*labels, f"difference x{gain:g}"), panel_width=size[0], gap=gap)
    canvas = np.zeros((len(exact), strip.shape[0] + size[1], strip.shape[1], 3), np.uint8)
    canvas[:, : strip.shape[0]] = strip
    modes = (Image.Resampling.BICUBIC, Image.Resampling.BICUBIC, Image.Resampling.NEAREST)
    for column, (clip, mode) in enumerate(zip((exact, fast, heat), modes, strict=True)):
        left = column * (size[0] + gap)
        for index, pixels in enumerate(clip):
            enlarged = Image.fromarray(pixels).resize(size, mode)
            canvas[index, strip.shape[0] :, left : left + size[0]] = np.asarray(enlarged)
    return canvas


def contact_sheet(frames: Sequence[np.ndarray] | np.ndarray, columns: int, *, gap: int = 4) -> Image:
    """Frames laid out row by row on one picture, dark gaps between them.

    Args:
        frames: uint8 pictures `(H, W, 3)` of equal size, or a clip `(T, H, W, 3)`.
        columns: pictures per row, at least 1.
        gap: pixels between and around the pictures.

    Raises:
        FrameError: the frames are empty, of unequal size or not uint8.
        ConfigError: columns or gap is out of range.
    """
    from PIL import Image

    if columns < 1 or gap < 0:
        raise ConfigError(f"a contact sheet needs columns >= 1 and gap >= 0, got {columns} and {gap}")
    if len({np.shape(frame) for frame in frames}) != 1:
        raise FrameError(
            "a contact sheet needs at least one frame, all of one size; resize or drop the odd ones"
        )
    pictures = check_uint8(np.stack(list(frames)))
    count, height, width = pictures.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (18, 18, 22))
    for index, pixels in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(Image.fromarray(pixels), (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


@contextmanager
def _renamed_when_complete(target: Path) -> Iterator[Path]:
    """Yields a temporary name in the target's folder; renames on success, removes on any exception."""
    import av

    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, target)
    except (OSError, av.FFmpegError) as error:
        advice = (
            "free some space"
            if error.errno in FULL_DISK
            else "choose another folder or change its permissions"
        )
        raise OutputError(f"cannot write {target}: {_reason(error)}; {advice}") from error
    finally:
        # After the rename there is nothing left under this name; on a read-only folder there never was.
        if os.path.lexists(partial):
            partial.unlink()


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _exact_rate(fps: float | Fraction) -> Fraction:
    """24 -> 24, 29.97 -> 2997/100, Fraction(30000, 1001) unchanged."""
    try:
        rate = Fraction(str(fps)) if isinstance(fps, float) else Fraction(fps)
    except (ValueError, TypeError, OverflowError):
        rate = Fraction(0)
    if not 0 < rate <= 1000 or rate.denominator > 100_000:
        raise ConfigError(
            f"fps must be a number above 0 and at most 1000, got {fps}; 16 suits the embedded model"
        )
    return rate


def _pad_even(frames: np.ndarray) -> np.ndarray:
    """yuv420p halves the chroma planes, so both sides must be even; the last row or column is repeated."""
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _heat_table() -> np.ndarray:
    """The 256-entry colour table `(256, 3)`, interpolated between `HEAT_COLOURS`."""
    anchors = np.asarray(HEAT_COLOURS, np.float64)
    stops = np.linspace(0, 255, len(anchors))
    channels = [np.interp(np.arange(256), stops, anchors[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _label_strip(labels: Sequence[str], *, panel_width: int, gap: int) -> np.ndarray:
    """The thin strip of centred names above the panels, uint8 `(h, w, 3)`."""
    from PIL import Image, ImageDraw, ImageFont

    height = 28
    strip = Image.new("RGB", (len(labels) * (panel_width + gap) - gap, height), (18, 18, 22))
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(size=15)
    for column, label in enumerate(labels):
        centre = column * (panel_width + gap) + panel_width // 2
        draw.text((centre, height // 2), label, fill=(232, 232, 236), font=font, anchor="mm")
    return np.asarray(strip)
