"""`rdm-sdk new-reward`: a distribution with one reward whose tests pass at once."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from string import Template

from rdm_sdk._version import __version__
from rdm_sdk.errors import ConfigError, shown
from rdm_sdk.plugins.hookspecs import REWARD_NAME

FILES = {
    "pyproject.toml.template": "pyproject.toml",
    "README.md.template": "README.md",
    "init.py.template": "$package/__init__.py",
    "reward.py.template": "$package/reward.py",
    "test.py.template": "tests/test_$module.py",
}
"""Template to the file it becomes."""
REMOTE_FILES = FILES | {
    "README_remote.md.template": "README.md",
    "init_remote.py.template": "$package/__init__.py",
    "remote.py.template": "$package/remote.py",
    "test_remote.py.template": "tests/test_$module.py",
}
"""The same of a reward that is made to be served; of two that become one file, the later counts."""
DEV = 'dev = ["pytest>=8"]'
REMOTE_EXTRAS = """# What only those who serve the reward install: add what its model needs, such as "transformers>=5".
server = ["rdm-sdk[serve]>=$minimum,<$limit"]
dev = ["pytest>=8", "$distribution[server]"]"""
MAX_LENGTH = 80
"""Characters of a new reward's name, which becomes the name of folders and files."""


def new_reward(name: str, directory: Path, remote: bool = False) -> Path:
    """Write a distribution for the reward `owner/name` into a new folder below `directory` and return the folder.

    One for a `remote` reward has it twice: itself, as `owner/name-model`, to be served, and `owner/name`, which asks
    the server.

    Raises:
        ConfigError: the name is not `owner/name`, or the folder exists already.
    """
    if not re.fullmatch(REWARD_NAME, name, re.ASCII) or "/" not in name:
        raise ConfigError(
            f"{name!r} cannot be a reward's name; write 'owner/name', each beginning with a letter and going on "
            "with letters, digits and '_', or '-' before a letter, as acme/sharpness (bare names are the SDK's own)"
        )
    if len(name) > MAX_LENGTH:
        raise ConfigError(f"a reward's name has at most {MAX_LENGTH} characters; got {len(name)}: {shown(name, 40)}")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    major, minor = __version__.split(".")[:2]
    classname = "".join(part[:1].upper() + part[1:] for part in re.split(r"[-_]", name.partition("/")[2]))
    values = {
        "name": name,
        "distribution": f"rdm-reward-{slug}",
        "package": f"rdm_reward_{slug.replace('-', '_')}",
        "module": slug.replace("-", "_"),
        "entry": slug,
        "classname": f"{classname}Reward" if keyword.iskeyword(classname) else classname,
        "minimum": f"{major}.{minor}",
        "limit": f"{major}.{int(minor) + 1}",
        "variable": slug.replace("-", "_").upper(),
    }
    values["extras"] = Template(REMOTE_EXTRAS if remote else DEV).substitute(values)
    target = directory / values["distribution"]
    if target.exists():
        raise ConfigError(f"{target} exists already; nothing was written. Remove it or choose another --output")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written into: {error}") from error
    with tempfile.TemporaryDirectory(dir=directory, prefix=".new-reward-") as scratch:
        staged = Path(scratch) / "distribution"
        for source, destination in (REMOTE_FILES if remote else FILES).items():
            text = files("rdm_sdk.plugins").joinpath("templates", "reward", source).read_text(encoding="utf-8")
            path = staged / Template(destination).substitute(values)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(text).substitute(values), encoding="utf-8")
        shutil.move(staged, target)
    return target
