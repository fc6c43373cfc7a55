"""What a release is made of: the README as a package index shows it, what wheels must hold, and the workflow."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import readme_renderer.markdown
import yaml

ROOT = Path(__file__).parents[2]
ADDRESS = "https://host.example/owner/project"
READMES = [ROOT / "README.md", *sorted(ROOT.glob("plugins/*/README.md"))]


@pytest.fixture(scope="module")
def wheels() -> Any:
    """The script that builds and tries wheels."""
    spec = importlib.util.spec_from_file_location("wheels", ROOT / ".ci" / "wheels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_a_readme_resolves_on_a_package_index(wheels: Any, readme: Path) -> None:
    """Rendered as the index renders it, nothing is relative; and what is linked to in here exists."""
    text = readme.read_text(encoding="utf-8")
    targets = [match.group(3) for match in wheels.LINK.finditer(text)]
    assert [target for target in targets if not (readme.parent / target.split("#")[0]).exists()] == []
    shown = readme_renderer.markdown.render(wheels.absolute(text, ADDRESS, "v1"))
    assert shown is not None
    links = re.findall(r'(?:href|src)="([^"]*)"', shown)
    assert [link for link in links if not link.startswith(("http", "#"))] == []
    if readme.parent == ROOT:
        assert f"{ADDRESS}/raw/v1/docs/demo_grid.png" in links
        assert f"{ADDRESS}/blob/v1/docs/method.md" in links


def test_what_may_not_be_published_is_found(wheels: Any, tmp_path: Path) -> None:
    """No license, a relative link, a version that is not the tag's."""
    wheel = tmp_path / "rdm_sdk-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("rdm_sdk-0.1.0.dist-info/METADATA", "Name: rdm-sdk\nVersion: 0.1.0\n\n[a](docs/a.md)\n")
    found = wheels.check(wheel, "v0.2.0")
    assert len(found) == 3
    for words in ("no LICENSE", "relative link: docs/a.md", "version is 0.1.0, and the tag v0.2.0"):
        assert any(words in each for each in found)
    assert len(wheels.check(wheel, None)) == 1


def test_wheels_that_do_not_load_are_found(wheels: Any) -> None:
    """Installed together, a plugin that is not listed, or whose import failed, ends the trial."""
    built = [Path("rdm_sdk-1-py3-none-any.whl"), *(Path(f"rdm_reward_{n}-1-py3-none-any.whl") for n in "abc")]
    listed = [
        {"distribution": "rdm-sdk", "failures": []},
        {"distribution": "rdm-reward-a", "failures": []},
        {"distribution": "rdm-reward-b", "failures": ["ImportError"]},
    ]
    assert wheels.absent(built, listed) == [built[2].name, built[3].name]


def test_the_workflow_calls_the_script_and_publishes_what_it_tried(wheels: Any) -> None:
    """Every package of the repository is among what is built; publishing waits for it and keeps no token."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))["jobs"]
    assert any(".ci/wheels.py --out dist" in step.get("run", "") for step in jobs["wheels"]["steps"])
    assert jobs["publish"]["needs"] == "wheels"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    # A second tag finds plugins whose versions are published already.
    assert jobs["publish"]["steps"][-1]["with"] == {"skip-existing": True}
    assert len(wheels.packages()) == 1 + len(list(ROOT.glob("plugins/*/pyproject.toml")))
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text(encoding="utf-8"))
