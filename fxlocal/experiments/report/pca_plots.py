"""The picture of principal components: one panel per network, points coloured by class."""

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .pca import Projection
from .plots import COLORS, MARKERS, style_axes

__all__ = ["plot_projections"]

MAX_CLASSES = 10  # more cannot be told apart
SHOWN_OF_MANY = 8
GREY = "#cfd5da"


def plot_projections(projections: Mapping[str, Projection], title: str) -> Figure:
    """Draw each network's projection; of more than 10 classes, the first 8 in colour.

    Each panel has axes of its own, because each network has its own components.
    """
    every = sorted({label for p in projections.values() for label in p.labels_N.tolist()})
    shown = every if len(every) <= MAX_CLASSES else every[:SHOWN_OF_MANY]
    size = (max(4.0 * len(projections), 6.4), 4.9)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    title = textwrap.fill(title, int(11 * size[0]))
    figure.suptitle(title, x=0.012, ha="left", fontsize=12).set_parse_math(False)
    panels = figure.subplots(1, len(projections), squeeze=False)[0]
    for axes, (name, projection) in zip(panels, projections.items(), strict=True):
        _draw(axes, name, projection, shown)
    handles = [
        Line2D([], [], ls="", marker=_look(i)[1], color=_look(i)[0], label=f"class {label}")
        for i, label in enumerate(shown)
    ]
    if len(shown) < len(every):
        others = f"the other {len(every) - len(shown)} of {len(every)} classes"
        handles.append(Line2D([], [], ls="", marker=".", color=GREY, label=others))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
    )
    return figure


def _draw(axes: Axes, name: str, projection: Projection, shown: Sequence[int]) -> None:
    first, second = (f"{100 * share:.0f} % of the variance" for share in projection.explained)
    style_axes(axes, name, f"first component ({first})", f"second component ({second})")
    axes.title.set_text("")
    axes.set_title(name, loc="left", fontsize=12, fontweight="bold", pad=22).set_parse_math(False)
    axes.annotate(
        f"between classes: {100 * projection.separation_plane:.0f} % "
        f"({100 * projection.separation:.0f} % in all features)",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 7),
        textcoords="offset points",
        fontsize=9,
        in_layout=False,
    )
    x, y = projection.scores_N2.T.tolist()
    labels = projection.labels_N.tolist()
    others = [i for i, label in enumerate(labels) if label not in shown]
    axes.plot([x[i] for i in others], [y[i] for i in others], ".", color=GREY, markersize=3)
    for place, label in enumerate(shown):
        color, marker = _look(place)
        own = [i for i, other in enumerate(labels) if other == label]
        axes.plot(
            [x[i] for i in own],
            [y[i] for i in own],
            ls="",
            color=color,
            marker=marker,
            markersize=4.5,
            mew=0,
            alpha=0.75,
        )


def _look(place: int) -> tuple[str, str]:
    """Return colour and marker of a class; no two share both."""
    return COLORS[place % len(COLORS)], MARKERS[(place + place // len(COLORS)) % len(MARKERS)]
