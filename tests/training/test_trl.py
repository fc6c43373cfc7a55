"""Settings with TRL's names mean what TRL means: scores become the advantages that its own code makes of them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import nanstd

from rdm_sdk import ConfigError, RDMConfig, RDMTrainer
from rdm_sdk.method.objective import aggregate

Make = Callable[..., RDMTrainer]
G = 4
MODES = [("sum_then_normalize", "group"), ("sum_then_normalize", "batch"), ("sum_then_normalize", "none")]
MODES += [("normalize_then_sum", "group")]
NAN = float("nan")


def trl_advantages(scores: Tensor, weights: list[float], scale: str, aggregation: str) -> Tensor:
    """Return what TRL makes of scores `[N, rewards]`: the very lines of its trainer, run on them."""
    source = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    (branch,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "self.multi_objective_aggregation == 'sum_then_normalize'"
    ]
    trainer = SimpleNamespace(
        multi_objective_aggregation=aggregation,
        scale_rewards=scale,
        reward_weights=torch.tensor(weights, dtype=scores.dtype),
        reward_funcs=weights,
    )
    names: dict[str, Any] = {
        "torch": torch,
        "nanstd": nanstd,
        "self": trainer,
        "device": scores.device,
        "num_generations": G,
        "rewards_per_func": scores,
        "unscorable_mask": scores.isnan().all(1),
    }
    exec(compile(ast.Module([branch], []), "trl", "exec"), names)
    return torch.nan_to_num(names["advantages"], nan=0.0)


def scores_of(kind: str) -> Tensor:
    """Return scores `[12, 2]` of two rewards in three groups, float64."""
    scores = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([1.0, 30.0]) + 5
    if kind == "missing":
        scores[1, 0] = scores[2] = scores[5, 1] = scores[8:11, 1] = NAN
    if kind == "constant":
        scores[4:8] = 2.0
    return scores


@pytest.mark.parametrize("kind", ["plain", "missing", "constant"])
@pytest.mark.parametrize("weights", [[1.0], [-1.0], [0.5, 0.5], [0.25, -0.75]])
@pytest.mark.parametrize(("aggregation", "scale"), MODES)
def test_advantages_are_those_of_trl(aggregation: Any, scale: Any, weights: list[float], kind: str) -> None:
    """To 1e-6, where the weights' sizes add up to 1."""
    scores = scores_of(kind)[:, : len(weights)]
    names = ["a", "b"][: len(weights)]
    got = aggregate(
        dict(zip(names, scores.unbind(1), strict=True)),
        dict(zip(names, weights, strict=True)),
        G,
        scale,
        aggregation,
    )
    assert got is not None
    expected = trl_advantages(scores, weights, scale, aggregation)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize(("aggregation", "scale"), MODES)
def test_only_the_size_of_the_weights_is_ours(aggregation: Any, scale: Any) -> None:
    """Three times the weights are three times the advantages: they stand beside fields, which TRL has not."""
    scores = scores_of("missing")
    named = dict(zip("ab", scores.unbind(1), strict=True))
    got = aggregate(named, {"a": 0.75, "b": -2.25}, G, scale, aggregation)
    assert got is not None
    expected = 3 * trl_advantages(scores, [0.25, -0.75], scale, aggregation)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("aggregation", "scale"), MODES)
def test_processes_make_the_advantages_of_one(aggregation: Any, scale: Any) -> None:
    """Statistics of the batch are over all processes: two with a part each, the second without any score of `b`."""
    scores = scores_of("missing")
    scores[4:, 1] = NAN
    barrier, parts = threading.Barrier(2), dict[int, Tensor]()
    found: dict[int, Tensor | None] = {}

    def total_of(rank: int) -> Callable[[Tensor], Tensor]:
        def total(sums: Tensor) -> Tensor:
            parts[rank] = sums
            barrier.wait(10)
            both = parts[0] + parts[1]
            barrier.wait(10)
            return both

        return total

    def run(rank: int, rows: slice) -> None:
        named = dict(zip("ab", scores[rows].unbind(1), strict=True))
        found[rank] = aggregate(named, {"a": 0.5, "b": 0.5}, G, scale, aggregation, total_of(rank))

    threads = [threading.Thread(target=run, args=args) for args in ((0, slice(4)), (1, slice(4, 12)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    expected = trl_advantages(scores, [0.5, 0.5], scale, aggregation)
    first, second = found[0], found[1]
    assert first is not None
    assert second is not None
    torch.testing.assert_close(torch.cat([first, second]).double(), expected, rtol=1e-6, atol=1e-6)


# ---- In a run -------------------------------------------------------------------------------------------------------


def ink(images: Tensor, prompts: list[str]) -> Tensor:
    """Score a picture by its darkness."""
    return 100 * (1 - images.mean(dim=(1, 2, 3)))


def contrast(images: Tensor, prompts: list[str]) -> Tensor:
    """Score a picture by its deviation."""
    return images.std(dim=(1, 2, 3))


@pytest.mark.parametrize(("aggregation", "scale"), MODES)
def test_a_batch_is_the_optimizer_step(make_trainer: Make, tmp_path: Path, aggregation: str, scale: str) -> None:
    """Micro-batches of one optimizer step are normalized together, as a generation batch of TRL is by default."""
    trainer = make_trainer(
        tmp_path,
        [(ink, 0.25), (contrast, 0.75)],
        multi_objective_aggregation=aggregation,
        scale_rewards=scale,
        num_generations=G,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    trainer.train()
    parts = [one.scored for one in trainer.step.rollouts.experiences]
    assert len(parts) == 2
    scores = torch.stack([torch.cat([part[name].scores for part in parts]) for name in ("ink", "contrast")], 1).double()
    got = torch.cat([one.together for one in trainer.step._advantages if one.together is not None])
    expected = trl_advantages(scores, [0.25, 0.75], scale, aggregation)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


# ---- As settings ----------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_trl() -> None:
    """Names that TRL has, and that are about rewards, have its defaults."""
    theirs = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    ours = {field.name: field.default for field in dataclasses.fields(RDMConfig)}
    for name in ("scale_rewards", "multi_objective_aggregation", "num_iterations"):
        assert ours[name] == theirs[name]
    assert "steps_per_generation" not in ours  # TRL rolls out for several steps at once; here, each step does


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("given", "meant"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_truth_values_are_taken_as_trl_takes_them(
    small_config: Callable[..., RDMConfig], tmp_path: Path, given: Any, meant: str
) -> None:
    """`scale_rewards=True` and `False` are its older forms."""
    assert small_config(tmp_path, scale_rewards=given).scale_rewards == meant
    assert GRPOConfig(str(tmp_path), scale_rewards=given, use_cpu=True, bf16=False).scale_rewards == meant


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_a_scale_that_plays_no_part_is_refused(
    small_config: Callable[..., RDMConfig], tmp_path: Path, scale: str
) -> None:
    """In TRL `normalize_then_sum` leaves `scale_rewards` out of account without a word."""
    with pytest.raises(ConfigError, match=f"scale_rewards={scale!r} cannot be used with.*'normalize_then_sum'"):
        small_config(tmp_path, multi_objective_aggregation="normalize_then_sum", scale_rewards=scale)
