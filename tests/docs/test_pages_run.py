"""The tutorials and how-to pages to the letter: their commands and Python blocks run; runs are only made shorter."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rdm_sdk.cli.main import main

DOCS = Path(__file__).parents[2] / "docs"
SHORTER = {"--max_steps 150": "--max_steps 1", "--per_device_train_batch_size 64": "--per_device_train_batch_size 8"}
SHORTER |= {"--samples 1000": "--samples 70", "--log_images 50": "--log_images 1"}


def commands(page: str) -> list[list[str]]:
    """Return the commands of a page's bash blocks, shorter; the comments behind them are left out."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S))
    blocks = blocks.replace("\\\n", "")
    for long, short in SHORTER.items():
        blocks = blocks.replace(long, short)
    return [shlex.split(line, comments=True) for line in blocks.splitlines()]


def python_blocks(page: str) -> list[str]:
    """Return a page's Python blocks."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)


def run_all(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page's commands in a folder that holds the files that the page has one write."""
    for block in python_blocks(page):
        name = re.match(r"# (\w+\.py)\n", block)
        if name is not None:
            (folder / name[1]).write_text(block, encoding="utf-8")
    monkeypatch.chdir(folder)
    for program, *words in commands(page):
        assert program == "rdm-sdk"
        if words[0] == "train":
            words = [*words, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
        assert main(words) == 0, words


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_first_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an empty folder to a picture, a table and a page."""
    run_all("first-distillation.md", tmp_path, monkeypatch)
    for name in ("sevens.png", "report.html", "outputs/first/eval/eval.json", "outputs/first/student/README.md"):
        assert (tmp_path / name).is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_first_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written, checked, trained with, and its figure is in the table."""
    run_all("first-reward.md", tmp_path, monkeypatch)
    assert "ink" in (tmp_path / "outputs" / "ink" / "eval" / "table.md").read_text(encoding="utf-8")


def test_a_first_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is written (its tests are run by `test_cli.py`)."""
    run_all("first-plugin.md", tmp_path, monkeypatch)
    assert (tmp_path / "rdm-reward-acme-sharpness" / "pyproject.toml").is_file()


def test_prompts_and_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The block runs and prints what the page says."""
    (block,) = python_blocks("data.md")
    monkeypatch.chdir(tmp_path)
    exec(block.replace('output_dir="outputs"', 'output_dir="outputs", use_cpu=True, report_to="none"'), {})
    said = re.search(r"print\(.*\)  # (.*)", block)
    assert said is not None
    assert capsys.readouterr().out.strip().endswith(said[1])


def test_a_weighting_of_your_own() -> None:
    """The class of the page is a `Weighting`, and does what the page says."""
    from rdm_sdk import RewardStatistics, Weighting

    (block,) = python_blocks("several-rewards.md")
    names: dict[str, type] = {}
    exec(block, names)
    made = names["HalfOnceReached"]()
    assert isinstance(made, Weighting)
    good = {"legibility": RewardStatistics(pull=1.0, score=0.995)}
    assert made.weigh({"dm": 1.0, "legibility": 0.4}, good, 1) == {"dm": 1.0, "legibility": 0.2}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of schedulers under numpy 2
def test_merging_a_student_of_pixart(tmp_path: Path) -> None:
    """The page's lines give the student's pictures, also saved and loaded again; every other pipeline fuses its own."""
    import torch
    from diffusers import DiffusionPipeline
    from peft import LoraConfig
    from pipeline_calls import run_pipeline
    from tiny_pipelines import TINY_PIPELINES

    from rdm_sdk.families.load import load_family
    from rdm_sdk.families.roles import STUDENT
    from rdm_sdk.rewards.resolve import resolve_rewards
    from rdm_sdk.training.export import StudentInfo, load_student, save_student

    kind = "PixArtSigmaPipeline"
    assert {name for name, make in TINY_PIPELINES.items() if not hasattr(make(), "fuse_lora")} == {kind}
    family = load_family(TINY_PIPELINES[kind](), torch.float32)
    targets = list(family.lora_targets)
    family.roles.add_role(STUDENT, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    save_student(tmp_path / "student", family, StudentInfo(2, None, False, 1.0, resolve_rewards("dm"), {}))

    def pictures(pipe: Any, scheduler: Any) -> Any:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        return run_pipeline(pipe, ["a fox"], output_type="pt", **call)

    pipe, beside = TINY_PIPELINES[kind](), TINY_PIPELINES[kind]()
    call = load_student(beside, tmp_path / "student")
    expected, bare = pictures(beside, beside.scheduler), pictures(pipe, beside.scheduler)
    (block,) = [block for block in python_blocks("export.md") if "PeftModel" in block]
    exec(block, {"pipe": pipe, "folder": str(tmp_path / "student")})
    assert (bare - expected).abs().max() > 1e-2
    assert (pictures(pipe, beside.scheduler) - expected).abs().max() < 1e-5
    pipe.save_pretrained(tmp_path / "merged")
    again = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert (pictures(again, again.scheduler) - expected).abs().max() < 1e-5


def test_the_yaml_that_starts_from_a_student_is_read() -> None:
    """Its settings exist and have values that they take."""
    import yaml

    from rdm_sdk import RDMConfig

    (block,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "several-rewards.md").read_text(encoding="utf-8"), re.S)
    settings = yaml.safe_load(block)
    assert settings.pop("rewards").startswith("dm + ")
    RDMConfig(use_cpu=True, report_to="none", **settings)
