"""The front door: what it names, and an import that costs next to nothing. (`make lint` checks the directions.)"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import rdm_sdk
import rdm_sdk.testing

ROOT = Path(rdm_sdk.__file__).parent

MODULES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def dotted(path: Path) -> str:
    """Return a file's module name below the package, such as "rewards.dm"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_the_front_door_imports_nothing_of_the_package() -> None:
    """`rdm_sdk/__init__.py` imports three small modules; what it names stands in its stub."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    at_run_time = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {a.name for n in at_run_time if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in at_run_time if isinstance(n, ast.ImportFrom) and n.module}
    assert names <= {"rdm_sdk._version", "rdm_sdk.lazy", "rdm_sdk.quiet"}


def test_import_is_light_and_fast() -> None:
    """`import rdm_sdk` loads no heavy library and takes less than 0.3 s (best of three)."""
    code = (
        "import sys, time; start = time.perf_counter(); import rdm_sdk; seconds = time.perf_counter() - start; "
        "print(seconds, *({'torch', 'transformers', 'diffusers', 'peft', 'datasets', 'numpy'} & sys.modules.keys()))"
    )
    seconds = []
    for _ in range(3):
        printed = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT.parent
        ).stdout.split()
        assert printed[1:] == []
        seconds.append(float(printed[0]))
    assert min(seconds) < 0.3


@pytest.mark.parametrize("name", rdm_sdk.__all__)
def test_every_public_name_loads(name: str) -> None:
    """Each name in `__all__` can be had, and `dir` shows it."""
    assert getattr(rdm_sdk, name) is not None
    assert name in dir(rdm_sdk)


@pytest.mark.parametrize("package", [rdm_sdk, rdm_sdk.testing], ids=lambda package: package.__name__)
def test_public_names_agree(package: ModuleType) -> None:
    """What is lazily loaded are the names that type checkers see, each from the module that they see it in."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
    tree = ast.parse(Path(str(package.__file__)).with_suffix(".pyi").read_text(encoding="utf-8"))
    assert all(isinstance(node, (ast.Expr, ast.ImportFrom)) for node in tree.body)
    typed = {a.asname: n.module for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert {name for name in typed if name != "__version__"} == set(package.__all__)
    for name in package.__all__:
        found = getattr(package, name)
        assert found is getattr(sys.modules[str(typed[name])], name)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_distribution_matching_has_no_private_door(path: Path) -> None:
    """Nothing in the package asks whether a reward is "dm": no comparison, no match case, no isinstance."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Compare, ast.MatchValue)):
            constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            assert "dm" not in constants, f"{path}:{node.lineno}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            assert "DistributionMatching" not in ast.unparse(node), f"{path}:{node.lineno}"
