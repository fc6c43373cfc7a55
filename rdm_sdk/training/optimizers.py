"""The critics' optimizer: beside the student's, which Trainer makes, with another rate and schedule."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.training_args import OptimizerNames

from rdm_sdk.errors import CheckpointError, ConfigError
from rdm_sdk.families.roles import STUDENT, Roles
from rdm_sdk.training.config import RDMConfig

EMBEDDING_RATE = 10.0
"""How much faster a critic learns what it is told of the student's step than its other weights. The vectors start at
zero and have to tell the steps apart before the critic can; a factor of 1 left it at the mixture for most of a run."""


CRITIC_RATE = 2.0
"""The critics' learning rate where none is set, in student's: the faster they follow, the less `dm` is off."""


OF_CRITICS = ("learning_rate", "adam_beta1", "adam_beta2", "weight_decay", "lr_scheduler_type", "lr_scheduler_kwargs")
"""Settings that critics have of their own, with `critic_` before each; one that is None follows the student's."""


BY_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedules that are told a metric with each step."""


def critic_settings(args: RDMConfig) -> RDMConfig:
    """Return the settings with the critics' optimizer in the student's place."""
    settings = copy.copy(args)
    settings.learning_rate = CRITIC_RATE * args.learning_rate
    if args.critic_lr_scheduler_type not in (None, SchedulerType(args.lr_scheduler_type).value):
        settings.lr_scheduler_kwargs = None  # options of another schedule
    for name in OF_CRITICS:
        value = getattr(args, f"critic_{name}")
        if value is not None:
            setattr(settings, name, value)
    return settings


def check_optimizer(args: RDMConfig) -> None:
    """Raise `ConfigError` for an optimizer that cannot be made here, and for options that it does not read."""
    name = OptimizerNames(args.optim).value
    if name.startswith("schedule_free"):
        raise ConfigError(
            f"optim={name!r} cannot be used: it has two sets of weights, and is not told when the student is sampled; "
            "take another optimizer, whose weights ema_decay averages"
        )
    given = "" if args.optim_args is None else f" with optim_args={args.optim_args!r}"
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        kind([torch.zeros(1, requires_grad=True)], **options)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"optim={name!r}{given} cannot be used here: {error}") from error
    for option in _names_of_options(args):
        if option == "weight_decay":
            raise ConfigError(f"optim_args={args.optim_args!r}: set the weight decay by weight_decay")
        if not _reads(args, option):
            raise ConfigError(
                f"optim_args={args.optim_args!r}: transformers passes no {option!r} on to optim={name!r}, so that it "
                "would change nothing; leave it out. Rates, betas, epsilon and weight decay have settings of their own"
            )


def _names_of_options(args: RDMConfig) -> list[str]:
    return [part.split("=")[0] for part in (args.optim_args or "").replace(" ", "").split(",") if part]


def _reads(args: RDMConfig, option: str) -> bool:
    """Return whether an optimizer's options hang on one of `optim_args`: transformers says nothing of the others."""
    without, odd = copy.copy(args), copy.copy(args)
    without.optim_args, odd.optim_args = None, f"{option}=?"  # which is nobody's default
    try:
        return bool(Trainer.get_optimizer_cls_and_kwargs(odd) != Trainer.get_optimizer_cls_and_kwargs(without))
    except (ValueError, TypeError, AttributeError):  # it is read, as a number or a name
        return True


def check_schedules(args: RDMConfig, critics: bool) -> None:
    """Raise `ConfigError` for a schedule whose options are not its own, and for one of critics that goes by a metric.

    `critics` says whether the run has any.
    """
    for prefix, settings in [("", args), ("critic_", critic_settings(args))][: 1 + critics]:
        kind = SchedulerType(settings.lr_scheduler_type).value
        if prefix and kind in BY_METRIC:
            raise ConfigError(
                f"critic_lr_scheduler_type={kind!r} goes by a metric, and the critics' rate moves with every optimizer "
                "step of the student; set critic_lr_scheduler_type to another, such as 'linear'"
            )
        weights = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
        options: Any = settings.lr_scheduler_kwargs
        try:
            get_scheduler(kind, weights, 0, max(args.max_steps, 1), options)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{prefix}lr_scheduler_kwargs={options!r} cannot be used with {prefix}lr_scheduler_type={kind!r}: "
                f"{error}. Set options that fit, or another schedule, such as 'constant'"
            ) from error


def critic_groups(roles: Roles, learning_rate: float) -> list[dict[str, Any]]:
    """Return the parameters of all critics in groups for an optimizer of PyTorch, each with its rate.

    What tells critics the student's step learns `EMBEDDING_RATE` times as fast as all else.
    """
    critics = [role for role in roles.trainable_roles if role != STUDENT]
    embeddings = [p for role in critics for p in roles.embedding_parameters_of(role).values()]
    apart = set(map(id, embeddings))
    weights = [p for role in critics for p in roles.parameters_of(role).values() if id(p) not in apart]
    groups = ((weights, learning_rate), (embeddings, EMBEDDING_RATE * learning_rate))
    return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]


class CriticOptimizer:
    """Optimizer and schedule of all critics of a run that has some."""

    schedule: torch.optim.lr_scheduler.LRScheduler

    def __init__(self, args: RDMConfig, roles: Roles) -> None:
        self.settings = critic_settings(args)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(self.settings)
        decay = {"weight_decay": self.settings.weight_decay}
        groups = [group | decay for group in critic_groups(roles, self.settings.learning_rate)]
        self.optimizer: torch.optim.Optimizer = kind(groups, **options)

    def begin(self, num_training_steps: int) -> None:
        """Start the schedule of a run of so many optimizer steps of the student."""
        settings = self.settings
        options: Any = settings.lr_scheduler_kwargs
        self.schedule = get_scheduler(
            settings.lr_scheduler_type,
            self.optimizer,
            settings.get_warmup_steps(num_training_steps),
            num_training_steps,
            options,
        )

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def step(self) -> None:
        """Update the critics' weights and let go of their gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def next_rate(self) -> None:
        """Move the schedule on by one optimizer step of the student."""
        self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned, with the rates and options of this run's settings."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        restart_rates(self.settings, self.optimizer, self.schedule, [1.0, EMBEDDING_RATE])


def restart_rates(args: RDMConfig, optimizer: Any, schedule: Any, factors: Sequence[float] = (1.0,)) -> None:
    """Let the rate, decay and betas of the settings count in the place of those that a checkpoint has restored.

    The settings are as the optimizer sees them, whose state is restored. The schedule is theirs too, restored as far as
    where it stands: it may have another length or shape now. `factors` are of the rate, per group of parameters.

    Raises:
        CheckpointError: the rate has changed, and this kind of schedule keeps it to itself.
    """
    options = Trainer.get_optimizer_cls_and_kwargs(args)[1] | {"weight_decay": args.weight_decay}
    options.pop("lr")
    schedule = getattr(schedule, "scheduler", schedule)  # out of accelerate's wrapping
    groups = optimizer.param_groups
    for group in groups:
        group.update({name: value for name, value in options.items() if name in group})
    rates = [args.learning_rate * factor for factor, _ in zip(factors, groups, strict=False)]
    if not isinstance(schedule, LambdaLR):
        if rates == [group.get("initial_lr", args.learning_rate) for group in groups]:
            return
        raise CheckpointError(
            f"the learning rate cannot change when a run with lr_scheduler_type={args.lr_scheduler_type!r} is resumed"
        )
    schedule.base_lrs = list(rates)
    for group, rate, multiplier in zip(groups, rates, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = rate
        group["lr"] = rate * multiplier(schedule.last_epoch)
