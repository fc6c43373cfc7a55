"""One self-contained HTML page about runs: nothing of it is loaded from anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from rdm_sdk._version import __version__
from rdm_sdk.errors import ConfigError, DataError
from rdm_sdk.evaluation.names import short_names
from rdm_sdk.evaluation.report.curves import Curve, curves_of
from rdm_sdk.evaluation.report.plots import COLORS, plot
from rdm_sdk.evaluation.report.reading import Evaluated, RunLog, read_run
from rdm_sdk.evaluation.report.remarks import remarks, told
from rdm_sdk.evaluation.result import EvaluationResult, Row
from rdm_sdk.files import replacing

TEMPLATE = Path(__file__).with_name("template.html.j2")
MOST_PICTURES = 24
"""Pictures of one run in a page."""
OPEN = ("Losses", "Rewards", "Matching", "Variety", "Gradients")
"""Groups of curves that are open at first."""


def write_report(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Write one HTML page about runs: curves, pictures, evaluations, settings and versions; runs are overlaid.

    Args:
        runs: output folders of runs; checkpoints, or folders of `rdm-sdk demo`.
        output: the page, replaced as a whole.

    Raises:
        DataError: a run has left no log.
        ConfigError: a run is given twice, the page's name does not end in .html, or Matplotlib or Jinja2 is not
            installed.
    """
    if not runs:
        raise ConfigError("a report needs the folder of at least one run")
    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{str(output)!r} must end in .html: it becomes a web page")
    places = [Path(folder).resolve() for folder in runs]
    twice = next((str(runs[i]) for i, place in enumerate(places) if place in places[:i]), None)
    if twice is not None:
        raise ConfigError(f"the run {twice!r} is given twice; give each run once")
    logs = [read_run(folder) for folder in runs]
    names = short_names([run.folder for run in logs])
    curves = curves_of(logs)
    versions = [run.record.get("versions", {}) for run in logs]
    settings = [_settings(run) for run in logs]
    slider = _slider(names, logs)
    evaluations = [
        _evaluation(name if len(run.evaluations) == 1 else f"{name}, {one.folder.name}", one)
        for name, run in zip(names, logs, strict=True)
        for one in run.evaluations
    ]
    rows = _differences(settings)
    different = sum(row["differs"] for row in rows)
    content = {
        "title": names[0] if len(names) == 1 else f"{len(names)} runs",
        "colors": COLORS,
        "runs": [_card(name, run, curves, i) for i, (name, run) in enumerate(zip(names, logs, strict=True))],
        "slider": slider,
        "evaluations": evaluations,
        "groups": list(_groups(curves, names)),
        "settings": rows,
        "settings_title": f"{different} of {len(rows)} differ" if len(logs) > 1 else f"{len(rows)} settings",
        "versions": _differences(versions),
        "sdk": __version__,
        "sections": [
            ("runs", "Runs"),
            *([("pictures", "Pictures")] if slider else []),
            *([("evaluation", "Teacher against student")] if evaluations else []),
            ("curves", "Curves"),
            ("settings", "Settings"),
            ("versions", "Versions"),
        ],
    }
    page = _rendered(content)
    with replacing(Path(output)) as staged:
        staged.write_text(page, encoding="utf-8")
    return Path(output)


def _rendered(content: Mapping[str, Any]) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ConfigError("a report needs Jinja2: pip install 'rdm-sdk[report]'") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(content)


def _card(name: str, run: RunLog, curves: Sequence[Curve], number: int) -> dict[str, Any]:
    of = f" of {run.max_steps}" if run.max_steps else ""
    facts = [("steps", f"{run.step}{of}"), ("base", Path(str(run.record.get("base", ""))).name)]
    facts.append(("rewards", ", ".join(_reward(part) for part in run.record.get("rewards", []))))
    seconds = next((row["train_runtime"] for row in reversed(run.history) if "train_runtime" in row), None)
    facts.append(("took", "" if seconds is None else f"{seconds / 60:.1f} minutes"))
    found = [*told(run.history), *remarks(curves, number)]
    if 0 < run.step < run.max_steps:
        found.insert(0, f"It has not come to its end: {run.step} of {run.max_steps} steps.")
    return {"name": name, "facts": [(key, value) for key, value in facts if value], "remarks": found}


def _reward(part: Mapping[str, Any]) -> str:
    weight = part.get("weight")
    factor = "" if weight in (None, 1.0) else f"{weight:g} x "
    return f"{factor}{part.get('reward')} ({part.get('route')})"


def _settings(run: RunLog) -> dict[str, Any]:
    rewards = {f"reward {part.get('reward')}": _reward(part) for part in run.record.get("rewards", [])}
    base = {"base": run.record["base"]} if "base" in run.record else {}
    return {**base, **rewards, **run.record.get("settings", {})}


def _differences(sides: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of values by name, those that differ first."""
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for side in sides for name in side):
        cells = [str(side[name]) if name in side else "not known" if not side else "" for side in sides]
        rows.append({"name": name, "cells": cells, "differs": len(set(cells)) > 1})
    return sorted(rows, key=lambda row: not row["differs"])


def _groups(curves: Sequence[Curve], names: Sequence[str]) -> Iterable[dict[str, Any]]:
    numbered = enumerate(curves)
    for group, members in groupby(numbered, key=lambda pair: pair[1].group):
        shown = [
            {
                "name": curve.name,
                "unit": curve.unit,
                "meaning": curve.meaning,
                "svg": plot(curve, number),
                "ends": _ends(curve, names),
            }
            for number, curve in members
        ]
        yield {"name": group, "curves": shown, "open": group in OPEN}


def _ends(curve: Curve, names: Sequence[str]) -> str:
    """Return where a curve ended, and that it was broken if it was."""
    last = [f"{name}: {points[-1][1]:.4g}" for name, points in zip(names, curve.points, strict=True) if points]
    alone = len(names) == 1 and last
    text = f"Last: {curve.points[0][-1][1]:.4g}." if alone else f"Last: {', '.join(last)}." if last else "No value."
    return f"{text} {curve.broken} values were NaN or infinite." if curve.broken else text


def _slider(names: Sequence[str], logs: Sequence[RunLog]) -> dict[str, Any] | None:
    """Return the logged pictures of all runs by step; None where there are none."""
    films: list[dict[str, Any]] = []
    left_out = []
    for name, run in zip(names, logs, strict=True):
        chosen = _spaced(run.pictures, MOST_PICTURES)
        if len(chosen) < len(run.pictures):
            left_out.append(f"{name}: {len(chosen)} of {len(run.pictures)} pictures, at even distances.")
        if chosen:
            films.append({"name": name, "pictures": [{"step": s, "source": embedded(p)} for s, p in chosen]})
    steps = sorted({picture["step"] for film in films for picture in film["pictures"]})
    return {"steps": steps, "runs": films, "left_out": " ".join(left_out)} if films else None


def _spaced(items: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def embedded(path: Path) -> str:
    """Return a picture as a data URL: as it is, or as WebP where that is smaller.

    Raises:
        DataError: it cannot be read.
    """
    try:
        raw = path.read_bytes()
        packed = io.BytesIO()
        with Image.open(path) as picture:
            picture.convert("RGB").save(packed, format="WEBP", quality=80)
            kind = str(picture.format).lower()
    except OSError as error:
        raise DataError(f"the picture {str(path)!r} cannot be read: {error}") from error
    kind, content = ("webp", packed.getvalue()) if len(packed.getvalue()) < len(raw) else (kind, raw)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _evaluation(name: str, evaluated: Evaluated) -> dict[str, Any]:
    """Return the table of `eval.json`, with the sentence that its figures cannot do without."""
    content = evaluated.content
    try:
        rows = [Row(**row) for row in content["rows"]]
        made = content["provenance"]
        header, *table = EvaluationResult(rows, made).cells()
        sentence = (
            f"{made['samples']} images a row of {made['prompts']['different']} prompts; FID-SD and KID-SD against "
            f"{made['reference']['samples']} samples of the teacher at {made['reference']['steps']} steps, guidance "
            f"{made['guidance_scale']:g}; features: {made['features']}. Brackets are 95 % intervals."
        )
        prompts = [
            [row.name, reward, _ranked(scores.get("best", [])), _ranked(scores.get("worst", []))]
            for row in rows
            for reward, scores in row.rewards.items()
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"the eval.json of {name} is of another version of this SDK: {error}") from error
    picture = None if evaluated.picture is None else embedded(evaluated.picture)
    notes = content.get("notes", [])
    parts = {"header": header, "rows": table, "notes": notes, "picture": picture, "prompts": prompts}
    return {"name": name, "sentence": sentence, **parts}


def _ranked(prompts: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{part['prompt']} ({part['mean']:.4g})" for part in prompts)
