"""Write docs/logs.md from what the report knows of every figure: `python docs/logs_page.py`; `make docs` does."""

from __future__ import annotations

from pathlib import Path

from rdm_sdk.evaluation.report.curves import KINDS, ORDER

PAGE = Path(__file__).parent / "logs.md"

INTRODUCTION = """# What a run logs

<!-- Written by docs/logs_page.py from rdm_sdk/evaluation/report/curves.py; change the sentences there. -->

Every figure by its name in `log.jsonl` of the output folder, a line per log, in `trainer_state.json` that stands there
at the end, and in the trackers (which put `train/` or `eval/` before it), with its unit and what is normal. The states
in checkpoints keep the last 50 logs alone, so that they stay small; a run that goes on from one finds the rest in the
file beside it. `<name>` is a reward's, as the log calls it. A figure is the mean since the last log. Beside them stand
Trainer's `epoch`, `step`, `total_flos`, `train_...` and `..._runtime`, and the sentences of
[the watch](trainer.md#the-watch) under `watch`, with their `watch_kind` and `watch_figure`.
"""


def page() -> str:
    """Return the page's text."""
    parts = [INTRODUCTION]
    for group in ORDER[:-1]:  # the last is for what nobody knows
        parts += [f"\n## {group}\n", "\n| figure | unit | what it is, and what is normal |\n|---|---|---|\n"]
        for kind in KINDS:
            if kind.group == group:
                name = kind.pattern.replace("(.+)", "<name>", 1).replace("(.+)", "<figure>")
                parts.append(
                    f"| `{name}` | {kind.unit.replace('|', chr(92) + '|')} | {kind.meaning.format('`<name>`')} |\n"
                )
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
