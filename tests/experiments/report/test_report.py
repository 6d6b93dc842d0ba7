"""The report: what the page says, what the plots show, and that neither needs anything else."""

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from bokeh.models import MultiLine, Patches, Scatter
from support.results import make_results, make_run, with_errors

from fxlocal.experiments.report.charts import Chart, draw_charts, look_of
from fxlocal.experiments.report.page import render_page, write_page
from fxlocal.experiments.report.words import differ_when_equal, explain_noise, judge, time_text

ALWAYS = ["Error against time", "Loss", "Boundary", "Memory"]
WITH_ERRORS = ["Error against time", "Error", "Loss", "Boundary", "Memory"]
BOKEH = Path(str(files("bokeh"))) / "server/static/js/bokeh.min.js"
NAN = float("nan")


PLAIN = [make_run(s, seed, 2.0 + seed) for s in ("sgd", "freeze") for seed in (0, 1)]
LONG = [make_run("sgd", 0, 1.0, epochs=100)]
FULL = [with_errors(run) for run in PLAIN]


def page_of(results: dict[str, Any]) -> str:
    """The page but for its scripts."""
    return re.sub("<script.*?</script>", "", render_page(results), flags=re.S)


def nameless(page: str) -> str:
    """A page without the names of Bokeh's models, which a process numbers through."""
    return re.sub(r'"p\d{4,}"', '"p"', page)


def cells(page: str, table: str) -> list[list[str]]:
    """The text of a table's body, row by row."""
    body = re.search(rf'<table class="{table}">.*?<tbody>(.*?)</tbody>', page, re.S)
    assert body
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body[1], re.S)
    return [
        [
            re.sub(r"<[^>]*>", "", cell).strip()
            for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S)
        ]
        for row in rows
    ]


def chart(results: dict[str, Any], title: str) -> Chart:
    (found,) = (chart for chart in draw_charts(results) if chart.title == title)
    return found


def drawn(one: Chart, glyph: type) -> list[dict[str, Any]]:
    """The rows that a glyph of the chart draws."""
    renderer = next(r for r in one.figure.renderers if isinstance(r.glyph, glyph))
    data = renderer.data_source.data
    return [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]


@pytest.mark.parametrize(("runs", "names"), [(PLAIN, ALWAYS), (FULL, WITH_ERRORS)])
def test_writes_a_page_with_the_charts_that_there_are_numbers_for(
    runs: list[dict[str, Any]], names: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "folder"
    path = write_page(make_results(runs), folder)
    assert path == folder / "report.html"
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    page = path.read_text(encoding="utf-8")
    assert re.findall("<figcaption>(.*)</figcaption>", page) == names
    assert ('value="seconds"' in page) == (runs is FULL)  # of others nobody knows when epochs end
    assert len(page.encode()) < 2e6


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    picture = "<svg><title>blocks</title></svg>"
    page = write_page(make_results(FULL), tmp_path, picture).read_text(encoding="utf-8")
    assert picture in page and picture in (tmp_path / "blocks.svg").read_text()
    again = write_page(make_results(FULL), tmp_path).read_text(encoding="utf-8")
    assert nameless(page) == nameless(again)
    ours = page.replace(BOKEH.read_text(encoding="utf-8"), "")
    assert len(ours) < 200_000
    assert not re.search(r"<link|@import|url\(|src=|href=|https?://(?!www\.w3\.org/)", ours)
    assert "default-src 'none'" in ours


@pytest.mark.usefixtures("unrendered")
def test_summary_table() -> None:
    page = page_of(make_results(PLAIN))
    arrow, plus_minus = "&rarr;", "&plusmn;"
    assert cells(page, "summary") == [
        [name, f"2.50 {plus_minus} 0.71", "0.73", "10.5", "0.5", f"8.0 {arrow} 5.0", "3", "2"]
        for name in ("sgd", "freeze")
    ]
    assert cells(page, "runs")[1] == ["sgd", "1", "3.00", "11.0", "0.5", "4", "0.5000"]


@pytest.mark.usefixtures("unrendered")
def test_boundaries_that_differ_over_seeds_show_as_a_range() -> None:
    runs = [make_run("sgd", seed, 1.0) | {"boundary": [0, 0, 1, 4 + seed]} for seed in range(3)]
    assert cells(page_of(make_results(runs)), "summary")[0][6] == "4 to 6"


@pytest.mark.usefixtures("unrendered")
def test_environment_lists_what_the_results_say() -> None:
    page = page_of(make_results(PLAIN) | {"command": "fxlocal compare <x>"})
    for text in ("torch 2.15.0, fxlocal 0.1.0", "resnet14", "fxlocal compare &lt;x&gt;"):
        assert f"<td>{text}</td>" in page


def test_names_are_escaped_and_a_dollar_is_no_formula() -> None:
    name = "<b>$x&"
    page = render_page(make_results([make_run(name, 0, 1.0)]))
    assert "&lt;b&gt;$x&amp;" in page and "\\u003cb>$x&" in page  # tables, scripts
    assert name not in page


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("missing", [None, NAN])
def test_diverged_runs_are_marked_and_count_in_no_mean(missing: float | None) -> None:
    gone = with_errors(make_run("local", 1, missing, epochs=3)) | {"loss": [2.0, 9.0, missing]}
    lost = [make_run("lost", seed, missing, epochs=0) for seed in (0, 1)]
    results = make_results([*FULL, with_errors(make_run("local", 0, 3.0)), gone, *lost])
    page = page_of(results)
    _, _, local, wholly_lost = cells(page, "summary")
    assert local[1:4] == ["3.00", "0.73", "10.0"]
    assert local[-1] == "2 (1 diverged)"
    assert wholly_lost == ["lost", "diverged", "-", "-", "-", "-", "-", "2 (2 diverged)"]
    assert [row[2] for row in cells(page, "runs")[-4:]] == ["3.00", *["diverged"] * 3]
    assert not re.search(r"\b(nan|None)\b", page)


def test_curves_are_the_mean_over_seeds_within_its_band() -> None:
    one = chart(make_results(FULL), "Error")
    sgd = drawn(one, MultiLine)[0]
    assert (sgd["strategy"], sgd["epoch"], sgd["seconds"]) == ("sgd", [2, 4], [5.0, 10.0])
    assert sgd["y"] == pytest.approx([25.5, 13.0])
    band = drawn(one, Patches)[0]
    assert (band["epoch"], band["y"]) == ([2, 4, 4, 2], [25.0, 12.5, 13.5, 26.0])
    first, second, *_ = drawn(one, Scatter)
    assert (first["low"], first["y"], first["high"]) == (25.0, 25.5, 26.0)
    assert second["epoch"] == 4 and first["mark"] > 0
    assert one.figure.yaxis.axis_label == "test error (%)"
    assert one.text.startswith("test error (%): sgd from 25.5 to 13; freeze from")


def test_a_diverged_run_is_a_line_of_its_own_that_ends_in_a_cross() -> None:
    gone = make_run("sgd", 1, None, epochs=3) | {"loss": [2.0, 9.0, None]}
    one = chart(make_results([make_run("sgd", 0, 1.0), gone]), "Loss")
    mean, line = drawn(one, MultiLine)
    assert mean["y"] == pytest.approx([2.0, 1.0, 2 / 3, 0.5], rel=1e-5)
    assert (line["y"], line["strategy"]) == ([2.0, 9.0], "sgd")
    last = drawn(one, Scatter)[-1]
    assert (last["epoch"], last["marker"]) == (2, "x")
    assert last["label"] == "sgd, seed 1, ended early" and "ended early at 9" in one.text
    assert cells(page_of(make_results([gone])), "summary")[0][-1] == "1 (1 diverged)"


@pytest.mark.usefixtures("unrendered")
def test_a_run_that_was_stopped_is_unfinished_and_not_diverged() -> None:
    page = page_of(make_results([make_run("sgd", 0, 1.0), make_run("freeze", 0, None, epochs=2)]))
    assert cells(page, "summary")[1][1] == "unfinished"
    assert cells(page, "runs")[1][2] == "unfinished"
    assert "freeze: no seed finished" in page


def test_equal_boundaries_show_under_each_other() -> None:
    first, second = drawn(chart(make_results(PLAIN), "Boundary"), MultiLine)
    assert first["y"] == second["y"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert first["epoch"] == [0.5, 1.5, 1.5, 2.5, 2.5, 3.5, 3.5, 4.5]
    assert first["width"] > second["width"] and first["color"] != second["color"]
    steps = drawn(chart(make_results(FULL), "Boundary"), MultiLine)[0]
    assert steps["seconds"] == [0, 2.5, 2.5, 5, 5, 7.5, 7.5, 10]


def test_twelve_strategies_have_looks_of_their_own() -> None:
    looks = [look_of(i) for i in range(24)]
    assert len(set(looks)) == 24
    assert len({(look.color, look.dash) for look in looks[:12]}) == 12
    assert len({(look.marker, look.dash) for look in looks[:12]}) == 12
    marked = [row["mark"] > 0 for row in drawn(chart(make_results(LONG), "Loss"), Scatter)]
    assert (len(marked), sum(marked)) == (100, 12)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("device", "compiled", "name"),
    [
        ("cpu", False, "kept for backward"),
        ("cpu", True, "kept for backward (predicted)"),
        ("cuda (NVIDIA H200)", True, "peak of GPU memory"),
    ],
)
def test_memory_is_named_by_what_was_measured(device: str, compiled: bool, name: str) -> None:
    results = make_results(PLAIN, device, compiled)
    one = chart(results, "Memory")
    assert one.figure.yaxis.axis_label == f"{name} (MiB)"
    assert [row["y"] for row in drawn(one, Scatter)[:4]] == [8, 7, 6, 5]
    assert name in page_of(results)


def test_error_against_time() -> None:
    runs = [run | {"train_seconds": 5.0} if run["strategy"] == "freeze" else run for run in PLAIN]
    one = chart(make_results(runs), "Error against time")
    rows = drawn(one, Scatter)
    assert [row["label"] for row in rows[3:]] == [
        "freeze, seed 0",
        "freeze, seed 1",
        "freeze, mean",
    ]
    assert [row["x"] for row in rows] == pytest.approx([1, 1, 1 / 1.37, 0.5, 5 / 11, 1 / 1.37])
    assert [row["y"] for row in rows[3:]] == [2.0, 3.0, 2.5]
    assert rows[5]["mark"] > rows[4]["mark"]
    assert "freeze 2.50 % in 0.73 of SGD's time" in one.text


@pytest.mark.parametrize(
    ("errors", "text"),
    [
        (
            (2.1, 2.2, 3.0),
            "+0.10 points of error, outside the seeds' spread (+- 0.00 over 3 seeds)",
        ),
        ((1.0, 2.0, 4.0), "+0.00 points of error, inside the seeds' spread (+- 1.05 over 3 seeds)"),
        (
            (2.5, None, 3.1),
            "+0.35 points of error, outside the seeds' spread (+- 0.21 over 2 seeds)",
        ),
        ((None, 1.0, None), "-1.10 points of error, on one seed, which says nothing of the spread"),
    ],
)
def test_verdicts_say_time_and_error_with_their_uncertainty(
    errors: Sequence[float | None], text: str
) -> None:
    plain = [make_run("sgd", seed, error) for seed, error in enumerate((2.0, 2.1, 2.9))]
    own = [make_run("freeze", seed, error) for seed, error in enumerate(errors)]
    own = [run | {"train_seconds": 0.65 * run["train_seconds"]} for run in own]
    (line,) = judge(make_results([*plain, *own]))
    several = sum(error is not None for error in errors) > 1
    assert line == f"freeze: 0.65 of SGD's time{' (0.65..0.65)' * several}, {text}"


def timed(strategy: str, seconds: Sequence[float], work: str, seed: int = 0) -> dict[str, Any]:
    run = make_run(strategy, seed, 1.0) | {"seconds": [*accumulate(seconds)], "work": [*work]}
    return run | {"train_seconds": sum(seconds), "flops": [7] * 4}


def test_equal_epochs_say_how_far_the_machine_alone_is_apart() -> None:
    runs = [timed("sgd", (10, 10, 20, 10), "aaab"), timed("x", (11, 8, 9, 5), "aacc")]
    runs += [timed("y", (10.5, 9, 9.9, 20), "aac-"), timed("z", (30, 9, 9, 9), "a   ", seed=1)]
    runs += [timed("sgd-same-error", (10, 10, 20, 10), "aaab")]  # sgd's own run
    results = make_results([run | {"work": [w.strip() for w in run["work"]]} for run in runs])
    apart = differ_when_equal(results)
    assert apart == pytest.approx([10, 20, 5, 10, 10])  # the last: y's third epoch over x's
    assert differ_when_equal(results | {"other_models": ["y"]}) == pytest.approx([10, 20])
    told = "the machine alone differs by 10.0 (10.0..10.0) % between equal epochs (5 pairs)"
    assert told in explain_noise(results) and told in page_of(results)
    assert "machine" not in explain_noise(make_results(PLAIN))


@pytest.mark.parametrize(
    ("ratio", "seeds", "apart", "texts"),
    [
        (0.97, [0.97], [], ("0.97", "")),
        (0.97, [0.97], [2.0, 4.0, 6.0], ("~0.97", "")),  # 5 % is the upper quartile
        (0.94, [0.94], [2.0, 4.0, 6.0], ("0.94", "")),
        (0.9, [0.7, 1.1], [], ("~0.90", "(0.70..1.10)")),
        (0.8, [0.7, 0.9], [2.0], ("0.80", "(0.70..0.90)")),
        (1.0, [1.0, 1.0], [9.0], ("1.00", "")),
    ],
)
def test_what_is_too_noisy_to_say_is_marked(
    ratio: float, seeds: list[float], apart: list[float], texts: tuple[str, str]
) -> None:
    assert time_text(ratio, seeds, apart) == texts


def test_verdicts_need_sgd_and_a_seed_that_finished() -> None:
    assert judge(make_results([make_run("freeze", 0, 1.0)])) == [
        "freeze: no run of sgd to compare it with"
    ]
    gone = make_results([make_run("sgd", 0, 1.0), make_run("freeze", 0, NAN)])
    assert judge(gone) == ["freeze: no seed finished"]


@pytest.mark.usefixtures("unrendered")
def test_what_differs_but_for_the_layers_is_said() -> None:
    same = "sees the same batches"
    assert same in page_of(make_results(PLAIN))
    grown = PLAIN[3] | {"batch_size": [16, 32, 32, 32]}
    short = make_run("freeze", 1, 3.0, epochs=2)
    for other in (grown, short):
        assert same not in page_of(make_results([*PLAIN[:3], other]))


@pytest.mark.usefixtures("unrendered")
def test_an_error_that_was_not_reached_is_marked() -> None:
    page = page_of(make_results([PLAIN[0], PLAIN[2] | {"reached": False}]))
    assert cells(page, "summary")[1][-1] == "1 (1 not reached)"


def test_skipped_images_are_no_speed() -> None:
    skipping = PLAIN[2] | {"images": 200, "train_seconds": 5.0}
    rows = drawn(chart(make_results([PLAIN[0], skipping]), "Error against time"), Scatter)
    assert rows[2]["x"] == 1.0


def test_without_a_baseline_there_is_no_share_of_its_time() -> None:
    results = make_results(PLAIN)
    for row in results["summary"]:
        row["speedup"] = None
    page = page_of(results)
    assert "Error against time" not in page
    assert cells(page, "summary")[0][2] == "-"


def test_wide_ranges_get_a_logarithmic_scale() -> None:
    near = chart(make_results(PLAIN), "Loss")
    far = chart(make_results([make_run("sgd", 0, 1.0) | {"loss": [9.0, 3.0, 1.0, 0.1]}]), "Loss")
    assert type(near.figure.y_scale).__name__ == "LinearScale"
    assert type(far.figure.y_scale).__name__ == "LogScale"


def test_results_read_back_from_json_give_the_same_page() -> None:
    results = make_results(FULL)
    again = json.loads(json.dumps(results))
    assert nameless(render_page(results)) == nameless(render_page(again))
