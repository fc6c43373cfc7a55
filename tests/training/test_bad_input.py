"""Bad input: a clear error of the right type before any training starts (acceptance 7)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor

from rdm_sdk import (
    ConfigError,
    DataError,
    ModelError,
    RDMConfig,
    RDMError,
    RDMTrainer,
    RewardError,
    digits,
)

Make = Callable[..., RDMTrainer]


# ---- Settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [({"num_generation": 4}, "num_generations"), ({"learning_rat": 1.0}, "learning_rate"), ({"xqz": 1}, "xqz")],
)
def test_an_unknown_setting_names_the_nearest_one(setting: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    """A misspelled keyword is refused, with the setting that was probably meant."""
    with pytest.raises(ConfigError, match=rf"unknown setting '{next(iter(setting))}'") as caught:
        RDMConfig(output_dir=str(tmp_path), **setting)
    assert wanted in str(caught.value)
    assert ("Did you mean" in str(caught.value)) == (wanted != "xqz")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"per_device_train_batch_size": 10, "num_generations": 4}, "=10 .*multiple of num_generations=4"),
        ({"num_generations": 0}, "num_generations=0 .*at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 .*at least 1"),
        ({"critic_steps": -1}, "critic_steps=-1 .*0 or more"),
        ({"min_time": 0.9, "max_time": 0.1}, "0 <= min_time < max_time < 1"),
        ({"matching": "steps"}, "matching='steps' .*Did you mean 'step'"),
        ({"critic_learning_rate": -1e-4}, r"critic_learning_rate=-0\.0001 .*0 or more"),
        ({"critic_adam_beta1": 1.0}, r"critic_adam_beta1=1\.0 .*\[0, 1\)"),
        ({"critic_weight_decay": -0.1}, r"critic_weight_decay=-0\.1 .*0 or more"),
        ({"critic_lr_scheduler_type": "liner"}, "critic_lr_scheduler_type='liner' .*Did you mean 'linear'"),
        ({"ema_decay": 1.0}, r"ema_decay=1\.0 .*\[0, 1\)"),
        ({"epsilon": 0.0}, r"epsilon=0\.0 .*positive"),
        ({"shift": -1.0}, r"shift=-1\.0 .*positive"),
        ({"guidance_scale": -1.0}, r"guidance_scale=-1\.0"),
        ({"normalization": "groups"}, "normalization='groups' .*group, sample.*Did you mean 'group'"),
        ({"scale_rewards": "bach"}, "scale_rewards='bach' .*Did you mean 'batch'"),
        ({"fp16": True}, "fp16=True is not supported.*bf16=True"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(
    small_config: Callable[..., RDMConfig], tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    """The message names the setting, its value and what it must be."""
    with pytest.raises(ConfigError, match=words):
        small_config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("rewards", "settings", "words"),
    [
        ("dm", {"critic_steps": 0}, "critic_steps=0 .*untrained"),
        (["dm", len], {"num_inference_steps": 1}, "'len' acts through its scores.*num_inference_steps=1 "),
        (["dm", len], {"num_generations": 1}, "'len' has no gradient.*num_generations=1"),
        ("dm", {"height": 33}, r"multiples of 8 .*; got 33 x 32"),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_a_combination_that_cannot_work_is_refused(
    make_trainer: Make, tmp_path: Path, rewards: object, settings: dict[str, Any], words: str
) -> None:
    """What only fails together is refused when the trainer is built."""
    with pytest.raises(ConfigError, match=words):
        make_trainer(tmp_path, rewards, **settings)


@pytest.mark.parametrize("spec", ["0*dm", "0*legibility", "0*dm + 0*legibility"])
@pytest.mark.usefixtures("no_training")
def test_all_weights_zero_is_refused(make_trainer: Make, tmp_path: Path, spec: str) -> None:
    """Nothing would be learned, so it is said at once."""
    with pytest.raises((ConfigError, RewardError), match="weight"):
        make_trainer(tmp_path, spec).train()


@pytest.mark.usefixtures("no_training")
def test_an_unwritable_output_folder_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    """A folder that cannot be made (here: below a regular file) is found out at once."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"output_dir=.*file/run.* cannot be written to"):
        make_trainer(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 4}},
            r"lr_scheduler_kwargs=.* cannot be used with lr_scheduler_type='linear'",
        ),
        (
            {"critic_lr_scheduler_type": "polynomial", "critic_lr_scheduler_kwargs": '{"powr": 4}'},
            r"critic_lr_scheduler_kwargs=\{'powr': 4\} cannot be used with critic_lr_scheduler_type='polynomial'",
        ),
        ({"learning_rate": 0.0, "critic_learning_rate": 1e-4}, "smaller than initial lr.*another schedule"),
        ({"critic_lr_scheduler_type": "reduce_lr_on_plateau"}, "goes by a metric.*critic_lr_scheduler_type to another"),
        ({"optim": "schedule_free_adamw"}, "optim='schedule_free_adamw' cannot be used: it has two sets of weights"),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_an_optimizer_that_cannot_work_is_refused(
    make_trainer: Make, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    """Before the base is loaded, not with the first step."""
    with pytest.raises(ConfigError, match=words):
        make_trainer(tmp_path, model=str(tmp_path / "nowhere"), **settings)


@pytest.mark.parametrize("argument", ["peft_config", "fake_peft_config"])
@pytest.mark.usefixtures("no_training")
def test_a_lora_option_that_changes_the_base_is_refused(make_trainer: Make, tmp_path: Path, argument: str) -> None:
    """`bias="all"` would train what the teacher shares; the message says which config and which option."""
    with pytest.raises(ConfigError, match=rf"{argument}\.bias='all' cannot be used: it trains biases of the base"):
        make_trainer(tmp_path, **{argument: LoraConfig(bias="all")})


# ---- Prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "no prompts"),
        (["a seven", ""], "prompt 1 must be a text that is not empty"),
        (["a seven", "  \n"], "prompt 1 must be a text that is not empty"),
        (["a seven", None], "prompt 1 must be a text.*None"),
        (["a seven", 7], "prompt 1 must be a text.*7"),
        (Dataset.from_dict({"prompts": ["a seven"]}), "no column 'prompt'.*it has: prompts.*Did you mean 'prompts'"),
        (Dataset.from_dict({"prompt": []}), "no prompts"),
        ("missing.txt", "no file at 'missing.txt'"),
        (7, "got int"),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_unusable_prompts_are_refused(make_trainer: Make, tmp_path: Path, prompts: object, words: str) -> None:
    """Each kind of bad prompts raises a DataError that says which and where."""
    with pytest.raises(DataError, match=words):
        make_trainer(tmp_path, prompts=prompts).train()


@pytest.mark.usefixtures("no_training")
def test_an_empty_text_file_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    """A file of blank lines holds no prompts."""
    (tmp_path / "prompts.txt").write_text("\n  \n")
    with pytest.raises(DataError, match="no prompts"):
        make_trainer(tmp_path, prompts=tmp_path / "prompts.txt")


@pytest.mark.usefixtures("no_training")
def test_training_without_prompts_is_refused(small_config: Callable[..., RDMConfig], tmp_path: Path) -> None:
    """A trainer may be built without prompts (to sample), but not trained."""
    trainer = RDMTrainer(digits.teacher_path(), "dm", small_config(tmp_path))
    with pytest.raises(DataError, match="train_dataset"):
        trainer.train()


# ---- The base model ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_training")
def test_a_missing_base_folder_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    """A path that does not exist is not taken for a hub id."""
    with pytest.raises(ModelError, match=r"no base model at .*nowhere.*no such folder"):
        make_trainer(tmp_path, model=str(tmp_path / "nowhere"))


@pytest.mark.usefixtures("no_training")
def test_a_folder_that_is_no_pipeline_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    """A folder without model_index.json is named as such."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        make_trainer(tmp_path, model=str(tmp_path / "folder"))


@pytest.mark.usefixtures("no_training")
def test_a_hub_id_that_cannot_be_had_is_refused(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, an unknown hub id gives a ModelError that repeats the id and says what to pass."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"cannot load the base model 'nobody/no-such-model'.*Pass a hub id"):
        make_trainer(tmp_path, model="nobody/no-such-model")


class OtherPipeline(DiffusionPipeline):
    """A pipeline of a class that no family is for."""


@pytest.mark.parametrize("model", [OtherPipeline(), 7])
@pytest.mark.usefixtures("no_training")
def test_an_unsupported_family_is_refused(make_trainer: Make, tmp_path: Path, model: object) -> None:
    """The message names the class and the supported families."""
    with pytest.raises(ModelError, match=rf"{type(model).__name__} is not supported.*StableDiffusion3Pipeline"):
        make_trainer(tmp_path, model=model)


def copy_of_teacher(folder: Path) -> Path:
    """Copy the embedded teacher to a folder, so that it can be damaged."""
    return Path(shutil.copytree(digits.teacher_path(), folder))


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.usefixtures("no_training")
def test_nan_in_the_teachers_weights_is_refused(
    make_trainer: Make, tmp_path: Path, component: str, value: float
) -> None:
    """One bad weight anywhere in the base is found, and the parameter is named."""
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    name, parameter = list(getattr(pipeline, component).named_parameters())[-1]
    parameter.data.flatten()[-1] = value
    with pytest.raises(ModelError, match=rf"holds NaN or infinite weights.*{name}"):
        make_trainer(tmp_path, model=pipeline)


@pytest.mark.usefixtures("no_training")
def test_a_truncated_base_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    """A base whose weight file was cut off gives a ModelError, not a stack of third-party errors."""
    folder = copy_of_teacher(tmp_path / "teacher")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load the base model"):
        make_trainer(tmp_path / "run", model=str(folder))


# ---- Rewards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ("legibilty", "unknown reward 'legibilty'.*Did you mean 'legibility'.*Known rewards: .*legibility"),
        ("dm + ", "column 6"),
        ("dm + + legibility", "column 6"),
        ("dm legibility", "column 4"),
        ("dm + 0.5*", "column"),
        ("1.2.3*dm", r"1\.2\.3.*not a number"),
        ("dm ++ legibility", "column"),
        ("", "empty"),
        ([], "no rewards"),
        ("dm + dm", "two rewards have the name 'dm'; if they are one, name it once, with the sum of the weights"),
        (["dm", 7], "got 7"),
        ([RDMTrainer], "a reward is a name, a spec, a callable or a Reward object"),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_unusable_rewards_are_refused(make_trainer: Make, tmp_path: Path, rewards: object, words: str) -> None:
    """Unknown names and malformed specs raise, with the nearest name or the column."""
    with pytest.raises(RewardError, match=words):
        make_trainer(tmp_path, rewards)


@pytest.mark.parametrize(
    ("weights", "words"), [([1.0], "1 entries for 2 rewards"), ([1.0, float("nan")], "finite numbers")]
)
@pytest.mark.usefixtures("no_training")
def test_unusable_reward_weights_are_refused(
    make_trainer: Make, tmp_path: Path, weights: list[float], words: str
) -> None:
    """One finite weight per reward."""
    with pytest.raises(RewardError, match=words):
        make_trainer(tmp_path, "dm + legibility", reward_weights=weights)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0] * 3, r"'bad'.*one score per sample, shape \[8\]; got \[3\]"),
        (torch.ones(8, 2), r"'bad'.*shape \[8\]; got \[8, 2\]"),
        ([1.0] * 7 + [float("inf")], "'bad'.*infinite score"),
        ([None] * 8, "'bad'.*NaN .not applicable. for every sample"),
        (3.0, "'bad'.*must return a list of numbers.*got float"),
    ],
)
def test_nonsense_from_a_reward_stops_the_run(
    make_trainer: Make, tmp_path: Path, steps_run: list[int], returned: object, words: str
) -> None:
    """What a reward returns is checked at the first step, before the student is changed."""

    def bad(images: Tensor, prompts: list[str]) -> object:
        return returned

    trainer = make_trainer(tmp_path, ["dm", bad])
    before = [p.detach().clone() for p in trainer.parameters_of("student")]
    with pytest.raises(RewardError, match=words):
        trainer.train()
    assert len(steps_run) == 1
    assert trainer.state.global_step == 0
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.parameters_of("student"), strict=True))


def test_an_error_inside_a_reward_is_not_hidden(make_trainer: Make, tmp_path: Path) -> None:
    """The author's own exception reaches the author."""

    def bad(images: Tensor, prompts: list[str]) -> list[float]:
        raise ZeroDivisionError("my own mistake")

    with pytest.raises((ZeroDivisionError, RDMError), match="my own mistake"):
        make_trainer(tmp_path, ["dm", bad]).train()
