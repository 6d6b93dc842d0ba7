"""Where a graph can be cut: the boundary before a node, and the values that cross it."""

from itertools import takewhile

from torch import fx

from .nodes import STAGE, computations, node_named
from .operators import is_plain

__all__ = ["crossing_values", "first_of_stage", "nodes_before"]


def nodes_before(gm: fx.GraphModule, start: str) -> set[fx.Node]:
    """Return the nodes before the one named ``start``: those before a boundary."""
    first = node_named(gm, start)
    return set(takewhile(lambda node: node is not first, gm.graph.nodes))


def crossing_values(gm: fx.GraphModule, start: str) -> list[fx.Node]:
    """Return the values computed before the node named ``start`` and used at or after it.

    Inputs and fetched attributes are no computed values; sizes and other plain values carry no
    gradient. Skip edges over the boundary are included: they are uses like any other.
    """
    before = nodes_before(gm, start)
    return [
        node
        for node in computations(gm.graph)
        if node in before and not before.issuperset(node.users) and not is_plain(node)
    ]


def first_of_stage(gm: fx.GraphModule, stage: int) -> fx.Node:
    """Return the first node that is tagged to lie in ``stage``."""
    found: fx.Node = next(node for node in gm.graph.nodes if node.meta[STAGE] == stage)
    return found
