"""What the console shows of a run: the few figures to watch, on a line, and nothing that a user logged is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rdm_sdk.training.callbacks import WHAT_TO_WATCH, log_line

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        (
            {
                "loss": 0.1,
                "dm/critic_loss": 0.43812,
                "dm/residual": 0.1733,
                "dm/gap": 0.00555,
                "dm/error": 0.08,
                "dm/lag": -0.001,
                "student/diversity": 0.5432,
                "student/deviation": 0.7,
                "rewards/dm/mean": -4.7,
                "cost/rollouts": 3.0,
            },
            "step 5/20 | dm gap 0.00555 | diversity 0.543 | dm critic loss 0.438",
        ),
        (
            {"rewards/jpeg/mean": -1.04637, "rewards/jpeg/std": 0.1, "rewards/hps:v2.1/mean": 0.25},
            "step 5/20 | jpeg -1.046 | hps:v2.1 0.25",
        ),
        (
            {"rewards/a/skipped": 0.0, "rewards/b/skipped": 0.25, "ratio/ess": 0.934},
            "step 5/20 | b skipped 25% | effective samples 93%",
        ),
        (
            {"eval_loss": -0.9, "eval_rewards/ink/mean": 0.9, "eval_runtime": 3.0, "epoch": 1.0},
            "step 5/20 | evaluation: ink 0.9",
        ),
        ({"loss": 0.1, "temperature": 71, "mine/x": "hot"}, "step 5/20 | temperature 71 | mine/x hot"),
        ({"train_runtime": 12.34, "train_loss": 0.1, "total_flos": 0.0}, "trained to step 5 in 12 s"),
    ],
)
def test_the_line_holds_what_is_watched(logs: dict[str, object], expected: str) -> None:
    """Residual, rewards, the critics' losses, what was skipped or used again, and what is not a figure of the run."""
    assert log_line(logs, 5, 20) == expected


@pytest.mark.parametrize("bar", [False, True])
def test_a_run_prints_lines_and_keeps_all_figures(
    bar: bool, make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a bar and without; trackers and trainer_state.json get every figure by its name."""
    trainer = make_trainer(tmp_path, "dm + 0*legibility", max_steps=2, logging_steps=1, disable_tqdm=not bar)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.split(" | ")[0] for line in lines] == [WHAT_TO_WATCH, "step 1/2", "step 2/2", lines[-1]]
    assert lines[-1].startswith("trained to step 2 in ")
    assert "legibility 0." in lines[1] or "legibility 1" in lines[1]
    assert {"loss", "dm/pull", "rewards/legibility/std", "cost/rollouts"} <= trainer.state.log_history[0].keys()
    json.dumps(trainer.state.log_history)


def test_the_line_has_the_score_of_a_reward_that_tilts(
    make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is in the reward's units, whatever the reward acts by; a residual is that of `dm` alone."""
    settings = {"reward_route": "tilt", "max_steps": 1, "logging_steps": 1, "disable_tqdm": True}
    trainer = make_trainer(tmp_path, "dm + 0.2*legibility", **settings)
    trainer.train()
    assert re.search(r"step 1/1 .*\| legibility [01]", capsys.readouterr().out)
    assert "dm/residual" in trainer.state.log_history[0]
    assert "legibility/residual" not in trainer.state.log_history[0]
