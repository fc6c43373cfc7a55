"""Write docs/recipes.md from `examples/recipes/*.yaml`.

python docs/recipes_page.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

PAGE = Path(__file__).with_name("recipes.md")
RECIPES = sorted((PAGE.parents[1] / "examples" / "recipes").glob("*.yaml"))
HEAD = """# Recipes

<!-- Written by docs/recipes_page.py from examples/recipes/*.yaml; change the recipes there. -->

Settings to start from, as files in the repository's `examples/recipes/` (no wheel has them). `rdm-sdk train --config
examples/recipes/NAME.yaml --prompts prompts.txt` runs one with your prompts; `digits` needs none. The tests run each
for a step on a tiny random pipeline of its class. Rates and weights are starting points, from what others published and
from the digits.

| recipe | what | rewards | rates: student, critics | LoRA rank | batch | guidance | on published weights |
|---|---|---|---|---|---|---|---|
"""
TAIL = """
Batch is samples in a micro-batch, times micro-batches in a step. **Memory** is what `rdm-sdk plan --config
examples/recipes/NAME.yaml --memory 24` says: it reads the base's configs from the hub, which could not be reached where
this was written; [models](models.md#on-a-gpu) has what was measured at published shapes. **Hours** are known for no
base but the digits (five minutes on two cores): a step's seconds in that table, times `max_steps`, is the nearest that
there is.
"""


def row(recipe: Path) -> str:
    """Return a recipe's line of the table."""
    text = recipe.read_text(encoding="utf-8")
    settings: dict[str, Any] = yaml.safe_load(text)
    what = text.splitlines()[0].removeprefix("# ").rstrip(".")
    rate = float(settings["learning_rate"])
    critics = float(settings.get("critic_learning_rate", 2 * rate))
    full = settings.get("student_weights") == "full"
    times = settings.get("gradient_accumulation_steps", 1)
    cells = [
        f"`{recipe.stem}`",
        what,
        f"`{settings['rewards']}`",
        f"{rate:g}, {critics:g}",
        "full" if full else str(settings["lora_r"]),
        f"{settings['per_device_train_batch_size']} x {times}",
        f"{float(settings['guidance_scale']):g}",
        "not run" if "Not run on published weights" in text else "run",
    ]
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """Return the whole page."""
    return HEAD + "\n".join(map(row, RECIPES)) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}: {len(RECIPES)} recipes")
