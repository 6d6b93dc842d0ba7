"""Where the blocks and skip edges of a model stand on a page; `draw` makes a picture of it.

Lengths are pixels. Heights count up from the line that a row of blocks stands on.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ...compiler.analysis import Analysis
from ...errors import PlanError
from ...facts import Block, Cost, SkipEdge

__all__ = [
    "MARGIN",
    "NAME_SIZE",
    "NAME_SLANT",
    "Arc",
    "Box",
    "Layout",
    "Stretch",
    "find_layout",
    "short",
    "text_width",
]

PER_ROW, ROW_WIDTH, WIDEST_SLOT, NARROWEST_PAGE, MARGIN = 28, 1180, 112, 700, 26
GAP = 0.26  # between blocks, as a part of a slot
TALLEST, SHORTEST, ROOM_FOR_NUMBER = 96, 3, 17  # heights of blocks; what a number inside needs
LOWEST_ARC, ARC_STEP, HIGHEST_ARC = 26, 17, 150  # heights of arcs between blocks
NAME_SIZE, NAME_SLANT, LONGEST_NAME = 11, 35, 26  # pixels, degrees, characters


@dataclass(frozen=True)
class Box:
    """One block; ``share`` is the part of its cost, from the left, before the boundary."""

    name: str
    tooltip: str
    number: str
    row: int
    x: float
    width: float
    height: float
    share: float

    @property
    def holds_number(self) -> bool:
        """Whether its number fits inside; else it stands on top."""
        return self.height >= ROOM_FOR_NUMBER

    @property
    def top(self) -> float:
        """The height from which arcs may start."""
        return self.height if self.holds_number else self.height + 13


@dataclass(frozen=True)
class Arc:
    """Skip edges of one kind between the same two blocks, or inside one block."""

    source: int
    target: int
    kind: str
    long_range: bool
    edges: tuple[SkipEdge, ...]


@dataclass(frozen=True)
class Stretch:
    """The part of an arc in one row; an end is None where the arc goes on in another row."""

    arc: Arc
    row: int
    start: Box | None
    end: Box | None
    height: float


@dataclass(frozen=True)
class Layout:
    """Everything that stands on the page; ``cut`` is the row and x of the boundary, if any."""

    boxes: tuple[Box, ...]
    arcs: tuple[Arc, ...]
    stretches: tuple[Stretch, ...]
    cut: tuple[int, float] | None
    slanted: bool
    name_room: float
    width: float

    @property
    def rows(self) -> int:
        """Number of rows of blocks."""
        return self.boxes[-1].row + 1


def find_layout(analysis: Analysis, boundary: int) -> Layout:
    """Place the blocks and skip edges of ``analysis``, and the boundary before a layer.

    Raises:
        PlanError: if the model has no layers.
    """
    blocks = analysis.blocks
    if not blocks:
        raise PlanError("nothing to draw: the model has no convolution and no linear layer")
    per_row = math.ceil(len(blocks) / math.ceil(len(blocks) / PER_ROW))
    slot = min(WIDEST_SLOT, ROW_WIDTH / per_row)
    longest = max(text_width(_shortened(block.name), NAME_SIZE) for block in blocks)
    slanted = longest > slot - 6
    hanging_out = longest * math.cos(math.radians(NAME_SLANT)) - slot / 2 if slanted else 0
    left = MARGIN + max(0, hanging_out)
    costs, shares = _costs_and_shares(analysis, boundary)
    unit = TALLEST / max(costs)
    boxes = tuple(
        Box(
            name=_shortened(block.name),
            tooltip=_tooltip(analysis, block),
            number=short(cost),
            row=i // per_row,
            x=left + slot * (i % per_row + GAP / 2),
            width=slot * (1 - GAP),
            height=max(SHORTEST, unit * cost),
            share=share,
        )
        for i, (block, cost, share) in enumerate(zip(blocks, costs, shares, strict=True))
    )
    arcs = find_arcs(analysis)
    return Layout(
        boxes=boxes,
        arcs=arcs,
        stretches=_stretches(arcs, boxes),
        cut=_cut(boxes, slot) if boundary else None,
        slanted=slanted,
        name_room=24 + (longest * math.sin(math.radians(NAME_SLANT)) if slanted else 0),
        width=max(left + slot * per_row + MARGIN, NARROWEST_PAGE),
    )


def _costs_and_shares(analysis: Analysis, boundary: int) -> tuple[list[int], list[float]]:
    """Return the cost of each block, and the part of it that lies before the boundary."""
    weights = [1] * len(analysis.layers)
    if analysis.costs is not None:
        weights = [max(1, cost.flops) for cost in analysis.costs]
    costs = [sum(weights[i] for i in block.layers) for block in analysis.blocks]
    before = [sum(weights[i] for i in b.layers if i < boundary) for b in analysis.blocks]
    return costs, [part / cost for part, cost in zip(before, costs, strict=True)]


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
    return tuple(sorted(arcs, key=lambda arc: (arc.target - arc.source, arc.source)))


def _block_at(starts: list[int], position: int) -> int:
    """Return the block of the node at ``position``; what comes before the first is its input."""
    return max(0, bisect_right(starts, position) - 1)


def _stretches(arcs: Iterable[Arc], boxes: tuple[Box, ...]) -> tuple[Stretch, ...]:
    """Split the arcs between blocks by rows; each one rises above those that it overlaps."""
    placed: list[tuple[Arc, int, int, int, int]] = []  # arc, row, first and last block, level
    for arc in (arc for arc in arcs if arc.source != arc.target):
        for row in range(boxes[arc.source].row, boxes[arc.target].row + 1):
            inside = [i for i in range(arc.source, arc.target + 1) if boxes[i].row == row]
            first, last = inside[0], inside[-1]
            below = [p[4] for p in placed if p[1] == row and p[2] < last and first < p[3]]
            placed.append((arc, row, first, last, max(below, default=-1) + 1))
    highest = max((level for *_, level in placed), default=0)
    step = min(ARC_STEP, (HIGHEST_ARC - LOWEST_ARC) / max(1, highest))
    return tuple(
        Stretch(
            arc,
            row,
            start=boxes[first] if first == arc.source else None,
            end=boxes[last] if last == arc.target else None,
            height=LOWEST_ARC + step * level,
        )
        for arc, row, first, last, level in placed
    )


def _cut(boxes: tuple[Box, ...], slot: float) -> tuple[int, float]:
    """Return the row and the x of the boundary: inside the block that it splits, or in a gap."""
    box = next((box for box in boxes if box.share < 1), boxes[-1])
    return box.row, box.x + (box.share * box.width or -slot * GAP / 2)


def _tooltip(analysis: Analysis, block: Block) -> str:
    names = [analysis.layers[i].path for i in block.layers]
    shown = names if len(names) <= 12 else [*names[:11], f"and {len(names) - 11} more"]
    lines = [f"{block.name}: layers {block.layers[0]} to {block.layers[-1]}", *shown]
    if analysis.costs is not None:
        cost = sum((analysis.costs[i] for i in block.layers), Cost(0, 0, 0))
        lines.append(
            f"{cost.parameters:,} parameters; {short(cost.flops)} FLOPs forward; "
            f"{cost.saved_bytes / 2**20:.2f} MiB saved for backward"
        )
    return "\n".join(lines)


def short(number: float) -> str:
    """Return ``number`` with three digits and a unit, as 1.85G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            digits = number / size
            return f"{digits:.{0 if digits >= 99.95 else 1 if digits >= 9.995 else 2}f}{unit}"
    return f"{number:.3g}"


def text_width(text: str, size: float) -> float:
    """Estimate how wide ``text`` is in a common sans-serif font."""
    return 0.54 * size * len(text)


def _shortened(path: str) -> str:
    """Keep the end of a long path, which tells it from its neighbours, from a dot on."""
    if len(path) <= LONGEST_NAME:
        return path
    end = path[-LONGEST_NAME:]
    return "\u2026" + (end.partition(".")[2] or end)
