"""Prompts: where they come from, and how groups are formed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from rdm_sdk.errors import DataError, nearest
from rdm_sdk.rewards.base import RESERVED_COLUMNS
from rdm_sdk.training.prompt_files import read_prompt_file

if TYPE_CHECKING:
    from rdm_sdk.training.config import RDMConfig


def load_prompts(source: object, argument: str = "train_dataset") -> Dataset:
    """Turn a dataset with a `prompt` column, a list of strings, or the path of a file into a `Dataset`.

    Files are read by their suffix (`read_prompt_file`).

    Raises:
        DataError: no prompts, an empty prompt, no `prompt` column, a column that rewards could take for something
            else, or a file that is missing or cannot be read.
    """
    if isinstance(source, (str, Path)):
        source = read_prompt_file(Path(source).expanduser(), argument)
    if isinstance(source, Sequence):
        _check_texts(source, argument)
        source = Dataset.from_dict({"prompt": list(source)})
    if not isinstance(source, Dataset):
        raise DataError(
            f"{argument} must be a datasets.Dataset with a 'prompt' column, a list of strings or the path of a file; "
            f"got {type(source).__name__}"
        )
    if len(source) == 0:
        raise DataError(f"{argument} holds no prompts; give at least one")
    if "prompt" not in source.column_names:
        found = ", ".join(source.column_names)
        raise DataError(
            f"{argument} has no column 'prompt' (it has: {found}).{nearest('prompt', source.column_names)} Rename the "
            "column that holds the prompts."
        )
    for name in RESERVED_COLUMNS:
        if name in source.column_names:
            raise DataError(f"{argument} has a column {name!r}, which is what rewards are given; rename it")
    # Tensors and arrays have no None, "torch" makes it NaN; a custom format is a transform of the user's.
    plain: Dataset = source if source.format["type"] in (None, "custom") else source.with_format(None)
    _check_texts(plain["prompt"], argument)
    return plain


def _check_texts(prompts: Iterable[object], argument: str) -> None:
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{argument}: prompt {row} must be a text that is not empty; got {prompt!r}")


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Turn dataset rows into `{"prompts": [...], "columns": {name: [...]}}`."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    return {"prompts": [row["prompt"] for row in rows], "columns": columns}


class GroupSampler(Sampler[int]):
    """Indices of a shuffled epoch, each repeated `group_size` times, padded so that every batch is full.

    The prompts of an optimizer step come `num_iterations` times, for as many uses of their rollouts. An epoch's order
    depends on `seed` and `epoch` alone, so that a resumed run sees what it would have seen.
    """

    def __init__(
        self, num_prompts: int, group_size: int, prompts_per_step: int, seed: int, num_iterations: int = 1
    ) -> None:
        self.num_prompts, self.group_size, self.seed = num_prompts, group_size, seed
        self.prompts_per_step, self.num_iterations = prompts_per_step, num_iterations
        self.padded = -(-num_prompts // prompts_per_step) * prompts_per_step
        self.epoch = 0

    def __len__(self) -> int:
        return self.padded * self.group_size * self.num_iterations

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = []
        while len(order) < self.padded:
            order += torch.randperm(self.num_prompts, generator=generator).tolist()
        for start in range(0, self.padded, self.prompts_per_step):
            for _ in range(self.num_iterations):
                for index in order[start : start + self.prompts_per_step]:
                    yield from [index] * self.group_size


def group_sampler(args: RDMConfig, num_prompts: int) -> GroupSampler:
    """Return the sampler of a run for so many prompts."""
    groups = args.per_device_train_batch_size // args.num_generations
    together = groups * args.world_size * args.gradient_accumulation_steps
    seed = args.seed if args.data_seed is None else args.data_seed
    return GroupSampler(num_prompts, args.num_generations, together, seed, args.num_iterations)
