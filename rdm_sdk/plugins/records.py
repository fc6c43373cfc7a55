"""What is known of a plugin: where it comes from, what it registered, and what is wrong with it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

BUILTIN = "rdm-sdk"
"""The distribution of the SDK's own rewards and model families."""
KNOWN_PLUGINS = {
    "aesthetic": "rdm-reward-aesthetic",
    "clip": "rdm-reward-clip",
    "dino": "rdm-reward-dino",
    "geneval": "rdm-reward-geneval",
    "geneval2": "rdm-reward-geneval",
    "hps": "rdm-reward-hps",
    "hpsv3": "rdm-reward-hpsv3",
    "imagereward": "rdm-reward-imagereward",
    "jpeg": "rdm-reward-jpeg",
    "ocr": "rdm-reward-ocr",
    "pickscore": "rdm-reward-pickscore",
    "safety": "rdm-reward-safety",
    "unified": "rdm-reward-unified",
    "unified-api": "rdm-reward-unified",
    "vlm": "rdm-reward-vlm",
    "vlm-api": "rdm-reward-vlm",
}
"""The project's own rewards that are installed one by one: bare name to distribution."""


@dataclass(frozen=True)
class Entry:
    """A reward or a model family that somebody registered."""

    name: str
    """A reward's name, or the class of a family's pipelines."""
    target: str
    """"module:attribute"."""
    distribution: str
    version: str
    """The distribution's version."""
    description: str = ""

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass
class Plugin:
    """One entry point, loaded or not."""

    name: str
    """The entry point's name."""
    distribution: str
    version: str
    module: str = ""
    hooks: list[str] = field(default_factory=list)
    rewards: list[Entry] = field(default_factory=list)
    models: list[Entry] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """What it tried to register in vain, with the reason."""
    failures: list[str] = field(default_factory=list)
    """What is wrong with it, one sentence each; empty for a sound plugin."""
    cause: BaseException | None = None
    """The exception behind the first failure, if there was one."""

    @property
    def key(self) -> str:
        return f"{self.distribution}:{self.name}"

    def fail(self, problem: str, cause: BaseException | None = None) -> None:
        self.failures.append(problem)
        self.cause = self.cause or cause


def normalized(name: str) -> str:
    """Return a distribution's name as package indexes compare them: lower case, with single hyphens."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
