"""A run's random numbers within a step: PyTorch's own stream, which nobody else can move."""

from __future__ import annotations

import pytest
import torch

from rdm_sdk.training.processes import Processes
from rdm_sdk.training.randomness import Randomness

CPU = torch.device("cpu")


@pytest.mark.parametrize("disturbed", [False, True])
def test_steps_continue_the_global_stream(disturbed: bool) -> None:
    """What is drawn in two steps and after them are the numbers that the seed stands for, whatever a reward draws."""
    torch.manual_seed(3)
    expected = [torch.randn(2, 3) for _ in range(3)]
    torch.manual_seed(3)
    randomness, drawn = Randomness(CPU, Processes()), []
    for _ in range(2):
        randomness.begin()
        if disturbed:
            torch.rand(5)
            torch.manual_seed(9)
        drawn.append(randomness.draws.normal(2, (3,), CPU))
        randomness.end()
    drawn.append(torch.randn(2, 3))
    assert all(torch.equal(one, other) for one, other in zip(drawn, expected, strict=True))


def test_a_reward_draws_other_numbers_in_each_step() -> None:
    """The global state within a step is a function of the run's: neither the run's numbers nor always the same ones."""
    torch.manual_seed(3)
    randomness, seen = Randomness(CPU, Processes()), []
    for _ in range(2):
        randomness.begin()
        seen += [torch.randn(4), randomness.draws.normal(1, (4,), CPU)[0]]
        randomness.end()
    assert len({tuple(numbers.tolist()) for numbers in seen}) == 4


def test_a_step_that_failed_does_not_end_the_stream() -> None:
    """In a loop of one's own, the next step goes on with the numbers where it stopped, whatever rewards have drawn."""
    torch.manual_seed(3)
    expected = [torch.randn(2, 3) for _ in range(2)]
    torch.manual_seed(3)
    randomness, drawn = Randomness(CPU, Processes()), []
    for _ in range(2):  # no step ends
        randomness.begin()
        torch.rand(5)
        drawn.append(randomness.draws.normal(2, (3,), CPU))
    assert all(torch.equal(one, other) for one, other in zip(drawn, expected, strict=True))


def test_what_is_undisturbed_is_as_it_was() -> None:
    """Looking at samples in the middle of a step moves no stream."""
    torch.manual_seed(3)
    randomness = Randomness(CPU, Processes())
    randomness.begin()
    states = randomness.draws.generator.get_state(), torch.get_rng_state()  # type: ignore[union-attr]
    with randomness.undisturbed():
        torch.rand(5)
        randomness.draws.normal(2, (3,), CPU)
    assert torch.equal(randomness.draws.generator.get_state(), states[0])  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), states[1])
    randomness.end()


def test_processes_share_the_runs_stream_and_not_what_rewards_draw() -> None:
    """Each goes on from the first one's state, wherever its own is; a reward draws other numbers on each."""
    torch.manual_seed(3)
    first, expected = torch.get_rng_state(), torch.randn(4, 3)
    own, of_rewards = [], []
    for index in range(2):
        torch.manual_seed(10 + index)
        randomness = Randomness(CPU, Processes(2, gather=lambda value: [first, value], index=index))
        randomness.begin()
        of_rewards.append(torch.randn(5))
        own.append(randomness.draws.normal(2, (3,), CPU))
        randomness.end()
    torch.testing.assert_close(torch.cat(own), expected, rtol=0, atol=0)
    assert not torch.equal(*of_rewards)
