"""Checkpoints that the tests share."""

import pytest
from hps_files import random_tensors, save


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    """A tiny checkpoint of v2.1 as the hub has it."""
    return save(tmp_path_factory.mktemp("hps"), {"epoch": 1, "state_dict": tensors})
