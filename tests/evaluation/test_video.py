"""Clips as files and pictures: exact timing, right colours, nothing left behind after a failure."""

from __future__ import annotations

import resource
import signal
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vivace.core.errors import ConfigError, OutputError, VivaceError
from vivace.evaluation.frames import FrameError
from vivace.evaluation.video import VideoError, contact_sheet, heat_map, read_mp4, side_by_side, write_mp4


def clip(frames: int = 9, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """A bright square moving over a smooth gradient: what a codec sees in practice."""
    rows, columns = np.mgrid[0:height, 0:width]
    base = np.stack((rows * 255 // height, columns * 255 // width, np.full_like(rows, 40 + seed)), axis=-1)
    video = np.repeat(base[None].astype(np.uint8), frames, axis=0)
    for index in range(frames):
        video[index, 10:26, index * 2 : index * 2 + 16] = (220, 60, 40)
    return video


def leftovers(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.mark.parametrize("fps", [16, 24.0, 29.97, Fraction(30000, 1001), 7.5])
@pytest.mark.parametrize("count", [1, 2, 29])
def test_frame_count_and_rate_are_exact(tmp_path: Path, fps: float | Fraction, count: int) -> None:
    path = write_mp4(tmp_path / "a.mp4", clip(count), fps)
    frames, rate = read_mp4(path)
    wanted = Fraction(str(fps)) if isinstance(fps, float) else Fraction(fps)
    assert frames.shape == (count, 48, 64, 3)
    assert rate == pytest.approx(float(wanted), rel=1e-9)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = sorted(Fraction(p.pts) * p.time_base for p in container.demux(stream) if p.pts is not None)
        assert times == [index / wanted for index in range(count)]
        assert stream.duration * stream.time_base == count / wanted
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert leftovers(tmp_path) == ["a.mp4"]


def test_the_index_comes_first(tmp_path: Path) -> None:
    data = write_mp4(tmp_path / "a.mp4", clip(), 16).read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    "colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 0, 128), (255, 165, 0), (250, 250, 250)]
)
def test_colours_survive_and_are_tagged(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    flat = np.broadcast_to(np.asarray(colour, np.uint8), (3, 32, 32, 3))
    path = write_mp4(tmp_path / "a.mp4", flat, 16)
    frames, _ = read_mp4(path)
    assert np.abs(frames.astype(int) - flat).max() <= 4
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).colorspace == 1


def test_picture_is_close_and_bytes_repeat(tmp_path: Path) -> None:
    first = write_mp4(tmp_path / "a.mp4", clip(), 16)
    second = write_mp4(tmp_path / "b.mp4", clip(), 16)
    assert first.read_bytes() == second.read_bytes()
    assert np.abs(read_mp4(first)[0].astype(int) - clip()).mean() < 3


def test_odd_sizes_grow_by_the_edge(tmp_path: Path) -> None:
    frames, _ = read_mp4(write_mp4(tmp_path / "a.mp4", clip(3, 47, 63), 16))
    assert frames.shape == (3, 48, 64, 3)
    assert np.abs(frames[:, -1].astype(int) - frames[:, -2]).max() < 24


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 256, 256, 3), dtype=np.uint8)

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)  # encoding takes many times longer
    try:
        with pytest.raises(KeyboardInterrupt):
            write_mp4(tmp_path / "a.mp4", noise, 16)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert leftovers(tmp_path) == []


def test_an_old_file_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (24, 128, 128, 3), dtype=np.uint8)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (40_000, limits[1])
    )  # the kernel refuses to grow the file further
    try:
        with pytest.raises(OutputError, match=r"cannot write .*a\.mp4: .*; free some space") as caught:
            write_mp4(path, noise, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == ["a.mp4"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(OutputError, match="choose another folder"):
        write_mp4(blocker / "a.mp4", clip(), 16)
    with pytest.raises(OutputError, match="cannot write"):
        write_mp4(tmp_path, clip(), 16)
    assert leftovers(tmp_path) == ["file"]


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 5000, "fast"])
def test_a_bad_rate_is_refused(tmp_path: Path, fps: float) -> None:
    with pytest.raises(ConfigError, match="fps must be"):
        write_mp4(tmp_path / "a.mp4", clip(), fps)
    assert leftovers(tmp_path) == []


def test_bad_frames_and_quality_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="uint8"):
        write_mp4(tmp_path / "a.mp4", clip() / 255.0, 16)
    with pytest.raises(FrameError, match=r"\(T, H, W, 3\)"):
        write_mp4(tmp_path / "a.mp4", clip()[0], 16)
    with pytest.raises(ConfigError, match="crf"):
        write_mp4(tmp_path / "a.mp4", clip(), 16, crf=52)
    assert leftovers(tmp_path) == []


def test_unreadable_files_say_so(tmp_path: Path) -> None:
    whole = write_mp4(tmp_path / "whole.mp4", clip(), 16).read_bytes()
    for name, content in {"header": whole[:300], "text": b"not a video", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match=rf"{name}\b"):
            read_mp4(tmp_path / name)
    with pytest.raises(VideoError, match="no such file"):
        read_mp4(tmp_path / "missing.mp4")


def test_heat_map_measures() -> None:
    exact = clip()
    assert heat_map(exact, exact, gain=8).max() == 0
    fast = exact.copy()
    fast[2, 5, 7] = np.clip(fast[2, 5, 7].astype(int) + 12, 0, 255)
    heat = heat_map(exact, fast, gain=8)
    assert np.argwhere(heat.any(axis=-1)).tolist() == [[2, 5, 7]]
    # More difference is lighter, at every level: the map may be read in grey.
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    lightness = heat_map(ramp, np.zeros_like(ramp), gain=1) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness.ravel()) >= 0).all()
    with pytest.raises(ConfigError, match="gain"):
        heat_map(exact, fast, gain=0)
    with pytest.raises(FrameError, match="differ in shape"):
        heat_map(exact, fast[1:], gain=1)


def test_side_by_side_shows_three_enlarged_panels() -> None:
    exact, fast = clip(4, 128, 128), clip(4, 128, 128, seed=30)
    sheet = side_by_side(exact, fast, gain=8)
    strip = 28
    assert sheet.shape == (4, 384 + strip, 3 * 384 + 8, 3)
    assert sheet[:, :strip].max() > 200  # the names are there
    smaller = sheet[:, strip + 1 :: 3, 1:384:3]
    assert np.abs(smaller.astype(int) - exact).mean() < 3
    assert (sheet[:, strip:, 776:] == heat_map(exact, fast, gain=8).repeat(3, axis=1).repeat(3, axis=2)).all()


def test_contact_sheet_places_every_frame() -> None:
    frames = clip(5, 20, 30)
    sheet = np.asarray(contact_sheet(frames, 3, gap=2))
    assert sheet.shape == (2 * 22 + 2, 3 * 32 + 2, 3)
    assert (sheet[24:44, 34:64] == frames[4]).all()
    assert np.asarray(contact_sheet(list(frames[:2]), 9)).shape == (28, 72, 3)
    for bad in ([], [frames[0], frames[0][:5]]):
        with pytest.raises(VivaceError, match="at least one frame"):
            contact_sheet(bad, 2)
    with pytest.raises(ConfigError, match="columns"):
        contact_sheet(frames, 0)
