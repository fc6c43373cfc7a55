"""The reference pages: all settings, up to date; all public names, each with a docstring; every page in the menu."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import recipes_page
import settings_page
import yaml

import rdm_sdk
from rdm_sdk.lazy import homes

DOCS = Path(__file__).parents[2] / "docs"
PACKAGE = Path(rdm_sdk.__file__).parent


def test_the_settings_page_is_up_to_date() -> None:
    """`python docs/settings_page.py` would write what is there."""
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page()


def test_every_setting_of_the_method_has_a_group_and_a_help_text() -> None:
    """The headings in the source of `RDMConfig` have all its fields below them, each once, and no group is empty."""
    groups = settings_page.groups(settings_page.source())
    assert [name for names in groups.values() for name in names] == settings_page.own_settings()
    assert all(groups.values())
    assert all(rdm_sdk.RDMConfig.__dataclass_fields__[name].metadata["help"] for name in settings_page.own_settings())


def test_a_field_without_a_heading_is_missed() -> None:
    """What stands above the first heading belongs to no group."""
    lines = [
        "class A:",
        "    a: int = 1",
        "    # ---- One",
        "    b: int = 1",
        "    c: int = field(",
        "        d: 1",
        "    )",
    ]
    assert settings_page.groups("\n".join(lines)) == {"One": ["b", "c"]}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_generations", "`int`: at least 1"),
        ("shift", "`float`: positive, or `None`"),
        ("max_time", "`float`: 0 <= min_time < max_time < 1"),
        ("sampler", "`renoise`, `cps`, `sde`, `ode`"),
        ("reward_weights", "`list[float]`, or `None`"),
    ],
)
def test_the_settings_page_says_what_a_value_may_be(name: str, values: str) -> None:
    """Types and choices are those of the annotations, ranges those of the rules."""
    assert settings_page.values(name) == values


def test_the_page_of_public_names_has_them_all() -> None:
    """Every name of `rdm_sdk.__all__` has one entry in docs/api.md, and nothing else has."""
    entries = re.findall(r"^::: rdm_sdk\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(entries) == sorted(rdm_sdk.__all__)


def documented(tree: ast.Module, name: str) -> bool:
    """Say whether a class or function has a docstring of its own, or an assigned name a string after it."""
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return bool(ast.get_docstring(node))
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            match following:
                case ast.Expr(ast.Constant(str())):
                    return True
    return False


@pytest.mark.parametrize("name", rdm_sdk.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    """It is what docs/api.md shows; an inherited or generated one does not count."""
    home = homes(PACKAGE / "__init__.py")[name]
    if home == "rdm_sdk":  # a module
        assert ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8")))
        return
    path = PACKAGE.parent / (home.replace(".", "/") + ".py")
    assert documented(ast.parse(path.read_text(encoding="utf-8")), name)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("class a:\n    '''Text.'''", True),
        ("class a:\n    x = 1", False),
        ("def a():\n    return 1", False),
        ("a = 1\n'''Text.'''", True),
        ("a = 1\nb = 2\n'''Text.'''", False),
    ],
)
def test_a_missing_docstring_is_found(source: str, expected: bool) -> None:
    """Also that of a name that is assigned, such as `hookimpl`."""
    assert documented(ast.parse(source), "a") is expected


def test_every_page_is_in_the_menu() -> None:
    """A page that mkdocs.yml does not name is one that nobody finds."""
    menu = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert [next(iter(entry)) for entry in menu] == ["Home", "Tutorials", "How to", "Reference", "Explanation"]
    sections = [part for entry in menu for part in entry.values()]
    pages = [page for part in sections for page in ([part] if isinstance(part, str) else map(page_of, part))]
    assert sorted(pages) == sorted(path.name for path in DOCS.glob("*.md"))


def page_of(entry: dict[str, str]) -> str:
    """Return the file of an entry of the menu."""
    (page,) = entry.values()
    return page


def test_the_recipes_page_is_up_to_date() -> None:
    """`python docs/recipes_page.py` would write what is there."""
    assert recipes_page.PAGE.read_text(encoding="utf-8") == recipes_page.page()


def test_the_examples_page_names_every_example() -> None:
    """And nothing that is not there."""
    named = set(re.findall(r"`(\w+\.(?:py|ipynb))`", (DOCS / "examples.md").read_text(encoding="utf-8")))
    folder = DOCS.parent / "examples"
    assert named == {path.name for path in folder.iterdir() if path.suffix in (".py", ".ipynb")} - {"shared.py"}
