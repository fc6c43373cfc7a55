"""The file of a run's settings beside its checkpoints repeats the run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, Features, Value
from digit_runs import Bright, pictures, weights_of
from peft import LoraConfig
from tiny_pipelines import tiny_sd3
from torch import Tensor

from rdm_sdk import RDMTrainer
from rdm_sdk.cli.run_arguments import Run, parse_run
from rdm_sdk.rewards.dm import DistributionMatching
from rdm_sdk.training.data import load_prompts
from rdm_sdk.training.run_file import write_run_file

Make = Callable[..., RDMTrainer]
PROMPTS = ["a zero", 'a "one", é\nin two lines']


def read(path: Path) -> Run:
    """Return the run that the command line makes of a file."""
    return parse_run("train", "", ["--config", str(path)])[0]


def made_of(run: Run) -> RDMTrainer:
    """Return the trainer that `rdm-sdk train` makes of a run."""
    run.check()
    student, critic = run.loras
    return RDMTrainer(
        run.model, run.arguments.rewards, run.config, run.prompts, peft_config=student, fake_peft_config=critic
    )


def assert_same_weights(ours: RDMTrainer, theirs: RDMTrainer) -> None:
    """Compare what two runs begin with: the trained layers, by name, and their weights."""
    assert weights_of(ours).keys() == weights_of(theirs).keys()
    assert all(torch.equal(tensor, weights_of(theirs)[name]) for name, tensor in weights_of(ours).items())


@pytest.mark.parametrize(
    ("rewards", "settings", "lora"),
    [
        ("dm", {}, LoraConfig(r=16, lora_alpha=16)),
        (
            "dm + 0.5*jpeg[quality=80] - 0.25*legibility",
            {
                "learning_rate": 3e-5,
                "lr_scheduler_type": "cosine",
                "resolutions": ["32x32", "16x32"],
                "weighting": "fixed[cold_start=2]",
                "reward_route": "tilt[jpeg=advantage]",
                "reward_weights": [1.0, 0.5, 2.0],
                "num_iterations": 2,
                "optim": "rmsprop",
                "optim_args": "alpha=0.9",
                "seed": 7,
                "max_grad_norm": 0.5,
                "activation_checkpointing": True,
                "save_strategy": "steps",
                "save_steps": 3,
            },
            LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"]),
        ),
    ],
)
def test_it_makes_the_same_run(
    rewards: str, settings: dict[str, Any], lora: LoraConfig, make_trainer: Make, tmp_path: Path
) -> None:
    """Every setting, the rewards at their weights, the adapters, the base and the prompts in their order."""
    trainer = make_trainer(tmp_path, rewards, PROMPTS, peft_config=lora, **settings)
    run = read(write_run_file(trainer, tmp_path))
    ours, theirs = trainer.args.to_dict(), run.config.to_dict()
    assert {n for n in ours if ours[n] != theirs[n]} - {"reward_weights"} == set()
    made = made_of(run)
    assert [(r.term, r.weight, r.route) for r in made.rewards] == [(r.term, r.weight, r.route) for r in trainer.rewards]
    assert made.family.fingerprint() == trainer.family.fingerprint()
    for role in trainer.roles.trainable_roles:
        assert made.roles.describe(role) == trainer.roles.describe(role)
        assert made.roles.lora_config(role).target_modules == trainer.roles.lora_config(role).target_modules
    assert_same_weights(trainer, made)
    assert load_prompts(run.prompts)["prompt"] == trainer.train_dataset["prompt"]
    assert "Missing" not in (tmp_path / "run.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "adapters"),
    [({}, 0), ({"critic_weights": "full"}, 0), ({"student_weights": "full"}, 1)],
    ids=["adapters", "a critic in full", "a student in full"],
)
def test_a_run_from_a_student_is_the_same(
    settings: dict[str, Any], adapters: int, make_trainer: Make, tmp_path: Path
) -> None:
    """The student's adapters are those of `start_from`, beside which the command takes no others."""
    lora = None if settings.get("student_weights") else LoraConfig(r=4, lora_alpha=8, target_modules=r".*attn\.to_[qk]")
    make_trainer(tmp_path, peft_config=lora, **settings).save_model(str(tmp_path / "student"))
    given = LoraConfig(r=2, lora_alpha=2) if adapters else None  # of the critic, where there is nothing to inherit
    trainer = make_trainer(
        tmp_path, "dm", PROMPTS, start_from=str(tmp_path / "student"), fake_peft_config=given, **settings
    )
    path = write_run_file(trainer, tmp_path)
    assert path.read_text(encoding="utf-8").count("lora_r: ") == adapters
    assert "Missing" not in path.read_text(encoding="utf-8")
    assert_same_weights(trainer, made_of(read(path)))


def test_adapters_of_a_critic_that_differ_from_a_given_student_are_missing(make_trainer: Make, tmp_path: Path) -> None:
    """The command gives critics the adapters of `start_from`."""
    make_trainer(tmp_path, peft_config=LoraConfig(r=4, lora_alpha=8)).save_model(str(tmp_path / "student"))
    own = {"start_from": str(tmp_path / "student"), "fake_peft_config": LoraConfig(r=2, lora_alpha=2)}
    text = write_run_file(make_trainer(tmp_path, **own), tmp_path).read_text(encoding="utf-8")
    assert "# - LoRA settings of 'fake': rank 2, alpha 2" in text
    assert "LoRA settings of 'student'" not in text


def test_layers_that_a_regular_expression_names(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Are written by their names, which the command reads; where names would say others too, they are missing."""
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=r".*attn\.to_[qk]")
    trainer = make_trainer(tmp_path, "dm", PROMPTS, peft_config=lora)
    path = write_run_file(trainer, tmp_path)
    targets = yaml.safe_load(path.read_text(encoding="utf-8"))["lora_target_modules"]
    assert targets == [f"transformer_blocks.0.attn.to_{which}" for which in "kq"]
    assert "Missing" not in path.read_text(encoding="utf-8")
    assert_same_weights(trainer, made_of(read(path)))
    monkeypatch.setattr("rdm_sdk.training.run_file.names_of_adapted", lambda *_: None)
    text = write_run_file(trainer, tmp_path).read_text(encoding="utf-8")
    assert "# - lora_target_modules, which names alone cannot say: '.*attn" in text
    assert "lora_target_modules" not in yaml.safe_load(text)
    assert "LoRA settings of" not in text


def test_a_base_in_memory_is_missing(make_trainer: Make, tmp_path: Path) -> None:
    """The name of its class would be taken for a hub id."""
    settings: dict[str, Any] = {"model": tiny_sd3(), "max_sequence_length": None}
    text = write_run_file(make_trainer(tmp_path / "run", **settings), tmp_path).read_text(encoding="utf-8")
    assert "# - the base, a StableDiffusion3Pipeline that was put together or changed in memory: save it" in text
    assert "model" not in yaml.safe_load(text)
    tiny_sd3().save_pretrained(tmp_path / "base")
    settings["model"] = str(tmp_path / "base")
    path = write_run_file(make_trainer(tmp_path / "again", **settings), tmp_path)
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["model"] == str(tmp_path / "base")


def test_training_writes_it_without_secrets(make_trainer: Make, tmp_path: Path) -> None:
    """And names each thing that a file cannot hold."""
    trainer = make_trainer(
        tmp_path,
        [("dm", 1.0), (Bright(), 0.0)],
        pictures(),
        hub_token="hf_secret",
        eval_dataset=["a zero"],
        peft_config=LoraConfig(r=4, lora_alpha=8, use_rslora=True),
        max_steps=1,
    )
    trainer.train()
    text = (tmp_path / "run.yaml").read_text(encoding="utf-8")
    assert "hf_secret" not in text
    for missing in ("hub_token, a secret", "'bright', an object", "evaluation", "--prompts", "rslora True"):
        assert missing in text
    assert "prompts" not in yaml.safe_load(text)
    assert not (tmp_path / "prompts.jsonl").exists()


def test_the_file_of_a_resumed_run_makes_the_run_from_its_beginning(make_trainer: Make, tmp_path: Path) -> None:
    """It would go on from the other run's checkpoint otherwise, in another folder too."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=1, **saving).train()
    place = str(tmp_path / "checkpoint-1")
    make_trainer(tmp_path, max_steps=2, resume_from_checkpoint=place, **saving).train()
    content = yaml.safe_load((tmp_path / "run.yaml").read_text(encoding="utf-8"))
    assert content["max_steps"] == 2
    assert "resume_from_checkpoint" not in content
    assert place not in (tmp_path / "checkpoint-2" / "README.md").read_text(encoding="utf-8")


KEPT: dict[str, list[Any]] = {
    **{kind: ["seven", None] for kind in ("string", "large_string")},
    **{kind: [7, None] for kind in ("int8", "int64", "uint8", "uint64")},
    **{kind: [0.5, float("inf")] for kind in ("float16", "float32", "float64")},
    "bool": [True, None],
    "null": [None, None],
}
"""Types of columns that come back from the file, with values."""
LEFT_OUT: dict[str, object] = {
    "timestamp[us]": datetime(2024, 5, 1, 12, 30),
    "date32": date(2024, 5, 1),
    "time64[us]": time(12, 30),
    "duration[us]": timedelta(minutes=5),
    "decimal128(3, 2)": Decimal("1.50"),
    "binary": b"ab",
    "List": [1, 2],
}
"""Types of columns that are no texts and numbers, with a value."""


def test_columns_of_texts_and_numbers_come_back(make_trainer: Make, tmp_path: Path) -> None:
    """As they were, whatever form the dataset hands them out in."""
    features = Features({"prompt": Value("string"), **{kind: Value(kind) for kind in KEPT}})
    plain = Dataset.from_dict({"prompt": ["a zero", "a one"], **KEPT}, features=features)
    trainer = make_trainer(tmp_path, "dm", plain.with_format("torch"))
    assert load_prompts(read(write_run_file(trainer, tmp_path)).prompts).to_dict() == plain.to_dict()
    trainer = make_trainer(tmp_path, "dm", plain.with_transform(lambda rows: {"prompt": rows["prompt"]}))
    text = write_run_file(trainer, tmp_path).read_text(encoding="utf-8")
    assert "# - prompts (a transform makes them): give the file with --prompts" in text


def test_columns_of_other_types_stop_no_run(make_trainer: Make, tmp_path: Path) -> None:
    """They are named, as pictures are."""
    for kind, value in LEFT_OUT.items():
        prompts = Dataset.from_dict({"prompt": ["a zero", "a one"], "made": [value, None]})
        make_trainer(tmp_path, "dm", prompts, max_steps=1).train()
        text = (tmp_path / "run.yaml").read_text(encoding="utf-8")
        assert f"# - prompts (no text or number: the column 'made' of type {kind}): give the file with" in text
        assert "prompts" not in yaml.safe_load(text)


def test_an_object_is_not_taken_for_the_reward_of_its_name(make_trainer: Make, tmp_path: Path) -> None:
    """Neither a subclass nor a function: the file would repeat another run."""

    class Mine(DistributionMatching):
        pass

    def legibility(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))

    text = write_run_file(make_trainer(tmp_path, [Mine(), (legibility, 0.1)]), tmp_path).read_text(encoding="utf-8")
    for name in ("dm", "legibility"):
        assert f"the reward {name!r}, an object in Python" in text
    text = write_run_file(make_trainer(tmp_path, [("dm", 1.0), ("legibility", 0.1)]), tmp_path).read_text("utf-8")
    assert "an object in Python" not in text
