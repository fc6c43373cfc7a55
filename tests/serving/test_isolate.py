"""Environments for isolated rewards: packages that do not go with the host's, made without a network here."""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rdm_sdk import ConfigError, RewardBatch
from rdm_sdk.cli.main import main
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.serving import environment
from rdm_sdk.serving.environment import make_environment
from rdm_sdk.serving.isolated import Isolated

JUDGE = """
import tiny_scale
import torch
from rdm_sdk import Capabilities, Reward, hookimpl

@hookimpl
def rdm_register_rewards(register):
    register("tiny/judge", "tiny_judge:Judge")

class Judge(Reward):
    capabilities = Capabilities(gradient="autograd")
    def score(self, batch):
        return tiny_scale.SCALE * batch.images.mean(dim=(1, 2, 3))
"""


def wheel(folder: Path, name: str, version: str, code: str, entry: str = "") -> None:
    """Write a wheel of one module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files |= {f"{info}/entry_points.txt": entry} if entry else {}
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of wheels, which is all that pip sees: two versions of a package, and a reward that needs the second."""
    folder = tmp_path_factory.mktemp("wheels")
    for version in ("1.0", "2.0"):
        wheel(folder, "tiny_scale", version, f"SCALE = {version}")
    wheel(folder, "tiny_judge", "0.1", JUDGE, "[rdm_sdk]\ntiny = tiny_judge\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(folder))
        yield folder


@pytest.fixture(scope="module")
def python(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the reward and the second version."""
    folder = tmp_path_factory.mktemp("envs")
    words = ["isolate", "judge", "--requirements", "tiny_judge tiny_scale==2.0", "--with-host-packages"]
    assert main([*words, "--output", str(folder)]) == 0
    return folder / "judge" / "bin" / "python"


def test_another_version_than_the_hosts(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host imports version 1.0, the reward version 2.0, in one run; scores and gradients are the reward's."""
    (tmp_path / "tiny_scale.py").write_text("SCALE = 1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # which the child must not see
    assert importlib.import_module("tiny_scale").SCALE == 1.0
    reward = resolve_rewards(f'isolated[python="{python}",reward="tiny/judge"]')[0].reward
    assert isinstance(reward, Isolated)
    images = torch.rand(2, 3, 4, 4)
    output = evaluate_reward(reward, RewardBatch.from_images(images))
    torch.testing.assert_close(output.scores, 2 * images.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(output.gradient, torch.full_like(images, 2 / 48))
    assert reward.provenance()["served"]["origin"] == "tiny-judge 0.1"  # type: ignore[index]
    reward.child.stop()


def test_what_cannot_be_installed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the folder nor what is in it."""

    def run(command: list[str], complaint: str) -> str:
        if "venv" in command:
            (tmp_path / "env" / "bin").mkdir(parents=True)
            return ""
        raise ConfigError(complaint)

    monkeypatch.setattr(environment, "_run", run)
    with pytest.raises(ConfigError, match="pip cannot install what is wanted"):
        make_environment(tmp_path / "env", "tiny_scale==3.0")
    assert list(tmp_path.iterdir()) == []


def test_the_reason_is_in_the_message() -> None:
    """The last lines of what has failed."""
    with pytest.raises(ConfigError, match="it failed: ERROR: no version / ERROR: nothing matches"):
        environment._run(
            [sys.executable, "-c", "import sys; sys.exit('x\\nERROR: no version\\nERROR: nothing matches')"],
            "it failed",
        )


def test_mistakes_are_found_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started for them."""
    monkeypatch.setattr(environment, "_run", None)
    (tmp_path / "there").mkdir()
    for folder, requirements, words in (
        ("there", "clip", "exists already; nothing was made"),
        ("env", "--index-url http://x clip", "'--index-url' is an option"),
        ("env", "'clip", "cannot be read: No closing quotation"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_environment(tmp_path / folder, requirements)
    assert not (tmp_path / "env").exists()


def test_paths_are_those_of_the_folder_where_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreter, SDK and requirements; pip and the interpreter work in another one."""
    asked: list[list[str]] = []
    monkeypatch.setattr(environment, "_run", lambda command, complaint: asked.append(command) or "")
    monkeypatch.chdir(tmp_path)
    for path in ("bin", "mine", "sdk", "clip"):
        (tmp_path / path).mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    requirements = "./mine[extra] clip git+https://host/x missing/y"
    make_environment(Path("env"), requirements, python="bin/python", sdk="./sdk[serve]")
    assert asked[0][0] == str(tmp_path / "bin" / "python")  # the link itself, which may be an environment's
    installed = asked[1][asked[1].index("--disable-pip-version-check") + 1 :]
    assert installed == [f"{tmp_path}/sdk[serve]", f"{tmp_path}/mine[extra]", "clip", "git+https://host/x", "missing/y"]


def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    """It is named, and nothing is left."""
    with pytest.raises(ConfigError, match="no environment can be made with no/python"):
        make_environment(tmp_path / "env", "clip", python="no/python")
    assert not (tmp_path / "env").exists()
