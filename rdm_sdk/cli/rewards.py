"""The command line for plugins and their authors: `rdm-sdk rewards`, `models`, `plugins`, `new-reward`.

Listing imports no torch; `info` imports the one reward that is asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdm_sdk.plugins.records import KNOWN_PLUGINS, Plugin
from rdm_sdk.plugins.registry import PluginWarning, discover, registry, strict


def add_commands(commands: Any) -> None:
    """Add the subcommands to the parser's subparsers; each sets `run` to the function that does it."""
    rewards = commands.add_parser("rewards", help="list, explain or check rewards").add_subparsers(required=True)
    listed = rewards.add_parser("list", help="all rewards that can be named in a spec")
    listed.add_argument("--json", action="store_true", help="as JSON")
    listed.set_defaults(run=list_rewards)
    info = rewards.add_parser("info", help="what a reward measures, declares and takes")
    info.add_argument("name")
    info.set_defaults(run=show_reward)
    check = rewards.add_parser("check", help="run the contract kit on a reward; exit status 1 if a check fails")
    check.add_argument("spec", help="a name, or a spec with options such as 'acme/sharpness[radius=3]'")
    check.set_defaults(run=check_reward)
    models = commands.add_parser("models", help="list model families").add_subparsers(required=True)
    families = models.add_parser("list", help="the pipeline classes that can be distilled, and who brings them")
    families.add_argument("--json", action="store_true", help="as JSON")
    families.set_defaults(run=list_models)
    plugins = commands.add_parser("plugins", help="installed plugins: distribution, version, hooks, faults")
    plugins.add_argument("--json", action="store_true", help="as JSON")
    plugins.set_defaults(run=show_plugins)
    new = commands.add_parser("new-reward", help="write a distribution for a reward of your own, with passing tests")
    new.add_argument("name", help="owner/name, such as acme/sharpness")
    new.add_argument("--output", type=Path, default=Path(), help="the folder that it is written into")
    new.set_defaults(run=new_reward)


def list_rewards(options: argparse.Namespace) -> int:
    found = registry().rewards
    missing = {name: package for name, package in KNOWN_PLUGINS.items() if name not in found}
    if options.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found.values()], indent=2))
        return 0
    _print_table([(name, found[name].distribution, found[name].description) for name in sorted(found)])
    if missing:
        print("\nnot installed:")
        _print_table([(name, f"pip install {package}") for name, package in sorted(missing.items())])
    return 0


def list_models(options: argparse.Namespace) -> int:
    found = registry().models
    if options.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found.values()], indent=2))
        return 0
    _print_table([(name, found[name].distribution, found[name].description) for name in sorted(found)])
    return 0


def show_reward(options: argparse.Namespace) -> int:
    from rdm_sdk.rewards.spec import parse_spec

    name = parse_spec(options.name)[0].name  # options and a variant may be written along
    entry, target = registry().find(name), registry().load(name)
    print(f"{entry.name}  ({entry.distribution}, {entry.target})\n")
    print(inspect.cleandoc(target.__doc__ or entry.description or "no description"))
    capabilities = getattr(target, "capabilities", None)
    if capabilities is None:
        print("\na plain function: scored, not differentiated; takes no options")
        return 0
    declared = [(f.name, str(getattr(capabilities, f.name))) for f in dataclasses.fields(capabilities)]
    print("\ndeclares:")
    _print_table([(name, value) for name, value in declared if value not in ("None", "()", "False")])
    fields = target.Config.model_fields
    print("\noptions:" if fields else "\noptions: none")
    _print_table(
        [
            (
                name,
                _type_name(field.annotation),
                "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}",
                " ".join((field.description or "").split()),
            )
            for name, field in fields.items()
        ]
    )
    return 0


def check_reward(options: argparse.Namespace) -> int:
    from rdm_sdk.testing import run_reward_checks

    results = run_reward_checks(options.spec)
    _print_table([(result.name, result.status, result.message) for result in results])
    failed = sum(result.status == "failed" for result in results)
    print(f"\n{options.spec}: {'keeps the contract' if not failed else f'{failed} checks failed'}")
    return 1 if failed else 0


def show_plugins(options: argparse.Namespace) -> int:
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
    _print_table(rows)
    for plugin in plugins:
        for failure in plugin.failures:
            print(f"\nFAULT in {plugin.key} ({plugin.version}): {failure}")
    return 1 if strict() and any(plugin.failures for plugin in plugins) else 0


def new_reward(options: argparse.Namespace) -> int:
    from rdm_sdk.plugins.scaffold import new_reward

    folder = new_reward(options.name, options.output)
    print(f"wrote {folder}; next: cd {folder} && pip install -e '.[dev]' && pytest")
    return 0


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if type(annotation) is type else str(annotation).replace("typing.", "")


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


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
