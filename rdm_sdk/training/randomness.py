"""The random numbers of a run's steps: the same for any number of processes, and out of the reach of rewards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rdm_sdk.method.draws import Draws
from rdm_sdk.training.processes import Processes


@contextmanager
def forked(device: torch.device) -> Iterator[None]:
    """Put the random state of the CPU and of a device back after the block."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def global_state(device: torch.device) -> Tensor:
    """Return the state of PyTorch's global generator for a device, uint8 `[n]` on the CPU."""
    state: Tensor = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return state


def set_global_state(device: torch.device, state: Tensor) -> None:
    """Put PyTorch's global generator for a device into a state that `global_state` returned."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class Randomness:
    """Draws for the samples of a run, from a generator that nobody else has while an optimizer step is taken.

    Between steps, the run's random state is PyTorch's global one: Trainer saves and restores it, and data loaders draw
    from it. `begin` moves it into the generator and `end` moves it back. Between the two the global generators are
    in another state, a function of the run's and of the process: a reward may draw from them, or reseed them, and
    changes nothing about the run. Of several processes, the first one's state counts.
    """

    def __init__(self, device: torch.device, processes: Processes) -> None:
        self.device, self.processes = device, processes
        self.draws = Draws(processes.index, processes.count)
        self._before = torch.get_rng_state()

    def begin(self) -> None:
        """Take the global state over; after a step that failed, that of where it stopped."""
        self.end()
        (state, *_) = self.processes.gather(global_state(self.device))
        self.draws.generator = torch.Generator(self.device)
        self.draws.generator.set_state(state)
        digest = hashlib.sha256(state.numpy().tobytes()).digest()
        self._before = torch.get_rng_state()
        torch.manual_seed(int.from_bytes(digest[:7]) + self.processes.index)

    def end(self) -> None:
        """Give the state back."""
        if self.draws.generator is not None:
            torch.set_rng_state(self._before)
            set_global_state(self.device, self.draws.generator.get_state())
            self.draws.generator = None

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Put every random state back after the block."""
        generator = self.draws.generator
        state = None if generator is None else generator.get_state()
        with forked(self.device):
            yield
        if generator is not None and state is not None:
            generator.set_state(state)
