"""`rdm-sdk score`: score pictures on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rdm_sdk.cli.console import Parser, add_place, check_file, find_device

HELP = "score the pictures in a folder by any rewards"


def run(arguments: Sequence[str]) -> int:
    """Write the scores, and print their means."""
    parser = Parser(prog="rdm-sdk score", description=HELP)
    parser.add_argument("folder", type=Path, help="PNG, JPEG and WebP are read, in folders in it too")
    parser.add_argument("--rewards", required=True, help="which rewards, such as 'clip + jpeg'; weights mean nothing")
    parser.add_argument(
        "--prompts",
        help="a CSV or JSONL file with columns file_name and prompt, or 'names': a_red_fox_0012.png is 'a red fox'",
    )
    parser.add_argument("--output", type=Path, default=Path("scores.json"), help="ends in .json or .csv")
    add_place(parser, dtype=False)
    options = parser.parse_args(arguments)
    check_file("--output", options.output, "file")
    from rdm_sdk.evaluation.folder import check_target, score_folder
    from rdm_sdk.training.pictures import markdown_table
    from rdm_sdk.training.validation import check_writable

    check_target(options.output)
    check_writable(str(options.output.parent), "--output")
    found = score_folder(options.folder, options.rewards, options.prompts, device=find_device(options.device))
    rows = [
        [name, part["mean"], "" if part["low"] is None else f"{part['low']:.4g} to {part['high']:.4g}", part["images"]]
        for name, part in found.summaries.items()
    ]
    print(markdown_table(["reward", "mean", "95 % interval", "images"], rows))
    print(f"wrote {found.save(options.output)}")
    return 0
