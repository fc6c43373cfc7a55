"""The command line: finds the command, and prints what went wrong in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import rdm_sdk
from rdm_sdk.cli import (
    demo,
    evaluate,
    isolate,
    models,
    new_reward,
    plan,
    plugins,
    presets,
    report,
    rewards,
    sample,
    score,
    serve,
    train,
)
from rdm_sdk.cli.console import Parser, one_line
from rdm_sdk.errors import RDMError


class Command(Protocol):
    """A module of this package: one command."""

    HELP: str

    def run(self, arguments: Sequence[str], /) -> int:
        """Run the command with the words after its name; return the exit status."""


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "train": train,
    "sample": sample,
    "eval": evaluate,
    "score": score,
    "report": report,
    "plan": plan,
    "presets": presets,
    "rewards": rewards,
    "models": models,
    "plugins": plugins,
    "new-reward": new_reward,
    "serve": serve,
    "isolate": isolate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status.

    Errors of the SDK and of the file system are printed in one line: status 2. Ctrl-C is status 130.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "" not in sys.path:
        sys.path.append("")  # a reward's place, module:function, may be a file here; nothing installed is shadowed
    parser = Parser(prog="rdm-sdk", description=str(rdm_sdk.__doc__).splitlines()[0])
    parser.add_argument("--version", action="version", version=f"rdm-sdk {rdm_sdk.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.HELP, add_help=False)
    try:
        name = parser.parse_args(arguments[:1]).command
        if name is None:
            parser.error(f"which command? One of {', '.join(COMMANDS)}")
        return COMMANDS[name].run(arguments[1:])
    except (RDMError, OSError) as error:
        print(f"rdm-sdk: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nrdm-sdk: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
