"""`rdm-sdk new-reward`: a package for a reward, with passing tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rdm_sdk.cli.console import Parser
from rdm_sdk.plugins import scaffold

HELP = "write a distribution for a reward of your own, with passing tests"


def run(arguments: Sequence[str]) -> int:
    """Write the distribution."""
    parser = Parser(prog="rdm-sdk new-reward", description=HELP)
    parser.add_argument("name", help="owner/name, such as acme/sharpness")
    parser.add_argument("--output", type=Path, default=Path(), help="the folder that it is written into")
    parser.add_argument(
        "--remote",
        action="store_true",
        help="made to be served: its users ask a server ('rdm-sdk serve'), and need the SDK alone",
    )
    options = parser.parse_args(arguments)
    folder = scaffold.new_reward(options.name, options.output, options.remote)
    print(f"wrote {folder}; next: cd {folder} && pip install -e '.[dev]' && pytest")
    return 0
