"""What the catalogue says about a method, as validated data.

A claim is always somebody else's number: it carries who measured it, on what, against what, and how we know of it.
"""

from __future__ import annotations

import unicodedata
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Evidence = Literal[
    "survey abstract",
    "reader's report",
    "machine summary",
    "repository README",
    "repository code",
    "paper abstract",
    "notes",
    "recall",
    "inference",
]
EVIDENCE: dict[str, str] = {
    "survey abstract": "stated in the abstract of the survey",
    "reader's report": "from a report by somebody who read the whole survey; second hand",
    "machine summary": "from a summary of the survey made by a program",
    "repository README": "read in the README of the method's own repository",
    "repository code": "read in the source of the method, or of a library that implements it",
    "paper abstract": "read in the abstract of the method's paper",
    "notes": "copied from the paper by a note-taker; not checked again",
    "recall": "from memory; check before relying on it",
    "inference": "our conclusion; no text says so",
}
"""How we know something, and what that is worth."""

Status = Literal["implemented", "peer", "planned", "out of scope"]
STATUS: dict[str, str] = {
    "implemented": "a technique of this toolkit",
    "peer": "somebody else's implementation can be run and measured here",
    "planned": "to be built here",
    "out of scope": "not to be built here, for the reason given",
}
Objective = Literal["nfe", "per-step", "memory", "latency", "both"]
OBJECTIVE: dict[str, str] = {
    "nfe": "fewer function evaluations",
    "per-step": "less work in each evaluation",
    "memory": "less memory",
    "latency": "an earlier first frame, or less waiting for the same work",
    "both": "fewer evaluations and less work in each",
}
Training = Literal["none", "calibration", "light", "full"]
TRAINING: dict[str, str] = {
    "none": "no training",
    "calibration": "a short calibration",
    "light": "light training (an adapter, a router, a short fine-tune)",
    "full": "full training",
}
STATED_NOT = "not stated"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SubFamily(_Frozen):
    """A branch of the tree. `ours` marks a branch that we added to the survey's."""

    id: str = Field(pattern=r"^[A-D]\d[a-z]?$")
    title: str
    about: str
    aka: tuple[str, ...] = ()
    ours: bool = False


class Family(_Frozen):
    """One of the survey's paradigms (arXiv 2604.15911)."""

    name: str
    letter: str = Field(pattern=r"^[A-D]$")
    about: str
    subs: tuple[SubFamily, ...]


class Claim(_Frozen):
    """One published figure. `against` is the denominator: what was compared with; without it a factor says little."""

    text: str
    metric: str
    hardware: str = STATED_NOT
    against: str = STATED_NOT
    evidence: Evidence


class Peer(_Frozen):
    """An implementation that is not ours and that can be run here: our name of the contender, and what is called."""

    name: str
    function: str


class Method(_Frozen):
    """A published method.

    `sub` holds tree ids, the main one first. `technique` names ours where the status is implemented; `works_with` names
    techniques of ours that use what this method's training makes.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    aliases: tuple[str, ...] = ()
    year: int = Field(ge=2015, le=2100)
    sub: tuple[str, ...] = Field(min_length=1)
    objective: Objective
    training: Training
    training_words: str = ""
    bases: tuple[str, ...] = Field(min_length=1)
    claims: tuple[Claim, ...] = ()
    arxiv: str = Field(default="", pattern=r"^(\d{4}\.\d{5})?$")
    arxiv_recall: bool = False
    """The identifier is from memory."""
    code: str = Field(default="", pattern=r"^(https://\S+)?$")
    licence: str = "unknown"
    evidence: Evidence
    """How we know the idea; a claim carries its own."""
    status: Status
    reason: str = ""
    technique: str = ""
    works_with: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()
    related: tuple[str, ...] = ()
    gist: str = Field(max_length=130)
    idea: str = Field(min_length=60)

    @model_validator(mode="after")
    def _status_is_complete(self) -> Method:
        if (self.status == "implemented") != bool(self.technique):
            raise ValueError("a technique is named exactly when the status is implemented")
        if self.status == "peer" and not self.peers:
            raise ValueError("the status peer needs a peer to measure")
        if self.status in ("planned", "out of scope") and not self.reason:
            raise ValueError(f"the status {self.status} needs a reason")
        return self

    @property
    def letter(self) -> str:
        """Letter of the family."""
        return self.sub[0][0]

    @property
    def names(self) -> tuple[str, ...]:
        """All names it goes by: slug, title, aliases."""
        return (self.name, self.title, *self.aliases)

    @property
    def headline(self) -> Claim | None:
        """The first claim, which the data puts first on purpose."""
        return self.claims[0] if self.claims else None

    @property
    def paper(self) -> str:
        """Address of the paper's abstract, empty where no identifier is known."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


def key(name: str) -> str:
    """A name without case, accents and punctuation: `S²Q-VDiT` and `s2q vdit` are the same."""
    plain = unicodedata.normalize("NFKD", name.replace("Δ", "delta").replace("+", "plus"))
    return "".join(c for c in plain.lower() if c.isalnum() and c.isascii())
