"""`rdm-sdk report`: one page that loads nothing, with all curves, pictures, evaluations, settings and versions."""

from __future__ import annotations

import base64
import builtins
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rdm_sdk import DataError, write_report
from rdm_sdk.cli.main import main
from rdm_sdk.evaluation.report.curves import NOT_CURVES, Curve, curves_of, thinned
from rdm_sdk.evaluation.report.page import embedded
from rdm_sdk.evaluation.report.plots import COLORS, plot
from rdm_sdk.evaluation.report.reading import read_run
from rdm_sdk.evaluation.report.remarks import remarks
from rdm_sdk.evaluation.result import EvaluationResult, Row
from rdm_sdk.training.pictures import image_grid

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def logged(step: int) -> dict[str, float]:
    """Return what a run with two rewards logs at a step."""
    wave = math.sin(step / 50)
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 1 + wave,
        "loss/pathwise": 1 + wave,
        "dm/critic_loss": 0.3 + 0.1 * wave,
        "grad_norm": 0.1,
        "learning_rate": 1e-3 * (1 - step / 2000),
        "rewards/dm/mean": -30 + step / 100,
        "rewards/<jpeg>/mean": wave,
        "weights/dm": 1.0,
        "dm/residual": 0.2,
        "dm/critic_grad_norm": 0.3,
        "cost/teacher_forwards": 32.0 * step,
        "ratio/ess": 0.9,
        "ratio/clip_fraction": 0.01,
        "something/new": 3.0,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of 2,000 steps, logged at each, with pictures and an evaluation."""
    run = tmp_path_factory.mktemp("runs") / "first"
    write_run(run, 2000)
    for step in range(50, 2001, 50):
        image_grid([("student", torch.rand(4, 3, 16, 16))], run / "images" / f"step_{step:06d}.png")
    figures = {
        **{"frechet": 9.0, "low": 8.0, "high": 10.0, "kernel": 1.0, "kernel_deviation": 0.5},
        **{"precision": 0.9, "recall": 0.8, "density": 1.0, "coverage": 0.95},
    }
    reward = {"mean": 0.5, "low": 0.4, "high": 0.6, "best": [{"prompt": "a <cat>", "mean": 1.0}], "worst": []}
    row = Row("student, 4 steps", 4, "student", {"teacher": figures}, 0.1, {"jpeg": reward}, "7.9", 3.0)
    provenance = {
        **{"samples": 1000, "prompts": {"different": 10}, "reference": {"steps": 40, "samples": 1000}},
        **{"guidance_scale": 1.0, "features": "classifier"},
    }
    EvaluationResult([row], provenance).save(run / "eval")
    image_grid([("teacher", torch.rand(4, 3, 16, 16))], run / "eval" / "grid.png")
    return run


def write_run(run: Path, steps: int, **settings: Any) -> None:
    run.mkdir(parents=True)
    state = {"global_step": steps, "max_steps": 2000, "log_history": [logged(step) for step in range(1, steps + 1)]}
    (run / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    record = {
        "base": "some/base",
        "rewards": [{"reward": "dm", "weight": 1.0, "route": "gradient"}],
        "settings": {"learning_rate": 1e-3, "seed": 0} | settings,
        "versions": {"torch": "2.13"},
    }
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")


class Page(HTMLParser):
    """Collects what a page loads, and checks that its elements are closed in order."""

    VOID = frozenset({"meta", "img", "input", "br", "path", "use", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.loaded += [str(values[name]) for name in ("src", "href") if values.get(name)]
        self.ids += [str(values["id"])] if "id" in values else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    """Return the text of the run's page."""
    return write_report([folder], folder.parent / "report.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    """It parses, each id is there once, and all that it shows is in it; 2,000 steps stay below 2 MB."""
    parsed = Page(page)
    assert parsed.open == []
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert {loaded[:5] for loaded in parsed.loaded if not loaded.startswith("#")} == {"data:"}
    assert all(loaded[1:] in parsed.ids for loaded in parsed.loaded if loaded.startswith("#"))
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert len(page) < 2_000_000


def test_every_curve_is_there_and_explained(page: str) -> None:
    """By name, with a line, a sentence and its last value; names of rewards are escaped."""
    names = [name for name in logged(1) if not NOT_CURVES.fullmatch(name)]
    assert len(names) == 14
    for name in names:
        assert f"<b>{name.replace('<', '&lt;').replace('>', '&gt;')}</b>" in page
    assert len(set(re.findall(r'id="(plot\d+-run0)"', page))) == len(names)
    assert page.count("<figcaption>") == len(names)
    assert "Last: 3." in page
    assert "<jpeg>" not in page.replace("&lt;jpeg&gt;", "")
    assert "a &lt;cat&gt; (1)" in page


def test_pictures_evaluation_settings_and_versions_are_there(page: str) -> None:
    """The slider has the first and the last picture; the table has figures with intervals."""
    steps = [int(step) for step in re.findall(r'data-step="(\d+)"', page)]
    assert (len(steps), steps[0], steps[-1]) == (24, 50, 2000)
    assert "24 of 40 pictures" in page
    for text in ("9 (8 to 10)", "worth teacher steps", "some/base", "<td>learning_rate</td><td>0.001</td>", "2.13"):
        assert text in page


def test_a_name_with_the_tables_line_moves_no_figure(folder: Path, tmp_path: Path) -> None:
    """A student's folder may be called so: its figures stay below their titles, in the table and on the page."""
    write_run(tmp_path / "run", 3)
    content = json.loads((folder / "eval" / "eval.json").read_text(encoding="utf-8"))
    rows = [Row(**row | {"name": "a|b\nc, 4 steps"}) for row in content["rows"]]
    result = EvaluationResult(rows, content["provenance"])
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in result.table().splitlines()}) == 1
    assert len(result.table().splitlines()) == 3
    result.save(tmp_path / "run" / "eval")
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r'<td class="number">a\|b\s+c, 4 steps</td><td class="number">9 \(8 to 10\)</td>', page)


def test_every_evaluation_of_a_run_is_shown(folder: Path, tmp_path: Path) -> None:
    """The one of an alphabet's first folder may be the oldest."""
    write_run(tmp_path / "run", 3)
    content = json.loads((folder / "eval" / "eval.json").read_text(encoding="utf-8"))
    for name in ("before", "now"):
        rows = [Row(**row | {"name": f"student {name}"}) for row in content["rows"]]
        EvaluationResult(rows, content["provenance"]).save(tmp_path / "run" / name)
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("<h3>run, before</h3>") < page.index("student before") < page.index("<h3>run, now</h3>")
    assert page.index("<h3>run, now</h3>") < page.index("student now")
    (tmp_path / "run").rename(tmp_path / "training")  # as `rdm-sdk demo` leaves it, evaluated within the run
    (tmp_path / "training" / "now" / "eval.json").rename(tmp_path / "training" / "eval.json")
    assert [one.folder.name for one in read_run(tmp_path).evaluations] == ["training", "before"]


def test_a_page_is_written_in_a_few_seconds(folder: Path) -> None:
    """Of 2,000 steps, in processor time, which a busy machine does not stretch."""
    begin = time.process_time()
    write_report([folder], folder.parent / "again.html")
    assert time.process_time() - begin < 10


def test_runs_are_overlaid_and_their_differences_shown(folder: Path, tmp_path: Path) -> None:
    """A line for each in every plot; settings that differ come first; runs of the same name are told apart."""
    other = tmp_path / "first"
    write_run(other, 30, seed=1)
    text = write_report([folder, other], tmp_path / "two.html").read_text(encoding="utf-8")
    Page(text)
    assert len(set(re.findall(r'id="(plot\d+-run1)"', text))) == 14
    assert 'data-run="1"' in text
    assert "1 of 4 differ" in text
    assert text.index('class="other"><td>seed</td><td>0</td><td>1</td>') < text.index("<td>learning_rate</td>")
    assert f"{tmp_path.name}/first" in text
    assert "It has not come to its end: 30 of 2000 steps." in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """However far up their folders differ."""
    runs = [tmp_path / f"seed{seed}" / "demo" / "training" for seed in range(2)]
    for run in runs:
        write_run(run, 3)
    text = write_report(runs, tmp_path / "two.html").read_text(encoding="utf-8")
    assert text.count("seed0/demo/training") == text.count("seed1/demo/training") > 0


def test_a_run_leaves_what_a_report_needs(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    """With checkpoints or without: its log, settings and versions; a resumed run keeps what it logged before."""
    run = tmp_path / "run"
    make_trainer(run, "dm + 0.5*legibility", log_images=1, learning_rate=2e-3).train()
    found = read_run(run)
    assert [row["step"] for row in found.history if "loss" in row] == [1, 2]
    assert found.record["settings"]["learning_rate"] == 2e-3
    assert found.record["rewards"][1] == {"reward": "legibility", "weight": 0.5, "route": "gradient"}
    assert found.record["versions"]["rdm-sdk"]
    assert [step for step, _ in found.pictures] == [1, 2]
    groups = {curve.group for curve in curves_of([found])}
    assert "Other" not in groups
    text = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "0.5 x legibility (gradient)" in text


def test_a_checkpoint_alone_will_do(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    """Of a run that was killed: logs and settings of its newest checkpoint, no versions."""
    run = tmp_path / "run"
    make_trainer(run, save_strategy="steps", save_steps=1).train()
    (run / "run.json").unlink()
    (run / "trainer_state.json").unlink()
    for folder in (run, run / "checkpoint-1"):
        found = read_run(folder)
        assert found.step == (2 if folder == run else 1)
        assert found.record["settings"]["seed"] == 42
    assert "Not known: run.json" in write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_log_goes_on_beyond_the_newest_checkpoint(tmp_path: Path) -> None:
    """Of a run that was killed, or is still going on: it has come as far as its log."""
    write_run(tmp_path / "run", 3)
    lines = [json.dumps(logged(step)) + "\n" for step in range(1, 6)]
    (tmp_path / "run" / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    assert read_run(tmp_path / "run").step == 5


def test_what_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One line each: no folder, no log, a damaged one, Matplotlib missing."""
    with pytest.raises(DataError, match=r"holds no log of a run: log.jsonl is written from the first log on"):
        read_run(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        read_run(tmp_path)
    write_run(tmp_path / "run", 3)
    for line in ("[1]", "{}"):
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / "log.jsonl").write_text('{"step": 1}\n' + line + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"log.jsonl' cannot be read: line 2 is no log of a run"):
            read_run(tmp_path / "odd")
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert error == "rdm-sdk: a report needs Matplotlib: pip install 'rdm-sdk[report]'\n"
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("name", "values", "remark"),
    [
        ("dm/residual", [0.2] * 20 + [0.3] * 40, None),  # as of healthy runs, whose samples become sharper
        ("frac_reward_zero_std", [0.1] * 10 + [0.9] * 10, "advantages are empty"),
        ("ratio/ess", [0.9] * 10 + [0.3] * 10, "used too often"),
        ("grad_norm", [0.1] * 10 + [10.0] * 10, "may diverge"),
        ("dm/critic_loss", [0.3] * 10 + [0.6] * 10, None),  # the same
        ("loss/policy", [0.3] * 10 + [0.6] * 10, None),
    ],
)
def test_remarks_say_what_to_look_at(name: str, values: list[float], remark: str | None) -> None:
    """Each by its rule; a run without oddities has none."""
    found = remarks([Curve(name, "", "", "", [list(enumerate(values))], 0)], 0)
    assert (remark is None and not found) or (remark is not None and remark in found[0])


@pytest.mark.parametrize(("gap", "told"), [(0.01, False), (0.001, False), (1e-7, True)])
def test_a_critic_that_learns_nothing_is_told(gap: float, told: bool) -> None:
    """It equals the teacher, so that nothing else in the logs looks wrong."""
    sides = {"dm/gap": gap, "dm/error": 0.08}
    curves = [Curve(name, "", "", "", [[(step, value) for step in range(40)]], 0) for name, value in sides.items()]
    found = remarks(curves, 0)
    assert len(found) == told
    assert not told or "dm/gap ended at 1e-07, next to nothing: the critic still equals the teacher" in found[0]


def test_pictures_are_packed_where_that_makes_them_smaller(tmp_path: Path) -> None:
    """A photograph's, not a drawing's."""
    Image.effect_noise((64, 64), 50).save(tmp_path / "noise.png")
    Image.new("1", (256, 256)).save(tmp_path / "black.png")
    assert embedded(tmp_path / "noise.png").startswith("data:image/webp;base64,")
    black = base64.b64encode((tmp_path / "black.png").read_bytes()).decode()
    assert embedded(tmp_path / "black.png") == f"data:image/png;base64,{black}"


def test_runs_beyond_the_colors_are_dashed() -> None:
    """They take the colors again."""
    count = COLORS + 1
    svg = plot(Curve("loss", "", "", "", [[(1, 0.0), (2, float(run))] for run in range(count)], 0), 0)
    lines = [svg.split(f'id="plot0-run{run}"')[1].split("</g>")[0] for run in range(count)]
    assert ["dasharray" in line for line in lines] == [False] * COLORS + [True]


def test_labels_of_small_values_are_whole() -> None:
    """A curve between 0 and 0.004 has labels that differ, and every line is inside its drawing."""
    svg = plot(Curve("loss", "", "", "", [[(step, step * 1e-5) for step in range(400)]], 0), 3)
    labels = re.findall(r">([^<>]+)</text>", svg)
    assert {"0.001", "0.002", "0.003", "training step"} <= {label.strip() for label in labels}
    assert 'id="plot3-run0"' in svg


def test_thinning_keeps_spikes() -> None:
    """At most two points a bucket, first the one that came first, and the extremes of all."""
    points = [(step, 100.0 if step == 777 else math.sin(step)) for step in range(5000)]
    kept = thinned(points)
    assert len(kept) <= 300
    assert (777, 100.0) in kept
    assert kept == sorted(kept)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_it(page: str, tmp_path: Path) -> None:
    """On a phone's width nothing sticks out, the slider changes the picture, and a box hides a run's lines."""
    probe = """<script>
    const seen = {};
    try {
      seen.wide = document.documentElement.scrollWidth - window.innerWidth;
      const images = [...document.querySelectorAll(".film img")];
      const shown = () => images.filter(i => i.offsetHeight).map(i => i.dataset.step);
      seen.last = shown().join();
      const slider = document.getElementById("step"); slider.value = 0; slider.dispatchEvent(new Event("input"));
      seen.first = shown().join();
      seen.text = document.getElementById("shown-step").textContent;
      seen.drawn = document.querySelector("figure svg").getBoundingClientRect().width > 200;
    } catch (error) { seen.error = String(error); }
    document.title = JSON.stringify(seen);
    </script></body>"""
    path = tmp_path / "probe.html"
    path.write_text(page.replace("</body>", probe), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", f"--user-data-dir={tmp_path}/user"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=90
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    seen = json.loads(title[1])
    assert "error" not in seen
    assert seen["wide"] <= 0
    assert (seen["last"], seen["first"], seen["text"], seen["drawn"]) == ("2000", "50", "50", True)
