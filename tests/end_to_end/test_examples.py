"""The README's code and the demo run as written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def readme_blocks() -> list[str]:
    """Return the Python blocks of the README."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


def run(code: str, folder: Path) -> None:
    """Run code in a fresh interpreter inside a folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_readme_lines(tmp_path):
    """The README's training lines and its plain diffusers lines run; only the number of steps is lowered.

    Each block has names of its own, and all have one interpreter, as its imports take longer than they do.
    """
    training, sampling, scoring = readme_blocks()
    assert "max_steps=100" in training
    training = training.replace("max_steps=100", "max_steps=2").replace("log_images=50", "log_images=1")
    blocks = [training, sampling + "\nimage.save('seven.png')", scoring]
    run(f"for block in {blocks!r}:\n    exec(block, {{'__name__': '__main__'}})", tmp_path)
    assert (tmp_path / "outputs" / "images" / "step_000001.png").is_file()
    assert (tmp_path / "seven.png").stat().st_size > 0


@pytest.mark.slow
def test_readme_lines_to_the_letter(tmp_path):
    """The README's training lines run with not a character changed."""
    run(readme_blocks()[0], tmp_path)
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").is_file()


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
    """The demo and the first example import nothing of the package but its public names."""
    for path in (ROOT / "rdm_sdk" / "digits" / "demo.py", ROOT / "examples" / "quickstart.py"):
        imports = re.findall(r"^(?:from|import) (rdm_sdk\S*)", path.read_text(encoding="utf-8"), re.M)
        assert set(imports) == {"rdm_sdk"}, (path, imports)
