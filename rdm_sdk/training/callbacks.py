"""What happens around an optimizer step: compiling, epochs, moving average, pictures, and what the console shows."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from accelerate.utils.memory import clear_device_cache
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from rdm_sdk.families.compiled import compile_networks, compiling_seconds
from rdm_sdk.training.accelerated import leave_unwrapped
from rdm_sdk.training.pictures import logged_pictures, too_many
from rdm_sdk.training.run_record import RunRecord
from rdm_sdk.training.trackers import TellTrackers
from rdm_sdk.training.watch import Watch
from rdm_sdk.training.weighting import STRATEGIES

if TYPE_CHECKING:
    from rdm_sdk.training.trainer import RDMTrainer

logger = logging.getLogger(__name__)

WHAT_TO_WATCH = (
    "What to watch: 'gap', how far teacher and critic are apart (mean square), falls once the critic has learned; "
    "'diversity', how different a prompt's samples are, stays; rewards are in their own units, higher is better. All "
    "figures go to the trackers and into log.jsonl."
)

_TRACKED = re.compile(
    r"loss|grad_norm|learning_rate|epoch|total_flos|frac_reward_zero_std|(loss|weights|weighting|ratio|cost|rewards)/.*"
    r"|.*/(pull|critic_grad_norm|residual|critic_loss|gap|error|lag|distance)|student/.*|(.*_)?(runtime|per_second|loss)"
)
"""The names of a run's figures; the line shows the few that are named below."""


def log_line(logs: Mapping[str, Any], step: int, max_steps: int) -> str:
    """Return what a person reads of a log at a glance, on one line; what a user's callback logs is kept."""
    if "train_runtime" in logs:
        return f"trained to step {step} in {logs['train_runtime']:.0f} s"

    def each(pattern: str) -> list[tuple[str, Any]]:
        found = [(re.fullmatch(pattern, name), value) for name, value in logs.items()]
        return [(match[1], value) for match, value in found if match]

    residuals = dict(each("(.+)/residual"))
    # The score of a reward with a residual is a ratio of log-densities, whose level says nothing.
    scores = [(name, value) for name, value in each("rewards/(.+)/mean") if name not in residuals]
    parts = [f"step {step}/{max_steps}"]
    parts += [f"{name} gap {value:.3g}" for name, value in each("(.+)/gap")]
    parts += [f"{name} distance {value:.3g}" for name, value in each("(.+)/distance")]
    parts += [f"diversity {value:.3g}" for _, value in each("(student/diversity)")]
    parts += [f"{name} {value:.4g}" for name, value in scores]
    parts += [f"evaluation: {name} {value:.4g}" for name, value in each("eval_rewards/(.+)/mean")]
    parts += [f"{name} skipped {value:.0%}" for name, value in each("rewards/(.+)/skipped") if value]
    parts += [f"{name} critic loss {value:.3g}" for name, value in each("(.+)/critic_loss")]
    parts += [f"effective samples {value:.0%}" for _, value in each("(ratio/ess)")]
    parts += [f"{name} {value}" for name, value in logs.items() if not _TRACKED.fullmatch(name.removeprefix("eval_"))]
    return " | ".join(parts)


class ConsoleLog(TrainerCallback):
    """Prints the few figures that a person watches, in place of a dictionary of all."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            tqdm.write(WHAT_TO_WATCH)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            tqdm.write(log_line(logs, state.global_step, state.max_steps))


class ProgressBar(ProgressCallback):
    """The bar alone; `ConsoleLog` prints."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Print nothing."""


def speak_plainly(trainer: Trainer) -> None:
    """Put `ConsoleLog` in the place of what transformers prints on a console; notebooks keep their table."""
    bar, printer = trainer.pop_callback(ProgressCallback), trainer.pop_callback(PrinterCallback)
    if bar is not None:
        trainer.add_callback(ProgressBar())
    if bar is not None or printer is not None:
        trainer.add_callback(ConsoleLog())


class Compiling(TrainerCallback):
    """Compiles the networks under the roles, where the settings ask for it, and tells once what it took."""

    def __init__(self) -> None:
        self._before = 0.0
        self._told = False

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        if not args.torch_compile:
            return
        compile_networks([model.backbone, *model.copies.values()], args.torch_compile_backend, args.torch_compile_mode)
        # Otherwise accelerate compiles what holds the roles, which nobody calls.
        AcceleratorState().dynamo_plugin.backend = DynamoBackend.NO
        self._before = compiling_seconds()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.torch_compile and not self._told and state.is_world_process_zero:
            self._told = True
            tqdm.write(
                f"torch_compile: compiling with {args.torch_compile_backend!r} took "
                f"{compiling_seconds() - self._before:.0f} s of the first step; another shape of inputs, such as those "
                "of samples for an evaluation, is compiled when it first comes"
            )


def will_log(args: Any, state: TrainerState) -> bool:
    """Return whether the coming optimizer step is one that Trainer logs, or may be: at epochs, any may be the last."""
    if args.logging_strategy != IntervalStrategy.STEPS:
        return bool(args.logging_strategy == IntervalStrategy.EPOCH)
    step = state.global_step + 1
    return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)


class Bookkeeper(TrainerCallback):
    """Epochs for the sampler, which rewards judge a step, the moving average, free memory, pictures."""

    def __init__(self, trainer: RDMTrainer, trackers: TellTrackers) -> None:
        self.trainer, self.trackers = trainer, trackers

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.fsdp:
            leave_unwrapped(self.trainer.accelerator)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer._sampler is not None:
            self.trainer._sampler.epoch = int(state.epoch or 0)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A weighting that is not one of ours may go by what rewards without weight do.
        by_weights = type(self.trainer.weighting) in STRATEGIES.values()
        self.trainer.judge.watching = not by_weights or will_log(args, state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.models.move_average()
        if args.torch_empty_cache_steps and state.global_step % args.torch_empty_cache_steps == 0:
            clear_device_cache()
        due = args.log_images and state.global_step % args.log_images == 0
        if due and (args.should_save or self.trainer.roles.sharded):
            try:
                self._picture(args, state.global_step)
            except OSError as error:  # as of a full disk: steps since the last checkpoint are worth more
                logger.warning(f"the pictures of step {state.global_step} could not be written: {error}")

    def _picture(self, args: Any, step: int) -> None:
        path = self.trainer.write_images(self.trainer.keeper.records / "images" / f"step_{step:06d}.png")
        if not args.should_save:
            return
        if self.trainer.is_world_process_zero():  # nobody else has trackers; `save_on_each_node` lets more write
            self.trackers.show(path, step)
        if args.log_images_limit is not None:
            # Those of later steps are of a run that was taken back.
            until = {at: picture for at, picture in logged_pictures(path.parent) if at <= step}
            for at in too_many(list(until), args.log_images, args.log_images_limit):
                until[at].unlink()


def run_callbacks(trainer: RDMTrainer) -> list[TrainerCallback]:
    """Return the callbacks of every run, in their order."""
    trackers = TellTrackers(trainer)
    # The log's file is the last: what the watch finds is a row of it.
    return [Compiling(), Bookkeeper(trainer, trackers), trackers, Watch(trainer), RunRecord(trainer)]
