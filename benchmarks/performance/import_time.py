"""What `import rdm_sdk` and `rdm-sdk --help` take, beside Python alone and `import torch`.

    python benchmarks/performance/import_time.py --turns 5

Seconds of the processor, every command in a process of its own, in turns; the median of each. The first turn, which may
write bytecode, is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import rdm_sdk": ["-c", "import rdm_sdk"],
    "rdm_sdk.RDMTrainer": ["-c", "from rdm_sdk import RDMTrainer"],
    "rdm-sdk --help": ["-m", "rdm_sdk.cli.main", "--help"],
    "rdm-sdk train --help": ["-m", "rdm_sdk.cli.main", "train", "--help"],
}


def seconds_of(arguments: list[str]) -> float:
    """Return the processor time of a run of Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    turns = [{name: seconds_of(COMMANDS[name]) for name in options.commands} for _ in range(options.turns + 1)]
    print(
        json.dumps({name: round(statistics.median(turn[name] for turn in turns[1:]), 3) for name in options.commands})
    )


if __name__ == "__main__":
    main()
