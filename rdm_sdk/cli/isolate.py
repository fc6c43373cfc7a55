"""`rdm-sdk isolate`: an environment for a reward whose packages do not go with the run's."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rdm_sdk.cli.console import Parser, check_folder
from rdm_sdk.errors import ConfigError

HELP = "make a Python environment for isolated[...], a reward with packages of its own"


def run(arguments: Sequence[str]) -> int:
    """Make the environment, and print the spec that uses it."""
    from rdm_sdk.serving.environment import SDK, make_environment

    parser = Parser(prog="rdm-sdk isolate", description=HELP)
    parser.add_argument("name", help="the folder that is made")
    parser.add_argument("--requirements", required=True, help="such as 'rdm-reward-clip transformers==5.17'")
    parser.add_argument("--output", type=Path, default=Path(), help="where the folder is made")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that the environment is for")
    parser.add_argument("--sdk", help=f"what is installed as the SDK: a requirement or a path; by default {SDK}")
    parser.add_argument(
        "--with-host-packages", action="store_true", help="use that interpreter's packages where it has none of its own"
    )
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", options.name):
        raise ConfigError(f"{options.name!r} cannot be the name of an environment; take letters, digits, '-', '_', '.'")
    check_folder("--output", options.output)
    interpreter = make_environment(
        options.output / options.name,
        options.requirements,
        python=options.python,
        sdk=options.sdk,
        with_host_packages=options.with_host_packages,
    )
    print(f'made {options.output / options.name}; use it as isolated[python="{interpreter.absolute()}",reward="..."]')
    return 0
