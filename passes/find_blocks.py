"""Find the blocks: the stretches of layers between places where a single value is live.

Drop the long-range skip edges, then cut wherever exactly one value is defined before and used
after: there the network is a chain, so a residual block with its shortcut is one block. The cut
of a block edge is the last such place before the block's first layer, so that a norm and an
activation stay with the layer before them.

    conv1 | bn1 relu   layer1.0: conv1 bn1 relu conv2 bn2 add | relu   layer1.1: ...

No boundary parts the uses of a tied weight. Side branches that only reach another output
(auxiliary heads) do not hold a boundary back.
Cost: one sweep, linear in nodes and edges.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import fx

from fxlocal.facts import Block, Layer, SkipEdge
from fxlocal.ir.nodes import computations, parameter_uses, positions
from fxlocal.ir.operators import is_plain

__all__ = ["find_blocks"]


def find_blocks(
    gm: fx.GraphModule, *, layers: Sequence[Layer], skips: Sequence[SkipEdge]
) -> tuple[Block, ...]:
    """Return the blocks of ``gm`` in execution order; empty if it has no layers.

    Args:
        gm: the captured graph.
        layers: what `find_layers` found in this graph.
        skips: what `find_skips` found in it.
    """
    if not layers:
        return ()
    order = positions(gm.graph)
    place = {node.name: i for node, i in order.items()}
    live = _live_counts(gm, order, skips)
    tied = _tied_counts(gm, order)
    nodes = list(gm.graph.nodes)
    first = next(order[node] for node in computations(gm.graph))
    starts, edges = [first], [0]
    for previous, layer in pairwise(layers):
        gaps = range(place[layer.node], place[previous.node], -1)
        gap = next((i for i in gaps if live[i] == 1 and not tied[i]), None)
        if gap is not None:
            starts.append(gap)
            edges.append(layer.index)
    ends = [*edges[1:], len(layers)]
    groups = [range(a, b) for a, b in zip(edges, ends, strict=True)]
    names = _names([[layers[i].path for i in group] for group in groups])
    return tuple(
        Block(name, tuple(group), nodes[start].name)
        for name, group, start in zip(names, groups, starts, strict=True)
    )


def _live_counts(
    gm: fx.GraphModule, order: dict[fx.Node, int], skips: Sequence[SkipEdge]
) -> list[int]:
    """Return, for each position i, how many values are defined before i and used at or after."""
    main = _ancestors_of_main_output(gm, order)
    dropped = _long_range_uses(gm, skips)
    change = [0] * (len(order) + 1)
    for node in computations(gm.graph):
        if node not in main or is_plain(node):
            continue
        uses = [order[user] for user in node.users if user in main and (node, user) not in dropped]
        if uses:
            change[order[node] + 1] += 1
            change[max(uses) + 1] -= 1
    return list(accumulate(change))


def _tied_counts(gm: fx.GraphModule, order: dict[fx.Node, int]) -> list[int]:
    """Return, for each position i, how many parameters are used both before i and after."""
    spans: dict[int, tuple[int, int]] = {}
    for node, _, parameter in parameter_uses(gm):  # in execution order
        first, _ = spans.get(id(parameter), (order[node], 0))
        spans[id(parameter)] = (first, order[node])
    change = [0] * (len(order) + 1)
    for first, last in spans.values():
        change[first + 1] += 1
        change[last + 1] -= 1
    return list(accumulate(change))


def _ancestors_of_main_output(gm: fx.GraphModule, order: dict[fx.Node, int]) -> set[fx.Node]:
    """Return the nodes that the deepest output depends on, with the output node."""
    output = gm.graph.output_node()
    results = output.all_input_nodes
    if len(results) == 1 and isinstance(results[0].target, type):  # a named tuple is made
        output = results[0]
        results = output.all_input_nodes
    best: set[fx.Node] = set()
    for result in results:
        if result in best:
            continue
        seen, stack = set(), [result]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack.extend(node.all_input_nodes)
        if len(seen) > len(best):
            best = seen
    return best | {output}


def _long_range_uses(gm: fx.GraphModule, skips: Sequence[SkipEdge]) -> set[tuple[fx.Node, fx.Node]]:
    """Return the (value, user) pairs that make up the long-range skip edges."""
    named = {node.name: node for node in gm.graph.nodes}
    dropped = set()
    for edge in skips:
        if not edge.long_range:
            continue
        user, value = named[edge.target], named[edge.operand]
        dropped.add((value, user))
        while not edge.projection and value.name != edge.source:
            user, value = value, next(n for n in value.all_input_nodes if not is_plain(n))
            dropped.add((value, user))
    return dropped


def _names(groups: list[list[str]]) -> list[str]:
    """Name each block by the module path that its layers share and no other block has."""
    names: list[str] = []
    for paths in groups:
        if len(paths) == 1:
            names.append(paths[0])
            continue
        parts = [path.split(".") for path in paths]
        shared = []
        for step in zip(*parts, strict=False):
            if len(set(step)) > 1:
                break
            shared.append(step[0])
        names.append(".".join(shared) or paths[0])
    repeated = Counter(names)
    names = [
        paths[0] if repeated[name] > 1 else name for name, paths in zip(names, groups, strict=True)
    ]
    repeated = Counter(names)  # a layer called twice starts two blocks
    return [name if repeated[name] == 1 else f"{name}@{i}" for i, name in enumerate(names)]
