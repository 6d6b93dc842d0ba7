"""The plots of local modules' steps: BackLink's Figures 2, 4 and 5 for what was measured.

Figure 2: memory over the number of modules. Figure 4: step time over it, but of one process (the
paper has a device for each module). Figure 5: what is saved of both, and at what loss of accuracy
where `read_drops` found some.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from ..training.results import is_number
from ..training.settings import SettingsError
from .plots import INK, MARKERS, color_of, new_figure, style_axes

__all__ = ["plot_modules", "read_drops"]

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
            curves.setdefault(_name(row), []).append(row)
    on_gpu = str(results["device"]).startswith("cuda")
    memory = "peak GPU memory" if on_gpu else "saved for backward"
    figures = {
        "memory_over_modules.png": _plot_ratio(
            curves, "memory_ratio", "Memory over modules", f"{memory} (% of SGD's)"
        ),
        "time_over_modules.png": _plot_ratio(
            curves, "time_ratio", "Step time over modules", "step time (% of SGD's)"
        ),
    }
    figures["trade_off.png"] = _plot_drops(curves, drops) if drops else _plot_savings(curves)
    heads, balances = _settings(results)
    setting = (
        f"{results['model']}, batch of {results['batch_size']}, {results['device']}, "
        f"{' and '.join(heads)} heads, balance {' and '.join(balances)}"
    )
    for name, figure in figures.items():
        marks = "\nnumbers at points: K modules" if name == "trade_off.png" else ""
        figure.suptitle(setting + marks, fontsize=8, color=INK)
    return figures


def _name(row: Mapping[str, Any]) -> str:
    """Return the method of a row, with its link."""
    return f"{row['method']}, l={row['link']}" if row["link"] else str(row["method"])


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


def _plot_ratio(curves: Mapping[str, Rows], key: str, title: str, label: str) -> Figure:
    """Draw a ratio over the number of modules, one curve per method."""
    figure, axes = new_figure(title, "modules", label)
    counts = sorted({row["modules"] for rows in curves.values() for row in rows})
    for i, (name, rows) in enumerate(curves.items()):
        points = [(row["modules"], 100 * row[key]) for row in rows]
        _draw(axes, points, name, i)
    axes.axhline(100, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_major_formatter(FixedFormatter([str(count) for count in counts]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    _add_legend(figure, axes)
    return figure


def _plot_savings(curves: Mapping[str, Rows]) -> Figure:
    """Draw time against memory, each point marked with its number of modules."""
    figure, axes = new_figure(
        "Time against memory", "memory (% of SGD's)", "step time (% of SGD's)"
    )
    for i, (name, rows) in enumerate(curves.items()):
        points = [(100 * row["memory_ratio"], 100 * row["time_ratio"]) for row in rows]
        _draw(axes, points, name, i, [row["modules"] for row in rows])
    axes.axhline(100, color=INK, linewidth=0.8, linestyle=":")
    axes.axvline(100, color=INK, linewidth=0.8, linestyle=":")
    _add_legend(figure, axes)
    return figure


def _plot_drops(curves: Mapping[str, Rows], drops: Drops) -> Figure:
    """Draw what accuracy each saving of memory, and of time, costs."""
    figure = Figure(figsize=(9.6, 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, what in zip(
        panels, ("memory_ratio", "time_ratio"), ("memory", "step time"), strict=True
    ):
        style_axes(
            axes,
            f"Accuracy against {what}",
            f"{what} saved (%)",
            "accuracy lost (percentage points)",
        )
        for i, (name, rows) in enumerate(curves.items()):
            known = [row for row in rows if _key(row) in drops]
            if known:
                points = [(100 * (1 - row[key]), drops[_key(row)]) for row in known]
                _draw(axes, points, name, i, [row["modules"] for row in known])
    _add_legend(figure, panels[0])
    return figure


def _key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["method"], row["modules"], row["link"]


def _draw(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    name: str,
    index: int,
    counts: Sequence[int] = (),
) -> None:
    style: dict[str, Any] = {"color": color_of(index), "marker": MARKERS[index % len(MARKERS)]}
    axes.plot(*zip(*points, strict=True), label=name, linewidth=1.8, markersize=5, **style)
    for point, count in zip(points, counts, strict=False):
        axes.annotate(
            str(count), point, xytext=(4, 4), textcoords="offset points", fontsize=8, color=INK
        )


def _add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(3, len(handles))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
