"""Find the blocks: the stretches of layers between places where the fewest values are live.

A value is live from where it is made to its last use on the way to the deepest output, if a
parameter goes into it. Not so a mask or a table that is made of inputs and buffers, nor what is
used later by a long-range skip, for its size, or as one more output. Where one value is live the
network is a chain, so a residual block with its shortcut is one block. The cut of a block edge is
the last such place before the block's first layer, so that a norm and an activation stay with the
layer before them.

    conv1 | bn1 relu   layer1.0: conv1 bn1 relu conv2 bn2 add | relu   layer1.1: ...

Where several are live for long (a time embedding, parallel branches), a stretch of more than an
eighth of the layers is parted where the fewest of it are, then the rest of it where the next
fewest are, and so on. No boundary parts the uses of a tied weight that takes gradients.

Cost: linear in nodes and edges: 15 ms for ResNet-152.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from torch import fx

from fxlocal.facts import Block, Layer, SkipEdge
from fxlocal.ir.boundary import learned_values
from fxlocal.ir.nodes import (
    ancestors,
    computations,
    nodes_by_name,
    parameter_uses,
    positions,
    shared_path,
)
from fxlocal.ir.operators import is_inplace, origins

__all__ = ["find_blocks"]

_FEW = 4  # layers that are one block however small the network is


def find_blocks(
    gm: fx.GraphModule, *, layers: Sequence[Layer], skips: Sequence[SkipEdge]
) -> tuple[Block, ...]:
    """Return the blocks of a captured graph in execution order; empty if it has no layers."""
    if not layers:
        return ()
    order = positions(gm.graph)
    nodes, place = list(order), {node.name: i for node, i in order.items()}
    live = _Live(gm, skips, order)
    counts = live.counts(order)
    starts = [next(order[node] for node in computations(gm.graph))]
    for previous, layer in pairwise(layers):
        gaps = range(place[layer.node], place[previous.node], -1)
        starts.append(min(gaps, key=counts.__getitem__))  # the last of the best
    edges = _edges([counts[start] for start in starts])
    values = live.names_at([starts[edge] for edge in edges[1:]], nodes)
    groups = [range(a, b) for a, b in pairwise([*edges, len(layers)])]
    names = _names([[layers[i].path for i in group] for group in groups])
    return tuple(
        Block(name, tuple(group), nodes[starts[group[0]]].name, crossing)
        for name, group, crossing in zip(names, groups, [(), *values], strict=True)
    )


class _Live:
    """Which values are live where, long-range skips aside.

    Attributes:
        last: each value on the way to the main outputs, and the place of its last use on it.
        side: the same of what only a long-range skip takes, and that layers of its own make.
    """

    def __init__(
        self, gm: fx.GraphModule, skips: Sequence[SkipEdge], order: dict[fx.Node, int]
    ) -> None:
        self.gm, self.learned, self.uses = gm, learned_values(gm), list(parameter_uses(gm))
        named = nodes_by_name(gm.graph)
        dropped = {(named[e.operand], named[e.target]) for e in skips if e.long_range}
        alive = self._main_outputs()
        taken, ends = set(alive), dict[fx.Node, int]()  # by long-range skips too
        self.last: dict[fx.Node, int] = {}
        for node in reversed(order):
            if node not in taken and not self._changes(node, taken):
                continue
            on_main_path = node in alive or node not in taken
            for value in self._into(node):
                taken.add(value)
                ends.setdefault(value, order[node])
                if on_main_path and (value, node) not in dropped:
                    alive.add(value)
                    self.last.setdefault(value, order[node])
        uses = {node for node, _, _ in self.uses}
        self.side: dict[fx.Node, int] = {}
        for node in order:
            own = node in uses or not self.side.keys().isdisjoint(self._into(node))
            if own and node in ends and node not in alive:
                self.side[node] = ends[node]

    def counts(self, order: dict[fx.Node, int]) -> list[float]:
        """Return how many values are live before each place; infinite between tied weights."""
        spans: dict[int, tuple[int, int]] = {}
        for node, _, parameter in self.uses:  # in execution order
            if not parameter.requires_grad:
                continue
            first, _ = spans.get(id(parameter), (order[node], 0))
            spans[id(parameter)] = (first, order[node])
        live = _covered(((order[value], end) for value, end in self.last.items()), len(order))
        tied = _covered(spans.values(), len(order))
        return [math.inf if part else count for count, part in zip(live, tied, strict=True)]

    def names_at(self, starts: Sequence[int], nodes: Sequence[fx.Node]) -> list[tuple[str, ...]]:
        """Return the names of the values that are live before each of ``starts``."""
        ends, wanted = self.last | self.side, set(starts)
        live, found = list[fx.Node](), list[tuple[str, ...]]()
        for place, node in enumerate(nodes):
            if place in wanted:
                live = [value for value in live if ends[value] >= place]
                found.append(tuple(value.name for value in live))
            if node in ends:
                live.append(node)
        return found

    def _into(self, node: fx.Node) -> list[fx.Node]:
        return [value for value in node.all_input_nodes if value in self.learned]

    def _changes(self, node: fx.Node, values: set[fx.Node]) -> bool:
        """Tell whether a node whose own result is not used changes one of ``values`` in place."""
        if node not in self.learned or not is_inplace(self.gm, node):
            return False
        return not values.isdisjoint(origins(self.gm, node.all_input_nodes[0]))

    def _main_outputs(self) -> set[fx.Node]:
        """Return the deepest output, and the deepest of each tower that shares nothing with it."""
        results = self.gm.graph.output_node().all_input_nodes
        if len(results) == 1 and isinstance(results[0].target, type):  # a named tuple is made
            results = results[0].all_input_nodes
        above: dict[fx.Node, set[fx.Node]] = {}
        for result in reversed(self.gm.graph.nodes):
            wanted = result in results and result in self.learned
            if wanted and not any(result in deeper for deeper in above.values()):
                above[result] = ancestors(result, self.learned)
        found: set[fx.Node] = set()
        known: set[fx.Node] = set()
        for result, made_of in sorted(above.items(), key=lambda item: -len(item[1])):
            if known.isdisjoint(made_of):
                found.add(result)
            known |= made_of
        return found


def _covered(spans: Iterable[tuple[int, int]], length: int) -> list[int]:
    """Return, for each place, how many (first, last) begin before it and do not end before it."""
    change = [0] * (length + 1)
    for first, last in spans:
        change[first + 1] += 1
        change[last + 1] -= 1
    return list(accumulate(change))[:length]


def _edges(counts: Sequence[float]) -> list[int]:
    """Return the layers that begin a block; ``counts`` is what is live before each."""
    longest = max(math.ceil(len(counts) / 8), _FEW)
    edges = [0, *(k for k, count in enumerate(counts) if k and count <= 1)]
    for fewest in sorted({count for count in counts[1:] if 1 < count < math.inf}):
        long = [(a, b) for a, b in pairwise([*edges, len(counts)]) if b - a > longest]
        if not long:
            break
        edges += [k for a, b in long for k in range(a + 1, b) if counts[k] == fewest]
        edges.sort()
    return edges


def _names(groups: list[list[str]]) -> list[str]:
    """Name each block by the module path that its layers share and no other block has."""
    names = [*map(shared_path, groups)]
    repeated = Counter(names)
    names = [
        paths[0] if repeated[name] > 1 else name for name, paths in zip(names, groups, strict=True)
    ]
    repeated = Counter(names)  # a layer called twice starts two blocks
    return [name if repeated[name] == 1 else f"{name}@{i}" for i, name in enumerate(names)]
