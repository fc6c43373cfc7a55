"""`rdm-sdk eval`: students and their teacher beside each other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdm_sdk.cli.console import PROMPTS_MISSING, SEED, Parser, add_place, check_folder, find_device, whole_number
from rdm_sdk.errors import ConfigError, DataError

HELP = "evaluate students beside their teacher: distances, diversity, rewards, and what they are worth"
CALL = ("height", "width", "max_sequence_length")


def run(arguments: Sequence[str]) -> int:
    """Evaluate, write `eval.json`, and print the table."""
    options = _parser().parse_args(arguments)
    check_folder("--output", options.output)
    if options.prompts is None and options.model != "digits":
        raise ConfigError(PROMPTS_MISSING)
    if options.features is None and options.model != "digits":
        from rdm_sdk.evaluation.features import NAMES

        raise ConfigError(f"--features is missing: give {NAMES}")
    import torch

    from rdm_sdk import digits
    from rdm_sdk.cli.run_arguments import base_path
    from rdm_sdk.evaluation.run import evaluate
    from rdm_sdk.families.load import find_folder

    given = {name: value for name in CALL if (value := getattr(options, name)) is not None}
    if options.model == "digits" and not options.student:  # students say it themselves
        given = {"max_sequence_length": digits.TEXT_TOKENS} | given
    device = find_device(options.device)
    find_folder(base_path(options.model))
    result = evaluate(
        base_path(options.model),
        options.prompts or digits.prompts(),
        options.student,
        features=_features(options.features),
        teacher_steps=options.teacher_steps,
        steps=options.steps,
        rewards=options.rewards,
        samples=options.samples,
        reference_steps=options.reference_steps,
        reference_samples=options.reference_samples,
        real=_real(options),
        guidance_scale=options.guidance_scale,
        call=given,
        batch_size=options.batch_size,
        seed=options.seed,
        device=device,
        dtype=getattr(torch, options.dtype),
        output=options.output,
    )
    print(result.table())
    for note in result.notes:
        print(f"note: {note}")
    print(f"wrote {options.output / 'eval.json'}, with grid.png and table.md beside it")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="rdm-sdk eval", description=HELP)
    count = whole_number(1)
    parser.add_argument("--model", required=True, help="the base: a hub id, a path, or 'digits'")
    parser.add_argument("--student", action="append", default=[], help="a folder that training saved; several times")
    parser.add_argument("--prompts", help="a file of prompts: text, CSV, JSON or Parquet; not needed for 'digits'")
    parser.add_argument("--teacher_steps", type=count, nargs="+", default=[], help="the teacher beside the students")
    parser.add_argument(
        "--steps", type=count, nargs="+", default=[], help="of students that are not bound to their number of steps"
    )
    parser.add_argument("--rewards", help="which rewards to score by, such as 'clip + jpeg'")
    parser.add_argument("--samples", type=whole_number(2), default=1000, help="images per row")
    parser.add_argument("--reference_steps", type=count, default=40, help="the teacher's, for FID-SD and KID-SD")
    parser.add_argument("--reference_samples", type=whole_number(2), help="images of the reference; as --samples")
    parser.add_argument("--real", type=Path, help="a folder of real pictures of the images' size, for FID and KID")
    parser.add_argument("--features", help="'dinov2', 'inception', or a hub id or path; not needed for 'digits'")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="the teacher's, as the students were trained")
    for name in CALL:
        parser.add_argument(f"--{name}", type=count, help="as the students were trained")
    parser.add_argument("--batch_size", type=count, default=50, help="images that are sampled at a time")
    parser.add_argument("--seed", type=SEED, default=0, help="of the noise")
    add_place(parser)
    parser.add_argument("--output", type=Path, default=Path("eval"), help="a folder; what is in it is not made again")
    return parser


def _features(named: str | None) -> Any:
    """Return a source of features: the digits' classifier where none is named."""
    if named is not None:
        return named
    from rdm_sdk.digits.metrics import digit_features

    return digit_features


def _real(options: argparse.Namespace) -> Any:
    """Return real images: of a folder; the held-out scans of the digits; or None."""
    if options.real is None:
        if options.model != "digits" or options.features is not None:
            return None
        from rdm_sdk import digits

        return digits.heldout_images()
    from rdm_sdk.evaluation.folder import read_folder

    try:
        return read_folder(options.real)
    except DataError as error:
        raise DataError(f"--real: {error}") from error
