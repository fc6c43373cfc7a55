"""Print constraints that hold every package at the least version that `pyproject.toml` asks for.

PyTorch is at its tested version all the same: of others only builds for CUDA can be had. So are development tools, and
what our packages bring themselves is as new as they allow.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("serve", "report")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    for requirement in asked:
        bounded = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
        if bounded and bounded[1] != "torch":
            print("==".join(bounded.groups()))
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    print(next(line for line in tested if line.startswith("torch==")))


if __name__ == "__main__":
    main()
