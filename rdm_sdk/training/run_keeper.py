"""The checkpoints of one run: found and checked when it is resumed, written whole while it trains."""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from datasets import Dataset
from filelock import FileLock, Timeout
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from rdm_sdk.errors import CheckpointError, ConfigError
from rdm_sdk.training import checkpoint, checkpoint_folders
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.export import move_into
from rdm_sdk.training.identity import RunIdentity, prompts_digest, run_settings
from rdm_sdk.training.models import RunModels
from rdm_sdk.training.rollouts import rollouts_path, write_rollouts
from rdm_sdk.training.run_log import LOG, LogFile, check_own, whole_history
from rdm_sdk.training.step import DistillationStep

logger = logging.getLogger(__name__)

LOCK = ".rdm-sdk.lock"
"""A file in the output folder that is locked by the run that trains in it; the system frees it if that run dies."""


class RunKeeper:
    """Keeps a run's state on disk: a step's rollouts, weighting and counters, and the networks.

    `wait` returns when all processes have called it.
    """

    def __init__(
        self,
        args: RDMConfig,
        step: DistillationStep,
        models: RunModels,
        dataset: Dataset | None,
        wait: Callable[[], None],
    ) -> None:
        self.args, self.step, self.models, self.wait = args, step, models, wait
        read = [reward.capabilities for reward in step.judge.rewards]
        self.identity = RunIdentity(
            step.processes.gather(uuid.uuid4().hex)[0],
            models.family.fingerprint(),
            prompts_digest(dataset, (name for each in read for name in (*each.columns, *each.reads))),
            step.processes.count,
            run_settings(args),
        )
        self.records = self.output_dir
        """Where the run's log, settings and pictures go."""
        self.log = LogFile(self.records / LOG)
        self._found: checkpoint.RunState | None = None
        self._folder: Path | None = None
        self._best: str | None = None
        """The best checkpoint so far of a run that goes on."""

    @property
    def output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the output folder for the block: another run would remove what this one is about to name a checkpoint.

        Raises:
            ConfigError: another run trains in it.
        """
        processes, lock, taken = self.step.processes, FileLock(self.output_dir / LOCK, blocking=False), False
        if processes.index == 0:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                taken = True
        try:
            if any(processes.gather(taken)):
                raise ConfigError(
                    f"another run is training in output_dir={str(self.output_dir)!r}: wait for its end or stop it, or "
                    "give this one a folder of its own"
                )
            yield
        finally:
            if lock.is_locked:
                (self.output_dir / LOCK).unlink(missing_ok=True)  # held to the last, so it is this run's
                lock.release()

    def begin(self, wanted: str | bool | None) -> Path | None:
        """Return the checkpoint that the run goes on from, whole and of this run; None where it starts afresh.

        Raises:
            CheckpointError: see `checkpoint.find` and `checkpoint.check`; or the run is to end with its best
                checkpoint, which is gone; or the output folder holds checkpoints of another run, or a file that is in
                the place of the log and is none.
        """
        self.step.forget()  # of a train() before that has failed
        self.models.watch.end()
        if self.args.should_save:
            checkpoint_folders.clean(self.output_dir)
        self.wait()
        folder = self._folder = checkpoint.find(wanted, self.output_dir)
        self._found = None
        if folder is not None:
            mine = checkpoint.capture(self.step, self.models, self.identity)
            self._found = checkpoint.check(folder, mine, self.step.processes.index)
            self.identity = replace(self.identity, run=self._found.identity.run)
            self._best = self._find_best(folder)
        if self.args.save_strategy != SaveStrategy.NO:
            # Where it starts afresh, what this trainer wrote in a train() before is of another run, too.
            mine_there = None if folder is None else self.identity.run
            checkpoint_folders.refuse_other_runs(self.output_dir, mine_there)
        self.records = self._place_of_records()
        self.log.path = self.records / LOG
        check_own(self.log.path)
        return folder

    def _find_best(self, folder: Path) -> str | None:
        """Return where the best checkpoint so far is: beside the one that the run goes on from, or where it was.

        Folders are copied and moved, to other machines too, and the state names its place when it was written.
        """
        recorded = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).best_model_checkpoint
        if recorded is None:
            return None
        for place in (folder.parent / Path(recorded).name, Path(recorded)):
            if checkpoint_folders.is_of_run(place, self.identity.run):
                return recorded if place.resolve() == Path(recorded).resolve() else str(place)
        if self.args.load_best_model_at_end:
            raise CheckpointError(
                f"the best checkpoint so far of the run that {str(folder)!r} is of is neither beside it nor at "
                f"{recorded!r}, and load_best_model_at_end wants it in the end. Copy {Path(recorded).name} there, or "
                "set load_best_model_at_end=False"
            )
        return None

    def _place_of_records(self) -> Path:
        """Return the output folder, or one in it where it holds checkpoints of another run: the log there is theirs."""
        others = checkpoint_folders.of_other_runs(self.output_dir, self.identity.run)
        if not others:
            return self.output_dir
        place = self.output_dir / f"run-{self.identity.run[:8]}"
        if self.args.should_save:
            logger.warning(
                f"{str(self.output_dir)!r} holds {others[0]} of another run, whose log and settings stay; those of "
                f"this run, which saves no checkpoints, go into {str(place)!r}"
            )
        return place

    def restore(self, folder: str) -> None:
        """Put the weights, rollouts and counters of the checkpoint that `begin` returned in place."""
        if self._found is None:
            raise CheckpointError("a checkpoint is loaded through train(resume_from_checkpoint=...)")
        self.load_weights(folder)
        checkpoint.restore(self.step, self.models, self._found, Path(folder))

    def restore_finished(self, folder: str, state: TrainerState) -> None:
        """Put in place what a run has at its end whose last checkpoint is this one: its best weights, if it wants them.

        So a job that is started once more exports what it would have exported.
        """
        self.restore(folder)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load_weights(state.best_model_checkpoint)

    def begin_log(self, state: TrainerState) -> None:
        """Put all that the run has logged into Trainer's state, and let its file begin with that."""
        if self._folder is not None:
            state.log_history = whole_history(state.log_history, self._folder.parent / LOG)
            if state.best_model_checkpoint != self._best:
                state.best_model_checkpoint = self._best
                logger.warning(f"the best checkpoint so far is {self._best!r}")
        if self.args.should_save:
            self.log.begin(state.log_history)

    def load_weights(self, folder: str) -> None:
        """Put the weights and the moving average of a checkpoint in place."""
        self.models.load_average(checkpoint.load_weights(folder, self.models.family), folder)

    def finished(self, folder: Path) -> TrainerState | None:
        """Return the state of a checkpoint that is of the run's last step; None where steps are left."""
        state: TrainerState = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        if not 0 < self.args.max_steps <= state.global_step:
            return None
        state.log_history = whole_history(state.log_history, folder.parent / LOG)
        state.best_model_checkpoint = self._best
        logger.warning(
            f"{str(folder)!r} is of step {state.global_step} of {self.args.max_steps}: nothing is left to do"
        )
        return state

    @contextmanager
    def writing(self, state: TrainerState, output_dir: Path) -> Iterator[Path]:
        """Give the folder to write a checkpoint of Trainer's state into; it counts from the end of the block on.

        Of the run's log, it gets the end. Older checkpoints that are too many go then.
        """
        step, save = state.global_step, self.args.should_save
        self.step.processes.note("writing a checkpoint")
        with (
            checkpoint_folders.writing(output_dir, step, self.identity.run, save, self.wait) as folder,
            self.log.shortened(state),
        ):
            yield folder
            if state.best_global_step == step:
                state.best_model_checkpoint = str(output_dir / f"checkpoint-{step}")  # where it will be
                if save:
                    state.save_to_json(str(folder / f"checkpoint-{step}" / TRAINER_STATE_NAME))
        if save:
            keep = [state.best_model_checkpoint, f"checkpoint-{step}"]
            checkpoint_folders.rotate(output_dir, self.identity.run, self.args.save_total_limit, keep)

    def write_state(self, target: Path) -> None:
        """Write what a checkpoint keeps beside the export and Trainer's own files; each process its own rollouts."""
        if self.args.should_save:
            with tempfile.TemporaryDirectory(dir=target, prefix=".state-") as scratch:
                checkpoint.save_state(Path(scratch), self.step, self.models, self.identity)
                move_into(Path(scratch), target)
        write_rollouts(rollouts_path(target, self.args.process_index), self.step.rollouts.stored)
