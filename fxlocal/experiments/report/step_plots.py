"""The plots of local modules' steps: BackLink's Figures 2, 4 and 5 for what was measured; of ranks.

Figure 2: memory over the number of modules. Figure 4: step time over it, but of one process (the
paper has a device for each module). Figure 5: what is saved of both, and at what loss of accuracy
where `read_drops` found some.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..training.results import is_number
from ..training.settings import SettingsError
from .plots import DOTTED, INK, add_legend, look_of, new_figure, style_axes
from .words import OF_BYTES, OF_TIME, SPEEDUP

__all__ = ["plot_modules", "plot_wires", "read_drops"]

Rows: TypeAlias = list[Mapping[str, Any]]
Drops: TypeAlias = Mapping[tuple[str, int, int], float]  # points, by method, modules and link


def plot_modules(results: Mapping[str, Any], drops: Drops | None = None) -> dict[str, Figure]:
    """Return the plots by file name.

    Args:
        results: what `bench_steps` returned; the eager rows are drawn.
        drops: losses of accuracy against back-propagation, as `read_drops` finds them.
    """
    curves: dict[str, Rows] = {}
    for row in results["rows"]:
        if row["mode"] == "eager" and row["modules"]:
            name = row["method"] + (f", l={row['link']}" if row["link"] else "")
            curves.setdefault(name, []).append(row)
    figures = {
        "memory_over_modules.png": _plot_ratio(curves, "memory_ratio", "Memory", OF_BYTES),
        "time_over_modules.png": _plot_ratio(curves, "time_ratio", "Step time", OF_TIME),
        "trade_off.png": _plot_drops(curves, drops) if drops else _plot_savings(curves),
    }
    heads, balances = _settings(results)
    setting = (
        f"{results['model']}, batch of {results['batch_size']}, {results['device']}, "
        f"{' and '.join(heads)} heads, balance {' and '.join(balances)}"
    )
    for name, figure in figures.items():
        marks = "\nnumbers at points: K modules" if name == "trade_off.png" else ""
        figure.suptitle(setting + marks, fontsize=8, color=INK)
    return figures


def plot_wires(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the plot of what `bench_ranks` measured: the speed-up over the speed of the wire.

    Where the wire was not slowed, it is drawn as ten times the fastest.
    """
    figure, (axes,) = new_figure()
    style_axes(axes, "Speed-up over SGD under DDP", "wire (Mbit/s)", SPEEDUP)
    curves: dict[str, Rows] = {}
    for row in results["rows"]:
        if row["strategy"] != "sgd":
            curves.setdefault(f"{row['strategy']}, layer {row['boundary']}", []).append(row)
    unslowed = 10 * max((row["wire_megabits"] or 1 for row in results["rows"]), default=1)
    _draw(axes, curves, lambda row: (row["wire_megabits"] or unslowed, row["gain"]))
    for i, rows in enumerate(curves.values()):
        axes.axhline(rows[0]["gain_alone"], **{**DOTTED, "color": look_of(i)["color"]})
    axes.axhline(1, **DOTTED)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    _explain(figure, curves)
    about = f"{results['model']}, {results['nproc']} ranks with {results['batch_size']} images each"
    figure.suptitle(
        f"{about}, {results['device']}\ndotted: that in one process; rightmost: not slowed",
        fontsize=8,
        color=INK,
    )
    return {"gain_over_wire.png": figure}


def _settings(results: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the heads and the balances of the rows."""
    known = ({str(row[key]) for row in results["rows"] if row[key]} for key in ("head", "balance"))
    heads, balances = map(sorted, known)
    return heads, balances


def read_drops(
    paths: Sequence[Path], results: Mapping[str, Any]
) -> dict[tuple[str, int, int], float]:
    """Return the points of accuracy that each method lost, by method, modules and link.

    Args:
        paths: of files that ``fxlocal compare`` or ``fxlocal reproduce backlink`` wrote.
        results: what `bench_steps` returned: of the same model, width, heads and balance.

    Raises:
        SettingsError: if a file has none of this, or of another head, balance or width.
    """
    model, (heads, balances) = results["model"], _settings(results)
    own = {"head": heads, "balance": balances, "width": [results["width"]]}
    drops: dict[tuple[str, int, int], float] = {}
    for path in paths:
        try:
            found = _read_rows(json.loads(path.read_text(encoding="utf-8")), model)
        except (AttributeError, KeyError, TypeError, ValueError):
            found = []
        if not found:
            raise SettingsError(
                f"{path} says nothing of {model} in local modules: give results.json of a "
                "comparison with sgd and greedy, infopro or backlink, or of fxlocal reproduce "
                "backlink"
            )
        for key, here in own.items():
            there = {row["arguments"][key] for row in found if key in row["arguments"]}
            if odd := there - {*here}:
                ours = " and ".join(map(str, here))
                raise SettingsError(f"{path}: {key} is {odd.pop()} there and {ours} here")
        drops |= {_key(row): row["error_loss_mean"] for row in found}
    return drops


def _read_rows(results: Mapping[str, Any], model: str) -> Rows:
    """Return the rows of local modules whose loss is known, each with its arguments."""
    if "networks" in results:  # of a paper's table
        rows = [row for row in results["rows"] if row["network"] == model and row["modules"]]
        width = results["networks"][model].get("width") if rows else None
    else:
        width = results.get("width")
        errors = {row["strategy"]: row["error_percent_mean"] for row in results["summary"]}
        rows = [
            {
                "method": strategy,
                "modules": arguments["modules"],
                "link": arguments.get("link", 0),
                "arguments": arguments,
                "error_loss_mean": errors[name] - errors["sgd"] if errors[name] else None,
            }
            for name, parts in results["options"].items()
            for strategy, arguments in parts.items()
            if "modules" in arguments and results["model"] == model
        ]
    known = [row for row in rows if is_number(row["error_loss_mean"])]
    return [{**row, "arguments": {**row["arguments"], "width": width}} for row in known]


def _plot_ratio(curves: Mapping[str, Rows], key: str, what: str, label: str) -> Figure:
    """Draw a ratio over the number of modules, one curve per method."""
    figure, (axes,) = new_figure()
    style_axes(axes, f"{what} over modules", "modules", f"{label} (%)")
    _draw(axes, curves, lambda row: (row["modules"], 100 * row[key]))
    axes.axhline(100, **DOTTED)
    axes.set_xscale("log", base=2)
    counts = sorted({row["modules"] for rows in curves.values() for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    _explain(figure, curves)
    return figure


def _plot_savings(curves: Mapping[str, Rows]) -> Figure:
    """Draw time against memory, each point marked with its number of modules."""
    figure, (axes,) = new_figure()
    labels = f"{OF_BYTES} (%)", f"{OF_TIME} (%)"
    style_axes(axes, "Time against memory", *labels)
    _draw(axes, curves, lambda r: (100 * r["memory_ratio"], 100 * r["time_ratio"]), numbered=True)
    axes.axhline(100, **DOTTED)
    axes.axvline(100, **DOTTED)
    _explain(figure, curves)
    return figure


def _plot_drops(curves: Mapping[str, Rows], drops: Drops) -> Figure:
    """Draw what accuracy each saving of memory, and of time, costs."""
    figure, panels = new_figure(columns=2, size=(9.6, 4.2), sharey=True)
    known = {name: [row for row in rows if _key(row) in drops] for name, rows in curves.items()}
    for axes, key, what in zip(
        panels, ("memory_ratio", "time_ratio"), ("memory", "step time"), strict=True
    ):
        labels = f"{what} saved (%)", "accuracy lost (percentage points)"
        style_axes(axes, f"Accuracy against {what}", *labels)
        saved = partial(lambda key, row: (100 * (1 - row[key]), drops[_key(row)]), key)
        _draw(axes, known, saved, numbered=True)
    _explain(figure, known)
    return figure


def _key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["method"], row["modules"], row["link"]


def _draw(
    axes: Axes,
    curves: Mapping[str, Rows],
    point: Callable[[Mapping[str, Any]], tuple[float, float]],
    *,
    numbered: bool = False,
) -> None:
    """Draw a curve per method through its points; numbers at these are of modules."""
    near: dict[str, Any] = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8}
    for i, rows in enumerate(curves.values()):
        if rows:
            x, y = zip(*map(point, rows), strict=True)
            axes.plot(x, y, linewidth=1.8, markersize=5, **look_of(i))
        for row in rows if numbered else ():
            axes.annotate(str(row["modules"]), point(row), color=INK, **near)


def _explain(figure: Figure, curves: Mapping[str, Rows]) -> None:
    looks = {name: look_of(i) for i, name in enumerate(curves)}
    add_legend(figure, [(name, looks[name]) for name, rows in curves.items() if rows])
