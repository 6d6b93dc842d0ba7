"""Trace ``x += y`` as what it is: a change in place, which every other name of the tensor sees."""

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import fx

from ..ir.operators import AUGMENTED, is_plain

__all__ = ["augmented_path", "in_place_assignments"]

_OPERATORS = {getattr(operator, name) for name in AUGMENTED}


@contextmanager
def in_place_assignments() -> Iterator[None]:
    """Let a proxy record augmented assignments, for which `torch.fx` makes new values."""
    with ExitStack() as stack:
        for name in AUGMENTED:
            method = patch.object(fx.Proxy, f"__{name}__", _recorder(name), create=True)
            stack.enter_context(method)
        yield


def augmented_path(value: Any) -> str | None:
    """Return the path of the tensor that ``value`` is, after augmented assignments to it."""
    node: Any = value.node if isinstance(value, fx.Proxy) else None
    while node is not None and node.target in _OPERATORS:
        node = node.args[0]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _recorder(name: str) -> Callable[[fx.Proxy, Any], Any]:
    def record(self: fx.Proxy, other: Any) -> Any:
        if is_plain(self.node):  # a number: its other names keep the old one
            return NotImplemented
        target = getattr(operator, name)
        return self.tracer.create_proxy("call_function", target, (self, other), {}, name=name[1:])

    return record
