"""What every plot is made of: colours, marks, axes and legends, and PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

__all__ = [
    "COLORS",
    "DASHED",
    "DOTTED",
    "INK",
    "MARKERS",
    "add_legend",
    "color_of",
    "look_of",
    "new_figure",
    "style_axes",
    "write_plots",
]

Results: TypeAlias = Mapping[str, Any]

# Okabe and Ito's colours, which the colour-blind can tell apart, with grey in place of yellow.
COLORS = ("#0072b2", "#e69f00", "#5d6973", "#cc79a7", "#009e73", "#d55e00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#22292f"
DOTTED: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": ":"}
DASHED: dict[str, Any] = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3))}


def color_of(index: int) -> str:
    """Return the colour of the strategy at ``index`` in the summary."""
    return COLORS[index % len(COLORS)]


def look_of(index: int) -> dict[str, Any]:
    """Return its colour and marker, as matplotlib takes them."""
    return {"color": color_of(index), "marker": MARKERS[index % len(MARKERS)]}


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.2), **sharing: Any
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure in the report's style, and its panels."""
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)


def style_axes(axes: Axes, title: str, x_label: str, y_label: str, **style: Any) -> None:
    """Give a panel the report's style; further options are the title's."""
    style = {"loc": "left", "fontsize": 12, "fontweight": "bold", "color": INK, **style}
    axes.set_title(title, **style).set_parse_math(False)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dde2e6", linewidth=0.7)
    axes.set_axisbelow(True)


def add_legend(
    figure: Figure,
    entries: Sequence[tuple[str, Mapping[str, Any]]],
    loc: Any = "outside lower center",
    **style: Any,
) -> Legend:
    """Explain what each line or mark means, by its name and how it looks."""
    handles = [Line2D([], [], label=label, **look) for label, look in entries]
    style = {"ncols": min(3, len(handles)), "frameon": False, **style}
    legend: Legend = figure.legend(handles=handles, loc=loc, **style)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a name is a dollar
    return legend


def write_plots(figures: Mapping[str, Figure], folder: Path) -> dict[str, bytes]:
    """Write each figure as a PNG into ``folder``, made if it is missing; return their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name)
    return {name: (folder / name).read_bytes() for name in figures}
