"""The global random generators, which a reward must leave alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def random_states() -> dict[str, object]:
    """Return the states of the global random generators, by the name of their library."""
    numpy = [np.asarray(part).tolist() for part in np.random.get_state()]  # noqa: NPY002 - theirs is watched
    return {"torch": torch.get_rng_state().tolist(), "NumPy": numpy, "Python": random.getstate()}


@contextmanager
def drawn_from() -> Iterator[None]:
    """Draw from the global random generators, and put their states back after the block.

    A reward that sets a seed leaves the state of its call before where it was, and would not be seen.
    """
    numpy, python = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.rand(1)
        np.random.random()  # noqa: NPY002
        random.random()
        try:
            yield
        finally:
            np.random.set_state(numpy)  # noqa: NPY002
            random.setstate(python)
