"""Rewards of one's own, named by their place: `module:name`, in Python, YAML and on the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from rdm_sdk import Reward, RewardError, score_images
from rdm_sdk.cli.main import main
from rdm_sdk.rewards.resolve import plan_rewards, resolve_rewards

MODULE = """
import torch
from rdm_sdk import Capabilities, Reward, RewardConfig, declares

def ink(images, **columns):
    return (1 - images).mean((1, 2, 3)).tolist()

@declares(gradient="autograd", range=(0.0, 1.0))
def paper_tensor(images, wanted, **columns):
    'How light an image is.'
    return images.mean((1, 2, 3))

def paper(images, **columns):
    return images.mean((1, 2, 3)).tolist()

class Scaled(Reward):
    capabilities = Capabilities(gradient="autograd")

    class Config(RewardConfig):
        factor: float = 1.0

    def score(self, batch):
        return self.config.factor * batch.images.mean((1, 2, 3))

class Absent(Scaled):
    def __init__(self, config=None, **options):
        raise FileNotFoundError("no such file: weights.pt")

class Unmakable(Scaled):
    def __init__(self):
        pass

class Misplaced(Scaled):
    def __init__(self, factor=1.0):
        super().__init__(factor=1.0)
        self.factor = factor

def lost(images, **columns):
    raise ConnectionError

LIMIT = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a module `rewards` on the path; returns the module's name."""
    name = f"mine_{tmp_path.name}".replace("-", "_")
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "rewards.py").write_text(MODULE)
    (tmp_path / name / "broken.py").write_text("import no_such_module_at_all")
    for package, code in (
        ("raises", "1 / 0"),
        ("lacks", "import no_such_module_at_all"),
        ("exits", "raise SystemExit"),
    ):
        (tmp_path / name / package).mkdir()
        (tmp_path / name / package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield f"{name}.rewards"
    for loaded in [key for key in sys.modules if key.split(".")[0] == name]:
        del sys.modules[loaded]


def test_what_they_declare_is_shown(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By `rdm-sdk rewards info module:name`, as of registered ones; what is no reward is an error."""
    assert main(["rewards", "info", f"{module}:paper_tensor"]) == 0
    told = capsys.readouterr().out
    assert f"paper_tensor  (by its place, {module}:paper_tensor)" in told
    assert "How light an image is." in told
    assert "a plain function: differentiated" in told
    assert re.search(r"gradient +autograd", told)
    assert re.search(r"columns +\('wanted',\)", told)
    assert main(["rewards", "info", f"{module}:ink"]) == 0
    assert "a plain function: only scored" in capsys.readouterr().out
    assert main(["rewards", "info", f"{module}:Scaled"]) == 0
    assert re.search(r"factor +float +default 1.0", capsys.readouterr().out)
    assert main(["rewards", "info", f"{module}:LIMIT"]) == 2
    assert "names neither a Reward class nor a function" in capsys.readouterr().err


def test_functions_and_classes_are_found_by_their_place(module: str) -> None:
    """With weights and options as any reward; logs call them by their names."""
    images = torch.full((2, 3, 4, 4), 0.25)
    spec = f"0.5*{module}:ink + {module}:paper - {module}:Scaled[factor=2]"
    result = score_images(spec, images)
    assert {name: output.scores.tolist() for name, output in result.outputs.items()} == {
        "ink": [0.75, 0.75],
        "paper": [0.25, 0.25],
        "Scaled": [0.5, 0.5],
    }
    ink, paper, scaled = resolve_rewards(spec)
    assert (ink.weight, paper.weight, scaled.weight) == (0.5, 1.0, -1.0)
    assert ink.reward.provenance()["origin"] == module
    assert isinstance(scaled.reward, Reward)


def test_the_printed_spec_finds_them_again(module: str) -> None:
    """So that a model card and a checkpoint name what was trained with."""
    (planned,) = plan_rewards(f"2.0*{module}:Scaled[factor=3.0]")
    assert str(planned.term) == f"2.0*{module}:Scaled[factor=3.0]"
    (again,) = plan_rewards(str(planned.term))
    assert again.term == planned.term
    assert again.config.factor == 3.0


def test_two_of_a_name_are_told_apart(module: str) -> None:
    """By the whole reference, as for registered rewards."""
    labels = [planned.label for planned in plan_rewards(f"{module}:Scaled[factor=1.0] + {module}:Scaled[factor=2.0]")]
    assert labels == [f"{module}:Scaled[factor=1.0]", f"{module}:Scaled[factor=2.0]"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{module}:inc", "has no 'inc'. Did you mean 'ink'"),
        ("{package}.broken:ink", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("{package}.raises.rewards:ink", "rewards' cannot be imported: ZeroDivisionError"),
        ("{package}.lacks.rewards:ink", "rewards' cannot be imported: ModuleNotFoundError: No module named 'no_such"),
        ("{package}.exits:ink", "exits' cannot be imported: SystemExit"),
        ("{package}.exits.rewards:ink", "rewards' cannot be imported: SystemExit"),
        ("{package}.missing:ink", "unknown reward .*missing'.*module:function"),
        ("{package}.missing.further:ink", "unknown reward .*further'.*module:function"),
        ("{module}:LIMIT", "names neither a Reward class nor a function but 3; this is a mistake in the module"),
        ("{module}:ink[x=1]", "'ink' is a plain function and takes no options"),
        ("{module}:Scaled[size=1]", "reward '{module}:Scaled' has no option 'size'"),
        ("{module}:ink + {module}:ink", "two rewards have the name"),
    ],
)
def test_what_is_not_there_is_said(spec: str, words: str, module: str) -> None:
    """Before anything expensive starts."""
    with pytest.raises(RewardError, match=words.format(module=module)):
        plan_rewards(spec.format(module=module, package=module.split(".")[0]))


@pytest.mark.parametrize("name", ["Unmakable", "Misplaced"])
def test_a_class_that_takes_no_config(name: str, module: str) -> None:
    """Is told by its whole place; nor is the config handed to whatever parameter comes first."""
    with pytest.raises(RewardError, match=f"'{module}:{name}' cannot be made by its name: {name}.__init__ must"):
        resolve_rewards(f"{module}:{name}[factor=2]")


def test_an_error_of_the_system_names_the_reward(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it comes in making the reward or in scoring; commands tell errors of this kind in one line."""
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    for name, told in (
        ("Absent", "no such file: weights.pt (raised in making the reward 'Absent')"),
        ("lost", "ConnectionError (raised by the reward 'lost')"),
    ):
        words = ["score", str(tmp_path), "--rewards", f"{module}:{name}", "--output", str(tmp_path / "scores.csv")]
        assert main(words) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"rdm-sdk: {told}"


def test_a_registered_name_is_never_a_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`legibility:v2` is a variant that it does not have, whatever files lie around."""
    (tmp_path / "legibility.py").write_text("def v2(images): return []")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RewardError, match="no option 'variant'"):
        plan_rewards("legibility:v2")
