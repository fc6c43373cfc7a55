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

Settings to start from, as files in the folder `examples/recipes/` of the repository (pip does not install them).

```sh
rdm-sdk plan --config examples/recipes/NAME.yaml --memory 24   # does it fit? loads no weights
rdm-sdk train --config examples/recipes/NAME.yaml --prompts prompts.txt   # digits needs no prompts
```

Where a recipe has other rewards than `dm`, install their packages first, such as `rdm-reward-hps`. Rates and weights
are starting points, from what others published and from the digits. Only `digits` was run on its real weights; the
tests run each of the others for a step on a tiny random pipeline of its class.

| recipe | what | rewards | rates: student, critics | LoRA rank | batch | guidance | on published weights |
|---|---|---|---|---|---|---|---|
"""
TAIL = """
*Batch*: samples in a micro-batch, times micro-batches in a step. *Rates*: learning rates.

**Memory**: ask `plan`. It downloads the base's config files from the hub (a few kilobytes), or reads them in a local
folder that you give as `--model`. [Models](models.md#on-a-gpu) has what was measured at published sizes on an H200.
**Hours**: known for the digits alone (five minutes on two cores). For another base, the nearest that there is: the
seconds of a step in that table, times `max_steps`.
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
