"""The command line, as a user types it."""

import pytest
import yaml
from PIL import Image

from rdm_sdk.cli.main import main


@pytest.fixture
def run_file(tmp_path):
    """A run.yaml with a small digits run."""
    settings = {
        "model": "digits",
        "output_dir": str(tmp_path / "run"),
        "max_steps": 5,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "critic_steps": 1,
        "max_sequence_length": 4,
        "guidance_scale": 1.0,
        "save_strategy": "no",
        "disable_tqdm": True,
        "lora_r": 4,
        "use_cpu": True,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_train_then_sample(run_file, tmp_path, capsys):
    """A YAML file with a flag that overrides it trains a student that `sample` then draws with."""
    assert main(["train", "--config", str(run_file), "--max_steps", "2", "--save_to", str(tmp_path / "s")]) == 0
    assert (tmp_path / "s" / "pytorch_lora_weights.safetensors").is_file()
    card = (tmp_path / "s" / "README.md").read_text()
    assert "| `max_steps` | `2` |" in card
    assert "rank 4" in card
    out = tmp_path / "sample.png"
    arguments = ["sample", "--model", "digits", "--student", str(tmp_path / "s"), "--max_sequence_length", "4"]
    assert main([*arguments, "--prompt", "a handwritten two", "--prompt", "five", "--output", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.height > 30
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["train", "--model", "digits", "--learning_rte", "1e-4"],
            "unknown setting 'learning_rte'. Did you mean 'learning_rate'?",
        ),
        (["train", "--config", "no/such.yaml"], "there is no file 'no/such.yaml'"),
        (["train", "--model", "some/model"], "--prompts is missing"),
        (["sample", "--model", "digits", "--student", "nowhere", "--prompt", "x"], "there is no folder nowhere"),
        (["demo", "--samples", "7"], "--samples must be a multiple of 10"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, said, capsys, tmp_path, monkeypatch):
    """A mistake on the command line is one clear line on standard error, before anything is trained."""
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_unknown_key_in_the_file_is_named(run_file, capsys):
    """A misspelt key in the YAML file names its nearest match."""
    run_file.write_text(run_file.read_text() + "num_generation: 4\n")
    assert main(["train", "--config", str(run_file)]) == 2
    assert "unknown setting 'num_generation'. Did you mean 'num_generations'?" in capsys.readouterr().err
