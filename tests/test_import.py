"""The import direction of the architecture, and an import that costs next to nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rdm_sdk

ROOT = Path(rdm_sdk.__file__).parent

LAYERS: list[set[str]] = [
    {"errors", "types", "hookspecs"},
    {"registry", "presets"},
    {"core"},
    {"digits"},  # the embedded data set: data and a classifier, no part of the method
    {"sampling", "rewards", "models"},
    {"objective", "weighting", "rollouts"},
    {"config", "data"},
    {"requirements"},
    {"export", "evaluation", "report", "checkpoint", "optimizers"},
    {"hosting", "monitor"},
    {"judging"},
    {"trainer", "planning"},
    {"vision"},
    {"testing", "scaffold", "demo"},
    {"cli_rewards", "cli_plan"},
    {"cli"},
]
"""Bottom first. A part imports from layers below its own and from itself, never sideways or upwards."""

LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

WITHIN: dict[str, list[set[str]]] = {
    "core": [{"noise", "losses", "draws"}, {"groups", "matching", "transitions", "tilting"}, {"importance"}],
    "rewards": [
        {"spec", "context"},
        {"base"},
        {"dm", "guidance", "adversarial", "scored", "tilt", "legibility", "callables", "evaluate"},
        {"resolve"},
        {"scoring", "builtin", "routes"},
    ],
    "vision": [{"preprocess", "weights"}, {"clip"}, {"__init__"}],
    "testing": [
        {"kit", "batches", "models", "adapter_subject"},
        {"subject", "pipelines", "adapter_checks"},
        {"checks", "adapters"},
        {"rewards"},
        {"__init__"},
    ],
    "models": [
        {"roles"},
        {"base"},
        {"flow", "ddpm"},
        {"sd", "sd3", "flux", "qwen_image", "z_image", "pixart"},
        {"sdxl", "flux2", "sana"},
        {"load", "builtin", "placement"},
    ],
    "planning": [{"footprint", "blueprint"}, {"rehearsal"}, {"phases"}, {"plan"}, {"advice"}],
    "digits": [{"__init__"}, {"classifier"}],
}
"""The same inside the packages; "__init__" imports nothing unless it is named here."""

LAZY = {("digits", "digits.classifier"), ("registry", "rewards.builtin"), ("registry", "models.builtin")}
"""Exceptions: the front of the digits opens its own back room when a function asks for tensors; the registry loads the
built-in registrations by name, as it does any plugin's."""

MODULES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def dotted(path: Path) -> str:
    """Return a file's module name below the package, such as "rewards.dm"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def resolve(module: str, name: str | None) -> str:
    """Return where an imported thing lives below the package, following the public names' lazy door."""
    if module == "rdm_sdk":
        if name is None or name.startswith("__"):
            return ""
        module = rdm_sdk._PUBLIC.get(name, f"rdm_sdk.{name}")
        return module.removeprefix("rdm_sdk.")
    below = module.removeprefix("rdm_sdk.")
    is_module = (ROOT / below.replace(".", "/") / f"{name}.py").is_file()
    return f"{below}.{name}" if is_module else below


def imports(path: Path) -> set[str]:
    """Return all that a file imports from the package: at its top, in functions, for types, and by dotted string."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {resolve(a.name, None) for a in node.names if a.name.split(".")[0] == "rdm_sdk"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            if (node.module or "").split(".")[0] == "rdm_sdk":
                found |= {resolve(node.module or "", a.name) for a in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            reference = re.fullmatch(r"rdm_sdk\.([\w.]+):\w+", node.value)
            found |= {reference[1]} if reference else set()
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rdm_sdk":
            found.add(resolve("rdm_sdk", node.attr))
    return found - {""}


def test_every_module_has_its_place() -> None:
    """A new module must be given a layer, and a layer names nothing that is gone."""
    top = {dotted(path).split(".")[0] for path in MODULES}
    assert top == LEVEL.keys()
    for package, layers in WITHIN.items():
        files = {p.stem for p in (ROOT / package).glob("*.py")}
        assert files - {"__init__"} == set().union(*layers) - {"__init__"}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_downward_only(path: Path) -> None:
    """No module imports a sibling, a layer above its own, or upward inside its package."""
    name = dotted(path)
    part, _, inner = name.partition(".")
    for target in imports(path):
        other, _, other_inner = target.partition(".")
        if other != part:
            assert LEVEL[other] < LEVEL[part], f"{name} must not import {target}"
            continue
        levels = {module: level for level, modules in enumerate(WITHIN[part]) for module in modules}
        own, theirs = levels.get(inner or "__init__", -1), levels.get(other_inner or "__init__", -1)
        assert theirs < own or (name, target) in LAZY, f"{name} must not import {target}"


def test_the_front_door_imports_nothing_of_the_package() -> None:
    """`rdm_sdk/__init__.py` imports the package's modules for type checkers only."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    at_run_time = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {a.name for n in at_run_time if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in at_run_time if isinstance(n, ast.ImportFrom) and n.module}
    assert names <= {"__future__", "importlib", "typing"}


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


def test_public_names_agree() -> None:
    """What is listed, what is lazily loaded and what type checkers see are the same names."""
    assert set(rdm_sdk.__all__) == {*rdm_sdk._PUBLIC, *rdm_sdk._SUBMODULES}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rdm_sdk.nothing  # noqa: B018
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        a.asname
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for a in node.names
    }
    assert typed == set(rdm_sdk.__all__)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_distribution_matching_has_no_private_door(path: Path) -> None:
    """Nothing in the package asks whether a reward is "dm": no comparison, no match case, no isinstance."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Compare, ast.MatchValue)):
            constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            assert "dm" not in constants, f"{path}:{node.lineno}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            assert "DistributionMatching" not in ast.unparse(node), f"{path}:{node.lineno}"
