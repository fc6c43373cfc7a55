"""`rdm-sdk rewards`: list, explain or check rewards.

Listing imports no torch; `info` imports the one reward that is asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from collections.abc import Sequence
from typing import Any

from rdm_sdk.cli.console import Parser, print_table
from rdm_sdk.plugins.records import KNOWN_PLUGINS
from rdm_sdk.plugins.registry import registry

HELP = "list, explain or check rewards"


def run(arguments: Sequence[str]) -> int:
    """List the rewards, explain one or check one; return 1 if a check fails."""
    parser = Parser(prog="rdm-sdk rewards", description=HELP)
    commands = parser.add_subparsers(required=True, metavar="list | info | check")
    listed = commands.add_parser("list", help="all rewards that can be named in a spec")
    listed.add_argument("--json", action="store_true", help="as JSON")
    listed.set_defaults(run=_list)
    info = commands.add_parser("info", help="what a reward measures, declares and takes")
    info.add_argument("name")
    info.set_defaults(run=_info)
    check = commands.add_parser("check", help="run the contract kit on a reward; exit status 1 if a check fails")
    check.add_argument("spec", help="a name, or a spec with options such as 'acme/sharpness[radius=3]'")
    check.set_defaults(run=_check)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def _list(options: argparse.Namespace) -> int:
    found = registry().rewards
    missing = {name: package for name, package in KNOWN_PLUGINS.items() if name not in found}
    if options.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found.values()], indent=2))
        return 0
    print_table([(name, found[name].distribution, found[name].description) for name in sorted(found)])
    if missing:
        print("\nnot installed:")
        print_table([(name, f"pip install {package}") for name, package in sorted(missing.items())])
    return 0


def _info(options: argparse.Namespace) -> int:
    from rdm_sdk.rewards.base import Reward, check_class
    from rdm_sdk.rewards.resolve import is_by_place, load_reward, target_of
    from rdm_sdk.rewards.spec import parse_spec

    term = parse_spec(options.name)[0]  # options and a variant may be written along
    target = target_of(term)
    is_class = isinstance(target, type) and issubclass(target, Reward)
    capabilities = None if is_class else load_reward(term).capabilities  # a plain function loads nothing
    description = ""
    if is_by_place(term):
        print(f"{term.variant}  (by its place, {term.name}:{term.variant})\n")
    else:
        entry = registry().find(term.name)
        print(f"{entry.name}  ({entry.distribution}, {entry.target})\n")
        description = entry.description
    print(inspect.cleandoc(target.__doc__ or description or "no description"))
    if capabilities is not None:
        print(f"\na plain function: {'differentiated' if capabilities.gradient != 'none' else 'only scored'}")
        _print_declared(capabilities)
        print("\noptions: none; a Reward class has some")
        return 0
    check_class(target)
    _print_declared(target.capabilities)
    fields = target.Config.model_fields
    print("\noptions:" if fields else "\noptions: none")
    print_table(
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


def _print_declared(capabilities: Any) -> None:
    declared = [(f.name, str(getattr(capabilities, f.name))) for f in dataclasses.fields(capabilities)]
    print("\ndeclares:")
    print_table([(name, value) for name, value in declared if value not in ("None", "()", "False")])


def _check(options: argparse.Namespace) -> int:
    from rdm_sdk.testing import run_reward_checks

    results = run_reward_checks(options.spec)
    print_table([(result.name, result.status, result.message) for result in results])
    failed = sum(result.status == "failed" for result in results)
    print(f"\n{options.spec}: {'keeps the contract' if not failed else f'{failed} checks failed'}")
    return 1 if failed else 0


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if type(annotation) is type else str(annotation).replace("typing.", "")
