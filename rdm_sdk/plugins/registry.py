"""Finding plugins, and the rewards and model families they register, so that no plugin can take down another.

pluggy's own entry-point loader stops at the first plugin that fails to import and silently skips a second entry point
of one name. So entry points are loaded one at a time here, each into a plugin manager of its own; what fails is kept
by name, with its cause, and raised again only when somebody asks for something of that plugin. Nothing here imports
torch.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from rdm_sdk._version import __version__
from rdm_sdk.errors import ConfigError, ModelError, RDMError, RewardError, nearest, said
from rdm_sdk.plugins import hookspecs

BUILTIN = "rdm-sdk"
BUILTIN_MODULES = {"rewards": "rdm_sdk.rewards.builtin", "models": "rdm_sdk.families.builtin"}
ONLY, WITHOUT, STRICT = "RDM_SDK_PLUGINS", "RDM_SDK_DISABLE_PLUGINS", "RDM_SDK_STRICT_PLUGINS"

KNOWN_PLUGINS = {
    "aesthetic": "rdm-reward-aesthetic",
    "clip": "rdm-reward-clip",
    "dino": "rdm-reward-dino",
    "hps": "rdm-reward-hps",
    "imagereward": "rdm-reward-imagereward",
    "jpeg": "rdm-reward-jpeg",
    "pickscore": "rdm-reward-pickscore",
    "vlm": "rdm-reward-vlm",
}
"""The project's own rewards that are installed on their own: bare name to distribution."""


class PluginWarning(UserWarning):
    """A plugin that could not be loaded, or a part of it."""


@dataclass(frozen=True)
class Entry:
    """A reward or a model family that somebody registered."""

    name: str
    """A reward's name, or the class of a family's pipelines."""
    target: str
    """"module:attribute"."""
    distribution: str
    version: str
    """Of the distribution."""
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

    def find(self, name: str) -> Entry:
        """Return the entry of a reward.

        Raises:
            RewardError: the name is unknown, claimed twice, or its plugin is broken; says what to do.
        """
        if name in self.rewards:
            return self.rewards[name]
        if name in self.contested:
            owners = self.contested[name]
            raise RewardError(
                f"the reward {name!r} is registered by {' and by '.join(owners)}, and nothing says which one is meant; "
                f"uninstall one, or set {WITHOUT}={owners[-1]}"
            )
        broken = [plugin for plugin in self.plugins if plugin.failures]
        for plugin in broken:
            unknown_content = plugin.cause is not None or not plugin.hooks  # it did not come to say what it holds
            if name in plugin.refused or (unknown_content and _is_home(plugin, name)):
                problem = plugin.refused.get(name, plugin.failures[0])
                raise RewardError(
                    f"the reward {name!r} cannot be had, because the plugin {plugin.key} ({plugin.version}) is broken: "
                    f"{problem}. Repair or upgrade {plugin.distribution}; 'rdm-sdk plugins' lists all plugins."
                ) from plugin.cause
        if name in KNOWN_PLUGINS:
            raise RewardError(
                f"the reward {name!r} is a plugin that is not installed (or switched off by {ONLY} or {WITHOUT}): "
                f"pip install {KNOWN_PLUGINS[name]}"
            )
        known = sorted({*self.rewards, *KNOWN_PLUGINS})
        raise RewardError(
            f"unknown reward {name!r}.{nearest(name, known)}{_missing_spaces(name, self.rewards)} "
            f"Known rewards: {', '.join(sorted(self.rewards))}{_suspects(broken)}"
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
        if pipeline in self.contested:
            owners = self.contested[pipeline]
            raise ModelError(
                f"a family for {pipeline} is registered by {' and by '.join(owners)}, and nothing says which one is "
                f"meant; uninstall one, or set {WITHOUT}={owners[-1]}"
            )
        for plugin in self.plugins:
            if pipeline in plugin.refused:
                raise ModelError(
                    f"the family for {pipeline} cannot be had, because the plugin {plugin.key} ({plugin.version}) is "
                    f"broken: {plugin.refused[pipeline]}. Repair or upgrade {plugin.distribution}."
                )
        broken = [plugin for plugin in self.plugins if plugin.failures]
        raise ModelError(
            f"{pipeline} is not supported.{nearest(pipeline, self.models)} Pass a hub id, a local path or a pipeline "
            f"of one of: {', '.join(sorted(self.models))}; install a plugin that brings a family for it; or pass a "
            f"rdm_sdk.ModelFamily of your own (docs/write-a-model.md says how to write one){_suspects(broken)}"
        )

    def fingerprint(self) -> list[str]:
        """Return what must be the same on every process of a run: plugins, versions and failures."""
        return sorted(f"{p.key}=={p.version}{' (broken)' if p.failures else ''}" for p in self.plugins)


@cache
def discover() -> Registry:
    """Return what is installed in this process, found at first use, faults and all.

    Environment variables: RDM_SDK_PLUGINS ("none", or the only distributions to load), RDM_SDK_DISABLE_PLUGINS
    (distributions not to load); several are separated by commas.

    Raises:
        ConfigError: RDM_SDK_PLUGINS names a distribution that is not installed.
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
    """Load the SDK's own plugins and the given entry points, in the order of their distributions' names."""
    plugins = []
    for name, module in BUILTIN_MODULES.items():
        builtin = Plugin(name, BUILTIN, __version__, module)
        _load(builtin, partial(import_module, module))
        plugins.append(builtin)
    for point in sorted(points, key=lambda point: (_distribution(point), point.name)):
        version = (point.dist.version if point.dist is not None else None) or "?"
        plugin = Plugin(point.name, _distribution(point), version, point.value)
        _load(plugin, point.load)
        plugins.append(plugin)
    return _settle(plugins)


def _load(plugin: Plugin, load: Any) -> None:
    """Load one plugin and run its hooks; whatever goes wrong stays with the plugin."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    known = [name for name in vars(hookspecs) if name.startswith("rdm_")]
    try:
        module = load()
    except (Exception, SystemExit) as error:
        plugin.fail(f"it cannot be imported: {said(error)}", error)
        return
    try:
        manager.register(module, plugin.key)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        plugin.fail(_explain(error, known), error)
        return
    plugin.hooks = [caller.name for caller in manager.get_hookcallers(module) or []]
    if not plugin.hooks:
        plugin.fail(f"it implements no hook; decorate a function named {' or '.join(known)} with @rdm_sdk.hookimpl")
        return

    def taker(entries: list[Entry], problem_of: Callable[[object, Plugin], str | None]) -> Any:
        def register(name: str, target: str, *, description: str = "", contract: int = 1) -> None:
            problem = problem_of(name, plugin) or _unusable(name, target, contract, entries)
            if problem:
                plugin.refused[str(name)] = problem
                plugin.fail(problem)
            else:
                entries.append(Entry(name, target, plugin.distribution, plugin.version, str(description or "")))

        return register

    calls = {
        "rdm_register_rewards": taker(plugin.rewards, _bad_reward_name),
        "rdm_register_models": taker(plugin.models, _bad_pipeline_name),
    }
    for hook, register in calls.items():
        try:
            getattr(manager.hook, hook)(register=register)
        except Exception as error:
            plugin.fail(f"its hook {hook} raised {said(error)}", error)


def _explain(error: pluggy.PluginValidationError, known: list[str]) -> str:
    """Say in the reader's terms why pluggy refused a plugin."""
    text = " ".join(str(error).split())
    unknown = re.search(r"unknown hook '(\w+)'", text)
    if unknown:
        return (
            f"it implements the hook {unknown[1]!r}, which rdm-sdk {__version__} does not have."
            f"{nearest(unknown[1], known)} It is misspelt, or the plugin needs a newer rdm-sdk"
        )
    future = re.search(r"hook '(\w+)'.*?hookimpl definition: (.*?) Argument\(s\) (\{.*?\})", text)
    if future:
        return (
            f"its hook {future[1]!r} asks for {future[3]}, which rdm-sdk {__version__} does not give (it "
            f"gives: {', '.join(hookspecs.ARGUMENTS[future[1]])}); it is misspelt, or the plugin needs a newer rdm-sdk"
        )
    return f"pluggy refuses it: {text}"


def _bad_reward_name(name: object, plugin: Plugin) -> str | None:
    if not isinstance(name, str) or not re.fullmatch(hookspecs.REWARD_NAME, name, re.ASCII):
        return f"it registers a reward named {name!r}; names are written 'owner/name' in letters, digits, '-' and '_'"
    if "/" not in name and plugin.distribution not in (BUILTIN, KNOWN_PLUGINS.get(name)):
        return f"it registers the bare name {name!r}, which is kept for the SDK's own rewards; name it 'owner/{name}'"
    return None


def _bad_pipeline_name(name: object, plugin: Plugin) -> str | None:
    if not isinstance(name, str) or not name.isidentifier():
        return f"it registers a model family for {name!r}; give the name of a pipeline class, such as 'FluxPipeline'"
    return None


def _unusable(name: str, target: object, contract: object, entries: list[Entry]) -> str | None:
    if not isinstance(target, str) or not re.fullmatch(r"[\w.]+:\w+", target):
        return f"it registers {name!r} with the target {target!r}; write 'package.module:attribute'"
    if not isinstance(contract, int) or contract > hookspecs.CONTRACT_VERSION:
        return (
            f"it registers {name!r} for version {contract!r} of the contract, and rdm-sdk {__version__} has "
            f"version {hookspecs.CONTRACT_VERSION}; upgrade rdm-sdk"
        )
    if name in [entry.name for entry in entries]:
        return f"it registers {name!r} twice"
    return None


def _imported(entry: Entry, what: str, kind: type[RDMError]) -> Any:
    module, _, attribute = entry.target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:
        raise kind(
            f"{what} of {entry.distribution} cannot be imported from {entry.target!r}: {said(error)}. Repair or "
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
    installed = {_distribution(point) for point in points}
    only, without = _names(environment.get(ONLY, "")), _names(environment.get(WITHOUT, ""))
    missing = sorted(only - {"none"} - installed)
    if missing:
        raise ConfigError(
            f"{ONLY} names {missing[0]!r}, and no plugin of that distribution is installed."
            f"{nearest(missing[0], installed)} Installed: {', '.join(sorted(installed)) or 'none'}"
        )
    for name in sorted(without - installed):
        warnings.warn(
            f"{WITHOUT} names {name!r}, and no plugin of that distribution is installed.{nearest(name, installed)}",
            PluginWarning,
            stacklevel=3,
        )
    kept = installed if not only else only - {"none"}
    return [point for point in points if _distribution(point) in kept - without]


def _names(text: str) -> set[str]:
    return {_normalized(part) for part in text.split(",") if part.strip()}


def _distribution(point: EntryPoint) -> str:
    # A damaged installation may have entry points and no name.
    return _normalized(point.dist.name or "?") if point.dist is not None else "?"


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _is_home(plugin: Plugin, name: str) -> bool:
    """Whether a plugin is the likely home of a reward that it did not come to register."""
    owner, slash, _ = name.partition("/")
    if not slash:
        return KNOWN_PLUGINS.get(name) == plugin.distribution
    return _normalized(owner) in (plugin.name.lower(), *plugin.distribution.split("-"), plugin.distribution)


def _suspects(broken: list[Plugin]) -> str:
    if not broken:
        return ""
    return f". Broken plugins, which may hold it: {', '.join(plugin.key for plugin in broken)} (see 'rdm-sdk plugins')"


def _missing_spaces(name: str, known: Iterable[str]) -> str:
    return " Put spaces around a minus." if "-" in name and name.partition("-")[0] in known else ""
