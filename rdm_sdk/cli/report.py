"""`rdm-sdk report`: one HTML page about runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rdm_sdk.cli.console import Parser, check_file

HELP = "one HTML page about a run, or several: curves, pictures, evaluation, settings"


def run(arguments: Sequence[str]) -> int:
    """Write the page."""
    parser = Parser(prog="rdm-sdk report", description=HELP)
    parser.add_argument("runs", nargs="+", metavar="run", help="the output_dir of a run; several are overlaid")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page that is written")
    options = parser.parse_args(arguments)
    check_file("--output", options.output, "page")
    from rdm_sdk.evaluation.report.page import write_report

    page = write_report(options.runs, options.output)
    print(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0
