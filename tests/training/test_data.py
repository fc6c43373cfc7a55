"""Prompts: sources, whole groups in a repeatable order, and the cache of encodings."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rdm_sdk.training.data import GroupSampler, collate, load_prompts
from rdm_sdk.training.prompt_cache import PromptCache
from rdm_sdk.types import Condition

modest = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def test_prompts_from_list_file_and_dataset_are_the_same(tmp_path: Path) -> None:
    """Three ways to say the same; blank lines of a file are skipped, other columns kept."""
    prompts = ["a seven", "ein Ü"]
    (tmp_path / "prompts.txt").write_text("a seven\n\n  ein Ü  \n", encoding="utf-8")
    for source in (prompts, tuple(prompts), tmp_path / "prompts.txt", str(tmp_path / "prompts.txt")):
        assert load_prompts(source)["prompt"][:] == prompts
    dataset = Dataset.from_dict({"prompt": prompts, "digit": [7, None]})
    assert load_prompts(dataset) is dataset


def test_collate_separates_prompts_from_other_columns() -> None:
    """Rows become a list of prompts and a list per other column."""
    rows = [{"prompt": "a", "digit": 1}, {"prompt": "b", "digit": 2}]
    assert collate(rows) == {"prompts": ["a", "b"], "columns": {"digit": [1, 2]}}


def test_groups_stay_whole() -> None:
    """Each prompt comes as `group_size` equal neighbors, each prompt once when the batch divides the prompts."""
    order = list(GroupSampler(num_prompts=6, group_size=4, prompts_per_step=3, seed=0))
    groups = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert all(len(set(group)) == 1 for group in groups)
    assert sorted(group[0] for group in groups) == list(range(6))


def test_an_epoch_is_padded_to_full_batches() -> None:
    """Prompts are repeated until every optimizer step is full, as evenly as possible."""
    sampler = GroupSampler(num_prompts=3, group_size=2, prompts_per_step=8, seed=0)
    order = list(sampler)
    assert len(order) == len(sampler) == 16
    assert sorted(Counter(order).values()) == [4, 6, 6]
    assert len(GroupSampler(num_prompts=9, group_size=2, prompts_per_step=8, seed=0)) == 32


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    """The same seed and epoch give the same order whatever the global random state; others give another."""
    first, second = (GroupSampler(20, 1, 1, seed=5) for _ in range(2))
    torch.manual_seed(0)
    order = list(first)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert list(second) == order
    assert torch.equal(torch.get_rng_state(), before)
    second.epoch = 1
    assert list(second) != order
    assert list(GroupSampler(20, 1, 1, seed=99)) != order
    second.epoch = 0
    assert list(second) == order


def windows(sampler: GroupSampler, prompts_per_step: int) -> list[tuple[int, ...]]:
    """Return the prompts of each optimizer step, in order."""
    order, size = list(sampler), prompts_per_step * sampler.group_size
    assert len(order) == len(sampler)
    assert len(order) % size == 0
    steps = [order[i : i + size] for i in range(0, len(order), size)]
    for step in steps:
        groups = [step[i : i + sampler.group_size] for i in range(0, size, sampler.group_size)]
        assert all(len(set(group)) == 1 for group in groups)
    return [tuple(step[:: sampler.group_size]) for step in steps]


@pytest.mark.parametrize("num_iterations", [1, 2, 3])
def test_a_step_s_prompts_come_once_per_use(num_iterations: int) -> None:
    """Each optimizer step's prompts come `num_iterations` times in a row; without repeats the order is the same."""
    once = windows(GroupSampler(7, 4, 3, seed=5), 3)
    assert len(once) == 3
    repeated = windows(GroupSampler(7, 4, 3, seed=5, num_iterations=num_iterations), 3)
    assert repeated == [step for step in once for _ in range(num_iterations)]


@modest
@given(
    num_prompts=st.integers(1, 12),
    group_size=st.integers(1, 3),
    prompts_per_step=st.integers(1, 4),
    num_iterations=st.integers(2, 3),
)
def test_every_prompt_is_used_as_often(
    num_prompts: int, group_size: int, prompts_per_step: int, num_iterations: int
) -> None:
    """The prompts of a step come once per use; over an epoch no prompt comes oftener than another by more than one."""
    sampler = GroupSampler(num_prompts, group_size, prompts_per_step, 3, num_iterations)
    steps = windows(sampler, prompts_per_step)
    assert len(steps) % num_iterations == 0
    distinct = []
    for start in range(0, len(steps), num_iterations):
        uses = steps[start : start + num_iterations]
        assert all(use == uses[0] for use in uses)
        distinct += uses[0]
    counts = Counter(distinct)
    assert len(counts) == num_prompts
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_resumed_epoch_goes_on_in_the_middle_of_a_window() -> None:
    """Skipping what was seen, as a resumed run does, continues with the repeats that were left."""
    make = partial(GroupSampler, 10, 2, 4, seed=8, num_iterations=3)
    first, resumed = make(), make()
    first.epoch = resumed.epoch = 2
    seen = 2 * 4 * 4  # four optimizer steps: one window and a third of the next
    assert list(islice(resumed, seen, None)) == list(first)[seen:]
    steps = windows(first, 4)
    assert steps[3] == steps[4] == steps[5] != steps[2]


class Encoder:
    """Encodes a prompt as its length, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompts: list[str]) -> Condition:
        self.asked += prompts
        return {"length": torch.tensor([[float(len(p))] for p in prompts])}


def test_the_cache_encodes_each_prompt_once_and_keeps_the_order() -> None:
    """Repeated prompts cost one encoding; rows come back in the order asked for."""
    encoder = Encoder()
    cache = PromptCache(encoder, torch.device("cpu"))
    assert cache(["aaa", "b", "aaa"])["length"].tolist() == [[3.0], [1.0], [3.0]]
    assert cache(["cc", "aaa"])["length"].tolist() == [[2.0], [3.0]]
    assert encoder.asked == ["aaa", "b", "cc"]


def test_the_cache_forgets_the_least_recently_used() -> None:
    """Beyond its capacity the cache drops the prompt that was not used for longest, and one call may exceed it."""
    encoder = Encoder()
    cache = PromptCache(encoder, torch.device("cpu"), capacity=2)
    cache(["a", "bb"])
    cache(["a"])
    cache(["ccc"])  # drops "bb"
    cache(["a"])
    cache(["bb"])
    assert encoder.asked == ["a", "bb", "ccc", "bb"]
    assert cache(["a", "bb", "ccc", "dddd"])["length"][:, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_a_form_of_the_dataset_changes_no_value(form: str) -> None:
    """As tensors and arrays, None would be NaN, and a reward asked about prompts that it is not for."""
    plain = Dataset.from_dict({"prompt": ["a", "b"], "answer": [1, None]})
    assert list(load_prompts(plain.with_format(form))) == list(plain)
