"""The picture of a model's blocks: what each costs, how it learns, where gradients stop.

Blocks stand in execution order, in several rows if there are many. A block's height is its cost,
its colour how its layers learn; a block that the boundary splits shows both colours. A hexagon is
attention: lines of Q and K meet, and their product meets V; it has no layer of its own where a
module that attends is kept whole. A skip edge inside one block is a small arc over it, one between
blocks an arc from block to block.
The same input gives the same bytes. Lengths in a row: blocks across, points up.
"""

import io
import json
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Curve

from ...compiler.analysis import Analysis
from ...errors import PlanError
from ...facts import SkipEdge
from ...plan import Freeze, Rule
from ..training.settings import SettingsError
from .plots import INK
from .words import describe_block, describe_picture, describe_rule, short, shortened

__all__ = ["block_pixels", "draw_blocks", "plot_blocks", "short", "write_picture"]

FILLS = {"local": "#f2b134", "frozen": "#c3ccd3", "backprop": "#8fc4e6"}
FAINT, LONG_RANGE, BOUNDARY = "#5d6973", "#8a2f6b", "#c8321e"
LINES: dict[str, Any] = {"residual": "-", "concat": (0, (5, 2)), "gate": (0, (1.5, 1.5))}
ATTENDS: dict[str, Any] = {"marker": "h", "ms": 9, "mfc": "white", "mec": INK, "linestyle": ""}
MERGED_BY = {"residual": "residual (add)", "concat": "concat skip (cat)", "gate": "gate (mul)"}
PER_ROW = 28
WIDTH = 0.76  # of a block
TALLEST, SHORTEST, NUMBER = 72, 2, 12  # heights of blocks, and of the number on each
LETTERS, PRODUCT, ATTENTION = 10, 18, 26  # heights in a block that attends: over Q, K, V; of both
LOWEST_ARC, ARC_STEP, HIGHEST_ARC = 22, 14, 110  # of arcs between blocks, over the blocks


@dataclass(frozen=True)
class Arc:
    """Skip edges of one kind between the same two blocks, or inside one block."""

    source: int
    target: int
    kind: str
    long_range: bool
    edges: tuple[SkipEdge, ...]

    @property
    def span(self) -> int:
        """Over how many blocks it goes."""
        return self.target - self.source

    @property
    def style(self) -> dict[str, Any]:
        """How its line looks."""
        color, width = (LONG_RANGE, 1.6) if self.long_range else (INK, 0.9)
        return {"color": color, "linewidth": width, "linestyle": LINES[self.kind]}


def draw_blocks(analysis: Analysis, boundary: int, rule: Rule | None = None) -> str:
    """Return the picture as an SVG whose blocks and skip edges have tooltips.

    A block's ``data-layers`` lists index, path and cost of its layers, by which the page's script
    moves the boundary.
    """
    figure, file = plot_blocks(analysis, boundary, rule), io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fxlocal"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for artist in (patch for axes in figure.axes for patch in axes.patches):
        start, title = f'<g id="{artist.get_gid()}">', escape(str(artist.get_label()))
        if f"{start}\n <title>" not in svg:
            svg = svg.replace(start, f"{start}\n <title>{title}</title>")
    costs = _layer_costs(analysis)
    for i, block in enumerate(analysis.blocks):
        layers = [(k, analysis.layers[k].path, costs[k]) for k in block.layers]
        told = f'<g id="block-{i}" data-layers="{escape(json.dumps(layers))}">'
        svg = svg.replace(f'<g id="block-{i}">', told, 1)
    return svg


def write_picture(analysis: Analysis, boundary: int, rule: Rule | None, path: Path) -> None:
    """Write the picture into a file, whose suffix says whether as SVG or as PNG.

    Raises:
        PlanError: if the model has no layers.
        SettingsError: if the suffix is another.
    """
    if path.suffix == ".svg":
        path.write_text(draw_blocks(analysis, boundary, rule), encoding="utf-8")
    elif path.suffix == ".png":
        plot_blocks(analysis, boundary, rule).savefig(path, dpi=200)
    else:
        raise SettingsError(f"--draw {path}: give a file that ends in .svg or .png")


def block_pixels(analysis: Analysis, boundary: int, rule: Rule | None = None) -> Any:
    """Return the picture as an array of bytes (height, width, red green blue)."""
    canvas: Any = FigureCanvasAgg(plot_blocks(analysis, boundary, rule))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def plot_blocks(analysis: Analysis, boundary: int, rule: Rule | None = None) -> Figure:
    """Return the blocks of ``analysis``, cut before the layer ``boundary``.

    Args:
        analysis: what `fxlocal.analyze` returned; with costs, blocks are sized by forward FLOPs,
            else by their number of layers.
        boundary: index of the transition layer; 0 draws plain training.
        rule: how the layers before it learn; None says "local rule" and names none.

    Raises:
        PlanError: if the model has no layers.
    """
    blocks = analysis.blocks
    if not blocks:
        raise PlanError("nothing to draw: the model has no convolution and no linear layer")
    num_rows = math.ceil(len(blocks) / PER_ROW)
    per_row = math.ceil(len(blocks) / num_rows)
    rows = [_Row(analysis, boundary, rule, i * per_row, per_row) for i in range(num_rows)]
    handles = _legend(analysis, boundary, rule)
    lengths = (sum(row.height + 44 for row in rows), 15 * math.ceil(len(handles) / 3), 46)
    size = (min(12.5, max(7.6, 0.95 * per_row)), sum(lengths) / 72)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(num_rows, squeeze=False, height_ratios=[row.height for row in rows])
    for row, (axes,) in zip(rows, panels, strict=True):
        row.draw(axes)
    head, detail = describe_picture(analysis, boundary, rule)
    style: dict[str, Any] = {"loc": "left", "fontsize": 11, "fontweight": "bold", "color": INK}
    title = panels[0, 0].set_title(head, pad=22, gid="head", **style)
    title.set_parse_math(False)
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    panels[0, 0].annotate(detail, (0, 1), (0, 8), fontsize=9, color=FAINT, **place)
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return figure


def _legend(analysis: Analysis, boundary: int, rule: Rule | None) -> list[Patch | Line2D]:
    """Explain the colours and lines that occur."""
    handles: list[Patch | Line2D] = []
    if boundary:
        fill = FILLS[_prefix(rule)]
        handles.append(Patch(facecolor=fill, edgecolor=INK, label=describe_rule(rule)))
    handles.append(Patch(facecolor=FILLS["backprop"], edgecolor=INK, label="back-propagation"))
    if boundary:
        label = "boundary: no gradient crosses it"
        handles.append(Line2D([], [], color=BOUNDARY, linewidth=1.8, label=label))
    if analysis.attentions:
        handles.append(Line2D([], [], label="attention", **ATTENDS))
    styles = {(arc.kind, arc.long_range): arc.style for arc in find_arcs(analysis)}
    for (kind, long_range), style in sorted(styles.items(), key=lambda item: item[0]):
        label = MERGED_BY[kind] + (", long-range" if long_range else "")
        handles.append(Line2D([], [], label=label, **style))
    return handles


def _prefix(rule: Rule | None) -> str:
    return "frozen" if isinstance(rule, Freeze) else "local"


class _Row:
    """Some of the blocks side by side, and what passes over them; ``height`` is in points."""

    def __init__(
        self, analysis: Analysis, boundary: int, rule: Rule | None, first: int, count: int
    ) -> None:
        self.analysis, self.boundary, self.prefix = analysis, boundary, _prefix(rule)
        costs, shares = find_costs_and_shares(analysis, boundary)
        self.first, self.end, self.count = first, min(first + count, len(costs)), count
        self.places = range(self.first, self.end)
        self.heights = [max(SHORTEST, TALLEST * cost / max(costs)) for cost in costs]
        self.costs, self.shares = costs, shares
        arcs = find_arcs(analysis)
        self.inner = [arc for arc in arcs if not arc.span and arc.source in self.places]
        passing = [a for a in arcs if a.span and a.source < self.end and a.target >= first]
        spans = sorted({arc.span for arc in arcs if arc.span})  # longer arcs rise higher
        step = min(ARC_STEP, (HIGHEST_ARC - LOWEST_ARC) / max(1, len(spans)))
        attends = [bool(analysis.attentions_of(block)) for block in analysis.blocks]
        lowest = [(ATTENTION + 8) * one for one in attends]
        self.tops = [max(pair) for pair in zip(self.heights, lowest, strict=True)]
        roof = max(self.tops[i] for i in self.places) + NUMBER + 12 * bool(self.inner)
        self.passing = [(arc, roof + LOWEST_ARC + step * spans.index(arc.span)) for arc in passing]
        self.height = max((high for _, high in self.passing), default=roof) + 6
        self.height += 12 * bool(boundary)

    def draw(self, axes: Axes) -> None:
        """Draw the row."""
        axes.set_gid(f"row-{self.first}")
        axes.patch.set_gid(f"area-{self.first}")
        axes.set(xlim=(self.first - 0.6, self.first + self.count - 0.4), ylim=(0, self.height))
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.set_yticks([])
        own = slice(self.first, self.end)
        names = [shortened(block.name) for block in self.analysis.blocks[own]]
        axes.set_xticks(list(self.places), names, rotation=30, ha="right", rotation_mode="anchor")
        axes.tick_params(length=0, labelsize=8, labelcolor=INK)
        for text in axes.get_xticklabels():
            text.set_parse_math(False)  # a "$" in a name is a dollar
        left = [i - WIDTH / 2 for i in self.places]
        heights, shares = self.heights[own], self.shares[own]
        axes.bar(left, heights, WIDTH, align="edge", color=FILLS["backprop"])
        parts = [WIDTH * share for share in shares]
        axes.bar(left, heights, parts, align="edge", color=FILLS[self.prefix])
        outlines = axes.bar(left, heights, WIDTH, align="edge", fill=False, ec=INK, lw=0.7)
        for i, outline in zip(self.places, outlines, strict=True):
            outline.set_gid(f"block-{i}")
            outline.set_label(describe_block(self.analysis, self.analysis.blocks[i]))
            place = (i, self.tops[i]), (0, 1)
            style: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 7.5, "color": INK}
            axes.annotate(short(self.costs[i]), *place, textcoords="offset points", **style)
            if count := self.analysis.attentions_of(self.analysis.blocks[i]):
                _draw_attention(axes, i, count)
        for number, arc in enumerate(self.inner):
            self._draw_inner(axes, arc, sum(a.source == arc.source for a in self.inner[:number]))
        for arc, high in self.passing:
            self._draw_passing(axes, arc, high)
        if self.boundary:
            self._draw_boundary(axes)

    def _foot(self, index: int) -> float:
        """Return the height over a block's number, where arcs begin and end."""
        return self.tops[index] + NUMBER

    def _draw_inner(self, axes: Axes, arc: Arc, below: int) -> None:
        """Draw skip edges inside a block, over as many others."""
        half, foot = (0.3 - 0.06 * below) * WIDTH, self._foot(arc.source)
        start, end, high = arc.source - half, arc.source + half, foot + 4 / 3 * (9 + 5 * below)
        corners = [(start, foot), (start, high), (end, high), (end, foot)]
        _add_arc(axes, arc, corners)
        if len(arc.edges) > 1:
            axes.text(end + 0.06, foot + 3, f"\u00d7{len(arc.edges)}", fontsize=7, color=INK)

    def _draw_passing(self, axes: Axes, arc: Arc, high: float) -> None:
        """Draw a skip edge between blocks; the margins of a row cut it."""
        x, x_end = arc.source + 0.25 * WIDTH, arc.target - 0.25 * WIDTH
        foot, foot_end = self._foot(arc.source), self._foot(arc.target)
        top = (4 * high - (foot + foot_end) / 2) / 3
        corners = [(x, foot), (x, top), (x_end, top), (x_end, foot_end)]
        _add_arc(axes, arc, corners, arrives=arc.target in self.places)

    def _draw_boundary(self, axes: Axes) -> None:
        """Tint what lies before the boundary, and draw it inside the block that it splits."""
        index = next((i for i, share in enumerate(self.shares) if share < 1), len(self.shares))
        share = self.shares[index] if index < len(self.shares) else 0
        x = index - WIDTH / 2 + share * WIDTH if share else index - 0.5
        if index >= self.first:
            tint: dict[str, Any] = {"color": FILLS[self.prefix], "alpha": 0.15, "lw": 0}
            axes.axvspan(self.first - 0.6, min(x, self.end - 0.4), zorder=0, **tint)
        if index in self.places:
            axes.axvline(x, color=BOUNDARY, linewidth=1.8, gid="boundary")
            late = x > self.first + self.count / 2
            style: dict[str, Any] = {"ha": "right" if late else "left", "va": "top", "fontsize": 9}
            place = (x, self.height), (-4 if late else 4, -1)
            axes.annotate("boundary", *place, textcoords="offset points", color=BOUNDARY, **style)


def _draw_attention(axes: Axes, block: int, count: int) -> None:
    """Draw the product of Q and K, and of that and V, in the block at its place."""
    apart = 0.3 * WIDTH
    q, k, v = block - apart, block, block + apart
    weights, end = (q + k) / 2, block + apart / 4
    line: dict[str, Any] = {"color": INK, "linewidth": 0.8}
    axes.plot([q, weights, k], [LETTERS, PRODUCT, LETTERS], gid=f"product-{block}-qk", **line)
    axes.plot([weights, end, v], [PRODUCT, ATTENTION, LETTERS], gid=f"product-{block}-v", **line)
    axes.plot([end], [ATTENTION], gid=f"attends-{block}", **ATTENDS)
    style: dict[str, Any] = {"fontsize": 6.5, "color": INK, "va": "center"}
    for x, letter in ((q, "Q"), (k, "K"), (v, "V")):
        axes.text(x, LETTERS / 2, letter, ha="center", **style)
    if count > 1:
        axes.text(end + apart / 2, ATTENTION, f"\u00d7{count}", **style)


def _add_arc(
    axes: Axes, arc: Arc, corners: Sequence[tuple[float, float]], arrives: bool = True
) -> None:
    """Draw a Bezier curve, with an arrowhead at its end if that is in sight."""
    path = Curve(corners, [Curve.MOVETO, *[Curve.CURVE4] * 3])
    edges = "\n".join(f"{edge.source} -> {edge.target}" for edge in arc.edges)
    label, gid = f"{MERGED_BY[arc.kind]}\n{edges}", f"skip-{arc.source}-{arc.target}-{arc.kind}"
    axes.add_patch(PathPatch(path, fill=False, gid=gid, label=label, **arc.style))
    if arrives:
        x, y = corners[-1]
        axes.plot([x], [y + 2], "v", ms=3.5, color=arc.style["color"], gid="arrives")


# What is to be seen


def find_costs_and_shares(analysis: Analysis, boundary: int) -> tuple[list[int], list[float]]:
    """Return the cost of each block, and the part of it that lies before the boundary."""
    weights = _layer_costs(analysis)
    costs = [sum(weights[i] for i in block.layers) for block in analysis.blocks]
    before = [sum(weights[i] for i in b.layers if i < boundary) for b in analysis.blocks]
    return costs, [part / cost for part, cost in zip(before, costs, strict=True)]


def _layer_costs(analysis: Analysis) -> list[int]:
    if analysis.costs is None:
        return [1] * len(analysis.layers)
    return [max(1, cost.flops) for cost in analysis.costs]


def find_arcs(analysis: Analysis) -> tuple[Arc, ...]:
    """Join the skip edges of one kind between the same two blocks; shorter arcs come first."""
    starts = [analysis.order[block.start] for block in analysis.blocks]
    groups: dict[tuple[int, int, str, bool], list[SkipEdge]] = defaultdict(list)
    for edge in analysis.skips:
        before, target = analysis.order[edge.source], _block_at(starts, analysis.order[edge.target])
        # The source is often the last node of the block before: what the edge bypasses comes next.
        inside = _block_at(starts, before + 1) == target
        source = target if inside else _block_at(starts, before)
        groups[source, target, edge.kind, edge.long_range].append(edge)
    arcs = (Arc(*key, tuple(edges)) for key, edges in groups.items())
    return tuple(sorted(arcs, key=lambda arc: (arc.span, arc.source)))


def _block_at(starts: list[int], position: int) -> int:
    """Return the block of the node at ``position``; what comes before the first is its input."""
    return max(0, bisect_right(starts, position) - 1)
