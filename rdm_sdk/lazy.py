"""Public names that load on first use; a package says them once, in the stub beside its `__init__.py`."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def homes(file: str | Path) -> dict[str, str]:
    """Return the public names of a package, each with the module that it is in; `file` is its `__init__.py`.

    The stub has a line for each: "from module import name as name".
    """
    stub = Path(file).with_suffix(".pyi").read_text(encoding="utf-8")
    return {name: module for module, name in re.findall(r"^from (\S+) import ([^_]\w*) as \2$", stub, re.MULTILINE)}


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package of this `__name__` and `__file__`."""
    home = homes(file)

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if home[name] == package:  # a module of the package itself
            return import_module(f"{package}.{name}")
        return getattr(import_module(home[name]), name)

    return load, lambda: sorted({*vars(import_module(package)), *home}), list(home)
