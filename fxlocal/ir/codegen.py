"""Generate a network's forward: its evaluation branch, and ``with`` blocks around its nodes."""

import re

import torch
from torch import fx

from ..ops.local_modules import backward
from .contexts import context_changes

__all__ = ["generate_body"]

_COUNTER = re.compile(r"# COUNTER: (\d+)")


def generate_body(graph: fx.Graph, call_of_source: str, body: list[str]) -> list[str]:
    """Add to the generated lines of a forward its evaluation branch, if any, and ``with`` blocks.

    ``torch.fx`` marks the lines of node i with a comment, ``# COUNTER: i``, and removes it later.
    """
    nodes = list(graph.nodes)
    lines = ["if not self.training:\n", f"    return {call_of_source}\n"] if call_of_source else []
    if any(_learns(node) for node in nodes):
        lines.append("self.refuse_recomputation()\n")
    changes = list(context_changes(graph))
    depth = 0
    for line in "".join(body).splitlines(keepends=True):
        if marker := _COUNTER.search(line):
            _, ended, begun = changes[int(marker.group(1))]
            depth -= ended
            for context in begun:
                lines.append("    " * depth + f"with {context.source}:\n")
                depth += 1
        lines.append("    " * depth + line if line.strip() else line)
    return lines


def _learns(node: fx.Node) -> bool:
    target = node.target
    if target is backward:
        return True
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "fxlocal"
        and target._schema.is_mutable
    )
