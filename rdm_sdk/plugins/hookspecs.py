"""The hooks a plugin may implement (pluggy). Hook arguments are only ever added, so that old plugins keep working."""

from __future__ import annotations

from typing import Protocol

import pluggy

PROJECT = "rdm_sdk"
"""pluggy's project name, and the entry-point group that plugins are found by."""

CONTRACT_VERSION = 1
"""Version of the contracts of rewards and model families. A plugin says which one it was written for; one from the
future is refused by name."""

# A hyphen before a letter is part of the name; any other is the minus of a reward spec.
_WORD = r"[A-Za-z](?:[A-Za-z0-9_]|-(?=[A-Za-z]))*"
REWARD_NAME = rf"(?:{_WORD}/)?{_WORD}"
"""Pattern of a reward's name: bare for the SDK's own rewards, `owner/name` for everyone else's."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Decorates a plugin's hook functions."""


class RegisterReward(Protocol):
    """What `rdm_register_rewards` is given."""

    def __call__(self, name: str, target: str, *, description: str = "", contract: int = 1) -> None:
        """Register a reward.

        Args:
            name: `owner/name`; bare names are the SDK's own.
            target: "package.module:attribute" of a `Reward` class or of a function, imported when it is first used.
            description: one line for `rdm-sdk rewards list`.
            contract: the contract version that the reward was written for.
        """
        ...


class RegisterModel(Protocol):
    """What `rdm_register_models` is given."""

    def __call__(self, pipeline: str, target: str, *, description: str = "", contract: int = 1) -> None:
        """Register a model family.

        Args:
            pipeline: name of the diffusers pipeline class that the family's bases are loaded as.
            target: "package.module:attribute" of a `ModelFamily` subclass, imported when it is first used.
            description: one line for `rdm-sdk models list`.
            contract: the contract version that the family was written for.
        """
        ...


@hookspec
def rdm_register_rewards(register: RegisterReward) -> None:
    """Register rewards by dotted strings; import nothing heavy."""


@hookspec
def rdm_register_models(register: RegisterModel) -> None:
    """Register model families by dotted strings; import nothing heavy."""
