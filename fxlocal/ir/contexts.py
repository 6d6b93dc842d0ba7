"""The context managers that nodes run under: the model's own, and those that a rewrite adds.

They lie in ``node.meta["fxlocal_contexts"]``, outermost first. The generated code has a ``with``
block for each; `ContextInterpreter` enters them where that code would.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

from .nodes import BLOCK, CHECKPOINT

__all__ = ["ENABLE_GRAD", "NO_GRAD", "Context", "ContextInterpreter", "context_changes", "contexts"]


@dataclass(frozen=True)
class Context:
    """A context manager; frozen, as copied graphs share it.

    Attributes:
        kind: "no_grad", "enable_grad" or "autocast".
        device: type of the device that an autocast is of.
        dtype: what an autocast casts to.
        enabled: of an autocast.
    """

    kind: Literal["no_grad", "enable_grad", "autocast"]
    device: str = ""
    dtype: torch.dtype | None = None
    enabled: bool = True

    @property
    def source(self) -> str:
        """The Python expression that makes it, with ``torch`` imported."""
        if self.kind != "autocast":
            return f"torch.{self.kind}()"
        return f"torch.autocast({self.device!r}, dtype={self.dtype}, enabled={self.enabled})"

    def enter(self) -> AbstractContextManager[Any]:
        """Return a new context manager of this kind."""
        if self.kind == "autocast":
            return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled)
        return torch.no_grad() if self.kind == "no_grad" else torch.enable_grad()


NO_GRAD, ENABLE_GRAD = Context("no_grad"), Context("enable_grad")


def contexts(node: fx.Node) -> tuple[Context, ...]:
    """Return the context managers that ``node`` runs under, outermost first."""
    found: tuple[Context, ...] = node.meta.get("fxlocal_contexts", ())
    return found


def context_changes(nodes: Iterable[Any]) -> Iterator[tuple[Any, int, tuple[Context, ...]]]:
    """Yield each of all nodes of a graph with how many contexts end, and which begin, before it.

    Fetching an attribute depends on no context, so it ends none. Where a checkpointed stage, or a
    block that may be left out, begins or ends, all do.
    """
    opened: tuple[Context, ...] = ()
    place: tuple[Any, Any] = None, None
    for node in nodes:
        before, place = place, (node.meta.get(CHECKPOINT), node.meta.get(BLOCK))
        beyond = place != before
        wanted = contexts(node)
        if node.op == "get_attr":
            wanted = () if beyond else opened
        shared = 0
        while not beyond and opened[shared : shared + 1] == wanted[shared : shared + 1] != ():
            shared += 1
        yield node, len(opened) - shared, wanted[shared:]
        opened = wanted


class ContextInterpreter(fx.Interpreter):
    """Interprets a graph, each node in the contexts in which the generated code would run it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._changes = {n: (ended, begun) for n, ended, begun in context_changes(gm.graph.nodes)}
        self._opened: list[AbstractContextManager[Any]] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on ``args``."""
        try:
            return super().run(*args, **kwargs)
        finally:
            self._close(len(self._opened))

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value of one input; that of ``*args`` and ``**kwargs`` is given as one."""
        return (
            next(self.args_iter) if target[0] == "*" else super().placeholder(target, args, kwargs)
        )

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what one node takes; its lists and dicts are new ones, as those in code are."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _mutable(args), {name: _mutable(value) for name, value in kwargs.items()}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node in its contexts."""
        ended, begun = self._changes[n]
        self._close(ended)
        for context in begun:
            self._opened.append(context.enter())
            self._opened[-1].__enter__()
        return super().run_node(n)

    def _close(self, count: int) -> None:
        for _ in range(count):
            self._opened.pop().__exit__(None, None, None)


def _mutable(value: Any) -> Any:
    """Return ``value`` with lists and dicts in place of those that `torch.fx` keeps immutable."""
    if type(value) is tuple:
        return tuple(map(_mutable, value))
    if isinstance(value, immutable_list):
        return list(map(_mutable, value))
    if isinstance(value, immutable_dict):
        return {key: _mutable(part) for key, part in value.items()}
    return value
