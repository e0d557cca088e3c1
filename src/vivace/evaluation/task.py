"""Tasks: what is to be made and measured, as immutable files.

A task names its prompts (a file and its sha256), how many clips of each, the shape, the steps and guidance of the exact
run, and which metrics at which version judge the clips. A change is a new version beside the old one. The seed of a
sample is a hash of its prompt and repeat, so that it depends neither on its batch nor on its place in the list, and no
two prompts share noise. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vivace.core.errors import ConfigError, UnknownNameError
from vivace.evaluation.record import TaskRef, canonical

VERSION = 1
_HOME = "vivace.evaluation"


class Sample(BaseModel):
    """One clip to make: a prompt, a repeat, and the seed that both give."""

    model_config = ConfigDict(frozen=True)
    prompt: int
    """Index of the prompt within the task."""
    k: int
    text: str
    seed: int

    @property
    def id(self) -> str:
        """`<prompt>.<k>`"""
        return f"{self.prompt}.{self.k}"


class MetricUse(BaseModel):
    """A metric of a task. `limit`: only the first so many samples are measured (costly metrics); 0: all."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    version: int
    limit: int = 0


class Prompts(BaseModel):
    """Where the prompts come from: a file of one prompt a line, with the hash of its text. Empty: none are needed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: str = ""
    sha256: str = ""
    first: int = 0
    count: int = 0


class Task(BaseModel):
    """One task, at one version. See the module's docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    vivace_task: int = VERSION
    name: str
    version: int
    title: str
    about: str
    kind: Literal["quality", "speed"]
    split: Literal["report", "development", "smoke", "none"] = "none"
    """`report` sets are for reported numbers only, `development` sets for choosing settings; they share no prompt."""
    model: str = "tiny"
    """What `vivace.load` takes, or a configuration of `vivace.models.known` where `weights` is `random`; `any`: the
    user names it."""
    weights: Literal["trained", "random"] = "trained"
    prompts: Prompts = Prompts()
    per_prompt: int = 1
    frames: int
    height: int
    width: int
    fps: float
    steps: int
    guidance: float
    text_length: int = 512
    """Tokens of the random text embedding of a speed task."""
    output: Literal["frames", "latent"] = "frames"
    metrics: tuple[MetricUse, ...] = ()
    latent_samples: int = 0
    """Of how many of the first samples the latents of every step are kept and compared."""
    batch: int = 1
    """Clips in one call of the quality run; a contender whose samples influence each other runs with 1."""
    warmups: int = 3
    repeats: int = 10
    """Of the timed run on a GPU; `cpu_warmups` and `cpu_repeats` elsewhere."""
    cpu_warmups: int = 1
    cpu_repeats: int = 3
    clips: int = 6
    """How many of the first prompts' clips are kept for the eye."""
    needs: str = ""
    """What a user must bring, in a sentence; empty: nothing."""
    text: tuple[str, ...] = Field(default=(), exclude=True)
    """Prompts given by the user for a task without a file."""

    # -- files ------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """A task by name and version (`world-short@1`; the newest without a version), or from a YAML file.

        Raises:
            UnknownNameError: no such task or version.
            ConfigError: the file cannot be read, or a field is wrong.
        """
        text = str(source)
        if "/" not in text and not text.endswith((".yaml", ".yml")):
            return cls._packaged(text)
        try:
            content = Path(source).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the task file {source} cannot be read: {error.strerror or error}.") from None
        return cls._parse(content, text)

    @classmethod
    def _packaged(cls, name: str) -> Self:
        known = names()
        base, at, _ = name.partition("@")
        versions = [n for n in known if n.partition("@")[0] == base]
        wanted = name if at else (versions[-1] if versions else name)
        if wanted not in known:
            raise UnknownNameError("task", name, known, "A file needs its ending: .yaml.")
        file = resources.files(_HOME).joinpath("tasks", f"{wanted}.yaml")
        return cls._parse(file.read_text(encoding="utf-8"), wanted)

    @classmethod
    def _parse(cls, content: str, where: str) -> Self:
        try:
            data = yaml.safe_load(content)
        except yaml.YAMLError:
            raise ConfigError(f"the task {where} is not valid YAML; mend it and try again.") from None
        if not isinstance(data, Mapping) or "vivace_task" not in data:
            raise ConfigError(f"{where} is no task: it has no line 'vivace_task: 1'.")
        if data["vivace_task"] > VERSION:
            raise ConfigError(f"the task {where} was written for a newer Vivace; update it.")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigError(f"the task {where}: {place}: {first['msg'].lower()}.") from None

    # -- what it says -----------------------------------------------------------------------------------------

    @property
    def full_name(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def ref(self) -> TaskRef:
        """Name and hash, for a record. The hash covers every field and the prompts themselves."""
        data = self.model_dump(mode="json") | {"text": list(self.prompt_texts())}
        return TaskRef(name=self.full_name, sha256=hashlib.sha256(canonical(data).encode()).hexdigest())

    def prompt_texts(self) -> tuple[str, ...]:
        """All prompts, in order.

        Raises:
            ConfigError: the prompt file is missing, has changed, or holds too few prompts.
        """
        if self.text or not self.prompts.file:
            return self.text
        lines = read_prompts(self.prompts.file, self.prompts.sha256)
        chosen = lines[self.prompts.first : self.prompts.first + (self.prompts.count or len(lines))]
        if self.prompts.count and len(chosen) < self.prompts.count:
            raise ConfigError(f"{self.full_name} wants {self.prompts.count} prompts and has {len(chosen)}.")
        return tuple(chosen)

    def samples(self, limit: int = 0, repeat_from: int = 0) -> list[Sample]:
        """All samples: every prompt once, then every prompt again, so that any prefix is as diverse as it can be.

        Args:
            limit: only the first so many prompts; 0 means all.
            repeat_from: number of the first repeat; other noise for the same prompts (the seed ceiling).
        """
        texts = self.prompt_texts() or ("",)
        texts = texts[:limit] if limit else texts
        # Equal prompts get different noise: each has a number among its twins.
        twins = [texts[:i].count(t) for i, t in enumerate(texts)]
        return [
            Sample(prompt=i, k=k, text=t, seed=sample_seed(t, k, twins[i]))
            for k in range(repeat_from, repeat_from + self.per_prompt)
            for i, t in enumerate(texts)
        ]

    def with_prompts(self, texts: Sequence[str], model: str) -> Self:
        """The same task for prompts and a model of the user's; only for tasks that ask for them."""
        return self.model_copy(update={"text": tuple(texts), "model": model})

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline, without steps, guidance and prompts."""
        return {"num_frames": self.frames, "height": self.height, "width": self.width}


def sample_seed(prompt: str, k: int, twin: int = 0) -> int:
    """The seed of a sample: 48 bits of sha256 over the prompt, its repeat, and its number among equal prompts."""
    text = f"{prompt}\x1f{k}" + (f"\x1f{twin}" if twin else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def names() -> list[str]:
    """Names and versions of the packaged tasks."""
    folder = resources.files(_HOME).joinpath("tasks")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_prompts(file: str, sha256: str) -> list[str]:
    """The lines of a packaged prompt file.

    Raises:
        ConfigError: it is missing, or its text is not the one that the task was made with.
    """
    try:
        text = resources.files(_HOME).joinpath("tasks", "prompts", file).read_text(encoding="utf-8")
    except OSError:
        raise ConfigError(f"the prompt file {file} is missing; install Vivace again.") from None
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != sha256:
        raise ConfigError(
            f"the prompt file {file} has changed (sha256 {found[:12]}, the task says {sha256[:12]}); a changed list "
            "is a new file and a new version of the task."
        )
    return [line for line in text.splitlines() if line.strip()]
