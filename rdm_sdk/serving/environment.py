"""Making the environment of an isolated reward: a virtual environment with what it needs, and the SDK to serve it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rdm_sdk._version import __version__
from rdm_sdk.errors import ConfigError

SDK = f"rdm-sdk[serve]=={__version__}"


def make_environment(
    folder: Path,
    requirements: str,
    *,
    python: str = sys.executable,
    sdk: str | None = None,
    with_host_packages: bool = False,
) -> Path:
    """Make a virtual environment, install into it, and return its interpreter; on a failure nothing is left.

    Args:
        folder: must not exist.
        requirements: as `pip install` takes them, separated by spaces; quotes as in a shell.
        python: the interpreter that the environment is for.
        sdk: what pip installs as the SDK: a requirement, or the path of a checkout or a wheel; None is this version, or
            the host's where its packages are seen.
        with_host_packages: whether it sees the packages that `python` sees, too, where it has none of its own.

    Raises:
        ConfigError: the folder exists, or something cannot be made or installed; the last line of pip is in it.
    """
    try:
        wanted = shlex.split(requirements)
    except ValueError as error:
        raise ConfigError(f"--requirements {requirements!r} cannot be read: {error}") from error
    options = [word for word in wanted if word.startswith("-")]
    if options:
        raise ConfigError(
            f"--requirements takes requirements; {options[0]!r} is an option (pip's have variables, PIP_...)"
        )
    if folder.exists():
        raise ConfigError(f"{folder} exists already; nothing was made. Remove it or choose another name")
    folder, python = folder.absolute(), _found_from_here(python)
    sdk, wanted = sdk and _found_from_here(sdk), [_found_from_here(word) for word in wanted]
    interpreter = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    try:
        _run([python, "-m", "venv", str(folder)], f"no environment can be made with {python}")
        if with_host_packages:
            places = _run([python, "-c", _PLACES], f"{python} does not say where its packages are")
            own = _run([str(interpreter), "-c", _OWN], "the environment does not say where its packages are")
            (Path(own.strip()) / "host_packages.pth").write_text(places, encoding="utf-8")
        install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        ours = [sdk] if sdk else [] if with_host_packages else [SDK]
        _run([*install, *ours, *wanted], "pip cannot install what is wanted")
        _run([str(interpreter), "-c", "import rdm_sdk.serving.server"], "the SDK cannot serve from it")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return interpreter


def _found_from_here(word: str) -> str:
    """Return a program or a requirement whose path, if it has one, is absolute: both are used in another folder.

    What has no separator is a name, as for the shell and for pip.
    """
    path, bracket, extras = word.partition("[")
    is_path = "/" in path or os.sep in path
    return f"{Path(path).absolute()}{bracket}{extras}" if is_path and Path(path).exists() else word


_PLACES = (
    "import os, sys; print(*(p for p in sys.path if os.path.isdir(p) and p != os.path.dirname(os.__file__)), sep='\\n')"
)
"""Prints where packages are imported from, those of an environment within an environment included; not Python's own."""
_OWN = "import sysconfig; print(sysconfig.get_path('purelib'))"


def _run(command: Sequence[str], complaint: str) -> str:
    """Run a command and return what it printed; raises `ConfigError` with its last line if it fails."""
    try:
        # Elsewhere, or the folder that this is called in would be the first to import from.
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tempfile.gettempdir())
    except OSError as error:
        raise ConfigError(f"{complaint}: {error}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ConfigError(f"{complaint}: {' / '.join(lines[-2:]) or f'status {done.returncode}'}")
    return done.stdout
