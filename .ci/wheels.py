"""Build the wheels of the SDK and of every plugin, and try them in a fresh environment outside the checkout.

    .venv/bin/python .ci/wheels.py --out dist                              # build and try; `make wheels`
    .venv/bin/python .ci/wheels.py --out dist --address https://HOST/OWNER/REPOSITORY --ref v0.1.0   # to publish
    .venv/bin/python .ci/wheels.py --out dist --borrow                     # take dependencies from this environment

A package index knows nothing of the repository that a README's relative links lead into, so they are made absolute in
what is built, from the repository's address; without one, what is built is to be tried and not to be published.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)(\[[^\]]*\])\(((?!https?:|mailto:|#)[^)\s]+)\)")


def absolute(readme: str, address: str, ref: str) -> str:
    """Return a README's Markdown with relative links and pictures leading into a repository at a tag or branch."""

    def replaced(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        return (
            f"{picture}{text}({address.rstrip('/')}/{'raw' if picture else 'blob'}/{ref}/{target.removeprefix('./')})"
        )

    return LINK.sub(replaced, readme)


def packages() -> list[Path]:
    """Return the folders of what is released, relative to the root: the SDK, then its plugins."""
    return [Path(), *sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("plugins/*/pyproject.toml"))]


def build(out: Path, address: str | None, ref: str) -> list[Path]:
    """Build a wheel of every package from a copy of the tracked files; return them."""
    with tempfile.TemporaryDirectory() as scratch:
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, tracked.split("\0")):
            target = Path(scratch) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
        for package in packages():
            folder = Path(scratch) / package
            readme = folder / "README.md"
            if address is not None:
                there = f"{ref}/{package.as_posix()}" if package != Path() else ref
                readme.write_text(absolute(readme.read_text("utf-8"), address, there), encoding="utf-8")
            command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out.resolve())]
            subprocess.run(command, cwd=folder, check=True)
    return sorted(out.glob("*.whl"))


def check(wheel: Path, ref: str | None) -> list[str]:
    """Return what is wrong with a wheel that is to be published under a tag (None: that is only tried)."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        place = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(place).decode("utf-8"))
    wrong = [] if any(".dist-info/licenses/LICENSE" in name for name in names) else ["it has no LICENSE"]
    if ref is not None:
        left = [match.group(3) for match in LINK.finditer(str(metadata.get_payload()))]
        wrong += [f"its README has a relative link: {target}" for target in left]
        if wheel.name.startswith("rdm_sdk-") and ref != f"v{metadata['Version']}":
            wrong.append(f"its version is {metadata['Version']}, and the tag {ref}")
    return [f"{wheel.name}: {each}" for each in wrong]


def install(folder: Path, wheels: list[Path], borrow: bool) -> Path:
    """Make an environment with all wheels, and return its Python; `borrow` takes what they depend on from this one."""
    venv.create(folder, with_pip=not borrow)
    python = folder / "bin" / "python"
    if borrow:
        site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", *map(str, wheels)], check=True)
        here = [path for path in sys.path if path.endswith("site-packages")]
        (site / "borrowed.pth").write_text("\n".join(here) + "\n", encoding="utf-8")
    else:
        pip = [str(python), "-m", "pip"]
        sdk = next(wheel for wheel in wheels if wheel.name.startswith("rdm_sdk-"))
        wanted = [f"{sdk}[report]", *(str(wheel) for wheel in wheels if wheel != sdk)]
        torch = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
        assert torch is not None
        subprocess.run([*pip, "install", "--quiet", torch[0], "-c", str(ROOT / "constraints.txt")], check=True)
        subprocess.run([*pip, "install", "--quiet", "-c", str(ROOT / "constraints.txt"), *wanted], check=True)
    return python


def absent(wheels: list[Path], listed: list[dict[str, Any]]) -> list[str]:
    """Return the wheels that `rdm-sdk plugins --json` does not list, or lists with failures."""
    working = {row["distribution"].replace("-", "_") for row in listed if not row["failures"]}
    return [wheel.name for wheel in wheels if wheel.name.split("-")[0] not in working]


def try_out(python: Path, folder: Path, wheels: list[Path]) -> None:
    """Load every plugin, and run quickstart, eval and report from an empty folder, with the installed wheels alone."""
    for name in ("quickstart.py",):
        shutil.copyfile(ROOT / "examples" / name, folder / name)
    command = python.parent / "rdm-sdk"
    # Nothing of the checkout may be found, whatever the caller's environment says.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: object) -> str:
        print("$", *words, flush=True)
        done = subprocess.run(list(map(str, words)), cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        done.check_returncode()
        return done.stdout

    where = Path(run(python, "-c", "import rdm_sdk; print(rdm_sdk.__file__)").strip())
    if python.parents[1] not in where.parents:
        raise SystemExit(f"not the wheel was imported, but {where}")
    listed = json.loads(run(command, "plugins", "--json"))
    if missing := absent(wheels, listed):
        raise SystemExit(f"installed together, these do not load: {', '.join(missing)}")
    run(python, "quickstart.py", "--output", "quickstart", "--steps", 2)
    student = "quickstart/student"
    figures = ("--teacher_steps", 4, "--samples", 70, "--rewards", "legibility + jpeg")
    run(command, "eval", "--model", "digits", "--student", student, *figures, "--output", "quickstart/run/eval")
    run(command, "report", "quickstart/run", "--output", "report.html")
    if not (folder / "report.html").stat().st_size > 10_000:
        raise SystemExit("the report is empty")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--address", help="of the repository, for the README's links")
    parser.add_argument("--ref", help="the tag that is published; its version must be the SDK's")
    parser.add_argument("--borrow", action="store_true", help="dependencies of this environment, not downloaded ones")
    options = parser.parse_args()
    if (options.address is None) != (options.ref is None):
        parser.error("--address and --ref belong together")
    if list(options.out.glob("*.whl")):
        parser.error(f"{options.out} has wheels already; remove them")
    wheels = build(options.out, options.address, options.ref or "")
    wrong = [each for wheel in wheels for each in check(wheel, options.ref)]
    if wrong:
        raise SystemExit("\n".join(wrong))
    with tempfile.TemporaryDirectory() as scratch:
        python = install(Path(scratch) / "environment", wheels, options.borrow)
        (Path(scratch) / "empty").mkdir()
        try_out(python, Path(scratch) / "empty", wheels)
    print(f"{len(wheels)} wheels in {options.out}, tried together")


if __name__ == "__main__":
    main()
