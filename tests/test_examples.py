"""The README's code, the example and the demo run as written."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def readme_blocks() -> list[str]:
    """Return the Python blocks of the README."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


def run(code: str, folder: Path) -> None:
    """Run code in a fresh interpreter inside a folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_readme_lines(tmp_path):
    """The README's training lines and its plain diffusers lines run; only the number of steps is lowered."""
    training, sampling, scoring = readme_blocks()
    assert "max_steps=100" in training
    run(training.replace("max_steps=100", "max_steps=2").replace("log_images=50", "log_images=1"), tmp_path)
    assert (tmp_path / "outputs" / "images" / "step_000001.png").is_file()
    run(sampling + "\nimage.save('seven.png')", tmp_path)
    assert (tmp_path / "seven.png").stat().st_size > 0
    run(scoring, tmp_path)


@pytest.mark.slow
def test_readme_lines_to_the_letter(tmp_path):
    """The README's training lines run with not a character changed."""
    run(readme_blocks()[0], tmp_path)
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").is_file()


def test_quickstart(tmp_path):
    """The example trains, saves and samples."""
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--output", str(tmp_path), "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "student.png").is_file()
    assert (tmp_path / "student" / "peft" / "adapter_config.json").is_file()


def test_demo(tmp_path, capsys):
    """The demo prints its table and writes its grid; its untrained student is worse than a teacher of four steps."""
    from rdm_sdk.digits.demo import run_demo

    figures = run_demo(tmp_path, steps=1, num_samples=100)
    assert (tmp_path / "grid.png").is_file()
    assert "worth teacher steps" in capsys.readouterr().out
    teacher = [f"teacher, {n} step{'s' if n > 1 else ''}" for n in (1, 2, 4, 8, 16, 40)]
    student = ["student, stopped after 1", "student, stopped after 2", "student, stopped after 3", "student, 4 steps"]
    assert list(figures) == [*teacher, *student]
    assert figures["student, 4 steps"]["FID-SD"] > figures["teacher, 4 steps"]["FID-SD"]
    # From a hundred images, 4 and 40 steps cannot be told apart.
    few, fewer, many = (figures[f"teacher, {steps}"]["FID-SD"] for steps in ("2 steps", "1 step", "40 steps"))
    assert many < few < fewer
    assert figures["teacher, 40 steps"]["legibility"] > 0.9


def test_demo_and_example_use_public_names_only():
    """The demo and the example import nothing of the package but its public names."""
    for path in (ROOT / "rdm_sdk" / "digits" / "demo.py", ROOT / "examples" / "quickstart.py"):
        imports = re.findall(r"^(?:from|import) (rdm_sdk\S*)", path.read_text(encoding="utf-8"), re.M)
        assert set(imports) == {"rdm_sdk"}, (path, imports)


def test_step_floor(tmp_path):
    """The benchmark that times a training cycle against its bare passes runs, in small."""
    script = str(ROOT / "benchmarks" / "performance" / "step_floor.py")
    done = subprocess.run(
        [sys.executable, script, "--batch", "8", "--cycles", "1"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])["ratio"] > 0.5


def test_convergence_runs_in_small(tmp_path):
    """The convergence runs write a line per measurement, and a second call finds them done."""
    script, out = str(ROOT / "benchmarks" / "convergence.py"), tmp_path / "rows.jsonl"
    command = [sys.executable, script, "run", "--smoke", "--only", "demo", "dmd2", "--seeds", "0", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["cell"], row["update"]) for row in rows} == {
        (f"smoke {c}", u) for c in ("demo", "dmd2") for u in (1, 2)
    }
    assert all(len(row["FID-SD"]) == 4 and min(row["FID-SD"]) > 0 for row in rows)


def test_the_convergence_page_is_written_from_rows(tmp_path):
    """Tables of the teacher, of where runs end and of drift, and a plot; a student is worth teacher steps."""
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
        for update, last in ((50, 10.0), (100, 12.0))
    ]
    write_report([*teacher, *runs], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "What to do with it" in page
    assert (tmp_path / "convergence_runs.png").stat().st_size > 0
    (end,) = [line for line in page.splitlines() if line.startswith("| demo | 2 ")]
    # Means over both seeds: 20 and 12.5 after the two evaluations; the teacher's 18.5 and 8.5 are 4 and 8 steps.
    assert "20, 12.5" in end.replace("  ", " ")
    assert " 6.1 " in end or " 6 " in end
    rises = [line for line in page.splitlines() if line.startswith("| demo |") and line.rstrip(" |").endswith("%")]
    assert [line.split("|")[-2].strip() for line in rises] == ["20%", "18%"]
