"""Which plugins there are, who owns which reward and which model family, and errors that say what to do.

What is wrong with a plugin is kept by its name, with its cause, and raised only when somebody asks for something of
that plugin. Nothing here imports torch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rdm_sdk.errors import ConfigError, ModelError, RDMError, RewardError, described, nearest
from rdm_sdk.plugins import hookspecs
from rdm_sdk.plugins.loading import distribution_of, load_plugins
from rdm_sdk.plugins.records import BUILTIN, KNOWN_PLUGINS, Entry, Plugin, normalized

ONLY, WITHOUT, STRICT = "RDM_SDK_PLUGINS", "RDM_SDK_DISABLE_PLUGINS", "RDM_SDK_STRICT_PLUGINS"


class PluginWarning(UserWarning):
    """A plugin that could not be loaded, or a part of it."""


@dataclass(frozen=True)
class Registry:
    """All plugins found, and who owns which reward and which model family."""

    plugins: list[Plugin]
    rewards: Mapping[str, Entry]
    """The rewards that can be had, by name."""
    contested: Mapping[str, list[str]]
    """Names that several distributions claim, with their distributions; none of them can be had."""
    models: Mapping[str, Entry]
    """The model families that can be had, by the class of their pipelines."""

    def knows(self, name: str) -> bool:
        """Whether a reward's name is registered, claimed twice, or known to be a plugin's that is not installed."""
        return name in self.rewards or name in self.contested or name in KNOWN_PLUGINS

    def find(self, name: str) -> Entry:
        """Return the entry of a reward.

        Raises:
            RewardError: the name is unknown, claimed twice, or its plugin is broken; says what to do.
        """
        if name in self.rewards:
            return self.rewards[name]
        self._refuse(name, f"the reward {name!r}", RewardError)
        for plugin in self.plugins:
            unknown_content = plugin.cause is not None or not plugin.hooks  # it did not come to say what it holds
            if plugin.failures and unknown_content and _is_home(plugin, name):
                raise _broken(plugin, f"the reward {name!r}", plugin.failures[0], RewardError) from plugin.cause
        if name in KNOWN_PLUGINS:
            raise RewardError(
                f"the reward {name!r} is a plugin that is not installed (or switched off by {ONLY} or {WITHOUT}): "
                f"pip install {KNOWN_PLUGINS[name]}"
            )
        known = sorted({*self.rewards, *KNOWN_PLUGINS})
        raise RewardError(
            f"unknown reward {name!r}.{nearest(name, known)}{_missing_spaces(name, self.rewards)} "
            f"Known rewards: {', '.join(sorted(self.rewards))}{self._suspects()}. A function of your own is named "
            "by its place, module:function."
        )

    def load(self, name: str) -> Any:
        """Import and return what a reward's target names: a class or a function.

        Raises:
            RewardError: as `find`; or its module cannot be imported.
        """
        return _imported(self.find(name), f"the reward {name!r}", RewardError)

    def load_model(self, pipeline: str) -> Any:
        """Import and return the family class for a pipeline's class.

        Raises:
            ModelError: no family is registered for it, several are, its plugin is broken, or its module cannot be
                imported; says what to do.
        """
        if pipeline in self.models:
            return _imported(self.models[pipeline], f"the family for {pipeline}", ModelError)
        self._refuse(pipeline, f"a family for {pipeline}", ModelError)
        raise ModelError(
            f"{pipeline} is not supported.{nearest(pipeline, self.models)} Pass a hub id, a local path or a pipeline "
            f"of one of: {', '.join(sorted(self.models))}; install a plugin that brings a family for it; or pass a "
            f"rdm_sdk.ModelFamily of your own (docs/write-a-model.md says how to write one){self._suspects()}"
        )

    def _refuse(self, name: str, what: str, kind: type[RDMError]) -> None:
        """Raise for a name that several distributions claim, or that a plugin tried to register in vain."""
        if name in self.contested:
            owners = self.contested[name]
            raise kind(
                f"{what} is registered by {' and by '.join(owners)}, and nothing says which one is meant; uninstall "
                f"one, or set {WITHOUT}={owners[-1]}"
            )
        for plugin in self.plugins:
            if name in plugin.refused:
                raise _broken(plugin, what, plugin.refused[name], kind) from plugin.cause

    def _suspects(self) -> str:
        broken = ", ".join(plugin.key for plugin in self.plugins if plugin.failures)
        return broken and f". Broken plugins, which may hold it: {broken} (see 'rdm-sdk plugins')"

    def fingerprint(self) -> list[str]:
        """Return what must be the same on every process of a run: plugins, versions and failures."""
        return sorted(f"{p.key}=={p.version}{' (broken)' if p.failures else ''}" for p in self.plugins)


@cache
def discover() -> Registry:
    """Return what is installed in this process, found at first use, faults and all.

    Environment variables: RDM_SDK_PLUGINS ("none", or the only distributions to load), RDM_SDK_DISABLE_PLUGINS
    (distributions not to load); several are separated by commas.

    Raises:
        ConfigError: one of them names a distribution that is not installed, or there is another RDM_SDK_ variable.
    """
    return build_registry(_selected(entry_points(group=hookspecs.PROJECT), os.environ))


def strict() -> bool:
    """Whether a plugin's fault is an error: RDM_SDK_STRICT_PLUGINS is set to anything but 0."""
    return os.environ.get(STRICT, "0") not in ("", "0")


@cache
def registry() -> Registry:
    """Return what `discover` finds; each fault becomes a `PluginWarning`, once.

    Raises:
        ConfigError: there is a fault and RDM_SDK_STRICT_PLUGINS is set (to anything but 0).
    """
    built = discover()
    for plugin in built.plugins:
        for failure in plugin.failures:
            message = f"rdm-sdk plugin {plugin.key} ({plugin.version}): {failure}"
            if strict():
                raise ConfigError(f"{message}. {STRICT} is set, so this stops the program.") from plugin.cause
            warnings.warn(message, PluginWarning, stacklevel=2)
    return built


def build_registry(points: Iterable[EntryPoint]) -> Registry:
    """Load the SDK's own plugins and the given entry points, and decide who owns which name."""
    return _settle(load_plugins(points))


def _imported(entry: Entry, what: str, kind: type[RDMError]) -> Any:
    module, _, attribute = entry.target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a script that reads the command line ends the program
        raise kind(
            f"{what} of {entry.distribution} cannot be imported from {entry.target!r}: {described(error)}. Repair or "
            f"upgrade {entry.distribution}."
        ) from error


def _settle(plugins: list[Plugin]) -> Registry:
    """Decide who owns which name; a name with two owners belongs to neither, unless it is the SDK's own."""
    settled: list[dict[str, Entry]] = []
    contested: dict[str, list[str]] = {}
    for kind, noun in (("rewards", "the reward"), ("models", "a family for")):
        claims: dict[str, list[tuple[Plugin, Entry]]] = {}
        for plugin in plugins:
            for entry in getattr(plugin, kind):
                claims.setdefault(entry.name, []).append((plugin, entry))
        found = {}
        for name, owners in claims.items():
            if len(owners) == 1 or owners[0][0].distribution == BUILTIN:
                found[name] = owners[0][1]
                for plugin, _ in owners[1:]:
                    plugin.fail(f"it registers {name}, which is the SDK's own; pass your family as model= instead")
                continue
            contested[name] = [plugin.distribution for plugin, _ in owners]
            for plugin, _ in owners:
                plugin.fail(
                    f"{noun} {name!r} is registered by {' and by '.join(contested[name])}, so it cannot be used"
                )
        settled.append(found)
    return Registry(plugins, settled[0], contested, settled[1])


def _selected(points: Iterable[EntryPoint], environment: Mapping[str, str]) -> list[EntryPoint]:
    points = list(points)
    installed = {distribution_of(point) for point in points}
    only, without = _names(environment.get(ONLY, "")), _names(environment.get(WITHOUT, ""))
    for variable in sorted(environment):  # a misspelt variable must not load what it was to forbid; nor a misspelt name
        if variable.startswith("RDM_SDK_") and variable not in (ONLY, WITHOUT, STRICT):
            known = nearest(variable, (ONLY, WITHOUT, STRICT))
            raise ConfigError(
                f"the environment variable {variable} is not known.{known} There are: {ONLY}, {WITHOUT}, {STRICT}"
            )
    for variable, names in ((ONLY, only - {"none"}), (WITHOUT, without)):
        for name in sorted(names - installed):
            raise ConfigError(
                f"{variable} names {name!r}, and no plugin of that distribution is installed."
                f"{nearest(name, installed)} Installed: {', '.join(sorted(installed)) or 'none'}"
            )
    kept = installed if not only else only - {"none"}
    return [point for point in points if distribution_of(point) in kept - without]


def _names(text: str) -> set[str]:
    return {normalized(part) for part in text.split(",") if part.strip()}


def _is_home(plugin: Plugin, name: str) -> bool:
    """Whether a plugin is the likely home of a reward that it did not come to register."""
    owner, slash, _ = name.partition("/")
    if not slash:
        return KNOWN_PLUGINS.get(name) == plugin.distribution
    return normalized(owner) in (plugin.name.lower(), *plugin.distribution.split("-"), plugin.distribution)


def _broken(plugin: Plugin, what: str, problem: str, kind: type[RDMError]) -> RDMError:
    return kind(
        f"{what} cannot be had, because the plugin {plugin.key} ({plugin.version}) is broken: {problem}. Repair or "
        f"upgrade {plugin.distribution}; 'rdm-sdk plugins' lists all plugins."
    )


def _missing_spaces(name: str, known: Iterable[str]) -> str:
    return " Put spaces around a minus." if "-" in name and name.partition("-")[0] in known else ""
