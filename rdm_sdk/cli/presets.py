"""`rdm-sdk presets`: settings of known methods."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rdm_sdk.cli.console import Parser, print_table
from rdm_sdk.training.presets import PRESETS, show_preset

HELP = "settings of known methods"


def run(arguments: Sequence[str]) -> int:
    """List the presets, or show one."""
    parser = Parser(prog="rdm-sdk presets", description=HELP)
    commands = parser.add_subparsers(required=True, metavar="list | show")
    commands.add_parser("list", help="all presets").set_defaults(run=_list)
    show = commands.add_parser("show", help="a preset as YAML for 'train --config'")
    show.add_argument("name")
    show.set_defaults(run=_show)
    options = parser.parse_args(arguments)
    options.run(options)
    return 0


def _list(options: argparse.Namespace) -> None:
    print_table([(name, preset.summary) for name, preset in PRESETS.items()])


def _show(options: argparse.Namespace) -> None:
    print(show_preset(options.name))
