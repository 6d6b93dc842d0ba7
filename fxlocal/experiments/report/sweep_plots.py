"""The plots of a sweep: score against speed-up with the front, and each option's effect."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from ..training.results import has_diverged, is_number, runs_of
from ..training.sweep import value_text
from .plots import INK, MARKERS, color_of, error_name, new_figure, score_name, style_axes

__all__ = ["plot_sweep"]

Row = Mapping[str, Any]
GREY = "#b4bcc3"


def plot_sweep(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the plots of ``sweep.json`` by file name: those that it holds numbers for."""
    figures = {}
    if any(is_number(row["speedup"]) for row in results["summary"]):
        figures["pareto.png"] = _plot_front(results)
    if any(is_number(row["error_percent_mean"]) for row in results["summary"][1:]):
        for name in results["vary"]:
            figures[f"effect_of_{name}.png"] = _plot_effect(results, name)
    return figures


# --- score against speed-up ------------------------------------------------------------------


def _plot_front(results: Mapping[str, Any]) -> Figure:
    """Draw each setting: colour by the first option, marker by the second, number on the front."""
    score = score_name(results)
    title = f"{score[:1].upper()}{score[1:]} against speed-up"
    figure, axes = new_figure(title, "speed-up against sgd (training time)", f"test {score} (%)")
    front = []
    for number, row in enumerate(results["summary"]):
        if not is_number(row["speedup"]):
            continue
        color, marker = _look(results, row)
        speed, percent = row["speedup"], 100 - row["error_percent_mean"]
        low, high = _score_range(results, row)
        edge = INK if row["on_front"] or not row["setting"] else "white"
        size = 9 if row["setting"] else 12
        axes.plot([speed, speed], [low, high], color=color, linewidth=1.2, alpha=0.6, zorder=2)
        axes.plot(speed, percent, color=color, marker=marker, markersize=size, mec=edge, zorder=3)
        if row["on_front"]:
            front.append((speed, percent, number))
    front.sort()
    x, y = [point[0] for point in front], [point[1] for point in front]
    axes.step(x, y, where="pre", color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.margins(0.12)
    _add_key(figure, results)
    figure.draw_without_rendering()  # settles where the points lie on the page
    _number_front(axes, front)
    return figure


def _score_range(results: Mapping[str, Any], row: Row) -> tuple[float, float]:
    """Return the lowest and the highest score over the seeds of one setting."""
    errors = [
        run["error_percent"] for run in runs_of(results)[row["strategy"]] if not has_diverged(run)
    ]
    return 100 - max(errors), 100 - min(errors)


def _number_front(axes: Axes, front: Sequence[tuple[float, float, int]]) -> None:
    """Write each number right above its point, where, on a front, no other point can be.

    From the lowest point up, each number steps over the one before if the two would touch.
    """
    unit = axes.figure.dpi / 72  # of a typographic point, in pixels
    right, top = math.inf, -math.inf
    for speed, percent, number in reversed(front):
        x, y = axes.transData.transform((speed, percent)) / unit
        height = max(y + 5, top + 10) if right - x < 15 else y + 5
        right, top = x, height
        axes.annotate(
            str(number),
            (speed, percent),
            xytext=(7, height - y),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold",
            color=INK,
        )


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

    def point(label: str, color: str, marker: str) -> Line2D:
        return Line2D([], [], ls="", label=label, color=color, marker=marker, markersize=8)

    first, *rest = results["vary"]
    values = _ordered(results["vary"][first])
    handles = [
        point("sgd", INK, "*"),
        Line2D([], [], label="front", color=INK, linewidth=1, linestyle=(0, (4, 3))),
        point(first, "none", ""),
    ]
    for value, color in zip(values, _colors(len(values)), strict=True):
        handles.append(point(value_text(value), color, MARKERS[0]))
    if rest:
        handles.append(point(rest[0], "none", ""))
        for i, value in enumerate(_ordered(results["vary"][rest[0]])):
            handles.append(point(value_text(value), "#5d6973", MARKERS[i % len(MARKERS)]))
    legend = figure.legend(
        handles=handles, loc="outside right center", frameon=False, fontsize=9, handlelength=1.8
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
        if text.get_text() in (first, *rest[:1]):
            text.set_fontweight("bold")


# --- the effect of one option -------------------------------------------------------------------


def _plot_effect(results: Mapping[str, Any], name: str) -> Figure:
    """Draw error and speed-up over the values of one option, one above the other.

    A thin line is one choice of the other options, the thick one the mean over those that finished.
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    style_axes(upper, f"Effect of {name}", "", f"test {error_name(results)} (%)")
    style_axes(lower, "", name, "speed-up")
    values = _ordered(results["vary"][name])
    x = values if _is_numeric(values) else list(range(len(values)))
    for axes, key in ((upper, "error_percent_mean"), (lower, "speedup")):
        lines = _lines(results, name, key)
        for line in lines if len(lines) > 1 else []:
            axes.plot(x, line, color=GREY, linewidth=1)
        means = [_mean(column) for column in zip(*lines, strict=True)]
        axes.plot(x, means, color=color_of(0), linewidth=2.2, marker=MARKERS[0], markersize=6)
        sgd = results["summary"][0][key]
        if is_number(sgd):
            axes.axhline(sgd, color=INK, linewidth=1, linestyle=":")
    _set_ticks(lower, x, [value_text(value) for value in values])
    alone = len(results["vary"]) == 1
    label = results["strategy"] if alone else "mean"
    handles = [
        Line2D([], [], label=label, color=color_of(0), linewidth=2.2, marker=MARKERS[0]),
        Line2D([], [], label="with each choice of the other options", color=GREY, linewidth=1),
        Line2D([], [], label="sgd", color=INK, linewidth=1, linestyle=":"),
    ]
    if alone:
        del handles[1]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _lines(results: Mapping[str, Any], name: str, key: str) -> list[list[float]]:
    """Return ``key`` at each value of option ``name``, for each choice of the other options."""
    values = results["vary"][name]
    lines: dict[str, list[float]] = {}
    for row in results["summary"][1:]:
        others = repr({**row["setting"], name: None})
        line = lines.setdefault(others, [math.nan] * len(values))
        if is_number(row[key]):
            line[_place(values, row["setting"][name])] = row[key]
    return list(lines.values())


def _mean(numbers: Iterable[float]) -> float:
    """Return the mean of the settings that finished."""
    known = [number for number in numbers if is_number(number)]
    return fmean(known) if known else math.nan


def _set_ticks(axes: Axes, x: Sequence[float], labels: Sequence[str]) -> None:
    """Put a tick at each value; on a logarithmic scale if they are orders of magnitude apart."""
    if 0 < min(x) * 30 <= max(x):
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(x, labels)
