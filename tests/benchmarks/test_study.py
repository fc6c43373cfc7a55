"""The study runs, resumes, and its page regenerates from the raw results with one command (acceptance 6)."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "benchmarks" / "study" / "study.py"


def study(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the study's command line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(STUDY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a reduced study."""
    out = tmp_path_factory.mktemp("study")
    result = study("run", "--smoke", "--out", str(out))
    assert result.returncode == 0, result.stderr[-2000:]
    return out


@pytest.mark.slow
def test_smoke_runs_every_kind_of_cell_for_two_seeds(smoke: Path) -> None:
    """A line per run, with costs; all cells of the smoke study spend the same teacher forwards."""
    rows = [json.loads(line) for line in (smoke / "runs.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert len({row["cell"] for row in rows}) == 4
    assert {row["seed"] for row in rows} == {0, 1}
    assert {row["costs"]["cost/teacher_forwards"] for row in rows} == {4 * 32}
    assert all(row["FID-SD"] > 0 and 0 < row["legibility"] <= 1 for row in rows)


@pytest.mark.slow
def test_what_is_there_is_not_run_again(smoke: Path) -> None:
    """The study resumes: a second call finds all runs done and adds none."""
    before = (smoke / "runs.jsonl").read_text()
    assert study("run", "--smoke", "--out", str(smoke)).returncode == 0
    assert (smoke / "runs.jsonl").read_text() == before


@pytest.mark.slow
def test_what_lacks_a_later_figure_is_run_again(smoke: Path, tmp_path: Path) -> None:
    """`--complete` runs only the rows without it, and the new ones are the same to the bit but for it."""
    rows = [json.loads(line) for line in (smoke / "runs.jsonl").read_text().splitlines()]
    older = next(row for row in rows if row["cell"] == "dmd2")
    counted = older.pop("illegibility")
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert study("run", "--smoke", "--complete", "--out", str(tmp_path)).returncode == 0
    after = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert after[:-1] == rows
    again = after[-1]
    assert again["illegibility"] == counted
    assert {name: again[name] for name in ("cell", "seed", "FID-SD")} == {
        n: older[n] for n in ("cell", "seed", "FID-SD")
    }


@pytest.mark.slow
def test_the_page_regenerates_from_the_raw_results(smoke: Path) -> None:
    """One command writes the page with its tables and plots."""
    result = study("report", "--out", str(smoke))
    assert result.returncode == 0, result.stderr[-2000:]
    page = (smoke / "study.md").read_text()
    for text in ("| dmd2", "| 4 uses", "| balance, ink against jpeg 0.1 and 3", "Stable range"):
        assert text in page
    for name in ("sweep", "reuse", "front_ink_against_jpeg"):
        assert (smoke / f"study_{name}.png").stat().st_size > 5000
    assert "study_sweep.png" in page


def test_smoke_does_not_mix_with_the_real_results() -> None:
    """The smoke study refuses to write among the study's own results."""
    result = study("run", "--smoke")
    assert result.returncode != 0
    assert "--smoke needs an --out" in result.stderr


def test_the_committed_page_is_what_the_committed_results_say(tmp_path: Path) -> None:
    """docs/study.md was generated from benchmarks/results, not written by hand."""
    page = tmp_path / "study.md"
    result = study("report", "--page", str(page))
    assert result.returncode == 0, result.stderr[-2000:]
    assert page.read_text() == (ROOT / "docs" / "study.md").read_text()


@pytest.fixture
def fronts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module that compares fronts."""
    monkeypatch.syspath_prepend(str(STUDY.parent))
    return importlib.import_module("study_fronts")


def test_fronts_compare_at_equal_reward_and_at_equal_distance(fronts: Any) -> None:
    """Linear between points; a point that is better in both stands for what lies below it; None beyond a front."""
    front = [(0.0, 30.0), (2.0, 40.0), (4.0, 80.0)]
    assert fronts.cost_of_reward(front, 1.0) == pytest.approx(35.0)
    assert fronts.cost_of_reward(front, -1.0) == 30.0
    assert fronts.cost_of_reward(front, 5.0) is None
    assert fronts.reward_for_cost(front, 60.0) == pytest.approx(3.0)
    assert fronts.reward_for_cost(front, 100.0) == 4.0
    assert fronts.reward_for_cost(front, 29.0) is None
    assert fronts.reward_for_cost([(1.0, 30.0), (0.0, 50.0)], 50.0) == 1.0


def test_hypervolume_is_the_dominated_area(fronts: Any) -> None:
    """Two steps, one of them partly in the other's shadow; nothing beyond the reference."""
    assert fronts.hypervolume([(1.0, 30.0), (3.0, 60.0)], (0.0, 100.0)) == pytest.approx(1 * 70 + 2 * 40)
    assert fronts.hypervolume([(1.0, 30.0), (0.5, 60.0)], (0.0, 100.0)) == pytest.approx(70)
    assert fronts.hypervolume([(-1.0, 30.0), (1.0, 120.0)], (0.0, 100.0)) == 0.0
