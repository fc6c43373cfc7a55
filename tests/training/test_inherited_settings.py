"""Every setting of transformers is done, or refused when it is set: none is accepted and ignored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from rdm_sdk import ConfigError, RDMConfig, RDMTrainer
from rdm_sdk.training import callbacks
from rdm_sdk.training.inherited import UNSUPPORTED
from rdm_sdk.training.optimizers import check_schedules, critic_settings
from rdm_sdk.training.validation import check_arguments

Make = Callable[..., RDMTrainer]
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}

HERE = "below"
LOOP = "transformers' own loop, callbacks and data loader, which RDMTrainer leaves as they are"
DONE = {
    "output_dir": "test_export.py",
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), "test_data.py, test_trainer.py"),
    **dict.fromkeys(("num_train_epochs", "max_steps"), LOOP),
    **dict.fromkeys(("learning_rate", "lr_scheduler_type", "weight_decay"), "test_matching.py"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "optim", "max_grad_norm"), "test_matching.py"),
    **dict.fromkeys(("optim_args", "adam_epsilon", "lr_scheduler_kwargs", "warmup_steps"), HERE),
    "bf16": "test_full_copies.py, test_gpu.py",
    "tf32": "transformers sets PyTorch's switch",
    **dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), "test_memory.py"),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "test_compiling.py"),
    "torch_empty_cache_steps": HERE,
    **dict.fromkeys(("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node"), LOOP),
    **dict.fromkeys(("logging_nan_inf_filter", "log_level", "log_level_replica", "disable_tqdm"), LOOP),
    **dict.fromkeys(("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id"), LOOP),
    "trackio_static_space_id": LOOP,
    **dict.fromkeys(("eval_strategy", "eval_steps", "per_device_eval_batch_size"), "test_trainer_samples.py"),
    **dict.fromkeys(("eval_delay", "eval_on_start"), LOOP),
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), "test_trainer_samples.py"
    ),
    **dict.fromkeys(
        ("save_strategy", "save_steps", "save_total_limit", "save_only_model"), "test_checkpoint_folders.py"
    ),
    "save_on_each_node": LOOP,
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), "test_hub.py"),
    **dict.fromkeys(("hub_always_push", "hub_revision"), "test_hub.py"),
    "restore_callback_states_from_checkpoint": LOOP,
    **dict.fromkeys(("full_determinism", "use_cpu"), LOOP),
    **dict.fromkeys(("seed", "data_seed"), "test_data.py"),
    "resume_from_checkpoint": "test_resume.py",
    **dict.fromkeys(("dataloader_drop_last", "dataloader_num_workers"), LOOP),
    **dict.fromkeys(("dataloader_pin_memory", "dataloader_prefetch_factor"), LOOP),
    "dataloader_multiprocessing_context": LOOP,
    **dict.fromkeys(("ddp_backend", "local_rank"), "accelerate's process group"),
    "ddp_timeout": "test_distributed.py",
    **dict.fromkeys(("fsdp", "fsdp_config"), "test_sharding.py, test_distributed_sharding.py"),
    "skip_memory_metrics": LOOP,
}
"""Setting to who does it, or to the tests that see it done."""

OTHER: dict[str, Any] = {
    "label_names": ["labels"],
    "include_for_metrics": ["inputs"],
    "optim_target_modules": "all-linear",
    "include_num_input_tokens_seen": "all",
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "liger_kernel_config": {"rope": True},
    "accelerator_config": {"split_batches": True},
    "parallelism_config": object(),
    "debug": "something",
    "deepspeed": {"a": 1},
    "train_sampling_strategy": "sequential",
    "length_column_name": "tokens",
}
"""Values other than the default, where that is not simply the other truth or the next number."""


def other_value(name: str) -> Any:
    if name in OTHER:
        return OTHER[name]
    default = getattr(RDMConfig, name)
    return (not default) if "bool" in str(FIELDS[name].type) else (default or 0) + 1


def test_the_tests_that_are_named_exist() -> None:
    named = {name for where in DONE.values() for name in re.findall(r"test_\w+\.py", where)}
    assert named
    assert named <= {path.name for path in Path(__file__).parents[1].rglob("test_*.py")}


def test_there_is_a_verdict_on_every_setting() -> None:
    """A version of transformers with another setting fails here, until someone has looked at it."""
    assert FIELDS.keys() - UNSUPPORTED.keys() - DONE.keys() == set()
    assert UNSUPPORTED.keys() & DONE.keys() == set()


@pytest.mark.parametrize("name", [name for name in UNSUPPORTED if name in FIELDS])
def test_what_is_not_done_is_refused(name: str, tmp_path: Path) -> None:
    """In one line that names it, what was given, and why; its default may be given as well as not."""
    value = other_value(name)
    with pytest.raises(ConfigError) as caught:
        RDMConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r} is not supported: {UNSUPPORTED[name]}")
    assert "\n" not in message
    plain = RDMConfig(output_dir=str(tmp_path), use_cpu=True)
    RDMConfig(output_dir=str(tmp_path), use_cpu=True, **{name: getattr(plain, name)})
    assert dataclasses.replace(plain, learning_rate=1e-3).learning_rate == 1e-3


def test_a_config_that_evaluates_can_be_copied(tmp_path: Path) -> None:
    """Though transformers has set `do_eval` in it."""
    config = RDMConfig(output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=1)
    assert dataclasses.replace(config, eval_steps=2).do_eval


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"load_best_model_at_end": True, "save_strategy": "steps"}, "load_best_model_at_end requires"),
        ({"eval_strategy": "stpes"}, "stpes"),
        ({"save_strategy": "somtimes"}, "somtimes"),
        ({"logging_strategy": "always"}, "always"),
        ({"hub_strategy": "never"}, "never"),
        ({"optim": "adamm"}, "adamm"),
        ({"lr_scheduler_type": "liner"}, "liner"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"torch_empty_cache_steps": 0}, "torch_empty_cache_steps"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor"),
    ],
)
def test_what_transformers_refuses_is_an_error_of_ours(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    """In one line."""
    with pytest.raises(ConfigError, match=words) as caught:
        RDMConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "settings", "words"),
    [
        ("MIXED_PRECISION", "fp16", {}, "mixed_precision='fp16', .*says bf16=False; set bf16=True, or launch with"),
        ("MIXED_PRECISION", "bf16", {}, "mixed_precision='bf16', .*says bf16=False; set bf16=True, or launch with"),
        ("DYNAMO_BACKEND", "INDUCTOR", {}, "dynamo_backend='inductor', .*says torch_compile=False; set torch_compile="),
        ("MIXED_PRECISION", "no", {}, None),
        ("DYNAMO_BACKEND", "NO", {}, None),
        ("MIXED_PRECISION", "bf16", {"bf16": True}, None),
    ],
)
def test_what_a_launcher_asks_for_is_not_done_unasked(
    small_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    settings: dict[str, Any],
    words: str | None,
) -> None:
    """`accelerate launch --mixed_precision fp16`, or its config file, reaches transformers by the environment alone."""
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    args = small_config(tmp_path, **settings)
    with nullcontext() if words is None else pytest.raises(ConfigError, match=words):
        check_arguments(args, (None, None))


# ---- Evaluation -------------------------------------------------------------------------------------------------

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
BEST = {**EVALUATED, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("rewards", "given", "settings", "words"),
    [
        ("dm + legibility", False, EVALUATED, "eval_strategy='steps'.* needs eval_dataset and a reward that judges"),
        ("dm", True, EVALUATED, "eval_strategy='steps'.* needs eval_dataset and a reward that judges"),
        ("dm + legibility", False, {"eval_on_start": True}, "eval_on_start=True: evaluate.. needs eval_dataset"),
        ("dm + legibility", True, {"save_strategy": "best"}, "save_strategy='best' .* eval_strategy='no' makes none"),
        (
            "dm + legibility",
            True,
            {**BEST, "metric_for_best_model": "rewards/legiblity/mean"},
            "metric_for_best_model='rewards/legiblity/mean': there is no such figure. Did you mean 'rewards/",
        ),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_an_evaluation_that_cannot_be_made_is_refused(
    make_trainer: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rewards: str,
    given: bool,
    settings: dict[str, Any],
    words: str,
) -> None:
    """Before the base is loaded, and not at the first evaluation."""
    monkeypatch.setattr("rdm_sdk.training.validation.load_family", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(ConfigError, match=words):
        make_trainer(tmp_path, rewards, **({"eval_dataset": ["a seven"]} if given else {}), **settings)


@pytest.mark.parametrize(
    "metric", [None, "loss", "eval_loss", "rewards/legibility/mean", "eval_rewards/legibility/mean"]
)
@pytest.mark.usefixtures("no_training")
def test_every_figure_of_an_evaluation_can_choose(make_trainer: Make, tmp_path: Path, metric: str | None) -> None:
    trainer = make_trainer(
        tmp_path, "dm + 0*legibility", eval_dataset=["a seven"], **BEST, metric_for_best_model=metric
    )
    assert trainer.args.metric_for_best_model == (metric or "loss")


# ---- Optimizers -------------------------------------------------------------------------------------------------


def test_options_of_optimizer_and_schedule_reach_student_and_critics(make_trainer: Make, tmp_path: Path) -> None:
    """Those that no other test looks at."""
    trainer = make_trainer(
        tmp_path,
        optim="rmsprop",
        optim_args="alpha=0.7,momentum=0.3",
        lr_scheduler_type="cosine_with_restarts",
        lr_scheduler_kwargs={"num_cycles": 2},
        warmup_steps=1,
        max_steps=4,
        learning_rate=1e-3,
    )
    rates: list[tuple[float, float]] = []
    step = trainer.training_step

    def watching(*arguments: Any, **options: Any) -> Tensor:
        loss = step(*arguments, **options)
        rates.append((trainer.optimizer.param_groups[0]["lr"], trainer.critic_optimizer.learning_rate))
        return loss

    trainer.training_step = watching  # type: ignore[method-assign]
    trainer.train()
    for optimizer in (trainer.optimizer, trainer.critic_optimizer.optimizer):
        group = optimizer.param_groups[0]
        assert (group["alpha"], group["momentum"]) == (0.7, 0.3)
    wanted = [0.0, 1.0, 0.25, 0.75]  # one step of warm-up, then two cycles over three
    assert [rate / 1e-3 for rate, _ in rates] == pytest.approx(wanted)
    assert [rate / 2e-3 for _, rate in rates] == pytest.approx([*wanted[1:], 0.0])  # already those of the next step


@pytest.mark.parametrize(
    ("optim", "options", "words"),
    [
        (
            "adamw_torch",
            "eps=1e-7",
            "transformers passes no 'eps' on to optim='adamw_torch', so that it would change no",
        ),
        ("rmsprop", "alpha=0.7,momentun=0.3", "passes no 'momentun' on to optim='rmsprop'"),
        ("adafactor", "clip_threshold=2", "passes no 'clip_threshold' on to optim='adafactor'"),
        ("sgd", "momentum=0.9,weight_decay=0.1", "set the weight decay by weight_decay"),
        (
            "sgd",
            "nesterov=true",
            "optim='sgd' with optim_args='nesterov=true' cannot be used here: Nesterov momentum req",
        ),
        ("sgd", "momentum=much", "optim='sgd' with optim_args='momentum=much' cannot be used here: could not convert"),
    ],
)
def test_options_that_an_optimizer_does_not_take_are_refused(
    small_config: Any, tmp_path: Path, optim: str, options: str, words: str
) -> None:
    """Before the base is loaded; transformers passes over those that it does not know."""
    with pytest.raises(ConfigError, match=words):
        check_arguments(small_config(tmp_path, optim=optim, optim_args=options), (None, None))


@pytest.mark.parametrize(
    ("optim", "options"),
    [("sgd", "momentum=0.9, nesterov=true"), ("adagrad", "lr_decay=0"), ("rmsprop", "centered=false"), ("sgd", None)],
)
def test_options_that_it_takes_are_not(small_config: Any, tmp_path: Path, optim: str, options: str | None) -> None:
    """At their defaults too."""
    check_arguments(small_config(tmp_path, optim=optim, optim_args=options), (None, None))


def test_the_default_schedules_options_are_its_own(small_config: Any, tmp_path: Path) -> None:
    """Rates fall as the square of a line by default; another schedule begins with what its library gives it."""
    for given, expected in (
        ({}, {"power": 2, "lr_end": 0.0}),
        ({"lr_scheduler_type": "linear"}, None),
        ({"lr_scheduler_type": "cosine"}, None),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 10}}, {"timescale": 10}),
        ({"lr_scheduler_kwargs": None}, None),
    ):
        args = small_config(tmp_path, **given)
        check_schedules(args, critics=True)
        assert args.lr_scheduler_kwargs == critic_settings(args).lr_scheduler_kwargs == expected


def test_schedules_have_options_of_their_own(small_config: Any, tmp_path: Path) -> None:
    """The student's are not given to a schedule of another type."""
    power = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 4}}
    for given, expected in (
        (power, {"power": 4}),
        (power | {"critic_lr_scheduler_type": "polynomial"}, {"power": 4}),
        (power | {"critic_lr_scheduler_type": "linear"}, None),
        (power | {"critic_lr_scheduler_kwargs": {"power": 2}}, {"power": 2}),
        ({"critic_lr_scheduler_type": "polynomial", "critic_lr_scheduler_kwargs": '{"power": 3}'}, {"power": 3}),
    ):
        args = small_config(tmp_path, **given)
        check_schedules(args, critics=True)
        assert critic_settings(args).lr_scheduler_kwargs == expected


def test_a_metric_may_lead_where_there_are_no_critics(small_config: Any, tmp_path: Path) -> None:
    """Their schedule is not asked about."""
    args = small_config(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1)
    check_schedules(args, critics=False)
    with pytest.raises(ConfigError, match="set critic_lr_scheduler_type to another"):
        check_schedules(args, critics=True)


def test_free_memory_is_given_back_so_often(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch_empty_cache_steps`."""
    trainer = make_trainer(tmp_path, max_steps=5, torch_empty_cache_steps=2)
    at: list[int] = []
    monkeypatch.setattr(callbacks, "clear_device_cache", lambda: at.append(trainer.state.global_step))
    trainer.train()
    assert at == [2, 4]


def test_adam_epsilon_reaches_both(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, adam_epsilon=1e-5, max_steps=1)
    trainer.train()
    optimizers: list[torch.optim.Optimizer] = [trainer.optimizer, trainer.critic_optimizer.optimizer]
    assert [optimizer.param_groups[0]["eps"] for optimizer in optimizers] == [1e-5, 1e-5]
