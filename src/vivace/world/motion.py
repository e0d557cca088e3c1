"""Where everything is at time t: the subject's path and the camera's path, in float64 numpy.

World axes: x to the right, y up, the floor is y = 0, the resting camera looks along -z. Time runs from 0 to 1 over the
clip, so any number of frames shows the whole motion. Numbers are rounded, so that the last bit of a vectorised sine
(which may depend on the position in the batch) never reaches a pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vivace.world.attributes import CAMERAS, MOTIONS

TAN_HALF_FOV = 0.364  # 40 degrees across the shorter side of the frame
TARGET_HEIGHT = 0.72  # the resting camera looks at this height above the origin
BOUNCES = 2
ZOOM_WIDE, ZOOM_CLOSE = 0.84, 1.28  # focal length at either end of a zoom, 1 being the static camera


class CameraPath(NamedTuple):
    """Position (..., 3), the three axes (..., 3) each, and focal scale (...) over time."""

    position: np.ndarray
    right: np.ndarray
    up: np.ndarray
    forward: np.ndarray
    focal: np.ndarray


def times(frames: int) -> np.ndarray:
    """Clip time of each frame, (frames,), from 0 to 1."""
    return np.arange(frames, dtype=np.float64) / max(frames - 1, 1)


def subject_offset(motion: np.ndarray, travel: np.ndarray, phase: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Displacement of the subject from its resting place, (..., T, 3).

    `motion` indexes `MOTIONS`; `travel` is half the length of a straight path, the radius of a circle or the
    height of a bounce (world units), or the number of turns of a spin; `phase` is the start of a circle (radians).
    All have shape (...,), `t` has shape (T,).
    """
    motion, travel, phase = (np.asarray(value)[..., None] for value in (motion, travel, phase))
    is_ = {name: (motion == i) * travel for i, name in enumerate(MOTIONS)}
    along = 2.0 * t - 1.0
    hop = (BOUNCES * t) % 1.0
    angle = phase + 2.0 * np.pi * t
    x = (is_["slide_right"] - is_["slide_left"]) * along + is_["circle"] * np.cos(angle)
    y = is_["bounce"] * 4.0 * hop * (1.0 - hop)
    z = (is_["approach"] - is_["recede"]) * along + is_["circle"] * np.sin(angle)
    return np.round(np.stack(np.broadcast_arrays(x, y, z), axis=-1), 7)


def subject_turn(motion: np.ndarray, travel: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Angle in radians by which a spinning subject has turned about the vertical, (..., T)."""
    spinning = np.asarray(motion)[..., None] == MOTIONS.index("spin")
    return np.round(spinning * 2.0 * np.pi * np.asarray(travel)[..., None] * t, 7)


def rotation(yaw: np.ndarray, roll_x: np.ndarray, roll_z: np.ndarray) -> np.ndarray:
    """Object-to-world rotation (..., 3, 3): yaw about y first, then rolling about the world's x and z axes."""
    cy, sy, cx, sx, cz, sz = (f(a) for a in (yaw, roll_x, roll_z) for f in (np.cos, np.sin))
    zero, one = np.zeros_like(cy), np.ones_like(cy)

    def matrix(*entries: np.ndarray) -> np.ndarray:
        return np.stack(entries, axis=-1).reshape(*cy.shape, 3, 3)

    about_y = matrix(cy, zero, sy, zero, one, zero, -sy, zero, cy)
    about_x = matrix(one, zero, zero, zero, cx, -sx, zero, sx, cx)
    about_z = matrix(cz, -sz, zero, sz, cz, zero, zero, zero, one)
    return np.round(about_z @ about_x @ about_y, 7)


def camera_path(
    camera: np.ndarray, swing: np.ndarray, height: np.ndarray, distance: np.ndarray, t: np.ndarray
) -> CameraPath:
    """The camera over time. `camera` indexes `CAMERAS`; `swing` is half the angle of a pan or an orbit (radians).

    A pan turns the camera on the spot, an orbit carries it around the scene to the right, a zoom changes the focal
    length. All arguments have shape (...,) but `t` (T,).
    """
    camera, swing, height, distance = (
        np.asarray(value)[..., None] for value in (camera, swing, height, distance)
    )
    is_ = {name: (camera == i).astype(np.float64) for i, name in enumerate(CAMERAS)}
    along = 2.0 * t - 1.0
    orbit = is_["orbit"] * swing * along
    yaw = (is_["pan_right"] - is_["pan_left"]) * swing * along - orbit  # positive yaw turns towards +x
    growth = ZOOM_CLOSE / ZOOM_WIDE
    focal = (
        1.0
        + is_["zoom_in"] * (ZOOM_WIDE * growth**t - 1.0)
        + is_["zoom_out"] * (ZOOM_CLOSE * growth**-t - 1.0)
        + 0.0 * yaw
    )
    position = np.stack(
        np.broadcast_arrays(distance * np.sin(orbit), height + 0.0 * orbit, distance * np.cos(orbit)), axis=-1
    )
    drop = (height - TARGET_HEIGHT) / np.sqrt(distance**2 + (height - TARGET_HEIGHT) ** 2) + 0.0 * yaw
    level = np.sqrt(1.0 - drop**2)
    sin, cos = np.sin(yaw), np.cos(yaw)
    forward = np.stack([level * sin, -drop, -level * cos], axis=-1)
    right = np.stack([cos, np.zeros_like(cos), sin], axis=-1)
    up = np.stack([drop * sin, level, -drop * cos], axis=-1)
    return CameraPath(*(np.round(value, 7) for value in (position, right, up, forward, focal)))


def project(
    camera: CameraPath, centre: np.ndarray, radius: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image place of a ball: x to the right, y up and radius, in units of half the shorter side of the frame.

    `centre` is (..., T, 3) and `radius` broadcasts to (..., T).
    """
    offset = centre - camera.position
    depth = (offset * camera.forward).sum(-1)
    scale = camera.focal / (TAN_HALF_FOV * depth)
    return (offset * camera.right).sum(-1) * scale, (offset * camera.up).sum(-1) * scale, radius * scale
