"""What a network is to its source: the same in evaluation mode, and made of its modules."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from .additions import UnsavedHeads

__all__ = ["Structure", "call_graph", "call_source", "train_mode"]


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


class Structure:
    """The modules of ``source`` as its graph was made, but for what lies inside its leaves.

    Each call of a network reads it: 0.3 microseconds a module, flat lists and no walk.

    Args:
        source: the model.
        leaves: paths of the modules that the graph calls whole.
    """

    def __init__(self, source: nn.Module, leaves: Collection[str]) -> None:
        inside = tuple(f"{leaf}." for leaf in leaves)
        named = [(p, m) for p, m in source.named_modules() if not p.startswith(inside)]
        self._children = [
            (path, module._modules, dict(module._modules))
            for path, module in named
            if path not in leaves
        ]
        owners = [(path, module._parameters) for path, module in named if module._parameters]
        self._owners = [own for _, own in owners]
        self._named = [(path, name) for path, own in owners for name in own]
        self._names = [name for _, name in self._named]

    def read(self) -> list[bool]:
        """Return which parameters require a gradient.

        Raises:
            RuntimeError: if a module is another one, or has other parameters.
        """
        for path, now, then in self._children:
            if now == then:
                continue
            names = [name for name in (*then, *now) if now.get(name) != then.get(name)]
            if names and not isinstance(now.get(names[0]), UnsavedHeads):
                raise RuntimeError(_changed(".".join(filter(None, (path, *names[:1])))))
        if (names := [name for own in self._owners for name in own]) != self._names:
            pairs = zip_longest(self._named, names, fillvalue=("", ""))
            raise RuntimeError(_changed(next(path for (path, name), n in pairs if name != n)))
        return [p is not None and p.requires_grad for own in self._owners for p in own.values()]

    @property
    def is_stood_in_for(self) -> bool:
        """Whether plain tensors are in the place of parameters, as in a functional call."""
        return any(type(p) is Tensor for own in self._owners for p in own.values())


def _changed(path: str) -> str:
    return (
        f"{path!r} is another module, or has other parameters, than when the graph was made (a new "
        "head, converted norms, pruning, a parametrisation): the graph would train what was there "
        "before. Transform the model again, or make a new Driver"
    )
