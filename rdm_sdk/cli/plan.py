"""The command line for planning: `rdm-sdk plan` says what memory a run takes, before anything is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from rdm_sdk.errors import ConfigError

_HELP = "memory that a training run takes, per part, from configs alone; exit status 1 if it does not fit"
_NUMBERS: dict[str, tuple[type, str]] = {
    "num_generations": (int, "samples per prompt"),
    "gradient_accumulation_steps": (int, "micro-batches per optimizer step"),
    "num_iterations": (int, "student updates per rollout"),
    "num_inference_steps": (int, "steps of the student"),
    "height": (int, "image height in pixels; the model's own by default"),
    "width": (int, "image width in pixels; the model's own by default"),
    "max_sequence_length": (int, "text tokens per prompt; that of the pipeline's call by default"),
    "guidance_scale": (float, "guidance of the teacher; 1 is none"),
    "reward_batch_size": (int, "samples that rewards judge at a time"),
    "ema_decay": (float, "decay of the student's moving average; 0 is none"),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "quantization": ("none", "8bit", "4bit"),
    "text_encoders": ("keep", "offload", "drop"),
    "student_weights": ("lora", "full"),
    "critic_weights": ("lora", "full"),
}
_SWITCHES = ("vae_offload", "vae_slicing", "vae_tiling", "reward_offload")


def add_command(commands: Any) -> None:
    """Add `plan` to the parser's subparsers. Settings have the names that `train` knows them by."""
    plan = commands.add_parser("plan", help=_HELP, description=_HELP, argument_default=argparse.SUPPRESS)
    plan.add_argument("--model", required=True, help="a hub id, a local path, or 'digits' for the embedded teacher")
    plan.add_argument(
        "--batch", type=int, required=True, dest="per_device_train_batch_size", help="samples per micro-batch"
    )
    plan.add_argument("--rewards", default="dm", help="reward spec, such as 'dm + 0.5*clip'")
    plan.add_argument("--lora_r", type=int, default=16, help="LoRA rank of the student and the critic")
    plan.add_argument(
        "--memory",
        type=float,
        default=None,
        help="GB (2^30 bytes) that it must fit into; by default this GPU's, if any",
    )
    precision = plan.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true", help="base in bfloat16")
    precision.add_argument("--fp32", action="store_false", dest="bf16", help="base in float32, the default")
    plan.add_argument("--optim", help="the optimizer, as transformers names it, such as adamw_8bit")
    for name, (kind, text) in _NUMBERS.items():
        plan.add_argument(f"--{name}", type=kind, help=text)
    for name, choices in _CHOICES.items():
        plan.add_argument(f"--{name}", choices=choices)
    plan.add_argument(
        *("--activation_checkpointing", "--gradient_checkpointing"),
        action="store_true",
        dest="activation_checkpointing",
        help="run blocks again in the backward pass",
    )
    for name in _SWITCHES:
        plan.add_argument(f"--{name}", action="store_true")
    plan.set_defaults(run=print_plan)


def print_plan(options: argparse.Namespace) -> int:
    """Print the plan, and what would help where it does not fit; returns the exit status."""
    from peft import LoraConfig

    from rdm_sdk.digits import teacher_path
    from rdm_sdk.planning.advice import Run, advise
    from rdm_sdk.planning.plan import GB, Planner

    given = {name: value for name, value in vars(options).items() if name not in _OWN}
    if options.memory is not None and not options.memory > 0:
        raise ConfigError(f"--memory must be a positive number of GB; got {options.memory}")
    if options.lora_r < 1:
        raise ConfigError(f"--lora_r must be at least 1; got {options.lora_r}")
    lora = LoraConfig(r=options.lora_r, lora_alpha=16)
    full = given.get("student_weights") == "full", given.get("critic_weights") == "full"
    run = Run(
        Planner(teacher_path() if options.model == "digits" else options.model),
        _config(given),
        options.rewards,
        None if full[0] else lora,
        None if full[1] or not full[0] else lora,
    )
    plan = run.plan()
    print(plan)
    if plan.unknown:
        print(f"unknown, and not in the total: {', '.join(plan.unknown)}")
    memory = _memory_here() if options.memory is None else options.memory * GB
    if memory is None:
        return 0
    if plan.total <= memory:
        print(f"\nfits into {memory / GB:.2f} GB")
        return 0
    print(f"\ndoes not fit into {memory / GB:.2f} GB; {advise(run, int(memory))}")
    return 1


_OWN = ("command", "run", "model", "rewards", "lora_r", "memory")
"""Options that are no settings of `RDMConfig`."""


def _config(given: dict[str, Any]) -> Any:
    """Return the settings of a run on a GPU; there need be none here, so they are checked as those of a CPU."""
    from rdm_sdk.training.config import RDMConfig

    try:
        return RDMConfig(use_cpu=True, report_to="none", **given)
    except ConfigError:
        raise
    except ValueError as error:  # of transformers, such as an unknown optimizer
        raise ConfigError(" ".join(str(error).split())) from error


def _memory_here() -> int | None:
    """Return the memory of this machine's GPU in bytes, None where there is none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
