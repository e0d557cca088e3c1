"""A procedural, captioned 3-D world with exact ground truth: seeds to scenes, scenes to clips and captions."""

from vivace.world.attributes import (
    CAMERAS,
    COLOURS,
    FLOORS,
    MATERIALS,
    MOTIONS,
    SHAPES,
    SIZES,
    Attributes,
    ObjectSpec,
)
from vivace.world.captions import caption, unknown_words, vocabulary
from vivace.world.prompts import parse_prompt
from vivace.world.render import Clip, render
from vivace.world.scene import Placement, Scene, sample_scene, sample_scenes
from vivace.world.sheet import contact_sheet, write_png

__all__ = [
    "CAMERAS",
    "COLOURS",
    "FLOORS",
    "MATERIALS",
    "MOTIONS",
    "SHAPES",
    "SIZES",
    "Attributes",
    "Clip",
    "ObjectSpec",
    "Placement",
    "Scene",
    "caption",
    "contact_sheet",
    "parse_prompt",
    "render",
    "sample_scene",
    "sample_scenes",
    "unknown_words",
    "vocabulary",
    "write_png",
]
