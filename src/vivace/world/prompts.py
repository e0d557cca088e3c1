"""Reading a prompt back: which attributes a text states. Tolerant: it knows more words than the caption grammar."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vivace.world.attributes import Attributes, ObjectSpec
from vivace.world.captions import COLOUR_WORDS, MATERIAL_WORDS, SHAPE_WORDS, SIZE_WORDS


def _lookup(*tables: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: name for table in tables for name, words in table.items() for word in words}


SHAPES = _lookup(
    SHAPE_WORDS,
    {
        "sphere": ("orb", "globe"),
        "cube": ("block",),
        "cylinder": ("can", "barrel"),
        "torus": ("doughnut", "hoop"),
    },
)
SIZES = _lookup(SIZE_WORDS, {"small": ("tiny", "mini"), "large": ("huge", "giant", "enormous")})
MATERIALS = _lookup(
    MATERIAL_WORDS, {"matte": ("matt", "dull"), "shiny": ("metallic", "polished", "reflective")}
)
COLOURS = _lookup(COLOUR_WORDS, {"purple": ("violet",), "cyan": ("turquoise", "aqua")})

_SIDES = r"(?:to(?:wards?)? the )?"
_WATCHER = r"(?:the |a )?(?:camera|viewer|lens|us)\b"
_MOVE = r"(?:mov|roll|slid|glid|go|com|run|travel|drift|fly|fl)\w*"
_REST = r"(?:is|stays?|stands?|remains?|sits?|keeps?|held|holds)"
_STILL = rf"(?:(?:{_REST} )?(?:still|static|fixed|motionless|stationary)|(?:does not|doesn't|never) move|not moving)"
_VIEW = r"(?:camera|view|shot)"

# Facing words come first: "rolls toward the camera" is about the object, not about the camera.
_FACING = (
    ("approach", rf"(?:toward|towards|closer to|at|nearer to|nearer) {_WATCHER}|to {_WATCHER}"),
    ("approach", rf"approach\w* {_WATCHER}"),
    ("recede", rf"(?:away )?from {_WATCHER}"),
)
_CAMERA = (
    ("pan_left", rf"pan(?:s|ning)? {_SIDES}left|{_VIEW} (?:turns?|rotates?|swings?) {_SIDES}left|left pan"),
    (
        "pan_right",
        rf"pan(?:s|ning)? {_SIDES}right|{_VIEW} (?:turns?|rotates?|swings?) {_SIDES}right|right pan",
    ),
    ("zoom_in", r"zoom(?:s|ing)? (?:in|closer)"),
    ("zoom_out", r"zoom(?:s|ing)? (?:out|away)"),
    ("orbit", rf"{_VIEW} (?:orbit|circl|revolv)\w*(?: around)?(?: the \w+)?|orbiting {_VIEW}"),
    ("orbit", rf"{_VIEW} {_MOVE} around(?: the \w+)?"),
    ("static", rf"{_VIEW} {_STILL}|(?:still|static|fixed|stationary) {_VIEW}"),
)
_FLOOR = (
    ("checkered", r"check(?:er|ered|erboard)s?|chequered|chess ?board"),
    ("striped", r"striped|stripes"),
    ("sand", r"sand|sandy|desert|beach"),
    ("grass", r"grass|grassy|lawn|meadow"),
    ("plain", r"(?:plain|gr[ea]y)(?= (?:gr[ea]y )?(?:floor|ground|surface))"),
)
_MOTION = (
    ("slide_right", r"from (?:the )?left to (?:the )?right"),
    ("slide_left", r"from (?:the )?right to (?:the )?left"),
    ("slide_left", r"(?<!on the )(?<!on its )\bleft(?:wards?)?(?! of)"),
    ("slide_right", r"(?<!on the )(?<!on its )\bright(?:wards?)?(?! of)"),
    ("bounce", r"bounc\w*|jump\w*|hop(?:s|ping)?"),
    ("circle", rf"circl\w*|{_MOVE} around|in (?:a )?circles?|orbit\w*"),
    ("spin", r"spin\w*|rotat\w*|twirl\w*|whirl\w*|revolv\w*|turn(?:s|ing) (?:around|in place|on the spot)"),
    ("approach", r"approach\w*|(?:com|gett?|mov|roll)\w* (?:closer|nearer)"),
    ("recede", rf"reced\w*|retreat\w*|{_MOVE} away"),
    ("still", rf"{_STILL}|rest(?:s|ing)|at rest"),
)
_BREAKS = frozenset(
    (
        "a",
        "an",
        "the",
        "and",
        "or",
        "with",
        "beside",
        "to",
        "near",
        "by",
        "of",
        "on",
        "while",
        "in",
        ",",
        ".",
        ";",
    )
)
_TOKEN = re.compile(r"[a-z0-9_]+(?:'[a-z]+)?|[,.;]")


def _first(patterns: tuple[tuple[str, str], ...], text: str) -> tuple[str, re.Match[str]] | None:
    """The pattern that matches earliest in the text; of equals, the one listed first."""
    found = [(name, match) for name, pattern in patterns if (match := re.search(rf"\b(?:{pattern})\b", text))]
    return min(found, key=lambda pair: pair[1].start(), default=None)


def _blank(text: str, match: re.Match[str]) -> str:
    """The text without a match, the positions of everything else unchanged."""
    return text[: match.start()] + "," + " " * (match.end() - match.start() - 1) + text[match.end() :]


def _objects(text: str) -> tuple[list[ObjectSpec], list[tuple[int, int]]]:
    """Every object named, and every mention as (position of the noun, which object).

    A second mention completes the first. A place ("to the left of the cube") names an object, but is no mention of one
    that may be doing something.
    """
    tokens = [(match.group(), match.start()) for match in _TOKEN.finditer(text)]
    found: list[ObjectSpec] = []
    mentions: list[tuple[int, int]] = []
    for at, (word, start) in enumerate(tokens):
        shape = SHAPES.get(word) or (SHAPES.get(word[:-1]) if word.endswith("s") else None)
        if shape is None:
            continue
        said: dict[str, str] = {}
        first = at
        while (
            first > max(0, at - 6)
            and (before := tokens[first - 1][0]) not in _BREAKS
            and before not in SHAPES
        ):
            first -= 1
            for kind, table in (("colour", COLOURS), ("size", SIZES), ("material", MATERIALS)):
                if before in table:
                    said.setdefault(kind, table[before])
        spec = ObjectSpec(shape, **said)
        for which, known in enumerate(found):
            if known.shape == shape and (spec.colour is None or spec.colour == known.colour):
                known_better = (known.colour, known.size or spec.size, known.material or spec.material)
                found[which] = ObjectSpec(shape, *known_better)
                break
        else:
            which = len(found)
            found.append(spec)
        if "of" not in [token for token, _ in tokens[max(0, first - 2) : first]]:
            mentions.append((start, which))
    return found, mentions


def parse_prompt(text: str) -> Attributes:
    """What a prompt states about a clip; everything it does not say is `None`, and `objects` may be empty.

    The object that the motion is said of comes first. The result may repeat a shape or a colour: a prompt may ask for
    what the world cannot hold (`Attributes.require_drawable` tells).
    """
    text = re.sub(r"\s+", " ", text.lower().replace("-", " ")).strip()
    facing = _first(_FACING, text)
    place = len(text)
    motion = None
    if facing:
        motion, match = facing
        place = match.start()
        text = _blank(text, match)
    camera = _first(_CAMERA, text)
    if camera:
        text = _blank(text, camera[1])
    floor = _first(_FLOOR, text)
    if motion is None and (found := _first(_MOTION, text)):
        motion, place = found[0], found[1].start()
    objects, mentions = _objects(text)
    before = [which for start, which in mentions if start < place]
    if before and motion is not None:
        objects.insert(0, objects.pop(before[-1]))
    return Attributes(tuple(objects), motion, camera[0] if camera else None, floor[0] if floor else None)
