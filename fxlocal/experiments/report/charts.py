"""The charts of the page: what each strategy's runs showed, over epochs and over seconds.

A line is the mean over the seeds that finished, the band around it reaches from the lowest to the
highest; runs of different lengths have a line each. A run whose loss stopped being a number is a
thin line of its own that ends in a cross.

Bokeh draws them. Sources have the columns ``epoch`` and ``seconds``, of which the page's script
chooses one, ``strategy``, by which it hides rows, and ``color``, a name from the style sheet, which
knows whether the page is dark.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any, TypeAlias

from bokeh.models import (
    BasicTicker,
    BasicTickFormatter,
    BooleanFilter,
    CDSView,
    ColumnDataSource,
    HoverTool,
)
from bokeh.models.annotations import Span  # the stubs of bokeh.models leave it out
from bokeh.plotting import figure

from ..training.growth import growing_runs
from ..training.results import finished_runs, has_diverged, is_number, runs_of, speed_seconds
from .words import OF_TIME, memory_name

__all__ = ["MARKERS", "Chart", "Look", "draw_charts", "has_seconds", "look_of"]

Results: TypeAlias = Mapping[str, Any]
Run: TypeAlias = Mapping[str, Any]
Row: TypeAlias = dict[str, Any]
Point: TypeAlias = tuple[float, float, float]  # epoch, seconds since the start, value
Values: TypeAlias = Callable[[Run], list[tuple[int, float]]]  # by epoch

# As Bokeh names them, and as an SVG of 12 by 12 around the origin draws them in the tables.
MARKERS = {
    "circle": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "square": "M-3.6-3.6h7.2v7.2h-7.2z",
    "triangle": "M0-4.6L4.4,3.4H-4.4z",
    "diamond": "M0-5.2L4,0L0,5.2L-4,0z",
    "inverted_triangle": "M0,4.6L4.4-3.4H-4.4z",
    "plus": "M-1.4-4.6h2.8v3.2h3.2v2.8h-3.2v3.2h-2.8v-3.2h-3.2v-2.8h3.2z",
}
COLORS = len(MARKERS)  # of the style sheet: c0, c1 and so on
DASHES = {"solid": "", "dashed": "6 3", "dotted": "2 3", "dotdash": "2 3 6 3"}
MARKS = 12  # on a line, at most
TIP = "<div>@label, epoch @epoch: <b>@y{0.0000}</b> (@low{0.0000} to @high{0.0000})</div>"


@dataclass(frozen=True)
class Look:
    """How a strategy looks: no two of the first 24 are alike, and 6 colours tell apart most."""

    color: str
    marker: str
    dash: str

    @property
    def path(self) -> str:
        """The marker in a table."""
        return MARKERS[self.marker]

    @property
    def strokes(self) -> str:
        """The dashes in a table."""
        return DASHES[self.dash]


def look_of(index: int) -> Look:
    """Return the look of the strategy at ``index`` in the summary."""
    turn = index // COLORS
    marker = [*MARKERS][(index + turn) % len(MARKERS)]
    return Look(f"c{index % COLORS}", marker, [*DASHES][turn % len(DASHES)])


@dataclass(frozen=True)
class Chart:
    """A chart with its title, and what is to be seen in it, in words; ``over`` says over what."""

    title: str
    figure: figure
    text: str
    over: str = "epoch"


def has_seconds(results: Results) -> bool:
    """Tell whether each run knows when its epochs ended."""
    return all(len(run.get("seconds", ())) == len(run["loss"]) for run in results["runs"])


def draw_charts(results: Results) -> list[Chart]:
    """Return the charts that the results hold numbers for."""
    memory = f"{memory_name(results['device'], results['compile'])} (MiB)"
    curves: list[tuple[str, str, Values, bool]] = [
        ("Error", f"test {results['metric']} (%)", _errors, False),
        ("Loss", "training loss", _each("loss"), False),
        ("Boundary", "boundary (layer)", _each("boundary"), True),
        ("Memory", memory, _each("saved_bytes", 2**20), True),
    ]
    if growing_runs(results):
        curves.append(("Batch", "images per step", _each("batch_size"), True))
    if any(len(set(run.get("flops", ()))) > 1 for run in results["runs"]):
        curves.append(("FLOPs", "MFLOPs of an image's forward", _each("flops", 10**6), True))
    charts = [
        _draw_curves(results, title, label, values, stepped)
        for title, label, values, stepped in curves
        if any(map(values, results["runs"]))
    ]
    if any(is_number(row["speedup"]) for row in results["summary"]):
        charts.insert(0, _draw_trade(results))
    return charts


def _errors(run: Run) -> list[tuple[int, float]]:
    return list(zip(run["error_epochs"], run["errors"], strict=True))


def _each(key: str, unit: int = 1) -> Values:
    return lambda run: [(i, y / unit) for i, y in enumerate(run.get(key, ()), 1) if is_number(y)]


# --- curves -------------------------------------------------------------------------------------


def _draw_curves(results: Results, title: str, label: str, values: Values, stepped: bool) -> Chart:
    """Draw the curves of all strategies.

    With ``stepped``, for what stands still within an epoch and strategies often share, earlier
    strategies get broader lines, so that each shows under the next.
    """
    strategies, texts = runs_of(results), []
    lines, bands, points = list[Row](), list[Row](), list[Row]()
    for i, (name, runs) in enumerate(strategies.items()):
        look, below = look_of(i), len(strategies) - 1 - i
        own: Row = {"strategy": name, "color": look.color, "dash": look.dash}
        own["marker"] = look.marker
        own["width"] = 1.6 + min(1.4 * below, 7) if stepped else 2
        curves = [c for run in runs if not has_diverged(run) and (c := _curve(run, values))]
        # Runs of different lengths have no mean: after the end of the shortest it would jump.
        same = len({len(curve) for curve in curves}) < 2
        for alike in [curves] if same and curves else [[curve] for curve in curves]:
            mean, low, high = _mean(alike)
            lines.append(own | _path(mean, stepped))
            points += _points(own | {"label": name}, mean, low, high)
            if low != high:
                bands.append(own | _path(low, stepped, back=high))
            texts.append(f"{name} from {mean[0][2]:.3g} to {mean[-1][2]:.3g}")
        for run in filter(has_diverged, runs):
            if curve := _curve(run, values):
                label_of_run = f"{name}, seed {run['seed']}, ended early"
                thin = own | {"width": 1, "dash": "4 2", "label": label_of_run}
                lines.append(thin | _path(curve, stepped))
                points += _points(thin, curve, curve, curve)
                points[-1] |= {"marker": "x", "mark": 11}
                texts.append(f"{label_of_run} at {curve[-1][2]:.3g}")
    plot = _new_plot(label, "epoch", _is_wide([row["y"] for row in points]) and not stepped)
    line = {"line_color": "color", "line_dash": "dash", "line_width": "width"}
    _add(plot.patches, bands, "xs", "ys", fill_color="color", fill_alpha=0.18, line_width=0)
    _add(plot.multi_line, lines, "xs", "ys", **line)
    own_marks = {"size": "mark", "marker": "marker", "fill_color": "color", "line_color": "color"}
    _add(plot.scatter, points, **own_marks)
    hits = _add(plot.scatter, points, size=8, alpha=0)  # the page's script widens them
    plot.add_tools(HoverTool(renderers=[hits], tooltips=TIP, mode="vline"))
    return Chart(title, plot, f"{label}: {'; '.join(texts) or 'nothing known'}.")


def _curve(run: Run, values: Values) -> list[Point]:
    seconds = run.get("seconds", ())
    ends = [*seconds, *[math.nan] * (len(run["loss"]) - len(seconds))]
    return [(epoch, ends[epoch - 1], y) for epoch, y in values(run)]


def _mean(curves: Sequence[list[Point]]) -> tuple[list[Point], list[Point], list[Point]]:
    """Return the mean of curves of one length, the lowest values and the highest."""
    columns = [tuple(zip(*column, strict=True)) for column in zip(*curves, strict=True)]
    mean, low, high = (
        [(fmean(epochs), fmean(seconds), of(y)) for epochs, seconds, y in columns]
        for of in (fmean, min, max)
    )
    return mean, low, high


def _path(curve: list[Point], stepped: bool, back: list[Point] | None = None) -> Row:
    """Return the columns of a line, or of the area between it and the line ``back``."""
    if stepped:
        curve, back = _steps(curve), back and _steps(back)
    columns = zip(*curve, *reversed(back or []), strict=True)
    names = ("epoch", "seconds", "y")
    return {name: [*map(_rounded, column)] for name, column in zip(names, columns, strict=True)}


def _steps(curve: list[Point]) -> list[Point]:
    """Let each value last for its epoch: half of one around its number, all of its seconds."""
    begins = [0.0, *(seconds for _, seconds, _ in curve)]
    steps = (
        [(epoch - 0.5, begin, y), (epoch + 0.5, end, y)]
        for begin, (epoch, end, y) in zip(begins, curve, strict=False)
    )
    return list(chain.from_iterable(steps))


def _points(own: Row, mean: list[Point], low: list[Point], high: list[Point]) -> list[Row]:
    """Return a row for each epoch; a few of them have a mark."""
    every = -(-len(mean) // MARKS)
    return [
        own
        | {"epoch": epoch, "seconds": _rounded(seconds), "y": _rounded(y)}
        | {"low": _rounded(a[2]), "high": _rounded(b[2]), "mark": 0 if i % every else 7}
        for i, ((epoch, seconds, y), a, b) in enumerate(zip(mean, low, high, strict=True))
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


# --- error against time -------------------------------------------------------------------------


def _draw_trade(results: Results) -> Chart:
    """Draw the error over the share of SGD's time: large marks for means, small ones for runs.

    A run is measured against sgd from the same seed, which ran at about the same hour.
    """
    finished, rows, texts = finished_runs(results), list[Row](), []
    sgd = {run["seed"]: speed_seconds(run) for run in finished.get("sgd", ())}
    for i, row in enumerate(results["summary"]):
        name, look = row["strategy"], look_of(i)
        if not is_number(row["speedup"]):
            continue
        own = {"strategy": name, "color": look.color, "marker": look.marker}
        known = [run for run in finished[name] if run["seed"] in sgd]
        for run in known:
            place = {"x": speed_seconds(run) / sgd[run["seed"]], "y": run["error_percent"]}
            rows.append(own | place | {"label": f"{name}, seed {run['seed']}", "mark": 6})
        mean = {"x": 1 / row["speedup"], "y": row["error_percent_mean"]}
        rows.append(own | mean | {"label": f"{name}, mean", "mark": 14})
        texts.append(f"{name} {mean['y']:.2f} % in {mean['x']:.2f} {OF_TIME}")
    label = f"test {results['metric']} (%)"
    plot = _new_plot(label, OF_TIME, False)
    plot.x_range.tags = ["fixed"]  # over whatever the others are
    plot.add_layout(Span(dimension="height", location=1, line_dash="dotted", line_color="gray"))
    look_columns: Row = {"fill_color": "color", "line_color": "color", "fill_alpha": 0.7}
    hits = _add(plot.scatter, rows, size="mark", marker="marker", **look_columns)
    tip = "<div>@label: <b>@y{0.00} %</b> in <b>@x{0.00}</b> " + f"{OF_TIME}</div>"
    plot.add_tools(HoverTool(renderers=[hits], tooltips=tip))
    return Chart("Error against time", plot, f"{label}: {'; '.join(texts)}.", over=OF_TIME)


# --- what every chart is made of ----------------------------------------------------------------


def _new_plot(label: str, over: str, log: bool) -> figure:
    """Return an empty chart; a drag scrolls the page until a tool is chosen."""
    plot = figure(
        height=320,
        sizing_mode="stretch_width",
        tools="box_zoom,reset,save",
        active_drag=None,
        x_axis_label=over,
        y_axis_label=label,
        y_axis_type="log" if log else "linear",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    plot.toolbar.logo = None
    plot.yaxis.formatter = BasicTickFormatter(use_scientific=False)
    if over == "epoch":
        plot.xaxis.ticker = BasicTicker(min_interval=1)
    return plot


def _add(
    glyph: Callable[..., Any], rows: Sequence[Row], x: str = "x", y: str = "y", **look: Any
) -> Any:
    """Draw ``rows`` with a glyph, by their epochs where they have some; return its renderer."""
    at = "x" if rows and "x" in rows[0] else "epoch"
    names = dict.fromkeys([*chain.from_iterable(rows), "strategy", "seconds", at, "y"])
    names |= dict.fromkeys(map(str, look.values())) if not rows else {}
    source = ColumnDataSource({name: [row.get(name) for row in rows] for name in names})
    view = CDSView(filter=BooleanFilter())
    return glyph(**{x: at, y: "y"}, source=source, view=view, **look)


def _is_wide(values: Sequence[float]) -> bool:
    """Tell whether a curve starts far above its end, which a logarithmic scale keeps readable."""
    return 0 < min(values, default=0) < max(values, default=0) / 8
