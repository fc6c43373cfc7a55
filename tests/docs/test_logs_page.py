"""Every figure that a run can log is documented, with its unit and what is normal."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import logs_page
import pytest

import rdm_sdk
from rdm_sdk.evaluation.report.curves import KINDS, NOT_CURVES

PACKAGE = Path(rdm_sdk.__file__).parent


def kind_of(name: str) -> str:
    """Return the pattern of what is known of a figure; the last one fits all."""
    return next(kind.pattern for kind in KINDS if re.fullmatch(kind.pattern, name))


def names_logged(tree: ast.AST) -> Iterator[str]:
    """Yield the names that code logs, `x` for what stands in braces."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "log"
            and node.args
        ):
            match node.args[0]:
                case ast.Constant(str(name)):
                    yield name
                case ast.JoinedStr(parts):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in parts)


def test_the_page_is_up_to_date() -> None:
    """`python docs/logs_page.py` would write what is there."""
    assert logs_page.PAGE.read_text(encoding="utf-8") == logs_page.page()


def test_every_figure_in_the_source_is_known() -> None:
    """Whatever is logged by name: losses, rewards, weights, ratios, variety."""
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in (PACKAGE / "training").glob("*.py")]
    names = {name for source in sources for name in names_logged(source)}
    assert {"loss/pathwise", "ratio/ess", "rewards/x/mean", "x/critic_loss"} <= names
    # Of names that are made of variables alone, runs below show the values.
    unknown = [name for name in names if kind_of(name) == "(.+)" and name != "x/x" and name != "student/x"]
    assert unknown == []


@pytest.mark.parametrize(
    ("rewards", "settings"),
    [
        ("dm + 0.5*jpeg", {"num_iterations": 2, "weighting": "balance", "reward_on_error": "skip"}),
        ("dm + guidance", {"guidance_scale": 1.0, "eval_strategy": "steps"}),
    ],
)
def test_every_figure_of_a_run_is_known(
    rewards: str, settings: dict[str, Any], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    """Also those whose names are made in the run."""
    evaluated = "eval_strategy" in settings
    more = {"eval_dataset": ["a zero", "a one"], "eval_steps": 1} if evaluated else {}
    trainer = make_trainer(tmp_path, f"{rewards} + 0*legibility", max_steps=2, **settings, **more)
    trainer.train()
    names = {name for row in trainer.state.log_history for name in row if not NOT_CURVES.fullmatch(name)}
    assert {"dm/gap", "dm/lag", "student/deviation", "grad_norm"} <= names
    assert ("eval_rewards/legibility/std" in names) is evaluated
    assert [name for name in names if kind_of(name) == "(.+)"] == []


def test_an_unknown_figure_is_missed() -> None:
    """The last kind fits what nobody has described."""
    tree = ast.parse("self.log('new/thing', 1)\nself.monitor.log(f'{name}/other', 1)")
    assert list(names_logged(tree)) == ["new/thing", "x/other"]
    assert [kind_of(name) for name in names_logged(tree)] == ["(.+)", "(.+)"]
