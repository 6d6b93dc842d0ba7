"""The pictures of principal components: one panel per network, or all networks over layers."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .pca import Projection
from .plots import COLORS, MARKERS, add_legend, color_of, new_figure, style_axes

__all__ = ["plot_over_layers", "plot_projections"]

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
    figure, panels = new_figure(columns=len(projections), size=size)
    title = textwrap.fill(title, int(11 * size[0]))
    figure.suptitle(title, x=0.012, ha="left", fontsize=12).set_parse_math(False)
    for axes, (name, projection) in zip(panels, projections.items(), strict=True):
        _draw(axes, name, projection, shown)
    entries = [(f"class {label}", {"ls": "", **_look(i)}) for i, label in enumerate(shown)]
    if len(shown) < len(every):
        others = f"the other {len(every) - len(shown)} of {len(every)} classes"
        entries.append((others, {"ls": "", "marker": ".", "color": GREY}))
    add_legend(figure, entries, ncols=5, fontsize=9, handletextpad=0.2)
    return figure


def plot_over_layers(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Draw how far classes are apart over the layers (Figure 8), and the share of the variance.

    Distances are in units of each network's own activations; the share is free of them.
    """
    figure, panels = new_figure(columns=2, size=(10.0, 4.9))
    looks = {name: _look(i) for i, name in enumerate(found)}
    paths = list(dict.fromkeys(path for own in found.values() for path in own))
    measures = {"distance": "distance of means", "separation_plane": "share of variance"}
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        style_axes(axes, "", "layer", f"{label} between classes")
        for name, own in found.items():
            points = [(paths.index(path), numbers[measure]) for path, numbers in own.items()]
            axes.plot(*zip(*points, strict=True), **looks[name])
        axes.set_xticks(range(len(paths)), paths, rotation=90, fontsize=7)
    add_legend(figure, list(looks.items()), ncols=3)
    return figure


def _draw(axes: Axes, name: str, projection: Projection, shown: Sequence[int]) -> None:
    first, second = (f"{100 * share:.0f} % of the variance" for share in projection.explained)
    style_axes(axes, name, f"first component ({first})", f"second component ({second})", pad=22)
    plane, whole = 100 * projection.separation_plane, 100 * projection.separation
    text = f"between classes: {plane:.0f} % ({whole:.0f} % in all features)"
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(text, (0, 1), (0, 7), fontsize=9, in_layout=False, **place)
    others = ~torch.isin(projection.labels_N, torch.tensor(shown))
    axes.plot(*projection.scores_N2[others].T.tolist(), ".", color=GREY, markersize=3)
    style: dict[str, Any] = {"ls": "", "markersize": 4.5, "mew": 0, "alpha": 0.75}
    for i, label in enumerate(shown):
        own = projection.scores_N2[projection.labels_N == label]
        axes.plot(*own.T.tolist(), **style, **_look(i))


def _look(place: int) -> dict[str, Any]:
    """Return colour and marker of a class; no two share both."""
    marker = MARKERS[(place + place // len(COLORS)) % len(MARKERS)]
    return {"color": color_of(place), "marker": marker}
