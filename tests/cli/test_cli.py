"""The command line, as a user types it."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from rdm_sdk.cli import sample
from rdm_sdk.cli.main import main
from rdm_sdk.training.checkpoint import chosen, find
from rdm_sdk.training.checkpoint_folders import MANIFEST, Manifest


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
        assert picture.height > 60  # enlarged from 32
    assert "wrote" in capsys.readouterr().out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a handwritten two\nfive\n", encoding="utf-8")
    beside = ["--teacher", "2", "--prompts", str(prompts), "--samples", "2", "--files", str(tmp_path / "files")]
    assert main([*arguments, *beside, "--seed", "3", "--device", "cpu"]) == 0
    assert "wrote 8 pictures" in capsys.readouterr().out
    names = ["a_handwritten_two_0000.png", "a_handwritten_two_0001.png", "five_0002.png", "five_0003.png"]
    for place in ("s_4_steps", "teacher_2_steps"):
        assert sorted(path.name for path in (tmp_path / "files" / place).glob("*.png")) == names
        lines = (tmp_path / "files" / place / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == ["a handwritten two"] * 2 + ["five"] * 2
    (tmp_path / "s").rename(tmp_path / "teacher")
    beside_its_namesake = ["--student", str(tmp_path / "teacher"), "--teacher", "4", "--files", str(tmp_path / "both")]
    assert main(["sample", "--model", "digits", "--prompt", "five", *beside_its_namesake]) == 0
    assert len(list((tmp_path / "both").glob("*/five_0000.png"))) == 2
    (tmp_path / "teacher").rename(tmp_path / "s")
    first = (tmp_path / "files" / "s_4_steps" / names[0]).read_bytes()
    assert first != (tmp_path / "files" / "s_4_steps" / names[1]).read_bytes()
    assert main([*arguments, *beside, "--seed", "3", "--device", "cpu", "--output", str(out)]) == 0
    assert (tmp_path / "files" / "s_4_steps" / names[0]).read_bytes() == first
    with Image.open(out) as picture:
        assert picture.height > 4 * 60
    assert (
        main(
            [
                "score",
                str(tmp_path / "files" / "s_4_steps"),
                "--rewards",
                "legibility",
                "--output",
                str(tmp_path / "s.csv"),
                "--prompts",
                str(tmp_path / "files" / "s_4_steps" / "metadata.jsonl"),
            ]
        )
        == 0
    )


def test_a_row_of_the_picture_is_of_one_prompt(monkeypatch, tmp_path):
    """And of one candidate; those of a prompt are below each other."""
    rows = []
    monkeypatch.setattr("rdm_sdk.training.pictures.image_grid", lambda parts, output: rows.extend(parts))
    images = {name: start + torch.arange(4) for name, start in (("teacher", 0), ("student", 10))}
    sample._write_grid(images, ["a zero", "a one"], 2, tmp_path / "sample.png")
    assert [(label.replace("\n", ", "), row.tolist()) for label, row in rows] == [
        ("a zero, teacher", [0, 1]),
        ("a zero, student", [10, 11]),
        ("a one, teacher", [2, 3]),
        ("a one, student", [12, 13]),
    ]


def test_a_prompt_of_long_letters_names_a_file(tmp_path):
    """A letter may take four bytes, and a name has 255; that it has too many was found once all was sampled."""
    sample = ["sample", "--model", "digits", "--teacher", "1", "--max_sequence_length", "4", "--files", str(tmp_path)]
    assert main([*sample, "--prompt", "\U0001d5ee" * 80]) == 0
    assert len(list(tmp_path.glob("*_0000.png"))) == 1


def test_a_table_of_prompts_and_a_function_of_ones_own(run_file, tmp_path, monkeypatch, capsys):
    """Columns of a CSV reach a function that the spec names by its place, in the folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    name = f"mine_{tmp_path.name}".replace("-", "_")
    Path(f"{name}.py").write_text(
        "calls = []\n\ndef ink(images, wanted):\n    calls.append(wanted)\n    return [1 - i.mean() for i in images]\n"
    )
    Path("prompts.csv").write_text('prompt,wanted\n"a one, thin",1\n"a two, fat",2\n', encoding="utf-8-sig")
    rewards = ["--rewards", f"dm + 0.1*{name}:ink", "--prompts", "prompts.csv"]
    assert main(["train", "--config", str(run_file), "--max_steps", "1", "--logging_steps", "1", *rewards]) == 0
    assert sorted(importlib.import_module(name).calls[0]) == [1] * 4 + [2] * 4
    assert " | ink 0." in capsys.readouterr().out


class Seen:
    """What `rdm-sdk train` gives the trainer, in whose place it stands."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr("rdm_sdk.training.trainer.RDMTrainer", self)
        self.stop = False

    def __call__(self, model, reward_funcs, args, train_dataset, **loras):
        self.model, self.rewards, self.args, self.prompts, self.loras = model, reward_funcs, args, train_dataset, loras
        self.keeper = SimpleNamespace(records=Path(args.output_dir))
        return self

    def train(self):
        self.checkpoint = chosen(self.args.resume_from_checkpoint)
        if self.stop:
            raise KeyboardInterrupt

    def save_model(self, target):
        self.target = target


@pytest.fixture
def seen(monkeypatch):
    return Seen(monkeypatch)


def test_paths_may_begin_in_the_home(run_file, seen, tmp_path, monkeypatch):
    """A shell leaves "~" alone in a file and behind an equals sign; a folder of that name was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    checkpoint = checkpoint_in(tmp_path / "out")
    flags = ["--save_to=~/student", "--output_dir=~/out", "--resume_from_checkpoint=~/out/checkpoint-3"]
    assert main(["train", "--config", str(run_file), *flags]) == 0
    assert (seen.target, seen.args.output_dir) == (str(tmp_path / "student"), str(tmp_path / "out"))
    assert find(seen.args.resume_from_checkpoint, tmp_path / "out") == Path(checkpoint)
    assert not (tmp_path / "~").exists()


def checkpoint_in(folder):
    """Make what looks like a checkpoint."""
    made = folder / "checkpoint-3"
    made.mkdir(parents=True)
    (made / MANIFEST).write_text(Manifest("a run", 3, {}).text())
    return str(made)


@pytest.mark.parametrize("style", ["--config {}", "--config={}"])
def test_a_file_and_flags_are_the_same_settings(style, run_file, seen, tmp_path):
    """The file may follow a space or an equals sign; flags win, and may be written in all the ways that help prints."""
    flags = "--lora-r 8 --output-dir out --no_importance_sampling_correction --resolutions 32x32 64x64"
    assert main(["train", *style.format(run_file).split(), *flags.split(), "--lora_target_modules=all-linear"]) == 0
    assert (seen.args.num_generations, seen.args.max_steps, seen.args.guidance_scale) == (4, 5, 1.0)
    assert (seen.args.output_dir, seen.args.importance_sampling_correction) == ("out", False)
    assert seen.args.resolutions == ["32x32", "64x64"]
    lora = seen.loras["peft_config"]
    assert (lora.r, lora.target_modules) == (8, {"all-linear"})
    assert seen.rewards == "dm"
    assert len(seen.prompts) == 10


def test_values_of_a_file_are_what_their_flags_would_be(tmp_path, seen):
    """Numbers that YAML reads as texts, a bare `no` and `off`, words where lists are taken, and mappings."""
    lines = [
        "model: digits",
        "learning_rate: 1e-5",
        "save_strategy: no",
        "resolutions: 32x32",
        "use_cpu: true",
        "watch: off",
    ]
    lines += ["lr_scheduler_kwargs: {num_cycles: 2}", "reward_weights: [2]", "report_to: [none]", "prompts: null"]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    args = seen.args
    assert (args.learning_rate, args.save_strategy.value, args.resolutions) == (1e-5, "no", ["32x32"])
    assert args.watch == "off"
    assert (args.lr_scheduler_kwargs, args.reward_weights, args.report_to) == ({"num_cycles": 2}, [2.0], [])


def test_help_shows_defaults(capsys):
    """Those that there are."""
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("images per row (1000)", "as the students were trained (1.0)", "(float32)", "of the noise (0)"):
        assert words in shown
    assert "None" not in shown
    assert "([])" not in shown


@pytest.mark.parametrize("command", ["train", "plan"])
def test_help_prints_nothing_that_is_refused(command, capsys):
    """Every spelling that `--help` shows is one that the parser takes."""
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = set(re.findall(r"(?<![\w-])--[\w-]+", capsys.readouterr().out.partition("options:")[2]))
    assert {"--lora-r", "--no_importance_sampling_correction", "--config"} <= shown
    for flag in sorted(shown - {"--help"}):
        main([command, "--model", "./nowhere", flag, "none"])
        refused = capsys.readouterr().err
        assert "unknown setting" not in refused, flag
        assert "unrecognized arguments" not in refused, flag


@pytest.mark.parametrize("student", ["lora", "full"])
@pytest.mark.parametrize("critic", ["lora", "full"])
def test_full_weights_have_no_adapters(student, critic, seen):
    """The trainer gets a LoRA for what has adapters, and none for what is trained in full."""
    flags = ["--model", "digits", "--use_cpu", "--student_weights", student, "--critic_weights", critic]
    assert main(["train", *flags]) == 0
    ranks = {name: lora and lora.r for name, lora in seen.loras.items()}
    rank = {"lora": 16, "full": None}
    assert ranks == {"peft_config": rank[student], "fake_peft_config": rank[critic]}


@pytest.mark.parametrize("given", ["latest", "true", "checkpoint", "in the file"])
def test_a_run_is_resumed(given, seen, run_file, tmp_path):
    """By the name that transformers has for it, as a flag or in the file."""
    folder = checkpoint_in(tmp_path / "run")
    if given == "in the file":
        run_file.write_text(run_file.read_text() + "resume_from_checkpoint: true\n")
    name = {"checkpoint": folder, "in the file": None}.get(given, given)
    flags = [] if name is None else ["--resume_from_checkpoint", name]
    assert main(["train", "--config", str(run_file), *flags]) == 0
    assert seen.checkpoint == (folder if given == "checkpoint" else True)
    assert main(["train", "--config", str(run_file), "--resume_from_checkpoint", "false"]) == 0
    assert seen.checkpoint is False


@pytest.mark.parametrize("saved", [True, False])
def test_stopping_is_one_line_that_says_how_to_go_on(saved, seen, run_file, tmp_path, capsys):
    """Ctrl-C: status 130, and no traceback."""
    folder = checkpoint_in(tmp_path / "run") if saved else None
    seen.stop = True
    assert main(["train", "--config", str(run_file)]) == 130
    printed = capsys.readouterr().err.strip()
    assert printed.count("\n") == 0
    wanted = f"to go on from {folder}, add --resume_from_checkpoint latest" if saved else "before the first checkpoint"
    assert wanted in printed
