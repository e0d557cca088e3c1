"""Ray intersection with the five primitives, elementwise on tensors of rays given in the object's own frame.

Every function takes the ray's origin `o` and direction `d` (three broadcastable tensors each, in units of the object's
radius) and returns `(hit, t, normal)`: a boolean tensor, the distance along `d` (0 where it misses) and the three
components of the outward unit normal. Only correctly rounded operations are used (no sine, power or exponential), so a
pixel never depends on the vector width or on the batch it was computed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Vector = tuple[Tensor, Tensor, Tensor]

CUBE = 0.82  # half the edge
CYLINDER_RADIUS, CYLINDER_HALF = 0.68, 1.0  # slender, so that even a small one is no cube
CONE_RADIUS, CONE_HALF = 1.0, 1.0
TORUS_MAJOR, TORUS_MINOR = 0.68, 0.32  # a standing ring: its axis is z
TORUS_STEPS = 22
BOUND = {"sphere": 1.0, "cube": 1.43, "cylinder": 1.22, "cone": 1.42, "torus": 1.0}  # bounding ball, in radii
_TINY = 1e-9
_FAR = 1e4


class Hit(NamedTuple):
    """Where a ray meets a shape."""

    hit: Tensor
    t: Tensor
    normal: Vector


def _dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _at(o: Vector, d: Vector, t: Tensor) -> Vector:
    return o[0] + t * d[0], o[1] + t * d[1], o[2] + t * d[2]


def _unit(v: Vector) -> Vector:
    scale = 1.0 / (_dot(v, v) + _TINY).sqrt()
    return v[0] * scale, v[1] * scale, v[2] * scale


def _safe(d: Tensor) -> Tensor:
    """The same number, kept away from zero so that it can be divided by."""
    return torch.where(d.abs() < 1e-6, torch.full_like(d, 1e-6), d)


def sphere(o: Vector, d: Vector) -> Hit:
    """The unit sphere."""
    a, b, c = _dot(d, d), _dot(o, d), _dot(o, o) - 1.0
    root = b * b - a * c
    hit = root > 0
    t = (-b - root.clamp_min(0).sqrt()) / a
    return Hit(hit, t, _at(o, d, t))


def cube(o: Vector, d: Vector) -> Hit:
    """The axis-aligned cube, by the slab test (Kay and Kajiya, SIGGRAPH 1986)."""
    near, far = [], []
    for start, slope in zip(o, d, strict=True):
        inverse = 1.0 / _safe(slope)
        middle, half = -start * inverse, (CUBE * inverse).abs()
        near.append(middle - half)
        far.append(middle + half)
    enter = torch.maximum(torch.maximum(near[0], near[1]), near[2])
    leave = torch.minimum(torch.minimum(far[0], far[1]), far[2])
    nx, ny, nz = (
        torch.where(side == enter, -torch.sign(slope), torch.zeros_like(enter))
        for side, slope in zip(near, d, strict=True)
    )
    return Hit(enter < leave, enter, (nx, ny, nz))


def cylinder(o: Vector, d: Vector) -> Hit:
    """The upright capped cylinder."""
    a = d[0] * d[0] + d[2] * d[2] + _TINY
    b = o[0] * d[0] + o[2] * d[2]
    c = o[0] * o[0] + o[2] * o[2] - CYLINDER_RADIUS**2
    root = b * b - a * c
    t_side = (-b - root.clamp_min(0).sqrt()) / a
    y = o[1] + t_side * d[1]
    on_side = (root > 0) & (y.abs() < CYLINDER_HALF)
    t_cap = (-torch.sign(d[1]) * CYLINDER_HALF - o[1]) / _safe(d[1])
    cap_x, cap_z = o[0] + t_cap * d[0], o[2] + t_cap * d[2]
    on_cap = (cap_x * cap_x + cap_z * cap_z < CYLINDER_RADIUS**2) & ~on_side
    t = torch.where(on_side, t_side, t_cap)
    x, _, z = _at(o, d, t)
    zero = torch.zeros_like(t)
    normal = (
        torch.where(on_side, x / CYLINDER_RADIUS, zero),
        torch.where(on_side, zero, -torch.sign(d[1]) + zero),
        torch.where(on_side, z / CYLINDER_RADIUS, zero),
    )
    return Hit(on_side | on_cap, t, normal)


def cone(o: Vector, d: Vector) -> Hit:
    """The upright cone with its tip at +1 and its closed base at -1."""
    slope = CONE_RADIUS / (2.0 * CONE_HALF)
    top = CONE_HALF - o[1]  # distance below the tip, falls with t
    a = d[0] * d[0] + d[2] * d[2] - slope**2 * d[1] * d[1]
    b = o[0] * d[0] + o[2] * d[2] + slope**2 * top * d[1]
    c = o[0] * o[0] + o[2] * o[2] - slope**2 * top * top
    root = b * b - a * c
    sqrt, a = root.clamp_min(0).sqrt(), _safe(a)
    best = torch.full_like(root, _FAR)
    for t in ((-b - sqrt) / a, (-b + sqrt) / a):
        y = o[1] + t * d[1]
        best = torch.where((root > 0) & (y.abs() < CONE_HALF) & (t > 0) & (t < best), t, best)
    on_side = best < _FAR
    t_base = (-CONE_HALF - o[1]) / _safe(d[1])
    base_x, base_z = o[0] + t_base * d[0], o[2] + t_base * d[2]
    on_base = (base_x * base_x + base_z * base_z < CONE_RADIUS**2) & (t_base > 0) & (t_base < best)
    t = torch.where(on_base, t_base, best)
    x, y, z = _at(o, d, t)
    side = _unit((x, slope**2 * (CONE_HALF - y), z))
    zero = torch.zeros_like(t)
    normal = (
        torch.where(on_base, zero, side[0]),
        torch.where(on_base, zero - 1.0, side[1]),
        torch.where(on_base, zero, side[2]),
    )
    return Hit(on_side | on_base, t, normal)


def torus(o: Vector, d: Vector) -> Hit:
    """The standing torus, by sphere tracing (Hart, The Visual Computer 1996) from its bounding sphere inwards."""
    a, b, c = _dot(d, d), _dot(o, d), _dot(o, o) - 1.0
    root = b * b - a * c
    inside = root > 0
    sqrt = root.clamp_min(0).sqrt()
    t, leave = (-b - sqrt) / a, (-b + sqrt) / a
    step = 1.0 / a.sqrt()
    distance = torch.zeros_like(t)
    for _ in range(TORUS_STEPS):
        x, y, z = _at(o, d, t)
        ring = (x * x + y * y).sqrt() - TORUS_MAJOR
        distance = (ring * ring + z * z).sqrt() - TORUS_MINOR
        t = torch.minimum(t + distance * step, leave)
    x, y, z = _at(o, d, t)
    axis = (x * x + y * y + _TINY).sqrt()
    pull = 1.0 - TORUS_MAJOR / axis
    normal = _unit((x * pull, y * pull, z))
    return Hit(inside & (distance < 0.02) & (t < leave), t, normal)


INTERSECT: dict[str, Callable[[Vector, Vector], Hit]] = {
    "sphere": sphere,
    "cube": cube,
    "cylinder": cylinder,
    "cone": cone,
    "torus": torus,
}
