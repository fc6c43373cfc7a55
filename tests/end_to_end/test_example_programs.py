"""The programs under `examples/`, in a small form: a step or two, a group or two. The longer ones are slow tests."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import TINY_PIPELINES

from rdm_sdk import DataError, digits, image_grid

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ("--steps", 1, "--batch", 8)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return `run(name, *words)`: it runs an example's `main`, with a fresh `--output`, and returns that."""

    def run(name: str, *words: object) -> Path:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output", str(tmp_path), *map(str, words)])
        importlib.import_module(name).main()
        return tmp_path

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return a student's LoRA weights."""
    return load_file(folder / "pytorch_lora_weights.safetensors")


def card(folder: Path) -> str:
    """Return a student's model card."""
    return (folder / "README.md").read_text(encoding="utf-8")


def test_custom_reward(example: Any) -> None:
    """Function and class are in the run; the class's option too."""
    text = card(example("custom_reward", *SMALL) / "student")
    assert "0.2*sharpness[radius=2]" in text
    assert "0.1*ink" in text


def test_several_rewards(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with every reward's score and weight; the watched one has none."""
    example("several_rewards", *SMALL)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[-3:]] == ["legibility", "jpeg", "ink"]
    assert lines[-1].endswith("weight 0")


def test_custom_weighting(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """An untrained student is legible enough to halve the weight, which is logged."""
    example("custom_weighting", "--steps", 2, "--batch", 8)
    assert "'dm': 1.0" in capsys.readouterr().out.splitlines()[-1]
    strategy = importlib.import_module("custom_weighting").UntilReached({"a": 0.5})
    from rdm_sdk import RewardStatistics, Weighting

    assert isinstance(strategy, Weighting)
    reached = {"a": RewardStatistics(pull=1.0, score=0.6)}
    assert strategy.weigh({"dm": 1.0, "a": 0.2}, {}, 0) == {"dm": 1.0, "a": 0.2}
    assert strategy.weigh({"dm": 1.0, "a": 0.2}, reached, 1) == {"dm": 1.0, "a": 0.1}


def test_distill_then_reward(example: Any) -> None:
    """The second run's student is the first one's, moved by its own step."""
    folder = example("distill_then_reward", "--steps", 2, "--batch", 8)
    first, second = weights(folder / "distilled"), weights(folder / "rewarded")
    moved = torch.stack([(second[name] - first[name]).abs().max() for name in first]).max()
    size = torch.stack([tensor.abs().max() for name, tensor in first.items() if "lora_A" in name]).max()
    assert 0 < moved < 0.1 * size  # adapters of another start would have other A


@pytest.mark.slow
def test_full_fine_tuning(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what it takes, and leaves a whole transformer."""
    folder = example("full_fine_tuning", *SMALL)
    assert "full" in capsys.readouterr().out
    assert (folder / "student" / "transformer" / "config.json").is_file()


@pytest.mark.slow
def test_rewards_elsewhere(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server and a process are started and ended, and both rewards are the run's."""
    monkeypatch.delenv("RDM_SERVE_TOKEN", raising=False)
    folder = example("rewards_elsewhere", *SMALL, "--port", 8341)
    assert "remote" in card(folder / "student")
    assert "isolated" in card(folder / "student")


@pytest.mark.slow
def test_several_gpus(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """As one process; `test_distributed.py` runs two."""
    assert (example("several_gpus", *SMALL) / "student" / "inference.json").is_file()
    assert "1 process(es), 8 samples a step on each" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_and_report(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A table with the teacher's rows and the student's, and a page that has it."""
    folder = example("evaluate_and_report", "--steps", 3, "--batch", 8, "--samples", 70)
    assert "worth teacher steps" in capsys.readouterr().out
    assert "Teacher against student" in (folder / "report.html").read_text(encoding="utf-8")


def test_reuse_rollouts(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two steps, the second uses the first one's rollouts again."""
    example("reuse_rollouts", "--steps", 2, "--batch", 8)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "use(s)" in line]
    assert [float(row[2]) for row in rows] == [16, 8]


def test_score_pictures(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The emptier of two pictures compresses better; the file has a row for each."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32), "white").save(tmp_path / "pictures" / "empty.png")
    image_grid([("noise", torch.rand(4, 3, 32, 32))], tmp_path / "pictures" / "noise.png")
    example("score_pictures", "--output", tmp_path / "scores.csv", tmp_path / "pictures")
    assert "best: empty.png" in capsys.readouterr().out
    assert len((tmp_path / "scores.csv").read_text(encoding="utf-8").splitlines()) == 3


def test_score_pictures_without_a_score(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that a reward is not for is never the best; where it is for none, that is said."""
    (tmp_path / "rewards_of_some.py").write_text(
        "def some(images, prompts): return [None if 'a' == p else float(i.mean()) for i, p in zip(images, prompts)]\n"
        "def none(images): return [None] * len(images)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name, color in (("a", "white"), ("b", "gray"), ("c", "black")):
        Image.new("RGB", (8, 8), color).save(tmp_path / "pictures" / f"{name}.png")
    words = ["--output", tmp_path / "scores.csv", "--prompts", "names", tmp_path / "pictures"]
    example("score_pictures", *words, "--rewards", "rewards_of_some:some")
    assert "best: b.png (0.502)" in capsys.readouterr().out
    with pytest.raises(DataError, match="applies to none of the 3 images; leave it out"):
        example("score_pictures", *words, "--rewards", "rewards_of_some:none")


def test_own_loop(example: Any) -> None:
    """It trains and leaves a student."""
    state = weights(example("own_loop", *SMALL) / "student")
    assert any(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)


def test_two_dimensions(example: Any) -> None:
    """A picture that moves; and the closed form is that of the ring's density (Tweedie)."""
    folder = example("two_dimensions", "--steps", 3, "--batch", 16, "--pretraining", 20)
    with Image.open(folder / "ring.gif") as picture:
        assert picture.n_frames == 4
    module = importlib.import_module("two_dimensions")
    x_t, sigma = torch.randn(50, 2, requires_grad=True), torch.linspace(0.1, 0.9, 50)
    spread = ((1 - sigma) ** 2 * module.WIDTH**2 + sigma**2)[:, None]
    squares = (x_t[:, None] - (1 - sigma)[:, None, None] * module.CENTERS).square().sum(2)
    (score,) = torch.autograd.grad((-0.5 * squares / spread).logsumexp(1).sum(), x_t)
    tweedie = (x_t + sigma[:, None] ** 2 * score) / (1 - sigma)[:, None]
    torch.testing.assert_close(module.teacher(x_t, sigma), tweedie, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_dimensions_is_matched(example: Any) -> None:
    """At its full size the student comes to stand on the ring: most points within three deviations of a mode."""
    module = importlib.import_module("two_dimensions")
    torch.manual_seed(0)
    models = module.RingModels(module.pretrained(2000))

    def share() -> float:
        with torch.no_grad():
            points = module.sample(models.networks["student"], torch.randn(2000, 2), module.POLICY.inference())
        return float((torch.cdist(points, module.CENTERS).min(1).values < 3 * module.WIDTH).float().mean())

    before = share()
    module.distill(models, 600, 256, 1000)
    assert share() > max(0.9, before)


BASES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*BASES, "FluxPipeline", "QwenImagePipeline"])
def test_text_to_image(example: Any, kind: str, tmp_path: Path) -> None:
    """Tiny pipelines of the classes that the docstring names, with a scored reward beside `dm`."""
    TINY_PIPELINES[kind]().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo boats\n", encoding="utf-8")
    words = ["--model", tmp_path / "base", "--prompts", tmp_path / "prompts.txt", "--rewards", "dm + 0.1*jpeg"]
    folder = example("text_to_image", *words, "--steps", 1, "--batch", 4, "--resolution", "32x32")
    call = json.loads((folder / "student" / "inference.json").read_text(encoding="utf-8"))
    assert (call["num_inference_steps"], call["height"]) == (4, 32)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells run in order, with fewer steps; none has a stored output."""
    notebook = json.loads((EXAMPLES / "first_distillation.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    source = "\n".join("".join(cell["source"]) for cell in cells)
    assert "STEPS, BATCH, SAMPLES = 150, 64, 10" in source
    monkeypatch.chdir(tmp_path)
    shown: list[object] = []
    exec(
        source.replace("STEPS, BATCH, SAMPLES = 150, 64, 10", "STEPS, BATCH, SAMPLES = 2, 8, 1"),
        {"display": shown.append},
    )
    assert len(shown) == 2
    assert all(isinstance(each, Image.Image) for each in shown)
    assert (tmp_path / "outputs" / "student" / "inference.json").is_file()


def test_examples_have_docstrings_and_are_twelve_or_more() -> None:
    """There are twelve programs or more; each begins with what it is, and how it is run at full size."""
    programs = [path for path in EXAMPLES.glob("*.py") if path.stem != "shared"]
    assert len(programs) >= 12
    for path in programs:
        text = path.read_text(encoding="utf-8")
        assert f"examples/{path.name} " in text.split('"""')[1], path
    assert digits.prompts()
