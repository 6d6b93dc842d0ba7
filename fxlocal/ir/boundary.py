"""Where a graph can be cut: its data flow, the boundary before a node, the values that cross it."""

from itertools import takewhile

import networkx as nx
from torch import fx, nn

from ..ops.checkpoint import State
from .nodes import CHECKPOINT, STAGE, computations, fetched, module_of, node_named, parameter_uses
from .operators import (
    DRAWS,
    DROPOUTS,
    UNREPEATABLE,
    carries_gradient,
    is_inplace,
    is_plain,
    operator_name,
    origins,
)

__all__ = [
    "crossing_values",
    "data_flow",
    "first_of_stage",
    "fixed_values",
    "learned_values",
    "nodes_before",
    "state_of_stage",
]

_RANDOM = DRAWS | DROPOUTS | UNREPEATABLE


def data_flow(gm: fx.GraphModule) -> "nx.DiGraph[fx.Node]":
    """Return an edge from each value to each node that takes it, in execution order.

    Fetched attributes and `fixed_values` are left out. Costs 8 microseconds a node: each pass makes
    its own, and none is kept, as graphs are edited.
    """
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    fixed = fixed_values(gm)
    for node in gm.graph.nodes:
        if node.op != "get_attr" and node not in fixed:
            flow.add_node(node)
            flow.add_edges_from((value, node) for value in node.all_input_nodes if value in flow)
    return flow


def fixed_values(gm: fx.GraphModule) -> set[fx.Node]:
    """Return what is made of buffers, constants and sizes alone, such as a table of positions.

    No gradient flows there, so that it may cross a boundary as a fetched attribute does. What is
    drawn at random does not count, nor what something else is written into.
    """
    made: nx.Graph[fx.Node] = nx.Graph()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            found = not isinstance(fetched(gm, node), nn.Parameter)
        else:
            found = node.op in ("call_function", "call_method") and not is_plain(node)
            found = found and all(v in made or is_plain(v) for v in node.all_input_nodes)
            found = found and operator_name(node) not in _RANDOM
        if found:
            made.add_node(node)
            made.add_edges_from((value, node) for value in node.all_input_nodes if value in made)
    if not made:
        return set()
    writers = (n for n in computations(gm.graph) if n not in made)
    writers = (n for n in writers if is_inplace(gm, n) or n.kwargs.get("out") is not None)
    written = {value for node in writers for value in node.all_input_nodes}
    return set().union(*(c for c in nx.connected_components(made) if written.isdisjoint(c)))


def learned_values(gm: fx.GraphModule) -> set[fx.Node]:
    """Return what a parameter, frozen or not, goes into and a gradient may flow back through.

    All else may cross a boundary unnoticed: masks, positions, labels and what is checked of them,
    whatever is made of inputs and buffers alone.
    """
    found = {node for node, _, _ in parameter_uses(gm)}
    for node in computations(gm.graph):
        if node in found or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
            if is_inplace(gm, node):  # the graph may go on to use what it was written into
                written = origins(gm, node.all_input_nodes[0])
                found.update(value for value in written if value.op.startswith("call"))
            elif not carries_gradient(node):
                found.discard(node)
    return found


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


def state_of_stage(gm: fx.GraphModule, graph: fx.Graph, stage: int) -> State:
    """Return the norms that a checkpointed stage of ``graph`` calls, and all other buffers.

    Those are the ones that it may read or move.
    """
    nodes = [n for n in graph.nodes if n.meta.get(CHECKPOINT) == stage]
    called = [m for node in nodes if (m := module_of(gm, node)) is not None]
    modules = dict.fromkeys(inner for module in called for inner in module.modules())
    norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._NormBase)]
    own = [b for m in modules if m not in norms for b in m.buffers(recurse=False)]
    named = dict(gm.named_buffers(remove_duplicate=False))
    taken = dict.fromkeys(value for node in nodes for value in node.all_input_nodes)
    own += [named[v.target] for v in taken if v.op == "get_attr" and v.target in named]
    return norms, list({id(buffer): buffer for buffer in own}.values())
