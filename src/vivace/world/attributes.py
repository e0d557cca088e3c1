"""What can be said about a clip: the closed lists of the world, and the structured ground truth built from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from vivace.core.errors import ConfigError, UnknownNameError

SHAPES = ("sphere", "cube", "cylinder", "cone", "torus")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SIZES = ("small", "large")
MATERIALS = ("matte", "shiny")
MOTIONS = ("slide_left", "slide_right", "bounce", "spin", "circle", "approach", "recede", "still")
CAMERAS = ("static", "pan_left", "pan_right", "zoom_in", "zoom_out", "orbit")
FLOORS = ("plain", "checkered", "striped", "sand", "grass")
MAX_OBJECTS = 3


def _member(kind: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise UnknownNameError(kind, str(value), allowed)


@dataclass(frozen=True)
class ObjectSpec:
    """One object. `None` means "not said" (see `parse_prompt`); `sample_scene` fills it in from the seed."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    material: str | None = None

    def __post_init__(self) -> None:
        _member("shape", self.shape, SHAPES)
        _member("colour", self.colour, COLOURS)
        _member("size", self.size, SIZES)
        _member("material", self.material, MATERIALS)


@dataclass(frozen=True)
class Attributes:
    """Ground truth of a clip, or the part of it that a prompt states.

    `objects[0]` is the subject, the only one that moves. Shapes are distinct within a clip, and so are colours, so that
    "the red sphere" names one object. A field is `None` when it was not said.
    """

    objects: tuple[ObjectSpec, ...] = ()
    motion: str | None = None
    camera: str | None = None
    floor: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "objects", tuple(self.objects))
        _member("motion", self.motion, MOTIONS)
        _member("camera", self.camera, CAMERAS)
        _member("floor", self.floor, FLOORS)

    @property
    def count(self) -> int:
        """Number of objects."""
        return len(self.objects)

    @property
    def complete(self) -> bool:
        """True when nothing is left unsaid."""
        specs = [value for spec in self.objects for value in asdict(spec).values()]
        return bool(specs) and None not in (*specs, self.motion, self.camera, self.floor)

    def require_drawable(self) -> None:
        """Raise `ConfigError` unless these attributes, once completed, make a clip the world can hold."""
        if len(self.objects) > MAX_OBJECTS:
            raise ConfigError(
                f"a clip holds at most {MAX_OBJECTS} objects, not {len(self.objects)}: name fewer"
            )
        for kind in ("shape", "colour"):
            said = [value for spec in self.objects if (value := getattr(spec, kind)) is not None]
            if len(set(said)) < len(said):
                raise ConfigError(
                    f"two objects share the {kind} {max(said, key=said.count)!r}: give each its own"
                )

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain strings and lists."""
        return {**asdict(self), "objects": [asdict(spec) for spec in self.objects]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Attributes:
        """The inverse of `to_json`; raises `ConfigError` on unknown keys or values."""
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(
                f"unknown attribute {', '.join(unknown)}: a clip has objects, motion, camera and floor"
            )
        try:
            objects = tuple(ObjectSpec(**spec) for spec in data.get("objects", ()))
        except TypeError as error:
            raise ConfigError("an object is written as shape, colour, size and material") from error
        return cls(objects, data.get("motion"), data.get("camera"), data.get("floor"))
