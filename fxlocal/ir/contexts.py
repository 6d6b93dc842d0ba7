"""The context managers that nodes run under."""

from collections.abc import Iterator

from torch import fx

__all__ = ["context_changes", "contexts"]


def contexts(node: fx.Node) -> tuple[str, ...]:
    """Return the context managers that ``node`` runs under, outermost first, as source."""
    found: tuple[str, ...] = node.meta.get("fxlocal_contexts", ())
    return found


def context_changes(graph: fx.Graph) -> Iterator[tuple[fx.Node, int, tuple[str, ...]]]:
    """Yield each node with how many contexts end, and which begin, before it.

    Fetching an attribute depends on no context, so it ends none.
    """
    opened: tuple[str, ...] = ()
    for node in graph.nodes:
        wanted = opened if node.op == "get_attr" else contexts(node)
        shared = 0
        while opened[shared : shared + 1] == wanted[shared : shared + 1] != ():
            shared += 1
        yield node, len(opened) - shared, wanted[shared:]
        opened = wanted
