"""Curves as SVG that takes its colors from the page, so that one drawing does for light and dark."""

from __future__ import annotations

import io
import re
from typing import Any

from rdm_sdk.errors import ConfigError
from rdm_sdk.evaluation.report.curves import Curve, thinned

COLORS = 6
"""Colors of runs that the page defines; further runs take them again, dashed."""
_INK = "#010203"


def plot(curve: Curve, number: int) -> str:
    """Return a curve of all runs as an `<svg>` element. The line of run k has the id `plot<number>-run<k>`.

    Raises:
        ConfigError: Matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a report needs Matplotlib: pip install 'rdm-sdk[report]'") from error
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"plot{number}",
        "font.size": 9,
        "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.4, 1.9))
        figure.subplots_adjust(left=0.13, right=0.98, bottom=0.22, top=0.9)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15, color=_INK, linewidth=0.6)
        for run, points in enumerate(curve.points):
            kept = thinned(points)
            if kept:
                (line,) = axes.plot(
                    [step for step, _ in kept],
                    [value for _, value in kept],
                    color=_color(run),
                    linewidth=1.6,
                    linestyle="-" if run < COLORS else "--",
                    marker="o" if len(kept) == 1 else None,
                )
                line.set_gid(f"plot{number}-run{run}")
        axes.margins(x=0.01)
        axes.locator_params(nbins=5)
        axes.set_xlabel("training step", fontsize=8, labelpad=1)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _themed(file.getvalue())


def _color(run: int) -> str:
    return f"#0a0b{run % COLORS:02x}"


def _themed(svg: str) -> str:
    """Return the element alone, with the page's colors, and as wide as its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # names of its groups, the same in every drawing
    svg = svg.replace("xlink:href", "href").replace(_INK, "currentColor")
    svg = re.sub(r"#0a0b(0\d)", lambda match: f"var(--run{int(match[1])})", svg)
    # Shorter paths; never the labels, which may be small numbers.
    svg = re.sub(r' d="[^"]*"', lambda match: re.sub(r"(\d+\.\d\d)\d+", r"\1", match[0]), svg)
    return svg.replace("<svg", '<svg aria-hidden="true"', 1)
