"""What must hold before a run starts: settings, rewards and prompts that fit together, the same on every process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from rdm_sdk.errors import ConfigError, DataError, nearest
from rdm_sdk.families.base import ModelFamily
from rdm_sdk.families.compiled import check_compiler
from rdm_sdk.families.load import load_family
from rdm_sdk.families.roles import STUDENT, TEACHER, Roles, check_lora_config
from rdm_sdk.plugins.registry import registry
from rdm_sdk.rewards.base import Reward
from rdm_sdk.rewards.resolve import RewardFuncs, RunReward, WeightedReward, resolve_rewards, split_held_out
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.finished import NO_EVALUATION
from rdm_sdk.training.models import check_fits
from rdm_sdk.training.optimizers import check_optimizer, check_schedules
from rdm_sdk.training.start import starting_lora
from rdm_sdk.training.weighting import ANCHOR, Weighting, make_weighting


def run_rewards(reward_funcs: RewardFuncs, args: RDMConfig) -> tuple[list[WeightedReward], list[WeightedReward]]:
    """Return the rewards of a run, and those that judge its evaluations alone, under labels that tell all apart.

    Raises:
        RewardError, ConfigError: as `resolve_rewards`.
    """
    found = resolve_rewards(reward_funcs, args.reward_weights, args.reward_route, args.eval_rewards)
    return split_held_out(found, args.eval_rewards)


def run_family(model: object, args: RDMConfig) -> ModelFamily:
    """Return the family of a run's base, loaded in the run's precision.

    Raises:
        ConfigError, ModelError: it cannot be had, or not be trained with these settings. That is found before the
            pipeline gets adapters, so that it can be used for another try.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    family = load_family(model, dtype, args.quantization, max_sequence_length=args.max_sequence_length)
    check_fits(family, args)
    return family


def critic_roles(rewards: Sequence[RunReward]) -> list[str]:
    """Return the roles that the rewards train, in order, each once."""
    return list(dict.fromkeys(reward.capabilities.trains for reward in rewards if reward.capabilities.trains))


def role_configs(
    args: RDMConfig,
    rewards: Sequence[RunReward],
    peft_config: LoraConfig | None,
    fake_peft_config: LoraConfig | None,
) -> dict[str, LoraConfig | None]:
    """Return the networks that are trained: role to its LoRA, or to None for a full copy of the base.

    Raises:
        ConfigError: a LoRA config cannot be used, or is given for a role that is trained in full or has one already.
        ModelError: there is no finished student to start from.
    """
    given = (
        ("peft_config", peft_config, "student_weights", args.student_weights),
        ("fake_peft_config", fake_peft_config, "critic_weights", args.critic_weights),
    )
    for argument, lora, setting, weights in given:
        if lora is not None and weights == "full":
            raise ConfigError(f"{argument} describes adapters, and {setting}='full' trains a copy of the base; use one")
        if lora is not None:
            check_lora_config(lora, argument)
    if args.start_from is not None:
        peft_config = starting_lora(args.start_from, args.student_weights, peft_config)
    student = peft_config or LoraConfig(r=16, lora_alpha=16)
    critic = fake_peft_config or student
    heads = {reward.capabilities.trains for reward in rewards if reward.capabilities.head}
    configs: dict[str, LoraConfig | None] = {STUDENT: None if args.student_weights == "full" else student}
    for role in critic_roles(rewards):
        if role not in heads:
            configs[role] = None if args.critic_weights == "full" else critic
    return configs


def check_arguments(args: object, optimizers: Sequence[object]) -> None:
    """Raise `ConfigError` for settings of another class or that cannot work on this machine, and for optimizers."""
    if not isinstance(args, RDMConfig):
        raise ConfigError(f"args must be an RDMConfig; got {type(args).__name__}")
    if tuple(optimizers) != (None, None):
        raise ConfigError(
            "optimizers cannot be given: the weights of student and critics are made in the trainer's constructor, so "
            "that no optimizer made before could hold them. Set optim, learning_rate, lr_scheduler_type and their "
            "critic_* in RDMConfig, or override create_optimizer()"
        )
    _check_launcher(args)
    check_writable(str(args.output_dir), "output_dir")
    if args.prompt_cache is not None:
        check_writable(args.prompt_cache, "prompt_cache")
    for name in args.report_to or ():
        if name in INTEGRATION_TO_CALLBACK and name not in (*get_available_reporting_integrations(), "flyte"):
            raise ConfigError(
                f"report_to={name!r} needs its package, which is not installed; install it or leave it out"
            )
    if args.fsdp and args.world_size == 1:
        raise ConfigError("fsdp shares the base out between processes, and there is one; start several with torchrun")
    if args.torch_compile:
        check_compiler(str(args.torch_compile_backend), args.torch_compile_mode, args.device)
    check_optimizer(args)


_LAUNCHER = "accelerate has been told {told}, by its launcher's options or its config file, and RDMConfig says {said}"


def _check_launcher(args: RDMConfig) -> None:
    """Raise `ConfigError` for what accelerate's launcher asks for by environment variables, and the settings do not.

    Networks would compute in that precision while all else takes them for float32; what it compiles, nobody calls.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no" and not args.bf16:
        found = _LAUNCHER.format(told=f"mixed_precision={precision!r}", said="bf16=False")
        raise ConfigError(f"{found}; set bf16=True, or launch with --mixed_precision no")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no" and not args.torch_compile:
        found = _LAUNCHER.format(told=f"dynamo_backend={backend!r}", said="torch_compile=False")
        raise ConfigError(f"{found}; set torch_compile=True, or launch with --dynamo_backend no")


def check_run(
    args: RDMConfig,
    rewards: Sequence[RunReward],
    datasets: Mapping[str, Dataset | None],
    weighting: Weighting | None = None,
    held_out: Sequence[RunReward] = (),
) -> None:
    """Raise `ConfigError` or `DataError` for what cannot work together, before the base is loaded.

    `held_out` are the rewards of the setting `eval_rewards`.
    """
    _check_trackers(args)
    check_schedules(args, critics=bool(critic_roles(rewards)))
    _check_held_out(held_out, datasets)
    if "eval_dataset" in datasets:
        _check_evaluation(args, [*rewards, *held_out], datasets["eval_dataset"])
    _check_heads(args, rewards)
    if not any(reward.weight for reward in rewards):
        raise ConfigError("every reward has weight 0, so nothing would be learned; give one a weight other than 0")
    if weighting is not None and (isinstance(weighting, type) or not isinstance(weighting, Weighting)):
        raise ConfigError(
            f"weighting must be an object with weigh, state_dict and load_state_dict; got {type(weighting).__name__}. "
            "Strategies by name go into RDMConfig(weighting=...)"
        )
    if weighting is not None and args.weighting != "fixed":
        raise ConfigError(f"two weightings were given: an object, and RDMConfig(weighting={args.weighting!r}); use one")
    if make_weighting(args.weighting).needs_anchor and not any(o.label == ANCHOR and o.weight for o in rewards):
        raise ConfigError(
            f"weighting={args.weighting!r} weighs rewards against {ANCHOR!r}, and this run has none with a weight; add "
            f"it to the rewards, such as '{ANCHOR} + 0.5*...', or use weighting='fixed'"
        )
    scored = [reward.label for reward in rewards if reward.weight and reward.route == "advantage"]
    if scored and args.num_random_steps == 0:
        raise ConfigError(
            f"reward {scored[0]!r} acts through its scores, on the random steps of the sampler, and a student with "
            f"num_inference_steps={args.num_inference_steps} and sampler={args.sampler!r} has none; use more steps, a "
            "random sampler, or a reward that acts by its gradient"
        )
    compared = [reward for reward in rewards if reward.weight and not reward.differentiated]
    if compared and args.num_generations == 1:
        why = "has no gradient" if compared[0].capabilities.gradient == "none" else "acts by its scores"
        raise ConfigError(
            f"reward {compared[0].label!r} {why}, so samples of one prompt are compared with each other, and "
            "num_generations=1 leaves nothing to compare with; use at least 2"
        )
    for role in critic_roles(rewards):
        if role in (STUDENT, TEACHER):
            raise ConfigError(f"a reward declares trains={role!r}, which is not a critic's; give its role another name")
    if critic_roles(rewards) and args.critic_steps == 0:
        raise ConfigError("critic_steps=0 would leave the critics of the rewards untrained; use at least 1")
    grouped = [reward.label for reward in (*rewards, *held_out) if reward.capabilities.scope == "group"]
    if grouped and args.num_generations == 1:
        raise ConfigError(
            f"reward {grouped[0]!r} compares the samples of one prompt, and num_generations=1 leaves nothing to "
            "compare with; use at least 2"
        )
    _check_columns(rewards, datasets)
    _check_applies(rewards, datasets)


def _check_heads(args: RDMConfig, rewards: Sequence[RunReward]) -> None:
    """Raise `ConfigError` for two rewards that bring a module each for one role, and for real images of one size."""
    learning = [reward.label for reward in rewards if reward.capabilities.trains == "discriminator"]
    if learning and len(set(args.sizes)) > 1:
        raise ConfigError(
            f"reward {learning[0]!r} learns from a column of real images, each of one size, and resolutions="
            f"{args.resolutions} has a step drawn at several; use one, or leave the reward out"
        )
    heads = [reward for reward in rewards if reward.capabilities.head]
    for one, other in combinations(heads, 2):
        if one.capabilities.trains == other.capabilities.trains:
            raise ConfigError(
                f"{one.label!r} and {other.label!r} bring a module each for the role {one.capabilities.trains!r}, and "
                "one of them would stay untrained; use one of them, or a class of your own with another role"
            )


def _check_held_out(held_out: Sequence[RunReward], datasets: Mapping[str, Dataset | None]) -> None:
    """Raise `ConfigError` or `DataError` for rewards that are to judge an evaluation alone, and cannot."""
    for reward in held_out:
        if reward.capabilities.needs_models:
            raise ConfigError(
                f"eval_rewards: {reward.label!r} needs the models of a run, and what is evaluated are finished images; "
                "leave it out"
            )
    if "eval_dataset" in datasets:
        evaluated = datasets["eval_dataset"]
        if held_out and evaluated is None:
            raise ConfigError(
                f"eval_rewards names {held_out[0].label!r}, which would judge nothing: pass eval_dataset, the prompts "
                "that evaluate() samples"
            )
        _check_columns(held_out, {"eval_dataset": evaluated})
        _check_applies(held_out, {"eval_dataset": evaluated})


def _check_columns(rewards: Sequence[RunReward], datasets: Mapping[str, Dataset | None]) -> None:
    """Raise `DataError` if a dataset lacks a column that a reward needs; no evaluation asks those that need models."""
    for reward in rewards:
        for argument, dataset in datasets.items():
            if argument == "eval_dataset" and reward.capabilities.needs_models:
                continue
            for column in reward.capabilities.columns:
                if dataset is not None and column not in dataset.column_names:
                    raise DataError(
                        f"reward {reward.label!r} needs a column {column!r}, and {argument} has none."
                        f"{nearest(column, dataset.column_names)} It has: {', '.join(dataset.column_names)}"
                    )


def _check_applies(rewards: Sequence[RunReward], datasets: Mapping[str, Dataset | None]) -> None:
    """Raise `DataError` if a reward is for no prompt of the data: one that trains needs one in train_dataset.

    Rewards that are only planned are not loaded for it.
    """
    given = {argument: dataset for argument, dataset in datasets.items() if dataset is not None}
    for reward in rewards:
        searched = {name: data for name, data in given.items() if name == "train_dataset" or not reward.weight}
        if not isinstance(reward, WeightedReward) or reward.capabilities.needs_models or not searched:
            continue
        if not any(_applies_somewhere(reward.reward, dataset) for dataset in searched.values()):
            columns = ", ".join(reward.capabilities.columns)
            why = f" (it is for rows that have: {columns})" if columns else ""
            raise DataError(
                f"reward {reward.label!r} is for none of the prompts of {' and '.join(searched)}{why}; first prompt: "
                f"{next(iter(searched.values()))['prompt'][0]!r}. Add prompts that it is for, or leave it out"
            )


def _applies_somewhere(reward: Reward, dataset: Dataset) -> bool:
    """Whether a reward is for some prompt of a dataset, read in slices because columns may hold pictures."""
    for start in range(0, len(dataset), 32):
        columns = dataset[start : start + 32]
        if any(reward.applies(columns.pop("prompt"), columns)):
            return True
    return False


def _check_evaluation(args: RDMConfig, rewards: Sequence[RunReward], dataset: Dataset | None) -> None:
    """Raise `ConfigError` if the run is to be evaluated and cannot be, or by a figure that there will not be."""
    evaluates = args.eval_strategy != IntervalStrategy.NO or args.eval_on_start
    evaluation, saving = IntervalStrategy(args.eval_strategy).value, SaveStrategy(args.save_strategy).value
    chooses = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
    judging = [reward.label for reward in rewards if not reward.capabilities.needs_models]
    if chooses and not evaluates:
        raise ConfigError(
            f"save_strategy={saving!r} with load_best_model_at_end={args.load_best_model_at_end} "
            "goes by evaluations, and eval_strategy='no' makes none; set eval_strategy"
        )
    if evaluates and (dataset is None or not judging):
        raise ConfigError(f"eval_strategy={evaluation!r}, eval_on_start={args.eval_on_start}: {NO_EVALUATION}")
    if chooses:
        known = ["loss", *(f"rewards/{label}/mean" for label in judging)]
        metric = str(args.metric_for_best_model).removeprefix("eval_")
        if metric not in known:
            raise ConfigError(
                f"metric_for_best_model={args.metric_for_best_model!r}: there is no such figure."
                f"{nearest(metric, known)} There are: {', '.join(known)}"
            )


def check_hosted(args: RDMConfig, roles: Roles, shards: bool) -> None:
    """Raise for devices that the step does not work with (`ConfigError`), and for replays of blocks (`ModelError`)."""
    if args.activation_checkpointing or args.gradient_checkpointing:
        roles.check_recomputing()
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process would use nn.DataParallel, which cannot switch roles; start with "
            "'accelerate launch' or torchrun, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if shards:
        raise ConfigError(
            "accelerate has been told to use DeepSpeed or FSDP, by its launcher's options or its config file, and what "
            "it wraps cannot switch roles; start plain processes, and share out the base by RDMConfig(fsdp=True)"
        )


def check_same_plugins(num_processes: int) -> None:
    """Raise `ConfigError` on every process if one of them has other plugins: rewards would differ between them."""
    if num_processes == 1:
        return
    everyone: list[list[str]] = gather_object([registry().fingerprint()])
    for rank, plugins in enumerate(everyone):
        different = sorted(set(plugins) ^ set(everyone[0]))
        if different:
            raise ConfigError(
                f"process {rank} does not have the same rdm-sdk plugins as process 0: {', '.join(different)}. Install "
                "the same versions everywhere"
            )


def check_writable(folder: str, argument: str) -> None:
    """Raise `ConfigError` if a folder cannot be written to, or could not be made; nothing is made here."""
    path = Path(folder).expanduser().absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{argument}={folder!r} cannot be written to: {error}") from error


def _check_trackers(args: RDMConfig) -> None:
    """Raise `ConfigError` if `report_to` names a tracker that transformers does not know."""
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"report_to={name!r}: there is no such tracker.{nearest(name, INTEGRATION_TO_CALLBACK)} There are: "
                f"{', '.join(INTEGRATION_TO_CALLBACK)}, and 'none'"
            )
