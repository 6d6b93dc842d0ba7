"""Draw a model's blocks as a standalone SVG: what each costs, how it learns, where gradients stop.

Blocks stand on a line in execution order, in several rows if there are many. A block's height is
its cost, its colour how its layers learn; a block that the boundary splits shows both colours. A
skip edge inside one block is a small arc over it, one between blocks an arc from block to block.
The same input gives the same bytes.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from ...compiler.analysis import Analysis
from ...plan import Freeze, Hebbian, Oja, Rule
from .layout import (
    MARGIN,
    NAME_SIZE,
    NAME_SLANT,
    Arc,
    Box,
    Layout,
    Stretch,
    find_layout,
    short,
    text_width,
)

__all__ = ["draw_blocks"]

FILLS = {"local": "#f2b134", "frozen": "#c3ccd3", "backprop": "#8fc4e6"}
INK, FAINT, LONG_RANGE, BOUNDARY = "#22292f", "#5d6973", "#8a2f6b", "#c8321e"
Style = dict[str, float | str]
DASHES = {"residual": "none", "concat": "7 3", "gate": "2 2.5"}
MERGED_BY = {"residual": "residual (add)", "concat": "concat skip (cat)", "gate": "gate (mul)"}
FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


def draw_blocks(analysis: Analysis, boundary: int, rule: Rule | None = None) -> str:
    """Return an SVG of the blocks of ``analysis``, cut before the layer ``boundary``.

    Args:
        analysis: what `fxlocal.analyze` returned; with costs, blocks are sized by forward FLOPs,
            else by their number of layers.
        boundary: index of the transition layer; 0 draws plain training.
        rule: how the layers before it learn; None says "local rule" and names none.
    """
    layout = find_layout(analysis, boundary)
    prefix = "frozen" if isinstance(rule, Freeze) else "local"
    svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": FONT})
    _add(svg, "rect", width="100%", height="100%", fill="#ffffff")
    head, detail = _header(analysis, boundary, prefix)
    _text(svg, MARGIN, 26, head, size=14, font_weight="bold")
    _text(svg, MARGIN, 44, detail, size=12, fill=FAINT)
    width = max(layout.width, 2 * MARGIN + max(text_width(head, 14), text_width(detail, 12)))
    y = 56.0
    for row in range(layout.rows):
        y = _draw_row(svg, layout, row, prefix, y)
    height = _draw_legend(svg, layout, rule, y + 8)
    svg.set("width", f"{width:.0f}")
    svg.set("height", f"{height:.0f}")
    svg.set("viewBox", f"0 0 {width:.0f} {height:.0f}")
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


def _header(analysis: Analysis, boundary: int, prefix: str) -> tuple[str, str]:
    """Say in two lines what the picture shows."""
    layers, blocks = len(analysis.layers), len(analysis.blocks)
    head = f"{layers} layers in {blocks} blocks, all learn by back-propagation"
    if boundary:
        how = "are frozen" if prefix == "frozen" else "learn by the local rule"
        transition = analysis.layers[boundary].path
        head = (
            f"{boundary} of {layers} layers {how}; back-propagation stops at layer {boundary}, "
            f"{transition}"
        )
    if analysis.costs is None:
        return head, "Height of a block: its number of layers"
    flops = sum(cost.flops for cost in analysis.costs)
    kept, whole = (f"{(analysis.saved_bytes(b) or 0) / 2**20:.1f}" for b in (boundary, 0))
    return head, (
        f"Height of a block: FLOPs of its forward, {short(flops)} in all. "
        f"Saved for backward: {kept} of {whole} MiB"
    )


def _draw_row(svg: ET.Element, layout: Layout, row: int, prefix: str, y: float) -> float:
    """Draw one row of blocks with its top at ``y``; return where it ends."""
    group = _add(svg, "g", class_="row")
    boxes = {i: box for i, box in enumerate(layout.boxes) if box.row == row}
    left = min(box.x for box in boxes.values()) - 8
    right = max(box.x + box.width for box in boxes.values()) + 8
    _add(group, "path", d=f"M {left:.1f} 0 H {right:.1f}", stroke=FAINT)
    roof = 0.0
    for i, box in boxes.items():
        _draw_box(group, box, prefix, layout.slanted)
        inside = [arc for arc in layout.arcs if arc.source == arc.target == i]
        roof = max(roof, _draw_inner_arcs(group, box, inside))
    stretches = [s for s in layout.stretches if s.row == row]
    for stretch in stretches:
        _draw_stretch(group, stretch, roof + 6, (left, right))
    above = roof + max((6 + s.height for s in stretches), default=0) + 10
    if layout.cut and layout.cut[0] == row:
        above += 20
        _draw_boundary(group, layout, above)
    group.set("transform", f"translate(0 {y + above:.1f})")
    return y + above + layout.name_room


def _draw_box(parent: ET.Element, box: Box, prefix: str, slanted: bool) -> None:
    """Draw a block: one or two colours, its number, its name and a tooltip."""
    how = {0.0: "backprop", 1.0: prefix}.get(box.share, "split")
    group = _add(parent, "g", class_=f"block {how}")
    _add(group, "title", box.tooltip)
    place: Style = {"y": -box.height, "height": box.height}
    edge = box.share * box.width
    if edge:
        _add(group, "rect", class_=prefix, x=box.x, width=edge, fill=FILLS[prefix], **place)
    if edge < box.width:
        rest: Style = {"x": box.x + edge, "width": box.width - edge, "fill": FILLS["backprop"]}
        _add(group, "rect", class_="backprop", **rest, **place)
    outline: Style = {"fill": "none", "stroke": INK, "stroke_width": 0.8}
    _add(group, "rect", class_="outline", x=box.x, width=box.width, **outline, **place)
    middle = box.x + box.width / 2
    # Off the boundary: in the middle of the larger part of a split block.
    number_x = middle if box.share in (0, 1) else box.x + (edge + box.width * (box.share < 0.5)) / 2
    above_line = box.height / 2 - 3.5 if box.holds_number else box.height + 4
    _text(group, number_x, -above_line, box.number, size=10, text_anchor="middle")
    if slanted:
        name = _text(group, middle + 4, 14, box.name, size=NAME_SIZE, text_anchor="end")
        name.set("transform", f"rotate({-NAME_SLANT} {middle + 4:.1f} 14)")
    else:
        _text(group, middle, 16, box.name, size=NAME_SIZE, text_anchor="middle")


def _draw_inner_arcs(parent: ET.Element, box: Box, arcs: list[Arc]) -> float:
    """Draw the skip edges inside a block, one over the other; return the height reached."""
    for i, arc in enumerate(arcs):
        inset = (0.2 - 0.05 * i) * box.width
        start, end, height = box.x + inset, box.x + box.width - inset, 12 + 10 * i
        ellipse = f"A {(end - start) / 2:.1f} {height} 0 0 1 {end:.1f} {-box.top:.1f}"
        _add_arc(parent, arc, f"M {start:.1f} {-box.top:.1f} {ellipse}", (end, -box.top))
        if len(arc.edges) > 1:
            times, x = f"\u00d7{len(arc.edges)}", box.x + 0.95 * box.width
            _text(parent, x, -box.top - height, times, size=9)
    return box.top + (2 + 10 * len(arcs) if arcs else 0)


def _draw_stretch(
    parent: ET.Element, stretch: Stretch, rail: float, margins: tuple[float, float]
) -> None:
    """Draw a skip edge between blocks: up to the rail, half an ellipse, and down again.

    Where it goes on in another row, it leaves or enters at the margin, at its full height.
    """
    start, end, high = stretch.start, stretch.end, rail + stretch.height
    x = start.x + 0.75 * start.width if start else margins[0]
    x_end = end.x + 0.25 * end.width if end else margins[1]
    radius = (x_end - x) / (2 if start and end else 1)
    ellipse = f"A {radius:.1f} {stretch.height:.1f} 0 0 1"
    path = f"M {x:.1f} {-high:.1f}"
    if start:
        path = f"M {x:.1f} {-start.top:.1f} V {-rail:.1f}"
    if start and not end:
        path += f" {ellipse} {x_end:.1f} {-high:.1f}"
    elif end:
        path += f" {ellipse} {x_end:.1f} {-rail:.1f} V {-end.top:.1f}"
    else:
        path += f" H {x_end:.1f}"
    _add_arc(parent, stretch.arc, path, (x_end, -end.top) if end else None)


def _draw_boundary(parent: ET.Element, layout: Layout, above: float) -> None:
    """Draw the boundary, with its name on the side that has more room."""
    assert layout.cut is not None
    x = layout.cut[1]
    line = f"M {x:.1f} {8 - above:.1f} V 6"
    style: Style = {"fill": "none", "stroke": BOUNDARY, "stroke_width": 2}
    _add(parent, "path", class_="boundary", d=line, **style)
    side = 1 if x < layout.width / 2 else -1
    anchor = "start" if side == 1 else "end"
    _text(parent, x + 6 * side, 18 - above, "boundary", size=12, fill=BOUNDARY, text_anchor=anchor)


def _draw_legend(svg: ET.Element, layout: Layout, rule: Rule | None, y: float) -> float:
    """Explain the colours and lines that occur, in as many lines as it takes; return the end."""
    x, group = float(MARGIN), _add(svg, "g", class_="legend")
    for swatch, words in _legend_items(layout, rule):
        length = 38 + text_width(words, 12)
        if x + length > layout.width:
            x, y = float(MARGIN), y + 20
        item = _add(group, "g", transform=f"translate({x:.1f} {y:.1f})")
        item.append(swatch)
        _text(item, 30, 4, words, size=12)
        x += length + 14
    return y + 22


def _legend_items(layout: Layout, rule: Rule | None) -> Iterator[tuple[ET.Element, str]]:
    prefix = "frozen" if isinstance(rule, Freeze) else "local"
    words = {"local": "local rule", "frozen": "frozen", "backprop": "back-propagation"}
    if isinstance(rule, (Hebbian, Oja)):
        name = "Oja" if isinstance(rule, Oja) else "Hebbian"
        words["local"] = f"local rule ({name}, rate {rule.rate:g})"
    shown = [prefix] * any(b.share > 0 for b in layout.boxes)
    shown += ["backprop"] * any(b.share < 1 for b in layout.boxes)
    for how in shown:
        box: Style = {"x": 2, "y": -7, "width": 20, "height": 14, "fill": FILLS[how], "stroke": INK}
        yield _element("rect", stroke_width=0.8, **box), words[how]
    if layout.cut:
        line: Style = {"d": "M 12 -8 V 8", "stroke": BOUNDARY, "stroke_width": 2}
        yield _element("path", **line), "boundary: no gradient crosses it"
    for kind, long_range in sorted({(arc.kind, arc.long_range) for arc in layout.arcs}):
        swatch = _stroke(kind, long_range, "M 0 0 H 24")
        yield swatch, MERGED_BY[kind] + (", long-range" if long_range else "")


# --- SVG ----------------------------------------------------------------------------------------


def _element(tag: str, **attributes: float | str) -> ET.Element:
    """Make an element; ``class_`` and ``stroke_width`` stand for "class" and "stroke-width"."""
    texts = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{value:.1f}"
        for name, value in attributes.items()
    }
    return ET.Element(tag, texts)


def _add(
    parent: ET.Element, tag: str, content: str | None = None, /, **attributes: float | str
) -> ET.Element:
    element = _element(tag, **attributes)
    element.text = content
    parent.append(element)
    return element


def _text(
    parent: ET.Element, x: float, y: float, content: str, *, size: float, **attributes: str
) -> ET.Element:
    attributes = {"fill": INK, **attributes}
    return _add(parent, "text", content, x=x, y=y, font_size=size, **attributes)


def _add_arc(parent: ET.Element, arc: Arc, path: str, tip: tuple[float, float] | None) -> None:
    """Draw a line with an arrowhead that points down at ``tip``."""
    group = _add(parent, "g", class_=f"skip {arc.kind}" + (" long-range" if arc.long_range else ""))
    edges = "\n".join(f"{edge.source} -> {edge.target}" for edge in arc.edges)
    _add(group, "title", f"{MERGED_BY[arc.kind]}\n{edges}")
    group.append(_stroke(arc.kind, arc.long_range, path))
    if tip:
        x, y = tip
        head = f"M {x:.1f} {y:.1f} l -2.8 -5.5 h 5.6 Z"
        _add(group, "path", class_="head", d=head, fill=LONG_RANGE if arc.long_range else INK)


def _stroke(kind: str, long_range: bool, path: str) -> ET.Element:
    color, width = (LONG_RANGE, 2.2) if long_range else (INK, 1.2)
    style: Style = {"stroke": color, "stroke_width": width, "stroke_dasharray": DASHES[kind]}
    return _element("path", d=path, fill="none", **style)
