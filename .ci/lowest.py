"""Print constraints that hold every package at the least version that `pyproject.toml` asks for.

PyTorch is at its tested version all the same: of others only builds for CUDA can be had. What reports are drawn
with, development tools, and what packages bring themselves are as new as these allow: old Matplotlib warns of new
pyparsing, and warnings are errors in tests.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["serve"]):
        bounded = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
        if bounded and bounded[1] != "torch":
            print("==".join(bounded.groups()))
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    print(next(line for line in tested if line.startswith("torch==")))


if __name__ == "__main__":
    main()
