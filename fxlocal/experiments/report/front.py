"""The table and the plot of memory against step time, of what `bench_front` measured."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from ..bench.spread import explain_spread
from .plots import add_legend, look_of, new_figure, style_axes
from .tables import new_table, spread_cell
from .words import OF_TIME, STEP, memory_heading, memory_name

__all__ = ["front_table", "plot_front"]

_KINDS = {
    ("plain", "eager"): "plain training",
    ("checkpoint", "eager"): "checkpointing, exact",
    ("changed", "eager"): "fewer exact gradients",
    ("plain", "compiled"): "plain training, compiled",
    ("torch", "compiled"): "torch's budget, compiled",
    ("checkpoint", "compiled"): "checkpointing, compiled",
}


def front_table(results: Mapping[str, Any]) -> Table:
    """Return the table of what `bench_front` measured."""
    title = f"{results['model']}, batch of {results['batch_size']}, {results['device']}"
    right = [memory_heading(results["device"]), "predicted", STEP, OF_TIME]
    table = new_table(title, "mode", "plan", right=right)
    for row in results["rows"]:
        known = row["predicted_bytes"], row["bytes"]
        error = f"{known[0] / known[1] - 1:+.1%}" if all(known) else "-"
        table.add_row(
            row["mode"],
            row["name"] + (" <- auto" if row["chosen"] else ""),
            f"{row['bytes'] / 2**20:.2f}" if row["bytes"] is not None else "-",
            error,
            spread_cell(row, "milliseconds", ".1f"),
            spread_cell(row, "time_ratio", ".2f", same=1),
        )
    limit = f"{results['limit'] / 2**20:.2f} MiB"
    notes = [explain_spread(results["repeats"]), f"auto: within {limit}"]
    notes += ["predicted: less measured bytes", f"{OF_TIME}: plain training's, of the same mode"]
    if not results["compile"]:
        notes.append("--compile adds torch's activation_memory_budget")
    table.caption = "; ".join(notes)
    return table


def plot_front(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the plot by its file name."""
    figure, (axes,) = new_figure()
    labels = f"{memory_name(results['device'])} (MiB)", "step (ms)"
    style_axes(axes, f"{results['model']}: memory against step time", *labels)
    entries = []
    for index, (kind, label) in enumerate(_KINDS.items()):
        rows = [row for row in results["rows"] if (row["kind"], row["mode"]) == kind]
        points = sorted((row["bytes"] / 2**20, row["milliseconds"]) for row in rows)
        if points:
            look = {**look_of(index), "linestyle": "-" if len(points) > 1 else "none"}
            axes.plot(*zip(*points, strict=True), **look)
            entries.append((label, look))
    axes.axvline(results["limit"] / 2**20, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    add_legend(figure, entries)
    return {"front.png": figure}
