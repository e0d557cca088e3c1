"""The caption grammar: attributes and a seed to an English sentence of the closed vocabulary, lower case."""

from __future__ import annotations

import random
import re
from functools import cache

from vivace.core.errors import ConfigError
from vivace.world.attributes import Attributes, ObjectSpec

SHAPE_WORDS = {
    "sphere": ("sphere", "ball"),
    "cube": ("cube", "box"),
    "cylinder": ("cylinder",),
    "cone": ("cone",),
    "torus": ("torus", "ring", "donut"),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
MATERIAL_WORDS = {"matte": ("matte",), "shiny": ("shiny", "glossy")}
COLOUR_WORDS = {
    name: (name,) for name in ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
}
MOTION_PHRASES = {
    "slide_left": ("slides left", "moves left", "rolls left", "slides to the left", "moves to the left"),
    "slide_right": (
        "slides right",
        "moves right",
        "rolls right",
        "slides to the right",
        "moves to the right",
    ),
    "bounce": ("bounces", "bounces up and down", "jumps up and down", "hops up and down"),
    "spin": ("spins", "spins in place", "rotates", "rotates in place", "turns around in place"),
    "circle": ("circles around", "moves in a circle", "goes around in a circle", "rolls in a circle"),
    "approach": ("approaches", "comes closer", "moves toward the camera", "rolls toward the camera"),
    "recede": ("recedes", "moves away", "moves away from the camera", "rolls away from the camera"),
    "still": ("stands still", "stays still", "does not move", "rests"),
}
CAMERA_PHRASES = {
    "static": ("the camera is still", "the camera does not move", "static camera"),
    "pan_left": ("the camera pans left", "the camera turns left", "the camera pans to the left"),
    "pan_right": ("the camera pans right", "the camera turns right", "the camera pans to the right"),
    "zoom_in": ("the camera zooms in", "the view zooms in"),
    "zoom_out": ("the camera zooms out", "the view zooms out"),
    "orbit": ("the camera orbits", "the camera orbits around the scene", "the camera moves around the scene"),
}
FLOOR_PHRASES = {
    "plain": ("on a plain floor", "on a grey floor", "on a plain grey floor"),
    "checkered": ("on a checkered floor", "on a checkerboard"),
    "striped": ("on a striped floor", "on stripes"),
    "sand": ("on sand", "on the sand", "on a sandy floor"),
    "grass": ("on grass", "on the grass", "on a lawn"),
}
BESIDE_PHRASES = ("beside {others}", "next to {others}", "near {others}", "with {others} nearby")
TEMPLATES = (
    "{subject} {motion} {beside} {floor}, {camera}",
    "{subject} {motion} {floor} {beside}, {camera}",
    "{floor}, {subject} {motion} {beside}, {camera}",
    "{beside}, {subject} {motion} {floor}, {camera}",
    "{camera} while {subject} {motion} {beside} {floor}",
)
JOINING_WORDS = ("a", "an", "and", "while")
MAX_WORDS = 40
SHORT_SHARE = 0.25
"""Share of captions that leave most things out, as people do; they still name every object."""


class _Choices:
    """Choices drawn from one seed. Only `random()` is used: its sequence is the same in every version of Python."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random((int(seed) & ((1 << 64) - 1)) ^ 0x5EED0CA9)

    def happens(self, probability: float) -> bool:
        return self._random.random() < probability

    def one(self, options: tuple[str, ...]) -> str:
        return options[int(self._random.random() * len(options))]


def _noun_phrase(spec: ObjectSpec, choices: _Choices, say_size: bool, say_material: bool) -> str:
    words = [
        choices.one(table[value])
        for table, value, said in (
            (SIZE_WORDS, spec.size, say_size),
            (MATERIAL_WORDS, spec.material, say_material),
            (COLOUR_WORDS, spec.colour, True),
            (SHAPE_WORDS, spec.shape, True),
        )
        if said and value is not None
    ]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def caption(attributes: Attributes, seed: int) -> str:
    """A caption of complete attributes, at most `MAX_WORDS` words; the same seed gives the same caption.

    Colour, shape and motion are always said. A full caption also says every size, the floor and the camera (a static
    camera may be left out); a quarter of the captions are short and leave most of these out. Raises `ConfigError` when
    attributes are incomplete: let `sample_scene` complete them.
    """
    if not attributes.complete:
        raise ConfigError("only complete attributes have a caption: pass those of a sampled scene")
    choices = _Choices(seed)
    short = choices.happens(SHORT_SHARE)

    def said(full: float, brief: float) -> bool:
        return choices.happens(brief if short else full)

    say_size, say_material = said(1.0, 0.25), said(0.5, 0.1)
    nouns = [_noun_phrase(spec, choices, say_size, say_material) for spec in attributes.objects]
    parts = {
        "subject": nouns[0],
        "motion": choices.one(MOTION_PHRASES[str(attributes.motion)]),
        "beside": choices.one(BESIDE_PHRASES).format(others=" and ".join(nouns[1:])) if nouns[1:] else "",
        "floor": choices.one(FLOOR_PHRASES[str(attributes.floor)]) if said(1.0, 0.3) else "",
        "camera": "",
    }
    if said(0.5 if attributes.camera == "static" else 1.0, 0.1 if attributes.camera == "static" else 0.3):
        parts["camera"] = choices.one(CAMERA_PHRASES[str(attributes.camera)])
    fitting = tuple(t for t in TEMPLATES if all(parts[name] for name in _lead(t)))
    return _tidy(choices.one(fitting).format(**parts))


def _lead(template: str) -> list[str]:
    """The parts a sentence cannot begin without: those before the subject."""
    return re.findall(r"{(\w+)}", template.partition("{subject}")[0])


def _tidy(sentence: str) -> str:
    """Close the gaps that parts left unsaid leave behind."""
    sentence = re.sub(r"\s+", " ", sentence)
    sentence = re.sub(r"\s+,", ",", sentence)
    return sentence.strip(" ,")


def split_words(text: str) -> list[str]:
    """The lower-case words of a text, without punctuation."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word the grammar can produce, sorted."""
    tables = (
        SHAPE_WORDS,
        SIZE_WORDS,
        MATERIAL_WORDS,
        COLOUR_WORDS,
        MOTION_PHRASES,
        CAMERA_PHRASES,
        FLOOR_PHRASES,
    )
    phrases = [phrase for table in tables for options in table.values() for phrase in options]
    beside = [phrase.replace("{others}", "") for phrase in BESIDE_PHRASES]
    return tuple(sorted({word for text in (*phrases, *beside, *JOINING_WORDS) for word in split_words(text)}))


def unknown_words(prompt: str) -> list[str]:
    """Words of a prompt that no caption contains, in order, each once."""
    known = set(vocabulary())
    return list(dict.fromkeys(word for word in split_words(prompt) if word not in known))
