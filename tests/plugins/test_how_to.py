"""Packages of strangers: from docs/write-a-reward.md and write-a-model.md, or `rdm-sdk new-reward`; installed, used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from rdm_sdk import ConfigError
from rdm_sdk.plugins.scaffold import new_reward

DOCS = Path(__file__).parents[2] / "docs"
Run = Callable[..., str]

TRAIN = """
from rdm_sdk import RDMConfig, RDMTrainer, digits
args = RDMConfig(
    output_dir="run", max_steps=1, per_device_train_batch_size=4, num_generations=2, max_sequence_length=4,
    guidance_scale=1.0, critic_steps=1, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no",
)
trainer = RDMTrainer(digits.teacher_path(), reward_funcs="{spec}", args=args, train_dataset=digits.prompts())
trainer.train()
print(sorted(key for key in trainer.state.log_history[0] if key.startswith("rewards/") and key.endswith("/mean")))
"""


FAMILY = """
import sys
sys.path.insert(0, "acme-models/tests")
from test_auraflow import tiny_auraflow
from rdm_sdk import RDMConfig, RDMTrainer
tiny_auraflow().save_pretrained("base")
args = RDMConfig(
    output_dir="models_run", max_steps=1, per_device_train_batch_size=4, num_generations=2, max_sequence_length=16,
    critic_steps=1, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no",
)
trainer = RDMTrainer("base", "dm", args, ["a red fox", "two boats"])
trainer.train()
trainer.save_model("student")
print(type(trainer.family).__name__, trainer.state.log_history[0]["loss"] > 0)
"""


def files_of_the_page(name: str) -> dict[str, str]:
    """Return the files that a page tells its reader to write: a name in backquotes, a colon, and a block of code."""
    text = (DOCS / name).read_text(encoding="utf-8")
    found = re.findall(r"^`([\w./-]+)`:.*?\n\n```\w+\n(.*?)```", text, re.M | re.S)
    return dict(found)


def runner(folder: Path) -> Run:
    """Return `run(*arguments, expect=0)`: a Python process that sees what was installed into `folder/site`."""

    def start(*arguments: str, expect: int = 0) -> str:
        path = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
        everything = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=everything, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    return start


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return the `runner` of the test's folder."""
    return runner(tmp_path)


def install(run: Run, site: Path, *folders: Path) -> None:
    """Install distributions with pip; nothing is downloaded."""
    quietly = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run("-m", "pip", "install", *quietly, "--target", str(site), *map(str, folders))


STEPS = """
import json, sys, traceback
import pytest
from rdm_sdk.cli.main import main

kinds = {"rdm-sdk": main, "pytest": pytest.main, "python": lambda words: exec(words[0], {"__name__": "__main__"})}
for name, kind, words in json.loads(sys.argv[1]):
    print(f"<<<{name}>>>", flush=True)
    try:
        status = kinds[kind](words) or 0
    except Exception:
        traceback.print_exc(file=sys.stdout)
        status = 1
    print(f"status {int(status)}", flush=True)
"""
QUIETLY = ["-q", "-p", "no:cacheprovider"]


def write_files(page: str, folder: Path) -> set[str]:
    """Write the files of a page into a folder, and return their names."""
    files = files_of_the_page(page)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return set(files)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Return a folder with three packages of strangers, installed with pip, and what each step with them printed.

    All in one process that sees them, as its imports take longer than most of the steps.
    """
    folder = tmp_path_factory.mktemp("strangers")
    start = runner(folder)
    packages = [folder / "acme-rewards", folder / "acme-models", new_reward("acme/fine-Grain_2", folder)]
    for page, package in zip(("write-a-reward.md", "write-a-model.md"), packages, strict=False):
        write_files(page, package)
    install(start, folder / "site", *packages)
    spec = "dm + 0.2*acme/ink + 0.1*acme/sharpness[radius=2]"
    steps = [
        ("rewards", "rdm-sdk", ["rewards", "list"]),
        ("info", "rdm-sdk", ["rewards", "info", "acme/sharpness"]),
        ("check", "rdm-sdk", ["rewards", "check", "acme/sharpness[radius=2]"]),
        ("rewards' tests", "pytest", [*QUIETLY, str(packages[0])]),
        ("rewards' run", "python", [TRAIN.format(spec=spec)]),
        ("models", "rdm-sdk", ["models", "list"]),
        ("models' tests", "pytest", [*QUIETLY, str(packages[1] / "tests")]),
        ("models' run", "python", [FAMILY]),
        ("new tests", "pytest", [*QUIETLY, str(packages[2])]),
        ("new info", "rdm-sdk", ["rewards", "info", "acme/fine-Grain_2"]),
    ]
    parts = re.split("<<<(.+?)>>>\n", start("-u", "-c", STEPS, json.dumps(steps)))
    return folder, dict(zip(parts[1::2], parts[2::2], strict=True))


def done(told: str) -> str:
    """Return what a step printed, which must have gone well."""
    assert re.search("^status 0$", told, re.MULTILINE), told
    return told


def test_the_page_from_an_empty_folder_to_a_run(strangers: tuple[Path, dict[str, str]]) -> None:
    """The page's own files, installed with pip, are listed, checked and trained with, without touching the SDK."""
    _, told = strangers
    assert files_of_the_page("write-a-reward.md").keys() == {
        "pyproject.toml",
        "acme_rewards/__init__.py",
        "acme_rewards/rewards.py",
        "tests/test_rewards.py",
    }
    listed = done(told["rewards"])
    assert "acme/ink" in listed
    assert "how much neighboring pixels differ" in listed
    assert "radius  int  default 1  Distance of the compared pixels." in done(told["info"])
    assert "keeps the contract" in done(told["check"])
    assert "passed" in done(told["rewards' tests"])
    means = [f"rewards/{name}/mean" for name in ("acme/ink", "acme/sharpness", "dm")]
    assert str(means) in done(told["rewards' run"])


def test_a_new_reward_passes_its_own_tests_at_once(strangers: tuple[Path, dict[str, str]]) -> None:
    """The generated distribution installs, its tests pass, and its reward can be named."""
    folder, told = strangers
    assert (folder / "rdm-reward-acme-fine-grain-2").is_dir()
    said = done(told["new tests"])
    assert re.search(r"\d+ passed", said)
    assert "failed" not in said
    assert "rdm_reward_acme_fine_grain_2.reward:FineGrain2" in done(told["new info"])


@pytest.mark.slow
def test_a_new_remote_reward_passes_its_own_tests_at_once(tmp_path: Path, run: Run) -> None:
    """Both of its rewards keep the contract, one through a real server; the thin one needs an address, and says so."""
    folder = new_reward("acme/fine-Grain_2", tmp_path, remote=True)
    install(run, tmp_path / "site", folder)
    told = run("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(folder))
    assert re.search(r"\d+ passed", told)
    assert "failed" not in told
    assert "declares no gradient" not in told  # among what was skipped
    assert "acme/fine-Grain_2-model" in run("-m", "rdm_sdk.cli.main", "rewards", "list")
    told = run("-m", "rdm_sdk.cli.main", "rewards", "check", "acme/fine-Grain_2", expect=2)
    assert "Set the environment variable ACME_FINE_GRAIN_2_URL to its address" in told


def test_what_a_remote_reward_is_made_of(tmp_path: Path) -> None:
    """The model's packages are an extra; users ask for the reward by its plain name, servers by another."""
    folder = new_reward("acme/fine-Grain_2", tmp_path, remote=True)
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    package = "rdm_reward_acme_fine_grain_2"
    assert written == {
        *("pyproject.toml", "README.md", "tests/test_acme_fine_grain_2.py"),
        *(f"{package}/{name}.py" for name in ("__init__", "remote", "reward")),
    }
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert [line.partition(">")[0] for line in project["dependencies"]] == ["rdm-sdk"]
    assert project["optional-dependencies"]["server"][0].startswith("rdm-sdk[serve]>=")
    for path in folder.rglob("*"):
        assert not path.is_file() or "$" not in path.read_text()


def test_what_is_published_of_a_new_reward_is_the_package_alone(tmp_path: Path, run: Run) -> None:
    """A run of the tutorial leaves its outputs in the folder; a source distribution must not hold them."""
    folder = new_reward("acme/sharpness", tmp_path)
    (folder / "outputs").mkdir()
    (folder / "outputs" / "prompts.jsonl").write_text("private\n", encoding="utf-8")
    build = "import os, sys; os.chdir(sys.argv[1]); from hatchling.build import build_sdist; print(build_sdist('dist'))"
    with tarfile.open(folder / "dist" / run("-c", build, str(folder)).split()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    package = {"rdm_reward_acme_sharpness/__init__.py", "rdm_reward_acme_sharpness/reward.py"}
    assert names == package | {"tests/test_acme_sharpness.py", "pyproject.toml", "README.md", "PKG-INFO"}


@pytest.mark.parametrize("name", ["sharpness", "acme/", "/x", "acme/a b", "acme/x/y", "ac.me/x", ""])
def test_unusable_names_are_refused(tmp_path: Path, name: str) -> None:
    """Nothing is written for a name that no spec could hold."""
    with pytest.raises(ConfigError, match="write 'owner/name'"):
        new_reward(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_name_as_long_as_no_file_may_be_is_refused(tmp_path: Path) -> None:
    """In the SDK's words, before the file system says it in its own."""
    with pytest.raises(ConfigError, match="at most 80 characters; got 305"):
        new_reward("acme/" + 300 * "a", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_models_example_of_the_page(tmp_path: Path) -> None:
    """The page's class with a CLIP is made, keeps its options apart and scores."""
    import torch

    from rdm_sdk.testing import check_reward, save_tiny_clip

    page = DOCS / "write-a-reward.md"
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S) if "class Score" in block]
    names: dict[str, object] = {"__name__": __name__}
    exec(compile(code, str(page), "exec", dont_inherit=True), names)
    reward = names["Score"](path=str(save_tiny_clip(tmp_path)), variant="v1")
    assert {result.status for result in check_reward(reward)} <= {"passed", "skipped"}
    assert torch.is_tensor(reward.clip.model.logit_scale)


def test_a_distribution_name_that_pip_takes(tmp_path: Path) -> None:
    """No hyphen at the end, whatever the reward's name ends in."""
    assert new_reward("acme/foo_", tmp_path).name == "rdm-reward-acme-foo"


def test_a_keyword_is_no_class_name(tmp_path: Path) -> None:
    """`you/true` becomes TrueReward."""
    folder = new_reward("you/true", tmp_path)
    assert "class TrueReward(Reward)" in (folder / "rdm_reward_you_true" / "reward.py").read_text()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    """A second call does not overwrite what the author wrote."""
    folder = new_reward("acme/sharpness", tmp_path)
    (folder / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="exists already; nothing was written"):
        new_reward("acme/sharpness", tmp_path)
    assert (folder / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_family_from_the_page_to_a_run(strangers: tuple[Path, dict[str, str]]) -> None:
    """The page's own family is found by the pipeline's class, keeps the contract and trains."""
    folder, told = strangers
    assert files_of_the_page("write-a-model.md").keys() == {
        "pyproject.toml",
        "acme_models/__init__.py",
        "acme_models/auraflow.py",
        "tests/test_auraflow.py",
    }
    assert "AuraFlowPipeline" in done(told["models"])
    assert "21 passed" in done(told["models' tests"])
    assert "AuraFlowFamily True" in done(told["models' run"])
    assert "from diffusers import AuraFlowPipeline" in (folder / "student" / "README.md").read_text()


def test_every_distribution_has_its_license() -> None:
    """In its folder, and named in its pyproject.toml, so that it gets into the wheel."""
    root = DOCS.parent
    folders = [root, *sorted((root / "plugins").iterdir())]
    assert len(folders) > 10
    for folder in folders:
        assert (folder / "LICENSE").read_bytes() == (root / "LICENSE").read_bytes()
        assert 'license-files = ["LICENSE"]' in (folder / "pyproject.toml").read_text()
