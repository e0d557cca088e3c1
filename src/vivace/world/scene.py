"""A scene: ground truth plus every continuous parameter the renderer needs, sampled from one integer seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np

from vivace.core.errors import ConfigError
from vivace.world import motion as paths
from vivace.world.attributes import (
    CAMERAS,
    COLOURS,
    FLOORS,
    MATERIALS,
    MAX_OBJECTS,
    MOTIONS,
    SHAPES,
    SIZES,
    Attributes,
    ObjectSpec,
)
from vivace.world.draws import Draws

RADIUS = {"small": 0.44, "large": 0.87}  # world units; about 19 and 37 pixels across at 128 x 128
REST_HEIGHT = {
    "sphere": 1.0,
    "cube": 0.82,
    "cylinder": 1.0,
    "cone": 1.0,
    "torus": 1.0,
}  # of the centre, in radii
COUNT_SHARES = (0.60, 0.28, 0.12)
CANDIDATES = {1: 16, 2: 72, 3: 256}
"""Layouts tried for each seed, by number of objects; the first that keeps everything visible and apart is taken."""

TRAVEL = {  # half path, circle radius, bounce height (world units) or turns
    "slide_left": (0.85, 1.35),
    "slide_right": (0.85, 1.35),
    "bounce": (0.95, 1.35),
    "spin": (1.25, 1.75),
    "circle": (0.70, 1.00),
    "approach": (1.75, 2.10),
    "recede": (1.75, 2.10),
    "still": (0.0, 0.0),
}
SWING = {"static": 0.0, "pan_left": 0.11, "pan_right": 0.11, "zoom_in": 0.0, "zoom_out": 0.0, "orbit": 0.40}


@dataclass(frozen=True)
class Placement:
    """One object at rest: radius and place on the floor in world units, yaw in radians."""

    radius: float
    x: float
    z: float
    yaw: float


@dataclass(frozen=True)
class Scene:
    """Everything `render` needs. Lengths in world units, angles in radians, shares in [0, 1)."""

    attributes: Attributes
    seed: int
    placements: tuple[Placement, ...]
    travel: float
    """Size of the subject's motion; its meaning depends on the motion (`motion.subject_offset`)."""
    phase: float
    """Where a circle starts."""
    swing: float
    """Half the angle of a pan or an orbit."""
    camera_height: float
    camera_distance: float
    light_azimuth: float
    light_elevation: float
    sky_tint: float
    floor_angle: float
    floor_x: float
    floor_z: float
    hills_near: float
    hills_far: float

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain numbers, strings and lists."""
        return {
            **asdict(self),
            "attributes": self.attributes.to_json(),
            "placements": [asdict(placement) for placement in self.placements],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scene:
        """The inverse of `to_json`; raises `ConfigError` when a parameter is missing or unknown."""
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise ConfigError(f"a scene needs exactly these parameters: {', '.join(sorted(names))}")
        placements = tuple(Placement(**placement) for placement in data["placements"])
        return cls(
            **{**data, "attributes": Attributes.from_json(data["attributes"]), "placements": placements}
        )


def _complete(draws: Draws, wanted: Sequence[Attributes | None]) -> list[Attributes]:
    """Fill in everything that is not said, keeping shapes and colours distinct."""
    count = 1 + (draws.uniform("count") >= np.cumsum(COUNT_SHARES)[None, :-1]).sum(axis=1)
    shapes, colours = draws.order("shape", len(SHAPES)), draws.order("colour", len(COLOURS))
    crowded = np.where(count == 3, 1 / 3, 1 / 2)[:, None]  # three large objects hardly fit into the frame
    sizes = (draws.uniform("size", MAX_OBJECTS) < crowded).astype(int)
    materials = (draws.uniform("material", MAX_OBJECTS) * len(MATERIALS)).astype(int)
    motions, cameras, floors = (
        draws.index(name, len(group))
        for name, group in (("motion", MOTIONS), ("camera", CAMERAS), ("floor", FLOORS))
    )
    done = []
    for b, given in enumerate(wanted):
        if given is not None and given.complete:
            done.append(given)
            continue
        given = given or Attributes()
        said = given.objects or (ObjectSpec(),) * int(count[b])
        free_shapes = [SHAPES[i] for i in shapes[b] if all(SHAPES[i] != spec.shape for spec in said)]
        free_colours = [COLOURS[i] for i in colours[b] if all(COLOURS[i] != spec.colour for spec in said)]
        objects = tuple(
            ObjectSpec(
                spec.shape or free_shapes.pop(0),
                spec.colour or free_colours.pop(0),
                spec.size or SIZES[sizes[b, i]],
                spec.material or MATERIALS[materials[b, i]],
            )
            for i, spec in enumerate(said)
        )
        done.append(
            Attributes(
                objects,
                given.motion or MOTIONS[motions[b]],
                given.camera or CAMERAS[cameras[b]],
                given.floor or FLOORS[floors[b]],
            )
        )
    return done


@dataclass
class _Layouts:
    """Candidate layouts of scenes with n objects each: `x`, `z` (B, K, n), the paths (B, K), the camera (B,)."""

    x: np.ndarray
    z: np.ndarray
    travel: np.ndarray
    phase: np.ndarray
    swing: np.ndarray
    height: np.ndarray
    distance: np.ndarray


def _candidates(draws: Draws, motion: np.ndarray, camera: np.ndarray, count: int) -> _Layouts:
    k = CANDIDATES[count]

    def each(name: str, low: float, high: float) -> np.ndarray:
        return draws.uniform(name, k * count, low, high).reshape(-1, k, count)

    x, z = each("x", -2.2, 2.2), each("z", -2.6, 1.2)
    # The subject rests near the middle of the line it will travel along.
    x[..., 0] = draws.uniform("subject x", k, -0.9, 0.9)
    z[..., 0] = draws.uniform("subject z", k, -0.6, 0.7)
    straight = np.isin(motion, [MOTIONS.index("approach"), MOTIONS.index("recede")])
    z[straight, :, 0] = draws.uniform("subject z", k, -0.5, -0.2)[straight]
    low, high = (np.array([TRAVEL[name][i] for name in MOTIONS])[motion][:, None] for i in (0, 1))
    return _Layouts(
        x=x,
        z=z,
        travel=low + (high - low) * draws.uniform("travel", k),
        phase=draws.uniform("phase", k, 0.0, 2.0 * np.pi),
        swing=np.array([SWING[name] for name in CAMERAS])[camera]
        * draws.uniform("swing", 1, 0.92, 1.08)[:, 0],
        height=draws.uniform("camera height", 1, 2.65, 3.05)[:, 0],
        distance=draws.uniform("camera distance", 1, 8.0, 8.4)[:, 0],
    )


def _faults(
    layout: _Layouts, motion: np.ndarray, camera: np.ndarray, radius: np.ndarray, rest: np.ndarray
) -> np.ndarray:
    """How far each candidate is from a good layout, (B, K); 0 is good. `radius` and resting height are (B, n).

    Good: every ball that bounds an object stays inside the frame, objects never touch in space, in the image they keep
    apart, and nothing stands in front of the subject.
    """
    t = np.linspace(0.0, 1.0, 9)
    path = paths.camera_path(camera, layout.swing, layout.height, layout.distance, t)
    path = paths.CameraPath(*(value[:, None, None] for value in path))  # (B, 1, 1, T, ...)
    centre = np.stack(np.broadcast_arrays(layout.x, rest[:, None], layout.z), axis=-1)[..., None, :]
    centre = np.repeat(centre, len(t), axis=-2)  # (B, K, n, T, xyz)
    centre[:, :, 0] += paths.subject_offset(motion[:, None], layout.travel, layout.phase, t)
    px, py, pr = paths.project(path, centre, radius[:, None, :, None])
    edge = np.maximum(np.abs(px), np.abs(py)) + 1.04 * pr - 0.97
    total = np.maximum(edge, 0.0).max(-1).sum(-1)
    depth = ((centre - path.position) * path.forward).sum(-1)
    for a, b in combinations(range(radius.shape[1]), 2):
        reach = (radius[:, a] + radius[:, b])[:, None, None]
        gap = np.sqrt(((centre[:, :, a] - centre[:, :, b]) ** 2).sum(-1)) / reach
        apart = np.hypot(px[:, :, a] - px[:, :, b], py[:, :, a] - py[:, :, b]) / (pr[:, :, a] + pr[:, :, b])
        hides = (a == 0) & (depth[:, :, b] < depth[:, :, a])
        total += np.maximum(1.12 - gap, 0.0).max(-1)
        total += np.maximum(np.where(hides, 0.95, 0.72) - apart, 0.0).max(-1)
    return total


def _place(draws: Draws, truth: Sequence[Attributes]) -> list[dict[str, Any]]:
    """The layout of scenes that all have the same number of objects: placements, travel, phase and camera."""
    count = truth[0].count
    motion = np.array([MOTIONS.index(str(a.motion)) for a in truth])
    camera = np.array([CAMERAS.index(str(a.camera)) for a in truth])
    radius = np.array([[RADIUS[str(spec.size)] for spec in a.objects] for a in truth])
    radius = radius * draws.uniform("radius", count, 0.96, 1.04)
    rest = radius * [[REST_HEIGHT[str(spec.shape)] for spec in a.objects] for a in truth]
    layout = _candidates(draws, motion, camera, count)
    best = np.argmin(
        np.round(_faults(layout, motion, camera, radius, rest), 6), axis=1
    )  # the first of equals
    rows = np.arange(len(truth))
    yaw = draws.uniform("yaw", count, -0.5, 0.5)
    spots = np.round(np.stack([radius, layout.x[rows, best], layout.z[rows, best], yaw], axis=-1), 5).tolist()
    columns = {
        "travel": layout.travel[rows, best],
        "phase": layout.phase[rows, best],
        "swing": layout.swing,
        "camera_height": layout.height,
        "camera_distance": layout.distance,
    }
    plain = {name: np.round(column, 5).tolist() for name, column in columns.items()}
    return [
        {"placements": tuple(Placement(*spot) for spot in spots[row])}
        | {name: plain[name][row] for name in plain}
        for row in range(len(truth))
    ]


SURROUNDINGS = {  # parameters that no constraint touches: sampled ranges
    "light_azimuth": (-1.0, 1.0),
    "light_elevation": (0.80, 1.10),
    "sky_tint": (0.0, 1.0),
    "floor_angle": (-0.25, 0.25),
    "floor_x": (0.0, 1.0),
    "floor_z": (0.0, 1.0),
    "hills_near": (0.0, 1.0),
    "hills_far": (0.0, 1.0),
}


def sample_scenes(seeds: Sequence[int], attributes: Sequence[Attributes | None] | None = None) -> list[Scene]:
    """A scene for every seed; each depends on its own seed (and attributes) alone.

    `attributes[i]`, where given, is kept, and what it leaves unsaid is sampled. Raises `ConfigError` when attributes
    name more than three objects or repeat a shape or a colour, or when the two lists differ in length.
    """
    seeds = [int(seed) for seed in seeds]
    wanted = [None] * len(seeds) if attributes is None else list(attributes)
    if len(wanted) != len(seeds):
        raise ConfigError(f"{len(seeds)} seeds came with {len(wanted)} attributes: give one for each seed")
    for given in wanted:
        if given is not None:
            given.require_drawable()
    if not seeds:
        return []
    draws = Draws(seeds)
    truth = _complete(draws, wanted)
    around = {
        name: np.round(draws.uniform(name, 1, low, high)[:, 0], 5).tolist()
        for name, (low, high) in SURROUNDINGS.items()
    }
    scenes: dict[int, Scene] = {}
    for count in range(1, MAX_OBJECTS + 1):
        rows = [b for b, a in enumerate(truth) if a.count == count]
        if rows:
            places = _place(Draws([seeds[b] for b in rows]), [truth[b] for b in rows])
            for b, place in zip(rows, places, strict=True):
                scenes[b] = Scene(truth[b], seeds[b], **place, **{name: around[name][b] for name in around})
    return [scenes[b] for b in range(len(seeds))]


def sample_scene(seed: int, attributes: Attributes | None = None) -> Scene:
    """One scene from one seed; see `sample_scenes`."""
    return sample_scenes([seed], [attributes])[0]
