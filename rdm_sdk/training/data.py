"""Prompts: where they come from, how groups are formed, and their cached encodings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from rdm_sdk.errors import ConfigError, DataError, nearest
from rdm_sdk.rewards.base import RESERVED_COLUMNS
from rdm_sdk.training.prompt_files import read_prompt_file
from rdm_sdk.types import Condition

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
    _check_texts(source["prompt"], argument)
    return source


def all_prompts(*datasets: Dataset | None) -> list[str]:
    """Return every prompt of some datasets, each once, in order."""
    given = [dataset for dataset in datasets if dataset is not None]
    return list(dict.fromkeys(prompt for dataset in given for prompt in dataset["prompt"]))


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

    The prompts of `reuse_interval` optimizer steps come `num_iterations` times, one step after the other and
    around again, for as many uses of their rollouts. An epoch's order depends on `seed` and `epoch` alone, so that a
    resumed run sees what it would have seen.
    """

    def __init__(
        self,
        num_prompts: int,
        group_size: int,
        prompts_per_step: int,
        seed: int,
        num_iterations: int = 1,
        reuse_interval: int = 1,
    ) -> None:
        self.num_prompts, self.group_size, self.seed = num_prompts, group_size, seed
        self.together, self.num_iterations = prompts_per_step * reuse_interval, num_iterations
        whole = self.together if num_iterations > 1 else prompts_per_step
        self.padded = -(-num_prompts // whole) * whole
        self.epoch = 0

    def __len__(self) -> int:
        return self.padded * self.group_size * self.num_iterations

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = []
        while len(order) < self.padded:
            order += torch.randperm(self.num_prompts, generator=generator).tolist()
        for start in range(0, self.padded, self.together):
            for _ in range(self.num_iterations):
                for index in order[start : min(start + self.together, self.padded)]:
                    yield from [index] * self.group_size


def group_sampler(args: RDMConfig, num_prompts: int) -> GroupSampler:
    """Return the sampler of a run for so many prompts."""
    groups = args.per_device_train_batch_size // args.num_generations
    together = groups * args.world_size * args.gradient_accumulation_steps
    seed = args.seed if args.data_seed is None else args.data_seed
    reuse = args.num_iterations, args.reuse_interval
    return GroupSampler(num_prompts, args.num_generations, together, seed, *reuse)


class PromptCache:
    """Encoded prompts, the most recently used ones kept (on the CPU), so that an epoch encodes each prompt once.

    Args:
        encode: encodes a list of prompts, None being no prompt.
        device: where conditions are needed.
        capacity: how many prompts are kept; None is all.
        encoded: called after new prompts were encoded.
    """

    def __init__(
        self,
        encode: Callable[[list[str | None]], Condition],
        device: torch.device,
        capacity: int | None = 256,
        encoded: Callable[[], None] = lambda: None,
    ) -> None:
        self._encode, self._device, self._capacity, self._encoded = encode, device, capacity, encoded
        self._rows: OrderedDict[str | None, Condition] = OrderedDict()

    def __call__(self, prompts: Sequence[str | None]) -> Condition:
        """Return the condition of the prompts, `[N, ...]`, in their order."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        for prompt in new:
            # One at a time: in a batch, an encoding's last bits depend on the prompts beside it, and a resumed run,
            # which starts with an empty cache, would not repeat the uninterrupted one.
            self._rows[prompt] = {name: tensor[0].cpu() for name, tensor in self._encode([prompt]).items()}
        if new:
            self._encoded()
        rows = [self._rows[prompt] for prompt in prompts]
        for prompt in prompts:
            self._rows.move_to_end(prompt)
        while self._capacity is not None and len(self._rows) > self._capacity:
            self._rows.popitem(last=False)
        return {name: torch.stack([row[name] for row in rows]).to(self._device) for name in rows[0]}

    def bytes_per_prompt(self) -> int:
        """Return how much memory a prompt that is kept takes (the last one's)."""
        return sum(tensor.numel() * tensor.element_size() for tensor in next(reversed(self._rows.values())).values())

    def close(self, reason: str) -> None:
        """Answer for the prompts that are kept alone from now on; others raise a `ConfigError` with the reason."""

        def refuse(prompts: list[str | None]) -> Condition:
            raise ConfigError(f"the prompt {prompts[0]!r} cannot be encoded: {reason}")

        self._encode = refuse
