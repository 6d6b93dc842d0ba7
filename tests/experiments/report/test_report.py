"""The report: what the page says, what the plots show, and that neither needs anything else."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fxlocal.experiments.report.page import render_page, write_report
from fxlocal.experiments.report.plots import plot_results

ALWAYS = {
    "loss_over_epochs.png",
    "boundary_over_epochs.png",
    "memory_over_epochs.png",
    "accuracy_against_speedup.png",
}
WITH_ERRORS = {"error_over_time.png", "error_over_epochs.png"}
NAN = float("nan")


def make_run(strategy: str, seed: int, error: float | None, epochs: int = 4) -> dict[str, Any]:
    """A run that was never evaluated before its end."""
    return {
        "strategy": strategy,
        "seed": seed,
        "error_percent": error,
        "train_seconds": 10.0 + seed,
        "compile_seconds": 0.5,
        "saved_bytes": [(8 - epoch) * 2**20 for epoch in range(epochs)],
        "boundary": list(range(epochs)),
        "loss": [2.0 / (1 + epoch) for epoch in range(epochs)],
        "errors": [],
        "error_epochs": [],
        "seconds": [],
        "batch_size": [16] * epochs,
        "images": 100 * epochs,
        "reached": True,
    }


def with_errors(run: dict[str, Any], every: int = 2) -> dict[str, Any]:
    """Add what the plots of the error need; evaluated at every second epoch."""
    evaluated = list(range(every, len(run["loss"]) + 1, every))
    seconds = [2.5 * (epoch + 1) for epoch in range(len(run["loss"]))]
    return run | {
        "error_epochs": evaluated,
        "errors": [50.0 / epoch + run["seed"] for epoch in evaluated],
        "seconds": seconds,
    }


def make_results(
    runs: Sequence[dict[str, Any]], device: str = "cpu", compiled: bool = False
) -> dict[str, Any]:
    summary = []
    for name in dict.fromkeys(run["strategy"] for run in runs):
        mine = [r["error_percent"] for r in runs if r["strategy"] == name]
        errors = [e for e in mine if e is not None and e == e]
        summary.append(
            {
                "strategy": name,
                "error_percent_mean": fmean(errors) if errors else None,
                "error_percent_std": stdev(errors) if len(errors) > 1 else None,
                "speedup": 1.37 if errors else None,
                "images_per_second": 99.0 if errors else None,
            }
        )
    return {
        "data": "digits",
        "model": "resnet14",
        "epochs": 4,
        "metric": "error",
        "device": device,
        "compile": compiled,
        "versions": {"torch": "2.15.0", "fxlocal": "0.1.0"},
        "runs": list(runs),
        "summary": summary,
    }


PLAIN = [make_run(s, seed, 2.0 + seed) for s in ("sgd", "freeze") for seed in (0, 1)]
FULL = [with_errors(run) for run in PLAIN]


def page_of(results: dict[str, Any]) -> str:
    return render_page(results, plots={})


def cells(page: str, table: str) -> list[list[str]]:
    """The text of a table's body, row by row."""
    body = re.search(rf'<table class="{table}">.*?<tbody>(.*?)</tbody>', page, re.S)
    assert body
    rows = re.findall(r"<tr>(.*?)</tr>", body[1], re.S)
    return [
        [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<td>(.*?)</td>", row, re.S)]
        for row in rows
    ]


def axes_of(figure: Figure) -> Axes:
    (axes,) = figure.axes
    return axes


def points(line: Line2D, axis: str) -> list[float]:
    data: Any = line.get_xdata() if axis == "x" else line.get_ydata()
    return [float(value) for value in data]


@pytest.mark.parametrize(("runs", "names"), [(PLAIN, ALWAYS), (FULL, ALWAYS | WITH_ERRORS)])
def test_writes_the_plots_and_embeds_them(
    runs: list[dict[str, Any]], names: set[str], tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "folder"
    path = write_report(make_results(runs), folder)
    assert path == folder / "report.html"
    page = path.read_text(encoding="utf-8")
    files = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert set(files) == names
    assert all(content.startswith(b"\x89PNG\r\n\x1a\n") for content in files.values())
    embedded = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert sorted(map(base64.b64decode, embedded)) == sorted(files.values())


def test_the_page_needs_nothing_from_elsewhere() -> None:
    picture = "<svg><title>blocks</title></svg>"
    page = render_page(make_results(FULL), {"a.png": b"png"}, picture)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)', page))
    assert not re.search(r"<script|<link|@import|url\(|https?://", page)
    assert picture in page


def test_summary_table() -> None:
    page = page_of(make_results(PLAIN))
    arrow, plus_minus = "&rarr;", "&plusmn;"
    assert cells(page, "summary") == [
        [name, f"2.50 {plus_minus} 0.71", "10.5", "1.37\u00d7", "0.5", f"8.0 {arrow} 5.0", "3", "2"]
        for name in ("sgd", "freeze")
    ]
    assert cells(page, "runs")[1] == ["sgd", "1", "3.00", "11.0", "0.5", "4", "0.5000"]


def test_boundaries_that_differ_over_seeds_show_as_a_range() -> None:
    runs = [make_run("sgd", seed, 1.0) | {"boundary": [0, 0, 1, 4 + seed]} for seed in range(3)]
    assert cells(page_of(make_results(runs)), "summary")[0][6] == "4 to 6"


def test_environment_lists_what_the_results_say() -> None:
    page = page_of(make_results(PLAIN) | {"command": "fxlocal compare <x>"})
    for text in ("torch 2.15.0, fxlocal 0.1.0", "resnet14", "fxlocal compare &lt;x&gt;"):
        assert f"<td>{text}</td>" in page


def test_names_are_escaped_and_a_dollar_is_no_formula() -> None:
    name = "<b>$x&"
    page = page_of(make_results([make_run(name, 0, 1.0)]))
    assert "&lt;b&gt;$x&amp;" in page
    assert "<b>" not in page


@pytest.mark.parametrize("missing", [None, NAN])
def test_diverged_runs_are_marked_and_count_in_no_mean(missing: float | None) -> None:
    gone = with_errors(make_run("local", 1, missing, epochs=3)) | {"loss": [2.0, 9.0, missing]}
    lost = [make_run("lost", seed, missing, epochs=0) for seed in (0, 1)]
    results = make_results([*FULL, with_errors(make_run("local", 0, 3.0)), gone, *lost])
    page = page_of(results)
    _, _, local, wholly_lost = cells(page, "summary")
    assert local[1:3] == ["3.00", "10.0"]
    assert local[-1] == "2 (1 diverged)"
    assert wholly_lost == ["lost", "diverged", "-", "-", "-", "-", "-", "2 (2 diverged)"]
    assert [row[2] for row in cells(page, "runs")[-4:]] == ["3.00", *["diverged"] * 3]
    assert not re.search(r"\b(nan|None)\b", page)


def test_a_curve_is_the_mean_over_seeds_within_its_band() -> None:
    axes = axes_of(plot_results(make_results(FULL))["error_over_time.png"])
    sgd = axes.get_lines()[0]
    assert points(sgd, "x") == pytest.approx([5.0, 10.0])  # the ends of epochs 2 and 4
    assert points(sgd, "y") == pytest.approx([25.5, 13.0])
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((12.5, 26.0))
    assert axes.get_ylabel() == "test error (%)"
    assert axes.get_xlabel() == "training time (s)"


def test_a_diverged_run_is_a_line_of_its_own_that_ends_in_a_cross() -> None:
    gone = make_run("sgd", 1, None, epochs=3) | {"loss": [2.0, 9.0, None]}
    results = make_results([make_run("sgd", 0, 1.0), gone])
    figure = plot_results(results)["loss_over_epochs.png"]
    mean, line, cross = axes_of(figure).get_lines()
    assert points(mean, "y") == pytest.approx([2.0, 1.0, 2 / 3, 0.5])
    assert points(line, "y") == [2.0, 9.0]
    assert (points(cross, "x"), cross.get_marker()) == ([2], "x")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sgd (1 of 2 diverged)"]


def test_equal_boundaries_show_under_each_other() -> None:
    first, second = axes_of(
        plot_results(make_results(PLAIN))["boundary_over_epochs.png"]
    ).get_lines()
    assert points(first, "y") == points(second, "y") == [0, 1, 2, 3]
    assert first.get_linewidth() > second.get_linewidth()
    assert first.get_color() != second.get_color()


def test_one_epoch_shows_as_a_point() -> None:
    plots = plot_results(make_results([make_run("sgd", 0, 2.0, epochs=1)]))
    for name in ("boundary_over_epochs.png", "memory_over_epochs.png"):
        (line,) = axes_of(plots[name]).get_lines()
        assert line.get_marker() == "o"
    longer = plot_results(make_results(PLAIN))["boundary_over_epochs.png"]
    assert axes_of(longer).get_lines()[0].get_marker() == "None"


@pytest.mark.parametrize(
    ("device", "compiled", "name"),
    [
        ("cpu", False, "saved for backward"),
        ("cpu", True, "saved for backward (predicted)"),
        ("cuda (NVIDIA H200)", True, "peak GPU memory"),
    ],
)
def test_memory_is_named_by_what_was_measured(device: str, compiled: bool, name: str) -> None:
    results = make_results(PLAIN, device, compiled)
    axes = axes_of(plot_results(results)["memory_over_epochs.png"])
    assert axes.get_ylabel() == f"{name} (MiB)"
    assert points(axes.get_lines()[0], "y") == [8, 7, 6, 5]
    assert name in page_of(results)


def test_accuracy_against_speedup() -> None:
    runs = [run | {"train_seconds": 5.0} if run["strategy"] == "freeze" else run for run in PLAIN]
    axes = axes_of(plot_results(make_results(runs))["accuracy_against_speedup.png"])
    sgd_runs, _, freeze_runs, freeze_mean, _ = axes.get_lines()
    assert points(sgd_runs, "x") == [1.0, 1.0]
    assert points(freeze_runs, "x") == pytest.approx([10 / 5, 11 / 5])  # by seed
    assert points(freeze_runs, "y") == [98.0, 97.0]
    assert (points(freeze_mean, "x"), points(freeze_mean, "y")) == ([1.37], [97.5])


def test_what_differs_but_for_the_layers_is_said() -> None:
    same = "sees the same batches"
    assert same in page_of(make_results(PLAIN))
    grown = PLAIN[3] | {"batch_size": [16, 32, 32, 32]}
    short = make_run("freeze", 1, 3.0, epochs=2)
    for other in (grown, short):
        assert same not in page_of(make_results([*PLAIN[:3], other]))


def test_an_error_that_was_not_reached_is_marked() -> None:
    page = page_of(make_results([PLAIN[0], PLAIN[2] | {"reached": False}]))
    assert cells(page, "summary")[1][-1] == "1 (1 not reached)"


def test_skipped_images_are_no_speed() -> None:
    skipping = PLAIN[2] | {"images": 200, "train_seconds": 5.0}
    axes = axes_of(plot_results(make_results([PLAIN[0], skipping]))["accuracy_against_speedup.png"])
    assert points(axes.get_lines()[2], "x") == [1.0]


def test_without_a_baseline_there_is_no_speedup() -> None:
    results = make_results(PLAIN)
    for row in results["summary"]:
        row["speedup"] = None
    page = page_of(results)
    assert "accuracy_against_speedup.png" not in plot_results(results)
    assert cells(page, "summary")[0][3] == "-"


def test_wide_ranges_get_a_logarithmic_scale() -> None:
    near = plot_results(make_results(PLAIN))["loss_over_epochs.png"]
    far = [make_run("sgd", 0, 1.0) | {"loss": [9.0, 3.0, 1.0, 0.1]}]
    assert axes_of(near).get_yscale() == "linear"
    assert axes_of(plot_results(make_results(far))["loss_over_epochs.png"]).get_yscale() == "log"


def test_results_read_back_from_json_give_the_same_page() -> None:
    results = make_results(FULL)
    again = json.loads(json.dumps(results))
    assert page_of(results) == page_of(again)
