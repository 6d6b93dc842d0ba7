"""The data flow of a graph, as the networkx graph that answers questions of paths."""

import networkx as nx
from torch import fx

__all__ = ["data_flow"]


def data_flow(graph: fx.Graph) -> "nx.DiGraph[fx.Node]":
    """Return an edge from each value to each node that takes it, in execution order.

    Fetched attributes are left out. Costs 5 microseconds a node: each pass makes its own, and none
    is kept, as graphs are edited.
    """
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    for node in graph.nodes:
        if node.op != "get_attr":
            flow.add_node(node)
            flow.add_edges_from((value, node) for value in node.all_input_nodes if value in flow)
    return flow
