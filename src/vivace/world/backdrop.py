"""Sky, hills, floor and the shadows on the floor: one colour per pixel, antialiased analytically (no supersampling)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Colour = tuple[float, float, float]


class FloorLook(NamedTuple):
    """Two colours and a pattern: waves across x, waves across z, waves per world unit, and the sharpness of an edge."""

    first: Colour
    second: Colour
    across_x: float
    across_z: float
    frequency: float
    sharpness: float


FLOOR_LOOKS = {
    "plain": FloorLook((0.50, 0.50, 0.52), (0.50, 0.50, 0.52), 0.0, 0.0, 0.5, 1.0),
    "checkered": FloorLook((0.72, 0.72, 0.74), (0.33, 0.34, 0.38), 1.0, 1.0, 0.5, 6.0),
    "striped": FloorLook((0.76, 0.66, 0.66), (0.46, 0.32, 0.34), 1.0, 0.0, 0.5, 5.0),
    "sand": FloorLook((0.80, 0.68, 0.44), (0.72, 0.59, 0.36), 1.0, 1.0, 0.28, 1.0),
    "grass": FloorLook((0.40, 0.54, 0.26), (0.30, 0.44, 0.19), 1.0, 1.0, 0.28, 1.0),
}
SKIES: tuple[tuple[Colour, Colour], tuple[Colour, Colour]] = (  # (horizon, zenith) at either end of the tint
    ((0.80, 0.88, 0.95), (0.42, 0.62, 0.88)),
    ((0.94, 0.86, 0.82), (0.58, 0.58, 0.80)),
)
HILL_FAR: Colour = (0.62, 0.70, 0.80)
HILL_NEAR: Colour = (0.44, 0.52, 0.56)
FOG_DISTANCE = 26.0
SHADOW_DEPTH, CONTACT_DEPTH = 0.55, 0.35


class Backdrop(NamedTuple):
    """What the backdrop needs to know of a batch; every tensor is float32 and broadcasts to (B, T, H, W).

    `rays` holds the x and y coordinates of the pixels on the image plane; camera vectors are (B, T, 1, 1).
    """

    plane_x: Tensor
    plane_y: Tensor
    pixel: float
    focal: Tensor
    position: tuple[Tensor, Tensor, Tensor]
    right: tuple[Tensor, Tensor, Tensor]
    up: tuple[Tensor, Tensor, Tensor]
    forward: tuple[Tensor, Tensor, Tensor]
    light: tuple[Tensor, Tensor, Tensor]
    look: Tensor
    """(B, 10): both floor colours, then the four pattern numbers of `FloorLook`."""
    floor: tuple[Tensor, Tensor, Tensor, Tensor]
    """cos and sin of the pattern's angle, and its offsets, (B, 1, 1, 1) each."""
    tint: Tensor
    hills: tuple[Tensor, Tensor]


def smooth_step(x: Tensor) -> Tensor:
    """0 below 0, 1 above 1, and the cubic between."""
    x = x.clamp(0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _triangle(x: Tensor) -> Tensor:
    """A triangle wave of period 1 between -1 and 1."""
    return 4.0 * (x - x.floor() - 0.5).abs() - 1.0


def _swell(x: Tensor) -> Tensor:
    """A sine-like wave of period 1 between -1 and 1, made of parabolas."""
    x = x - x.floor() - 0.5
    return 16.0 * x * (0.5 - x.abs())


def sky_colour(elevation: Tensor, tint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sky at a given slope (rise over run), without hills."""
    height = smooth_step(elevation.clamp(0.0, 1.0) * 1.6)
    channels = []
    for c in range(3):
        low = SKIES[0][0][c] + tint * (SKIES[1][0][c] - SKIES[0][0][c])
        high = SKIES[0][1][c] + tint * (SKIES[1][1][c] - SKIES[0][1][c])
        channels.append(low + height * (high - low))
    return channels[0], channels[1], channels[2]


def _hill_cover(
    elevation: Tensor, bearing: Tensor, pixel: Tensor, base: float, height: float, rate: float, phase: Tensor
):
    ridge = base + height * (
        _swell(bearing * rate + phase) + 0.45 * _swell(bearing * (2.3 * rate) + 3.7 * phase)
    )
    return ((ridge - elevation) / pixel + 0.5).clamp(0.0, 1.0)


def paint(view: Backdrop, occluders: list[dict[str, Tensor]]) -> Tensor:
    """The picture without its objects, (B, T, H, W, 3) in [0, 1].

    Each occluder is one object slot of the batch: `x`, `y`, `z` (its centre), `inverse` (nine tensors, world to its own
    frame, in units of its shadow's half axes), `ring` and `width` (the profile of its shadow) and `present` (0 or 1).
    """
    # No camera rolls, so everything that depends on a ray's rise is one number per row.
    dy = view.forward[1] + view.plane_y * view.up[1]
    row_x = view.forward[0] + view.plane_y * view.up[0]
    row_z = view.forward[2] + view.plane_y * view.up[2]
    dx = row_x + view.plane_x * view.right[0]
    dz = row_z + view.plane_x * view.right[2]
    run = (dx * dx + dz * dz).sqrt()
    elevation = dy / run
    bearing = dx / (-dz).clamp_min(0.2)
    grain = view.pixel / view.focal  # size of a pixel on the image plane
    sky = sky_colour(elevation, view.tint)
    far = _hill_cover(elevation, bearing, grain, 0.060, 0.022, 1.3, view.hills[1])
    near = _hill_cover(elevation, bearing, grain, 0.022, 0.020, 1.9, view.hills[0])

    t = view.position[1] / (-dy).clamp_min(1e-3)
    px, pz = view.position[0] + t * dx, view.position[2] + t * dz
    look = [view.look[:, i, None, None, None] for i in range(10)]
    across_x, across_z, frequency, sharpness = look[6:]
    # A pixel covers `blur` waves along the line of sight; an edge is never sharper than that, and far waves fade away.
    blur = t * grain * frequency / (-dy).clamp_min(1e-3)
    slope = torch.minimum(sharpness, 0.25 / blur.clamp_min(1e-6))
    cos, sin, shift_x, shift_z = view.floor
    u = (px * cos + pz * sin) * frequency + shift_x
    v = (pz * cos - px * sin) * frequency + shift_z
    fade = (0.5 / blur.clamp_min(1e-6)).clamp_max(1.0)
    wave_x = (slope * _triangle(u)).clamp(-1.0, 1.0) * fade
    wave_z = (slope * _triangle(v)).clamp(-1.0, 1.0) * fade
    blend = 0.5 + 0.5 * (across_x * wave_x * (1.0 - across_z + across_z * wave_z))

    shade = torch.ones_like(px)
    for slot in occluders:
        shade = shade * _shade(px, pz, view.light, slot)
    distance = t * run
    fog = distance * distance / (distance * distance + FOG_DISTANCE * FOG_DISTANCE)
    ground = (-elevation / grain + 0.5).clamp(0.0, 1.0)
    horizon = sky_colour(torch.zeros_like(view.tint), view.tint)
    channels = []
    for c in range(3):
        first, second = look[c], look[3 + c]
        tile = (second + blend * (first - second)) * shade
        tile = tile + fog * (horizon[c] - tile)
        air = sky[c] + far * (HILL_FAR[c] - sky[c])
        air = air + near * (HILL_NEAR[c] - air)
        channels.append(air + ground * (tile - air))
    return torch.stack(channels, dim=-1)


def _shade(px: Tensor, pz: Tensor, light: tuple[Tensor, Tensor, Tensor], slot: dict[str, Tensor]) -> Tensor:
    """Light that reaches the floor past one object: a soft cast shadow times a contact shadow right below it."""
    wx, wy, wz = px - slot["x"], -slot["y"], pz - slot["z"]
    m = slot["inverse"]
    local = [m[..., 3 * i + 0] * wx + (m[..., 3 * i + 1] * wy + m[..., 3 * i + 2] * wz) for i in range(3)]
    toward = [
        m[..., 3 * i] * light[0] + m[..., 3 * i + 1] * light[1] + m[..., 3 * i + 2] * light[2]
        for i in range(3)
    ]
    along = local[0] * toward[0] + local[1] * toward[1] + local[2] * toward[2]
    length = toward[0] * toward[0] + toward[1] * toward[1] + toward[2] * toward[2]
    square = local[0] * local[0] + local[1] * local[1] + local[2] * local[2]
    miss = (square - along * along / length).clamp_min(0.0).sqrt()  # closest approach of the light's ray
    profile = (miss - slot["ring"]).abs() / slot["width"]
    cast = 1.0 - smooth_step((profile - 0.70) / 0.60)
    reach = slot["size"] * slot["size"]
    contact = reach / (reach + 1.5 * (wx * wx + wz * wz) + 4.0 * slot["lift"] * slot["lift"])
    contact = contact * contact
    return (1.0 - slot["present"] * SHADOW_DEPTH * cast) * (1.0 - slot["present"] * CONTACT_DEPTH * contact)
