"""`rdm-sdk distance`: two folders of pictures beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rdm_sdk.cli.console import Parser, add_place, check_folder, find_device
from rdm_sdk.errors import ConfigError

HELP = "how far the pictures in a folder are from those in another: FID, KID, precision, recall"


def run(arguments: Sequence[str]) -> int:
    """Write the figures, and print them."""
    parser = Parser(prog="rdm-sdk distance", description=HELP)
    parser.add_argument("folder", type=Path, help="PNG, JPEG and WebP are read, in folders in it too")
    parser.add_argument("reference", type=Path, help="a folder of real pictures, or of another model's")
    parser.add_argument("--features", required=True, help="'dinov2', 'inception', or a hub id or path")
    parser.add_argument("--output", type=Path, default=Path("distance.json"), help="ends in .json")
    add_place(parser, dtype=False)
    options = parser.parse_args(arguments)
    if options.output.suffix.lower() != ".json":
        raise ConfigError(f"--output: {str(options.output)!r} must end in .json")
    if options.output.is_dir():
        raise ConfigError(f"--output: {options.output} is a folder; give the name of a file")
    check_folder("--output", options.output.parent)
    from rdm_sdk.evaluation.folder_distance import folder_distance

    found = folder_distance(options.folder, options.reference, options.features, device=find_device(options.device))
    print(found.table())
    for note in found.notes:
        print(f"note: {note}")
    print(f"wrote {found.save(options.output)}")
    return 0
