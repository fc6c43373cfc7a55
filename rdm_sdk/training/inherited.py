"""Settings of transformers that the method does not do: refused where they are set, instead of accepted and ignored."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from rdm_sdk.errors import ConfigError
from rdm_sdk.training.rules import default_of

_NO_LABELS = "there are no labels and no metrics of predictions: rewards judge images"
_NO_TOKENS = "no tokens are counted: what is trained sees latents"
_OWN_EVALUATION = (
    "evaluate() samples the student and has rewards judge the images; per_device_eval_batch_size is its batch"
)
_OWN_GRADIENTS = (
    "no forward goes through distributed data parallel's wrapper; gradients are averaged by the step itself"
)
_OWN_SAMPLER = "prompts are drawn by the method's own sampler, which keeps groups whole"
_OWN_CHECKPOINTING = "blocks are run again under the role of their forward, which leaves nothing to choose"
_SCRIPT = "it is for scripts, which ask for it themselves: call train(), evaluate() or sample()"
_SHARDS = "start plain processes with 'accelerate launch' or torchrun; fsdp=True shares out the frozen base"

UNSUPPORTED = {
    "fp16": "its range is too small for scores; use bf16=True",
    **dict.fromkeys(("fp16_full_eval", "bf16_full_eval"), "evaluation runs in the precision of the training; use bf16"),
    **dict.fromkeys(("label_smoothing_factor", "label_names", "include_for_metrics"), _NO_LABELS),
    "neftune_noise_alpha": "it adds noise to the embeddings of a language model, and text encoders are not trained",
    "auto_find_batch_size": "a smaller batch is another run; 'rdm-sdk plan' says beforehand what fits",
    "optim_target_modules": "it is for optimizers of full language models; peft_config.target_modules names layers",
    "average_tokens_across_devices": _NO_TOKENS,
    "include_num_input_tokens_seen": _NO_TOKENS,
    **dict.fromkeys(("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"), _OWN_CHECKPOINTING),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config", "use_cache"), "it is for language models"),
    **dict.fromkeys(("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"), _OWN_EVALUATION),
    **dict.fromkeys(("eval_accumulation_steps", "batch_eval_metrics"), _OWN_EVALUATION),
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C save a checkpoint in any case",
    "ignore_data_skip": "a resumed run is the uninterrupted one, so it goes on with the prompts that come next",
    "accelerator_config": "groups of samples stay whole, which the default settings alone do",
    **dict.fromkeys(("parallelism_config", "deepspeed"), _SHARDS),
    "dataloader_persistent_workers": "workers that outlive an epoch draw their seed once, those of a resumed run again",
    "dataloader_in_order": "rollouts that are used again, and resumed runs, need the batches in their order",
    "remove_unused_columns": "prompts and the columns that rewards ask for would go",
    **dict.fromkeys(("train_sampling_strategy", "length_column_name"), _OWN_SAMPLER),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb"), _OWN_GRADIENTS),
    **dict.fromkeys(("ddp_broadcast_buffers", "ddp_static_graph"), _OWN_GRADIENTS),
    "debug": "what it hooks into is not what is run",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _SCRIPT),
}
"""Setting of transformers, in any of its versions, to why it cannot be set and what to do."""


def check_inherited(config: Any) -> None:
    """Raise `ConfigError` for the first setting of `UNSUPPORTED` that is not as the class has it.

    Transformers must not have rewritten yet what was given.
    """
    for spec in fields(config):
        if spec.name not in UNSUPPORTED:
            continue
        value = getattr(config, spec.name)
        default = default_of(spec)
        evaluates = spec.name == "do_eval" and config.eval_strategy != "no"  # then transformers sets it itself
        if value != default and not (_is_nothing(value) and _is_nothing(default)) and not evaluates:
            raise ConfigError(f"{spec.name}={value!r} is not supported: {UNSUPPORTED[spec.name]}. Leave it out")


def _is_nothing(value: object) -> bool:
    """Return whether a value means that nothing was asked for, as given or as transformers has rewritten it."""
    from transformers.trainer_pt_utils import AcceleratorConfig

    return value in (None, False, "", "no") or value in ([], {}) or value == AcceleratorConfig()


def chosen_settings(config: Any) -> dict[str, Any]:
    """Return the settings of an `RDMConfig` that are not as the class has them, as plain values."""
    plain: dict[str, Any] = config.to_dict()  # with plain values in the place of enums
    chosen = {}
    for spec in fields(config):
        name, value, default = spec.name, plain.get(spec.name), default_of(spec)
        # `to_dict` writes a mask even where there is no secret.
        if not spec.init or name in UNSUPPORTED or getattr(config, name) == default:
            continue
        if name.endswith("_checkpointing") and not value:  # which transformers makes of None
            continue
        if name == "report_to":
            chosen[name] = value or "none"
        elif value != getattr(default, "value", default) and not (value in (None, [], {}) and not default):
            chosen[name] = value
    return chosen


def name_checkpointing(config: Any) -> None:
    """Give activation checkpointing its older name, the only one that earlier versions of transformers know.

    There, either of the two names turns it on. Transformers must not have rewritten yet what was given.
    """
    if not hasattr(TrainingArguments, "activation_checkpointing"):
        config.gradient_checkpointing = bool(config.activation_checkpointing or config.gradient_checkpointing)
        config.activation_checkpointing = config.gradient_checkpointing
