"""Stored rollouts come back bit for bit, in order, with what a further use needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from rdm_sdk.training.rollouts import read_rollouts, rollouts_path, write_rollouts
from rdm_sdk.types import Experience, RewardOutput, Rollout, select_steps

CPU = torch.device("cpu")
FIELDS = ("plan", "weights")


def experience(seed: int, num: int = 4, use: int = 1, scored: tuple[str, ...] = ("second", "first")) -> Experience:
    """Make an experience of 3 steps and 2 uses, with values that print badly: NaN, denormals, thirds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 3

    trajectory, endpoints = draw(3, num, 2, 2), draw(3, num, 2, 2)
    trajectory[2, 0] = 1e-42
    scores = {name: draw(num) for name in scored}
    for values in scores.values():
        values[1] = torch.nan
    return Experience(
        prompts=[f"{seed}: ein Ü, 'quoted' \"twice\"\n" for _ in range(num)],
        columns={"digit": [1] * num},
        condition={"text": draw(num, 3)},
        rollout=Rollout(trajectory, endpoints, torch.randint(1, 4, (num,), generator=generator)),
        plan=torch.randint(3, (2, num), generator=generator),
        use=use,
        x_0=draw(num, 2, 2),
        weights=draw(num).exp(),
        scored={name: RewardOutput(values, logged={"ink": -values}) for name, values in scores.items()},
    )


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, list[int], bytes]:
    """Return what a tensor is, to the bit; NaN equals itself."""
    return tensor.dtype, list(tensor.shape), tensor.numpy().tobytes()


def assert_same(got: Experience, written: Experience) -> None:
    for name in FIELDS:
        assert bits(getattr(got, name)) == bits(getattr(written, name)), name
    for name in ("states", "x_0", "depths"):
        assert bits(getattr(got.rollout, name)) == bits(getattr(written.rollout, name)), name
    assert {n: bits(o.scores) for n, o in got.scored.items()} == {n: bits(o.scores) for n, o in written.scored.items()}
    for name, output in written.scored.items():
        assert {n: bits(v) for n, v in got.scored[name].logged.items()} == {"ink": bits(output.logged["ink"])}
    assert (got.prompts, got.use) == (written.prompts, written.use)
    assert (got.condition, got.columns) == ({}, {})
    assert bits(got.states) == bits(written.states)
    # What the next use predicts anew is, until then, what the rollout holds for this one.
    assert bits(got.x_0) == bits(select_steps(written.rollout.x_0, written.plan[written.use]))


def test_rollouts_come_back_bit_for_bit(tmp_path: Path) -> None:
    """Tensors, prompts and uses, in order; encodings and columns are left to the prompts."""
    every = [experience(seed, num=4 + seed % 2, use=seed % 2) for seed in range(14)]
    path = rollouts_path(tmp_path / "checkpoint-3", 0)
    write_rollouts(path, every)
    for own, other in zip(read_rollouts(path, CPU), every, strict=True):
        assert_same(own, other)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_rewards_without_scores_of_the_endpoints(tmp_path: Path) -> None:
    """A run without scored rewards stores rollouts too."""
    write_rollouts(tmp_path / "file", [experience(0, scored=())])
    (got,) = read_rollouts(tmp_path / "file", CPU)
    assert got.scored == {}


def test_scored_rewards_keep_their_order(tmp_path: Path) -> None:
    """Terms are added up in the rewards' order; a resumed run adds them in the same one, to the last bit."""
    write_rollouts(tmp_path / "file", [experience(0, scored=("zeta", "alpha", "mid"))])
    (got,) = read_rollouts(tmp_path / "file", CPU)
    assert list(got.scored) == ["zeta", "alpha", "mid"]


def test_reading_does_not_depend_on_layout(tmp_path: Path) -> None:
    """Tensors that are views of something larger come back as what they show."""
    own = experience(0)
    view = replace(own, weights=torch.arange(8.0)[::2], plan=own.plan.T.contiguous().T)
    write_rollouts(tmp_path / "file", [view])
    (got,) = read_rollouts(tmp_path / "file", CPU)
    assert torch.equal(got.weights, view.weights)
    assert torch.equal(got.plan, view.plan)


def test_what_is_stored_carries_no_graph(tmp_path: Path) -> None:
    """A use's x_0 has a graph while it trains; storing the rollout neither needs nor keeps it."""
    own = experience(0)
    weight = torch.ones((), requires_grad=True)
    write_rollouts(tmp_path / "file", [replace(own, x_0=weight * own.x_0)])
    (got,) = read_rollouts(tmp_path / "file", CPU)
    assert not got.x_0.requires_grad


def test_nothing_to_write_is_no_file(tmp_path: Path) -> None:
    """Without rollouts there is no file, and no file reads as no rollouts."""
    path = rollouts_path(tmp_path / "checkpoint-3", 0)
    write_rollouts(path, [])
    assert not path.parent.exists()
    assert read_rollouts(path, CPU) == []


def test_each_process_has_its_own_file(tmp_path: Path) -> None:
    """Processes do not overwrite each other's rollouts; the same one replaces its own."""
    paths = [rollouts_path(tmp_path, rank) for rank in range(3)]
    for rank, path in enumerate(paths):
        assert path.parent == tmp_path
        write_rollouts(path, [experience(rank + 10)])
        write_rollouts(path, [experience(rank)])
    for rank, path in enumerate(paths):
        (got,) = read_rollouts(path, CPU)
        assert_same(got, experience(rank))
