"""`rdm-sdk plugins`: what is installed, and what is wrong with it. It imports no torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence

from rdm_sdk.cli.console import Parser, print_table
from rdm_sdk.plugins.records import Plugin
from rdm_sdk.plugins.registry import PluginWarning, discover, strict

HELP = "installed plugins: distribution, version, hooks, faults"


def run(arguments: Sequence[str]) -> int:
    """List the plugins and their faults; return 1 if there are some and faults are errors."""
    parser = Parser(prog="rdm-sdk plugins", description=HELP)
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the faults are what is printed here
        plugins = discover().plugins
    if options.json:
        print(json.dumps([_described(plugin) for plugin in plugins], indent=2))
        return 0
    rows = [("plugin", "distribution", "version", "hooks", "brings")]
    for plugin in plugins:
        names = ", ".join(entry.name for entry in [*plugin.rewards, *plugin.models]) or "-"
        rows.append((plugin.name, plugin.distribution, plugin.version, ", ".join(plugin.hooks) or "-", names))
    print_table(rows)
    for plugin in plugins:
        for failure in plugin.failures:
            print(f"\nFAULT in {plugin.key} ({plugin.version}): {failure}")
    return 1 if strict() and any(plugin.failures for plugin in plugins) else 0


def _described(plugin: Plugin) -> dict[str, object]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "module": plugin.module,
        "hooks": plugin.hooks,
        "rewards": [entry.name for entry in plugin.rewards],
        "models": [entry.name for entry in plugin.models],
        "failures": plugin.failures,
    }
