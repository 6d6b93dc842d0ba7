"""What a network is in evaluation mode: one call of its source; and how to be out of that mode."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

__all__ = ["call_graph", "call_source", "train_mode"]


def call_source(source: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return what ``source`` computes."""
    if not torch.compiler.is_compiling() and is_fx_symbolic_tracing():
        return source.forward(*args, **kwargs)  # a tracer knows no path of it, which is no child
    return source(*args, **kwargs)


def call_graph(graph: fx.Graph, by_name: Collection[str]) -> fx.Graph:
    """Return a graph with the inputs of ``graph`` that calls ``_source`` with them.

    Args:
        graph: a graph of training.
        by_name: the inputs that the source takes by keyword only.
    """
    called = fx.Graph()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    copies = [called.node_copy(node) for node in inputs if "fxlocal" not in node.meta]  # no target
    args = [node for node in copies if node.target not in by_name]
    kwargs: dict[str, Any] = {str(node.target): node for node in copies if node.target in by_name}
    source = called.create_node("get_attr", "_source")
    called.output(called.call_function(call_source, (source, *args), kwargs))
    called.owning_module = graph.owning_module
    return called


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in train mode, unless its root already is; restore each module's flag."""
    if model.training:
        yield
        return
    flags = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
