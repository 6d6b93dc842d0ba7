"""The plots of a sweep: score against time with the front, and each option's effect."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..data.task import SCORES
from ..training.results import finished_runs, is_number
from ..training.sweep import value_text
from .plots import (
    DASHED,
    DOTTED,
    INK,
    MARKERS,
    add_legend,
    look_of,
    new_figure,
    style_axes,
)
from .words import OF_TIME

__all__ = ["plot_sweep"]

Row = Mapping[str, Any]
GREY = "#b4bcc3"


def plot_sweep(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the plots of ``sweep.json`` by file name: those that it holds numbers for."""
    figures, rows = {}, results["summary"]
    times = [1 / row["speedup"] if is_number(row["speedup"]) else None for row in rows]
    timed = [{**row, "time_ratio": time} for row, time in zip(rows, times, strict=True)]
    results = {**results, "summary": timed}
    if any(is_number(row["time_ratio"]) for row in results["summary"]):
        figures["pareto.png"] = _plot_front(results)
    if any(is_number(row["error_percent_mean"]) for row in results["summary"][1:]):
        for name in results["vary"]:
            figures[f"effect_of_{name}.png"] = _plot_effect(results, name)
    return figures


# --- score against time ----------------------------------------------------------------------


def _plot_front(results: Mapping[str, Any]) -> Figure:
    """Draw each setting: colour by the first option, marker by the second, number on the front."""
    score = SCORES[results["metric"]]
    figure, (axes,) = new_figure()
    labels = f"{OF_TIME} (less to the right)", f"test {score} (%)"
    style_axes(axes, f"{score[:1].upper()}{score[1:]} against time", *labels)
    axes.invert_xaxis()
    front = []
    for number, row in enumerate(results["summary"]):
        if not is_number(row["time_ratio"]):
            continue
        color, marker = _look(results, row)
        time, percent = row["time_ratio"], 100 - row["error_percent_mean"]
        runs = finished_runs(results)[row["strategy"]]
        scores = [100 - run["error_percent"] for run in runs]
        edge = INK if row["on_front"] or not row["setting"] else "white"
        size = 9 if row["setting"] else 12
        ends = [min(scores), max(scores)]
        axes.plot([time, time], ends, color=color, linewidth=1.2, alpha=0.6, zorder=2)
        axes.plot(time, percent, color=color, marker=marker, markersize=size, mec=edge, zorder=3)
        if row["on_front"]:
            front.append((time, percent, number))
    front.sort(reverse=True)
    x, y = [point[0] for point in front], [point[1] for point in front]
    axes.step(x, y, where="pre", zorder=1, **DASHED)
    axes.margins(0.12)
    _add_key(figure, results)
    figure.draw_without_rendering()  # settles where the points lie on the page
    _number_front(axes, front)
    return figure


def _number_front(axes: Axes, front: Sequence[tuple[float, float, int]]) -> None:
    """Write each number right above its point, where, on a front, no other point can be.

    From the lowest point up, each number steps over the one before if the two would touch.
    """
    unit = axes.figure.dpi / 72  # of a typographic point, in pixels
    right, top = math.inf, -math.inf
    for time, percent, number in reversed(front):
        x, y = axes.transData.transform((time, percent)) / unit
        height = max(y + 5, top + 10) if right - x < 15 else y + 5
        right, top = x, height
        style: dict[str, Any] = {"fontsize": 9, "fontweight": "bold", "color": INK}
        above = (7, height - y)
        axes.annotate(str(number), (time, percent), above, textcoords="offset points", **style)


def _look(results: Mapping[str, Any], row: Row) -> tuple[str, str]:
    """Return colour and marker of a setting; sgd has its own."""
    if not row["setting"]:
        return INK, "*"
    (first, *rest), vary = results["vary"], results["vary"]
    color = _colors(len(vary[first]))[_place(vary[first], row["setting"][first])]
    if not rest:
        return color, MARKERS[0]
    return color, MARKERS[_place(vary[rest[0]], row["setting"][rest[0]]) % len(MARKERS)]


def _place(values: Sequence[Any], value: Any) -> int:
    """Return where ``value`` stands among the values, by size if they are numbers."""
    return _ordered(values).index(value)


def _ordered(values: Sequence[Any]) -> list[Any]:
    return sorted(values) if _is_numeric(values) else list(values)


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(is_number(value) and not isinstance(value, bool) for value in values)


def _colors(count: int) -> list[str]:
    """Return colours from dark to light, in order for the colour-blind as well."""
    scale = matplotlib.colormaps["viridis"]
    return [to_hex(scale(0.88 * i / max(count - 1, 1))) for i in range(count)]


def _add_key(figure: Figure, results: Mapping[str, Any]) -> None:
    """List to the right what colours and markers mean."""
    vary = results["vary"]
    first, *rest = vary
    mark = {"ls": "", "markersize": 8}
    entries: list[tuple[str, dict[str, Any]]] = [
        ("sgd", {**mark, "color": INK, "marker": "*"}),
        ("front", DASHED),
        (first, {"ls": ""}),
    ]
    values = _ordered(vary[first])
    for value, color in zip(values, _colors(len(values)), strict=True):
        entries.append((value_text(value), {**mark, "color": color, "marker": MARKERS[0]}))
    for name in rest[:1]:
        entries.append((name, {"ls": ""}))
        for i, value in enumerate(_ordered(vary[name])):
            entries.append((value_text(value), {**mark, **look_of(i), "color": "#5d6973"}))
    legend = add_legend(
        figure, entries, "outside right center", ncols=1, fontsize=9, handlelength=1.8
    )
    for text in legend.get_texts():
        if text.get_text() in (first, *rest[:1]):
            text.set_fontweight("bold")


# --- the effect of one option -------------------------------------------------------------------


def _plot_effect(results: Mapping[str, Any], name: str) -> Figure:
    """Draw error and time over the values of one option, one above the other.

    A thin line is one choice of the other options, the thick one the mean over those that finished.
    """
    figure, (upper, lower) = new_figure(rows=2, sharex=True)
    style_axes(upper, f"Effect of {name}", "", f"test {results['metric']} (%)")
    style_axes(lower, "", name, OF_TIME)
    values = _ordered(results["vary"][name])
    x = values if _is_numeric(values) else list(range(len(values)))
    others = "with each choice of the other options"
    looks: dict[str, dict[str, Any]] = {
        "mean": {"linewidth": 2.2, **look_of(0)},
        others: {"color": GREY, "linewidth": 1},
        "sgd": DOTTED,
    }
    for axes, key in ((upper, "error_percent_mean"), (lower, "time_ratio")):
        lines = _lines(results, name, key)
        for line in lines if len(lines) > 1 else []:
            axes.plot(x, line, **looks[others])
        columns = ([y for y in column if is_number(y)] for column in zip(*lines, strict=True))
        means = [fmean(known) if known else math.nan for known in columns]
        axes.plot(x, means, **looks["mean"])
        if is_number(sgd := results["summary"][0][key]):
            axes.axhline(sgd, **looks["sgd"])
    if 0 < min(x) * 30 <= max(x):  # orders of magnitude apart
        lower.set_xscale("log")
    lower.xaxis.set_minor_locator(NullLocator())
    lower.set_xticks(x, [value_text(value) for value in values])
    if len(results["vary"]) == 1:
        looks = {results["strategy"]: looks["mean"], "sgd": looks["sgd"]}
    add_legend(figure, list(looks.items()), fontsize=9)
    return figure


def _lines(results: Mapping[str, Any], name: str, key: str) -> list[list[float]]:
    """Return ``key`` at each value of option ``name``, for each choice of the other options."""
    values = results["vary"][name]
    lines: dict[str, list[float]] = {}
    for row in (row for row in results["summary"] if row["setting"]):  # sgd has none
        others = repr({**row["setting"], name: None})
        line = lines.setdefault(others, [math.nan] * len(values))
        if is_number(row[key]):
            line[_place(values, row["setting"][name])] = row[key]
    return list(lines.values())
