"""Every script under `benchmarks/` and `examples/` runs, in a small form."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rdm_sdk.rewards.resolve import resolve_rewards

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
EXAMPLE_TESTS = TESTS / "end_to_end" / "test_example_programs.py"
FILES = sorted(path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = [path for path in FILES if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_has_a_test(script: Path) -> None:
    """A script is run by the function of its name here or among the examples' tests, or has a file of tests."""
    here = f"test_{script.stem}" in globals() or f"def test_{script.stem}(" in EXAMPLE_TESTS.read_text("utf-8")
    elsewhere = [path for path in TESTS.rglob(f"test_{script.stem}.py") if f"{script.stem}" in path.read_text()]
    assert here or elsewhere, f"{script.relative_to(ROOT)} is run by no test: add test_{script.stem} to this file"


def test_every_other_file_is_imported_by_one() -> None:
    """What is no script is a part of one, so that no file is forgotten when what it imports changes."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    others = [path.stem for path in FILES if path not in SCRIPTS]
    assert others
    assert [name for name in others if not re.search(rf"^\s*(from|import) {name}\b", text, re.M)] == []


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> Any:
    """Run a script's `main` with arguments; returns its module."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    module = importlib.import_module(name)
    module.main()
    return module


def start(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script, by its path from the root, as a user does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example trains, saves and samples."""
    run(monkeypatch, "quickstart", "--output", tmp_path, "--steps", 2)
    assert (tmp_path / "student.png").is_file()
    assert (tmp_path / "student" / "peft" / "adapter_config.json").is_file()


def test_step_floor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A training cycle is timed against its bare passes."""
    run(monkeypatch, "step_floor", "--batch", 8, "--cycles", 1)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["ratio"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_step_floor_of_tiny_models(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same for networks of other families, with random weights."""
    run(monkeypatch, "step_floor", "--model", model, "--batch", 8, "--cycles", 1)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["ratio"] > 0.5


@pytest.mark.slow
def test_scaling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A cycle is timed at two values of a setting, and an exponent fitted."""
    module = run(monkeypatch, "scaling", "--axes", "rewards", "--values", 2, "--cycles", 1)
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert row["values"] == [1, 2]
    assert min(row["seconds"]) > 0
    exponent, slope, start = module.fitted([1, 2, 4], [3.0, 5.0, 9.0])
    assert (slope, start) == (pytest.approx(2), pytest.approx(1))
    assert module.fitted([1, 2, 4], [3.0, 12.0, 48.0])[0] == pytest.approx(2)
    assert 0.5 < exponent < 1
    assert all(module.settings_of(axis, values[0])[0] for axis, values in module.AXES.items())
    assert len(resolve_rewards(module.settings_of("rewards", 8)[1])) == 1 + 8


def test_import_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands are timed in processes of their own."""
    run(monkeypatch, "import_time", "--turns", 1, "--commands", "python", "rdm-sdk --help")
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0 < row["python"] < row["rdm-sdk --help"]


@pytest.mark.filterwarnings("ignore")  # of the other side, which knows older versions
def test_against_modelopt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides train in turns, where the other is installed; else the script says how to install it."""
    arguments = ("--batch", 8, "--cycles", 1, "--ways", "shared rollouts")
    if importlib.util.find_spec("modelopt") is None:
        with pytest.raises(SystemExit):
            run(monkeypatch, "against_modelopt", *arguments)
        assert "this compares with nvidia-modelopt" in capsys.readouterr().err
        pytest.skip("nvidia-modelopt is not installed: what was run is the refusal alone")
    run(monkeypatch, "against_modelopt", *arguments)
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert row["time"] > 0.1
    assert row["bytes"] < 0.5
    assert row["compile"] is None
    # The fourth cycle's rollouts, 18 to 23, end at the steps in turn.
    assert row["modelopt_forwards"] == 8 * sum((turn % 4) + 1 for turn in range(18, 24))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the other side, which knows older versions
def test_against_modelopt_compiled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Networks of both sides are compiled before the cycles that are timed, and evaluations are counted as without."""
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
    small = ("--batch", 8, "--cycles", 1, "--ways", "same rollouts")
    run(monkeypatch, "against_modelopt", *small, "--compile", "both", "--backend", "eager")
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert row["compile"] == "both"
    assert row["compiling_s"] > 0
    assert row["compiling_late_s"] == 0
    assert (row["forwards"], row["modelopt_forwards"]) == (8 * 15, 8 * 17)


def test_reward_overhead(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward is timed against its bare model call, with and without the gradient; the model is smaller here."""
    monkeypatch.setitem(importlib.import_module("reward_overhead").VISION, "ViT-B-32", (64, 1, 32))
    run(monkeypatch, "reward_overhead", "--model", "ViT-B-32", "--batch", 1, "--size", 64, "--turns", 1)
    table = capsys.readouterr().out
    for text in ("| ViT-B-32, batch 1, 64 px", "| scores ", "| scores and gradient "):
        assert text in table


def test_reward_overlap(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward that waits adds at most a fifth of its time to a step that takes as long."""
    run(monkeypatch, "reward_overlap", "--batch", 8, "--critic-steps", 8, "--steps", 1, "--seconds", 0.2)
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert row["step_without_s"] > row["reward_s"]
    assert row["share"] <= 0.2


def test_serving_throughput(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A served reward is timed against the same one in this process."""
    sizes = ("--batch", 2, "--size", 64, "--clients", 2, "--calls", 2, "--turns", 1)
    run(monkeypatch, "serving_throughput", *sizes)
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert row["served_images_per_s"] > 0
    assert row["reward"] == "jpeg"


def test_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`--smoke` needs no GPU: a tiny model's step is planned, done and timed; a second call finds it done."""
    out = tmp_path / "rows.jsonl"
    module = run(monkeypatch, "full_size", "--smoke", "--out", out)
    (row,) = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert row["run"] == "sd3, tiny"
    # Rollouts of all four steps, two passes of the teacher and one of the critic; the rest is learned from.
    assert row["bare_s"] == pytest.approx(7 * row["evaluation_s"] + 3 * row["learning_s"])
    assert "| sd3, tiny |" in capsys.readouterr().out.replace("  ", "")
    module.main()
    assert len(out.read_text(encoding="utf-8").splitlines()) == 1


def test_full_size_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without `--smoke`, a machine without a GPU is told so before anything is built."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        run(monkeypatch, "full_size")
    assert "CUDA" in capsys.readouterr().err


def test_reward_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward set is trained, judged and put into the table; a second call finds it done."""
    arguments = ("--smoke", "--specs", "dm + 0.1*jpeg", "--out", tmp_path)
    module = run(monkeypatch, "reward_study", *arguments)
    rows = (tmp_path / "runs.jsonl").read_text(encoding="utf-8")
    assert json.loads(rows)["steps"] == 2
    assert "| dm + 0.1*jpeg | 1 " in (tmp_path / "table.md").read_text(encoding="utf-8")
    module.main()
    assert (tmp_path / "runs.jsonl").read_text(encoding="utf-8") == rows


@pytest.mark.slow
def test_planted_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each fault, and a picture of the first three."""
    run(monkeypatch, "planted_faults", "--steps", 2, "--out", tmp_path)
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].startswith("| healthy ")
    assert lines[5].count(" to ") == 5
    assert (tmp_path / "pictures.png").is_file()


@pytest.mark.slow
def test_digits_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifier, VAE and teacher are trained and saved as a pipeline; a second call trains none of them again."""
    module = run(monkeypatch, "digits_teacher", "--smoke", "--out", tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert 0 <= figures["classifier_heldout_accuracy"] <= 1
    assert figures["vae_heldout_rmse_of_255"] > 0
    assert (tmp_path / "teacher" / "model_index.json").is_file()
    for stage in ("train_classifier", "train_vae", "train_diffusion"):
        monkeypatch.setattr(module, stage, None)
    module.main()


@pytest.mark.slow
def test_digits_teacher_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--measure` judges the packaged teacher, and keeps the statistics of its samples."""
    run(monkeypatch, "digits_teacher", "--smoke", "--measure", "--out", tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["samples"]
    assert figures["40 steps, guidance 1.0"]["legibility"] > 0.9


@pytest.mark.slow
def test_convergence(tmp_path: Path) -> None:
    """The runs write a line per measurement."""
    out = tmp_path / "rows.jsonl"
    start("benchmarks/convergence.py", "run", "--smoke", "--only", "dm and flow", "dmd2", "--seeds", "0", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["cell"], row["update"]) for row in rows} == {
        (f"smoke {c}", u) for c in ("dm and flow", "dmd2") for u in (1, 2)
    }
    assert all(len(row["FID-SD"]) == 4 and min(row["FID-SD"]) > 0 for row in rows)


def test_the_convergence_page_is_written_from_rows(tmp_path: Path) -> None:
    """Tables of the teacher, of where runs end, of drift and of rates, and plots; a student is worth teacher steps."""
    from convergence import ALONE
    from convergence_report import write_report

    teacher = [
        {"cell": "teacher", "seed": seed, "steps": steps, "FID-SD": distance + seed, "FID to real digits": 30.0}
        | {"diversity": 0.14, "legibility": 1.0}
        for seed in (0, 1)
        for steps, distance in ((4, 18.0), (8, 8.0))
    ]
    costs = {f"cost/{role}_forwards": 1e6 for role in ("student", "fake", "teacher")}
    runs = [
        {"cell": "demo", "seed": seed, "update": update, "last": update == 100, "FID-SD": [20.0, last + seed]}
        | {"diversity": 0.15, "legibility": 0.99, "costs": costs, "cpu_seconds": 60.0}
        for seed in (0, 1)
        for update, last in ((25, 12.0), (50, 16.0), (75, 10.0), (100, 12.0))
    ]
    swept = [
        run | {"cell": cell, "FID-SD": [50.0, distance]}
        for run in runs
        for cell, distance in ((ALONE, 11.0), ("dmd2 preset, rate 0.0005, critics 1 times", 13.0))
    ]
    write_report([*teacher, *runs, *swept], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "What to do with it" in page
    for picture in ("convergence_runs.png", "convergence_rates.png"):
        assert (tmp_path / picture).stat().st_size > 0
        assert picture in page
    general, rates = page.split("## Where runs end")[1].split("## Each method at several rates")
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in rates.splitlines() if "50, 1" in line]
    assert rows == [["dmd2", "0.0005", "1", "2"], ["gndm", "0.001", "4", "2"]]
    assert f"| {ALONE} " in general  # a cell among others as well
    assert "dmd2" not in general
    (end,) = [line for line in general.splitlines() if line.startswith("| demo ") and "20, 12.5" in line]
    # Means over both seeds: 20 and 12.5 after the two evaluations; the teacher's 18.5 and 8.5 are 4 and 8 steps.
    assert " 6.1 " in end or " 6 " in end
    rises = [line for line in general.splitlines() if line.startswith("| demo ") and line.rstrip(" |").endswith("%")]
    assert [line.split("|")[-2].strip() for line in rises] == ["33%", "31%"]  # of 16 above 12, though 10 came later


@pytest.mark.slow
def test_fronts(tmp_path: Path, make_trainer: Any) -> None:
    """A finished student is trained further, with a scored reward and without, and a second call repeats nothing."""
    from rdm_sdk import digits

    trainer = make_trainer(tmp_path / "run", model=digits.teacher_path(), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "students" / "0"))
    out = tmp_path / "rows.jsonl"
    wanted = (
        "--students",
        tmp_path / "students",
        "--seeds",
        "0",
        "--only",
        "gndmr",
        "gndmr jpeg 5",
        "--max_steps",
        "1",
    )
    for _ in range(2):
        start("benchmarks/study/fronts.py", "run", *wanted, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["point"] for row in rows) == ["gndmr", "gndmr jpeg 5"]
    assert all(row["FID-SD"] > 0 and row["costs"]["cost/teacher_forwards"] == 64 for row in rows)


def test_the_page_of_fronts_is_written_from_rows(tmp_path: Path) -> None:
    """At the reward of the baseline's point the other front is read between its own, and so it is at its FID-SD."""
    from fronts_report import write_report

    def row(method: str, weight: float | None, jpeg: float, distance: float, seed: int) -> dict[str, Any]:
        setting = "" if weight is None else "jpeg"
        figures = {"FID": 30.0, "ink": 0.3, "legibility": 0.99, "diversity": 0.15, "cpu_seconds": 60.0}
        point = f"{method} {setting} {weight}" if setting else method
        own = {"point": point, "method": method, "setting": setting, "weights": [weight] if weight else []}
        return figures | own | {"seed": seed, "jpeg": jpeg, "FID-SD": distance}

    points = [
        *(("dmdr", None, -1.0, 10.0), ("dmdr", 1.0, -0.8, 20.0)),
        *(("gndmr", None, -1.0, 10.0), ("gndmr", 1.0, -0.9, 12.0), ("gndmr", 3.0, -0.7, 16.0)),
    ]
    rows = [row(*point, seed) for seed in (0, 1) for point in points]
    without_baseline = row("gndmr", 3.0, -0.7, 16.0, 0) | {"point": "gndmr both 3 1", "setting": "both"}
    write_report([*rows, without_baseline], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert (tmp_path / "fronts_jpeg.png").stat().st_size > 0
    assert "0.700 [0.700, 0.700], 2 of 2 seeds reach it" in page  # 14 at -0.8, against 20
    assert "0.1000 [0.1000, 0.1000], 2 of 2 seeds reach it" in page  # -0.7 at 16, where -0.8 costs 20
    assert page.count("No point of dmdr or dmdr, told the step has been run yet.") == 2
    write_report([one for one in rows if one["seed"] == 0], tmp_path / "page.md")
    assert "| 0.700, 1 of 1 seeds reach it |" in (tmp_path / "page.md").read_text(encoding="utf-8")
