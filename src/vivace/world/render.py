"""Ray casting of whole batches of clips: the backdrop once per pixel, each object in a small supersampled window.

Objects are grouped by shape (a clip has at most one of each), so only the shape an object has is ever evaluated; each
group is rendered in windows that follow its objects over the frame, and the windows are laid over the backdrop from the
farthest to the nearest. Everything per pixel is correctly rounded elementwise float32 arithmetic: on one device, a clip
has the same bytes in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vivace.core.errors import ConfigError, ShapeError
from vivace.world import backdrop, shapes
from vivace.world import motion as paths
from vivace.world.attributes import CAMERAS, MAX_OBJECTS, MOTIONS, SHAPES
from vivace.world.scene import REST_HEIGHT, Scene

PALETTE = {
    "red": (0.88, 0.09, 0.09),
    "green": (0.06, 0.58, 0.14),
    "blue": (0.10, 0.19, 0.88),
    "yellow": (0.99, 0.88, 0.08),
    "purple": (0.56, 0.12, 0.72),
    "orange": (1.00, 0.48, 0.02),
    "cyan": (0.08, 0.82, 0.88),
    "white": (0.97, 0.97, 0.97),
}
# A stripe that is fixed to the object, so that turning is visible on every shape: its normal, half width and tone.
STRIPE_NORMAL, STRIPE_HALF, STRIPE_TONE = (0.912, 0.24, 0.332), 0.17, 0.52
AMBIENT, DIFFUSE = 0.46, 0.66
# Shadow of a shape: half axes of its ellipsoid, and radius and half width of the ring it casts (a disc is a ring of 0).
_SHADOW = {
    "sphere": ((1.0, 1.0, 1.0), 0.0, 1.0),
    "cube": ((0.95, 0.90, 0.95), 0.0, 1.0),
    "cylinder": ((0.70, 1.05, 0.70), 0.0, 1.0),
    "cone": ((0.80, 1.00, 0.80), 0.0, 0.92),
    "torus": ((1.0, 1.0, 0.36), 0.66, 0.36),
}
_PIXELS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 25}


@dataclass(frozen=True)
class Clip:
    """Rendered clips: `video` uint8 (B, T, H, W, 3), and for each pixel what it shows.

    `index` uint8 (B, T, H, W) is 0 for the backdrop and i + 1 for `objects[i]`; `None` without masks.
    """

    video: Tensor
    index: Tensor | None

    @property
    def mask(self) -> Tensor:
        """Bool (B, T, H, W): pixels of any object. Raises `ConfigError` when rendered with `with_mask=False`."""
        if self.index is None:
            raise ConfigError("this clip was rendered without masks: render it with with_mask=True")
        return self.index > 0


class _Batch(NamedTuple):
    """The poses of a chunk of clips, float64 numpy; objects are slots in the order of the attributes."""

    camera: paths.CameraPath
    centre: np.ndarray  # (B, 3, T, 3)
    turn: np.ndarray  # (B, 3, T, 3, 3), object to world
    radius: np.ndarray  # (B, 3); 0 where there is no object
    rest: np.ndarray  # (B, 3)
    shape: np.ndarray  # (B, 3), -1 where there is no object
    light: np.ndarray  # (B, 3)


def _pose(scenes: Sequence[Scene], t: np.ndarray) -> _Batch:
    def column(name: str) -> np.ndarray:
        return np.array([getattr(scene, name) for scene in scenes], dtype=np.float64)

    motion = np.array([MOTIONS.index(str(scene.attributes.motion)) for scene in scenes])
    camera = np.array([CAMERAS.index(str(scene.attributes.camera)) for scene in scenes])
    travel, azimuth, elevation = column("travel"), column("light_azimuth"), column("light_elevation")
    path = paths.camera_path(camera, column("swing"), column("camera_height"), column("camera_distance"), t)
    radius, rest, x, z, yaw = np.zeros((5, len(scenes), MAX_OBJECTS))
    shape = np.full((len(scenes), MAX_OBJECTS), -1)
    rolls = np.zeros(len(scenes))
    for b, scene in enumerate(scenes):
        for i, (spec, spot) in enumerate(zip(scene.attributes.objects, scene.placements, strict=True)):
            shape[b, i] = SHAPES.index(str(spec.shape))
            radius[b, i], x[b, i], z[b, i], yaw[b, i] = spot.radius, spot.x, spot.z, spot.yaw
            rest[b, i] = spot.radius * REST_HEIGHT[str(spec.shape)]
        straight = scene.attributes.motion in ("slide_left", "slide_right", "approach", "recede")
        rolls[b] = straight and scene.attributes.objects[0].shape == "sphere"
    centre = np.repeat(np.stack([x, rest, z], axis=-1)[:, :, None], len(t), axis=2)
    offset = paths.subject_offset(motion, travel, column("phase"), t)
    centre[:, 0] += offset
    angles = np.repeat(yaw[:, :, None], len(t), axis=2)
    angles[:, 0] += paths.subject_turn(motion, travel, t)
    roll = (
        rolls[:, None, None] * offset / np.maximum(radius[:, :1, None], 1e-3)
    )  # a sphere rolls without slipping
    roll_x, roll_z = np.zeros_like(angles), np.zeros_like(angles)
    roll_x[:, 0], roll_z[:, 0] = roll[..., 2], -roll[..., 0]
    light = np.stack(
        [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)], axis=-1
    )
    return _Batch(
        path, centre, paths.rotation(angles, roll_x, roll_z), radius, rest, shape, np.round(light, 7)
    )


def _parts(vector: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(..., 3) to three tensors (..., 1, 1)."""
    tensor = torch.as_tensor(vector, dtype=torch.float32, device=device)
    return tensor[..., 0, None, None], tensor[..., 1, None, None], tensor[..., 2, None, None]


def _backdrop(
    scenes: Sequence[Scene], batch: _Batch, height: int, width: int, device: torch.device
) -> Tensor:
    def column(name: str, f=lambda value: value) -> Tensor:
        values = np.round([f(getattr(scene, name)) for scene in scenes], 7)
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None, None]

    focal = torch.as_tensor(batch.camera.focal, dtype=torch.float32, device=device)[..., None, None]
    side = min(height, width)
    pixel = 2.0 * paths.TAN_HALF_FOV / side
    rows = (height / 2 - 0.5 - torch.arange(height, device=device, dtype=torch.float32)) * pixel
    columns = (torch.arange(width, device=device, dtype=torch.float32) + 0.5 - width / 2) * pixel
    looks = [backdrop.FLOOR_LOOKS[str(scene.attributes.floor)] for scene in scenes]
    table = [[*look.first, *look.second, *look[2:]] for look in looks]
    view = backdrop.Backdrop(
        plane_x=columns[None, None, None, :] / focal,
        plane_y=rows[None, None, :, None] / focal,
        pixel=pixel,
        focal=focal,
        position=_parts(batch.camera.position, device),
        right=_parts(batch.camera.right, device),
        up=_parts(batch.camera.up, device),
        forward=_parts(batch.camera.forward, device),
        light=_parts(batch.light[:, None], device),
        look=torch.tensor(table, dtype=torch.float32, device=device),
        floor=(
            column("floor_angle", np.cos),
            column("floor_angle", np.sin),
            column("floor_x"),
            column("floor_z"),
        ),
        tint=column("sky_tint"),
        hills=(column("hills_near"), column("hills_far")),
    )
    slots = range(max(scene.attributes.count for scene in scenes))
    return backdrop.paint(view, [_occluder(batch, slot, device) for slot in slots])


def _occluder(batch: _Batch, slot: int, device: torch.device) -> dict[str, Tensor]:
    table = [_SHADOW[SHAPES[i]] if i >= 0 else _SHADOW["sphere"] for i in batch.shape[:, slot]]
    size = np.where(batch.radius[:, slot] > 0, batch.radius[:, slot], 1.0)
    axes = np.array([row[0] for row in table]) * size[:, None]
    inverse = np.round(np.swapaxes(batch.turn[:, slot], -1, -2) / axes[:, None, :, None], 6)

    def tensor(value: np.ndarray) -> Tensor:
        value = np.asarray(value, dtype=np.float64)
        value = value if value.ndim > 1 else value[:, None]
        return torch.as_tensor(np.round(value, 6), dtype=torch.float32, device=device)[:, :, None, None]

    centre = batch.centre[:, slot]
    return {
        "x": tensor(centre[..., 0]),
        "y": tensor(centre[..., 1]),
        "z": tensor(centre[..., 2]),
        "lift": tensor(centre[..., 1] - batch.rest[:, slot, None]),
        "inverse": torch.as_tensor(
            inverse.reshape(*inverse.shape[:2], 1, 1, 9), dtype=torch.float32, device=device
        ),
        "ring": tensor(np.array([row[1] for row in table])),
        "width": tensor(np.array([row[2] for row in table])),
        "size": tensor(size),
        "present": tensor((batch.shape[:, slot] >= 0).astype(np.float64)),
    }


class _Window(NamedTuple):
    """One object group: which clips and slots it belongs to, where its windows lie, and what they show."""

    clips: Tensor  # (n,)
    slots: np.ndarray  # (n,)
    top: Tensor  # (n, T)
    left: Tensor  # (n, T)
    colour: Tensor  # (n, T, h, w, 3), already multiplied by coverage
    cover: Tensor  # (n, T, h, w)


def _window(
    name: str,
    scenes: Sequence[Scene],
    batch: _Batch,
    height: int,
    width: int,
    samples: int,
    device: torch.device,
) -> _Window | None:
    """Render every object of one shape in windows that follow it."""
    clips, slots = np.nonzero(batch.shape == SHAPES.index(name))
    if not len(clips):
        return None
    side = min(height, width)
    camera = paths.CameraPath(*(value[clips] for value in batch.camera))
    centre, radius = batch.centre[clips, slots], batch.radius[clips, slots]
    sx, sy, sr = paths.project(camera, centre, (shapes.BOUND[name] * radius)[:, None])
    # A ball off the axis projects to an ellipse a little longer than its radius suggests.
    reach = int(np.ceil(1.22 * sr.max() * side / 2)) + 2
    h, w = min(2 * reach, height), min(2 * reach, width)
    top = np.clip(np.round(height / 2 - sy * side / 2).astype(int) - h // 2, 0, height - h)
    left = np.clip(np.round(width / 2 + sx * side / 2).astype(int) - w // 2, 0, width - w)

    pixel = 2.0 * paths.TAN_HALF_FOV / side
    focal = torch.as_tensor(camera.focal, dtype=torch.float32, device=device)[..., None, None]
    sub_y = (torch.arange(h * samples, device=device, dtype=torch.float32) + 0.5) / samples
    sub_x = (torch.arange(w * samples, device=device, dtype=torch.float32) + 0.5) / samples
    top_t, left_t = torch.as_tensor(top, device=device), torch.as_tensor(left, device=device)
    y = (height / 2 - (top_t[..., None, None] + sub_y[:, None])) * pixel / focal  # (n, T, h, 1)
    x = ((left_t[..., None, None] + sub_x[None, :]) - width / 2) * pixel / focal  # (n, T, 1, w)

    turn = batch.turn[clips, slots]  # object to world
    back = np.swapaxes(turn, -1, -2)
    size = radius[:, None, None]

    def local(vector: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        return _parts(np.round((back @ vector[..., None])[..., 0] / size, 7), device)

    origin = local(camera.position - centre)
    right, up, forward = local(camera.right), local(camera.up), local(camera.forward)
    dx, dy, dz = ((forward[i] + y * up[i]) + x * right[i] for i in range(3))
    d = (dx, dy, dz)
    hit, t, normal = shapes.INTERSECT[name](origin, d)
    colour = _shade(name, scenes, batch, clips, slots, hit, t, normal, origin, d, device)

    def pool(value: Tensor) -> Tensor:
        value = value.reshape(*value.shape[:2], h, samples, w, samples)
        total = value[:, :, :, 0, :, 0]
        for i in range(1, samples * samples):
            total = total + value[:, :, :, i // samples, :, i % samples]
        return total / (samples * samples)

    cover = hit.to(torch.float32)
    return _Window(
        torch.as_tensor(clips, device=device),
        slots,
        top_t,
        left_t,
        torch.stack([pool(channel * cover) for channel in colour], dim=-1),
        pool(cover),
    )


def _shade(
    name: str,
    scenes: Sequence[Scene],
    batch: _Batch,
    clips: np.ndarray,
    slots: np.ndarray,
    hit: Tensor,
    t: Tensor,
    normal: shapes.Vector,
    origin: shapes.Vector,
    d: shapes.Vector,
    device: torch.device,
) -> list[Tensor]:
    """Colour of every sample of a window, three tensors (n, T, h, w) in [0, 1]."""
    turn = batch.turn[clips, slots]
    light = np.swapaxes(turn, -1, -2) @ batch.light[clips][:, None, :, None]
    lx, ly, lz = _parts(np.round(light[..., 0], 7), device)
    specs = [scenes[clip].attributes.objects[slot] for clip, slot in zip(clips, slots, strict=True)]
    shiny = torch.tensor([float(spec.material == "shiny") for spec in specs], device=device)[
        :, None, None, None
    ]
    albedo = torch.tensor([PALETTE[str(spec.colour)] for spec in specs], device=device)
    tint = torch.tensor([scenes[clip].sky_tint for clip in clips], dtype=torch.float32, device=device)[
        :, None, None, None
    ]
    row = _parts(
        np.ascontiguousarray(np.round(turn[..., 1, :], 7)), device
    )  # the world's up, in the object's frame

    t = torch.where(hit, t, torch.zeros_like(t))
    px, py, pz = (origin[i] + t * d[i] for i in range(3))
    band = (px * STRIPE_NORMAL[0] + py * STRIPE_NORMAL[1] + pz * STRIPE_NORMAL[2]).abs()
    tone = STRIPE_TONE + (1.0 - STRIPE_TONE) * backdrop.smooth_step((band - STRIPE_HALF) / 0.06 + 0.5)

    nx, ny, nz = normal
    facing = nx * lx + ny * ly + nz * lz
    rise = nx * row[0] + ny * row[1] + nz * row[2]  # how much the surface looks at the sky
    low = px * row[0] + py * row[1] + pz * row[2]  # height above the object's centre, in radii
    occlusion = 0.80 + 0.20 * backdrop.smooth_step(low + 1.0)
    lit = (AMBIENT * (0.76 + 0.24 * rise) + DIFFUSE * facing.clamp_min(0.0)) * occlusion * tone

    length = (d[0] * d[0] + d[1] * d[1] + d[2] * d[2]).sqrt()
    incoming = (d[0] * nx + d[1] * ny + d[2] * nz) / length
    mirror = [d[i] / length - 2.0 * incoming * normal[i] for i in range(3)]
    glint = (mirror[0] * lx + mirror[1] * ly + mirror[2] * lz).clamp(0.0, 1.0)
    for _ in range(4):
        glint = glint * glint  # the 16th power
    graze = 1.0 - (-incoming).clamp(0.0, 1.0)
    graze = graze * graze * graze
    above = mirror[0] * row[0] + mirror[1] * row[1] + mirror[2] * row[2]
    sky = backdrop.sky_colour(above, tint)
    sheen = shiny * (0.06 + 0.30 * graze) * (0.35 + 0.65 * backdrop.smooth_step(above * 3.0 + 0.5))
    colours = []
    for c in range(3):
        base = albedo[:, c, None, None, None] * lit
        base = base + sheen * (sky[c] - base)
        colours.append((base + shiny * 0.75 * glint * (1.0 - base)).clamp(0.0, 1.0))
    return colours


def _lay_over(canvas: Tensor, index: Tensor | None, windows: list[_Window], batch: _Batch) -> None:
    """Blend the windows into the canvas (B, T, H, W, 3) in place, the farthest object of each frame first."""
    offset = batch.centre - batch.camera.position[:, None]
    depth = (offset * batch.camera.forward[:, None]).sum(-1)  # (B, 3, T)
    depth = np.where(batch.shape[..., None] >= 0, depth, -1.0)
    rank = np.argsort(np.argsort(-depth, axis=1, kind="stable"), axis=1)  # 0 is the farthest
    frames = torch.arange(canvas.shape[1], device=canvas.device)
    height, width = canvas.shape[2:4]
    flat, flat_index = canvas.view(-1, 3), None if index is None else index.view(-1)
    for turn in range(int((batch.shape >= 0).sum(1).max())):
        for window in windows:
            clips = window.clips.cpu().numpy()
            chosen = rank[clips, window.slots] == turn  # (n, T)
            if not chosen.any():
                continue
            n, frame = (torch.as_tensor(part, device=canvas.device) for part in np.nonzero(chosen))
            h, w = window.cover.shape[2:]
            rows = window.top[n, frame][:, None, None] + torch.arange(h, device=canvas.device)[:, None]
            columns = window.left[n, frame][:, None, None] + torch.arange(w, device=canvas.device)
            where = (window.clips[n] * len(frames) + frame)[:, None, None]
            where = ((where * height + rows) * width + columns).reshape(-1)
            cover = window.cover[n, frame].reshape(-1)
            flat[where] = window.colour[n, frame].reshape(-1, 3) + (1.0 - cover[:, None]) * flat[where]
            if flat_index is not None:
                label = torch.as_tensor(window.slots + 1, dtype=torch.uint8, device=canvas.device)[n]
                label = label[:, None].expand(-1, h * w).reshape(-1)
                flat_index[where] = torch.where(cover >= 0.5, label, flat_index[where])


def _render_chunk(
    scenes: Sequence[Scene],
    frames: int,
    height: int,
    width: int,
    device: torch.device,
    samples: int,
    with_mask: bool,
) -> Clip:
    batch = _pose(scenes, paths.times(frames))
    canvas = _backdrop(scenes, batch, height, width, device).contiguous()
    index = torch.zeros(canvas.shape[:-1], dtype=torch.uint8, device=device) if with_mask else None
    windows = [_window(name, scenes, batch, height, width, samples, device) for name in SHAPES]
    _lay_over(canvas, index, [window for window in windows if window is not None], batch)
    return Clip((canvas * 255.0 + 0.5).clamp(0.0, 255.0).to(torch.uint8), index)


@torch.no_grad()
def render(
    scenes: Sequence[Scene],
    *,
    frames: int = 29,
    height: int = 128,
    width: int = 128,
    device: str | torch.device = "cpu",
    supersample: int = 2,
    with_mask: bool = True,
) -> Clip:
    """Render scenes to clips of `frames` x `height` x `width` on `device`.

    Time is normalised over the clip, so any number of frames shows the whole motion. `supersample` is the number of
    samples per pixel and axis on objects. Raises `ShapeError` for sizes below one frame or 16 pixels.
    """
    if frames < 1 or height < 16 or width < 16 or supersample < 1:
        raise ShapeError(
            f"cannot render {frames} frames of {height}x{width} with {supersample} samples: "
            "ask for at least 1 frame, 16x16 pixels and 1 sample"
        )
    device = torch.device(device)
    if not scenes:
        video = torch.zeros(0, frames, height, width, 3, dtype=torch.uint8, device=device)
        return Clip(video, video[..., 0].clone() if with_mask else None)
    at_once = max(1, _PIXELS_AT_ONCE.get(device.type, 1 << 20) // (frames * height * width))
    parts = [
        _render_chunk(scenes[i : i + at_once], frames, height, width, device, supersample, with_mask)
        for i in range(0, len(scenes), at_once)
    ]
    indices = [part.index for part in parts if part.index is not None]
    return Clip(torch.cat([part.video for part in parts]), torch.cat(indices) if with_mask else None)
