"""Loading plugins, and taking what they register, so that no plugin can take down another.

pluggy's own entry-point loader stops at the first plugin that fails to import and silently skips a second entry point
of one name. So entry points are loaded one at a time here, each into a plugin manager that has nothing else in it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any

import pluggy

from rdm_sdk._version import __version__
from rdm_sdk.errors import described, nearest
from rdm_sdk.plugins import hookspecs
from rdm_sdk.plugins.records import BUILTIN, KNOWN_PLUGINS, Entry, Plugin, normalized

BUILTIN_MODULES = {"rewards": "rdm_sdk.rewards.builtin", "models": "rdm_sdk.families.builtin"}


def load_plugins(points: Iterable[EntryPoint]) -> list[Plugin]:
    """Load the SDK's own plugins, then the given entry points, in the order of their distributions' names.

    Whatever is wrong with a plugin stands in its `failures`.
    """
    plugins = []
    for name, module in BUILTIN_MODULES.items():
        builtin = Plugin(name, BUILTIN, __version__, module)
        _load(builtin, partial(import_module, module))
        plugins.append(builtin)
    for point in sorted(points, key=lambda point: (distribution_of(point), point.name)):
        version = (point.dist.version if point.dist is not None else None) or "?"
        plugin = Plugin(point.name, distribution_of(point), version, point.value)
        _load(plugin, point.load)
        plugins.append(plugin)
    return plugins


def _load(plugin: Plugin, load: Any) -> None:
    """Load one plugin and run its hooks; whatever goes wrong stays with the plugin."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    known = [name for name in vars(hookspecs) if name.startswith("rdm_")]
    try:
        module = load()
    except (Exception, SystemExit) as error:
        plugin.fail(f"it cannot be imported: {described(error)}", error)
        return
    try:
        manager.register(module, plugin.key)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        plugin.fail(_explain(error, known), error)
        return
    plugin.hooks = [caller.name for caller in manager.get_hookcallers(module) or []]
    if not plugin.hooks and getattr(module, "__name__", "") in known:
        plugin.fail(f"its entry point {plugin.module!r} is the hook itself; name the module that holds it")
        return
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
        except (Exception, SystemExit) as error:
            plugin.fail(f"its hook {hook} raised {described(error)}", error)


def _explain(error: pluggy.PluginValidationError, known: list[str]) -> str:
    """Return, in the reader's terms, why pluggy refused a plugin."""
    text = " ".join(str(error).split())
    unknown = re.search(r"unknown hook '(\w+)'", text)
    if unknown:
        return (
            f"it implements the hook {unknown[1]!r}, which rdm-sdk {__version__} does not have."
            f"{nearest(unknown[1], known)} It is misspelt, or the plugin needs a newer rdm-sdk"
        )
    future = re.search(r"hook '(\w+)'.*?hookimpl definition: (.*?) Argument\(s\) (\{.*?\})", text)
    if future:
        given = inspect.signature(getattr(hookspecs, future[1])).parameters
        return (
            f"its hook {future[1]!r} asks for {future[3]}, which rdm-sdk {__version__} does not give (it "
            f"gives: {', '.join(given)}); it is misspelt, or the plugin needs a newer rdm-sdk"
        )
    return f"pluggy refuses it: {text}"


def _bad_reward_name(name: object, plugin: Plugin) -> str | None:
    if not isinstance(name, str) or not re.fullmatch(hookspecs.REWARD_NAME, name, re.ASCII):
        return (
            f"it registers a reward named {name!r}; names are written 'owner/name', each beginning with a letter and "
            "going on with letters, digits and '_', or '-' before a letter"
        )
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


def distribution_of(point: EntryPoint) -> str:
    """Return the normalized name of an entry point's distribution, or "?"."""
    # A damaged installation may have entry points and no name.
    return normalized(point.dist.name or "?") if point.dist is not None else "?"
