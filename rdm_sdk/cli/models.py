"""`rdm-sdk models list`: the pipelines that can be distilled. It imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from rdm_sdk.cli.console import Parser, print_table
from rdm_sdk.plugins.registry import registry

HELP = "list model families"


def run(arguments: Sequence[str]) -> int:
    """List the families."""
    parser = Parser(prog="rdm-sdk models", description=HELP)
    commands = parser.add_subparsers(required=True, metavar="list")
    families = commands.add_parser("list", help="the pipeline classes that can be distilled, and who brings them")
    families.add_argument("--json", action="store_true", help="as JSON")
    families.set_defaults(run=_list)
    options = parser.parse_args(arguments)
    options.run(options)
    return 0


def _list(options: argparse.Namespace) -> None:
    found = registry().models
    if options.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found.values()], indent=2))
    else:
        print_table([(name, found[name].distribution, found[name].description) for name in sorted(found)])
