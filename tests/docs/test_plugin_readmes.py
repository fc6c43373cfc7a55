"""The plugins' READMEs, for who has nothing else: their specs are ones that the rewards take, and they are honest."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rdm_sdk.plugins.records import KNOWN_PLUGINS
from rdm_sdk.rewards.resolve import plan_rewards

ROOT = Path(__file__).parents[2]
READMES = sorted(ROOT.glob("plugins/*/README.md"))
NAMES = {*KNOWN_PLUGINS, "dm"}
BLOCK, INLINE = re.compile(r"```python\n(.*?)```", re.S), re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PLACES = {"RDMTrainer": 1, "score_images": 0}
"""Which argument of a call is a spec."""
TOLD = (
    "No weights, no download",
    "Checked on these weights",
    r"[Nn]ot run here: the real (weights|checkpoints?)",
    r"(hub weights themselves were not|no hub weights were|neither the real heads nor .* were) run here",
)
"""How a README tells whether real weights were run."""


def specs_of(text: str) -> Iterator[str]:
    """Yield the specs that a page shows: in calls, in names that calls are given, in comments and among its words."""
    for code in BLOCK.findall(text):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and starts_with_a_name(node.value):
                yield str(node.value.value)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PLACES:
                given = node.args[PLACES[node.func.id]]
                if isinstance(given, ast.Constant):
                    yield str(given.value)
                elif isinstance(given, ast.JoinedStr):
                    yield from joined(tree, given)
        yield from re.findall(r'# or "([^"]+)"', code)
    words = BLOCK.sub("", text)
    yield from (span for span in INLINE.findall(words) if re.match(rf"({'|'.join(NAMES)})[\[:][^(]*$", span))


def starts_with_a_name(value: ast.Constant) -> bool:
    """Say whether a constant is a text that begins with a reward's name."""
    return isinstance(value.value, str) and re.match(r"[\w-]+", value.value or "-")[0] in NAMES  # type: ignore[index]


def joined(tree: ast.Module, given: ast.JoinedStr) -> Iterator[str]:
    """Yield what an f-string comes to, of the constants that the block assigns."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    names = {node.targets[0].id: node.value.value for node in assigned}  # type: ignore[attr-defined]
    yield str(eval(compile(ast.Expression(given), "README", "eval"), {}, names))


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_specs_are_taken(readme: Path) -> None:
    """Every spec parses, its rewards are there, and they take its variants and options; no weights are loaded."""
    specs = list(specs_of(readme.read_text(encoding="utf-8")))
    assert specs
    for spec in specs:
        plan_rewards(spec)


def test_specs_are_found() -> None:
    """A page's specs, wherever they stand; what is no spec is left alone."""
    page = 'As in `clip[dtype=x]`, `clip` or `hps:v2`, `a[b]`.\n```python\njudge = "vlm[a=1]"\nname = "x"\n'
    page += 'RDMTrainer(m, f"dm + {judge}")\nscore_images("jpeg", i)  # or "dm + 2*jpeg"\n```\n'
    expected = ["vlm[a=1]", "dm + vlm[a=1]", "jpeg", "dm + 2*jpeg", "clip[dtype=x]", "hps:v2"]
    assert sorted(specs_of(page)) == sorted(expected)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_what_was_checked_on_real_weights_is_said(readme: Path) -> None:
    """Whether there are weights, and whether they were run; every name that its package brings is described."""
    text = " ".join(readme.read_text(encoding="utf-8").split())
    assert any(re.search(told, text) for told in TOLD)
    for name, package in KNOWN_PLUGINS.items():
        assert package != readme.parent.name or f"`{name}" in text


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_a_block_imports_what_it_uses(readme: Path) -> None:
    """A reader of a package's page has not seen the SDK's."""
    for code in BLOCK.findall(readme.read_text(encoding="utf-8")):
        used = set(re.findall(r"\b(RDMTrainer|score_images|Dataset)\b", code))
        imported = {alias.name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom) for alias in n.names}
        assert used <= imported
