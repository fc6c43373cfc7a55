"""`rdm-sdk demo`: distill the embedded digits teacher and compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rdm_sdk.cli.console import SEED, Parser, check_folder, whole_number
from rdm_sdk.errors import ConfigError

HELP = "distill the embedded digits teacher and compare, in about four minutes"


def run(arguments: Sequence[str]) -> int:
    """Run the demo."""
    parser = Parser(prog="rdm-sdk demo", description=HELP)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="the folder that it is written into")
    parser.add_argument("--steps", type=whole_number(1), default=None, help="optimizer steps of the student")
    parser.add_argument("--samples", type=int, default=1000, help="images per row of the table, a multiple of 10")
    parser.add_argument("--seed", type=SEED, default=0, help="of training and of the noise")
    options = parser.parse_args(arguments)
    if options.samples < 100 or options.samples % 10:
        raise ConfigError(f"--samples must be a multiple of 10, at least 100; got {options.samples}")
    check_folder("--output", options.output)
    from rdm_sdk.digits.demo import run_demo

    given = {} if options.steps is None else {"steps": options.steps}
    run_demo(options.output, num_samples=options.samples, seed=options.seed, **given)
    return 0
