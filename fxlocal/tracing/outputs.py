"""Objects that hold tensors, such as outputs with names: a graph makes them by calling their class.

    return ImageOutput(logits=x)   ->   %image_output = call_function ImageOutput(logits=%x)

A dataclass is made of its fields, a dict of its items, and a class that is registered in torch's
pytrees of what its registration takes apart. Another class of plain Python, such as a cache of keys
and values, is made of its attributes, as copying makes it. An object of which that makes another
one is refused.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..ops.values import is_plain

__all__ = ["Call", "Output", "call_of"]

_SEQUENCES = (tuple, list, deque, slice, range)
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_LITERALS = (type(None), bool, int, float, complex, str, torch.dtype)
_CONSTANTS = (*_LITERALS, torch.device, Enum, type)  # what an attribute may be besides


@dataclass(frozen=True)
class Call:
    """What makes an object: a callable and what it takes."""

    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class _Unflatten:
    """Makes an object of a registered class from its parts."""

    def __init__(self, kind: type, context: Any) -> None:
        self.kind, self.context = kind, context
        self.__name__, self.__module__ = kind.__name__, kind.__module__  # by which it is printed

    def __call__(self, *parts: Any) -> Any:
        return pytree.SUPPORTED_NODES[self.kind].unflatten_fn(list(parts), self.context)


class _Plain:
    """Makes an object of a plain class from its attributes, without calling ``__init__``."""

    def __init__(self, kind: type, names: list[str], constants: Mapping[str, Any]) -> None:
        self.kind, self.names, self.constants = kind, names, constants
        self.__name__, self.__module__ = kind.__name__, kind.__module__  # by which it is printed

    def __call__(self, **attributes: Any) -> Any:
        made: Any = object.__new__(self.kind)
        for name in self.names:
            held = self.constants if name in self.constants else attributes
            object.__setattr__(made, name, held[name])
        return made


class _SetLater:
    """Makes a dataclass that is a dict, and sets some of its fields then, in their order."""

    def __init__(self, kind: type, later: list[str]) -> None:
        self.kind, self.later = kind, later
        self.__name__, self.__module__ = kind.__name__, kind.__module__  # by which it is printed

    def __call__(self, **parts: Any) -> Any:
        made = self.kind(**{name: parts[name] for name in parts if name not in self.later})
        for name in self.later:
            setattr(made, name, parts[name])
        return made


def call_of(value: Any) -> Call | None:
    """Return the call that makes an object like ``value``; None for a plain container or a leaf.

    Raises:
        CaptureError: if its class makes another one of its parts.
    """
    kind: Any = type(value)
    if kind in (dict, defaultdict) or isinstance(value, (fx.Node, fx.Proxy)):
        return None
    if hasattr(kind, "__dataclass_fields__"):
        told = ((f, getattr(value, f.name)) for f in fields(value) if f.init)
        kwargs = {f.name: part for f, part in told if part is not None or f.default is not None}
        call = Call(kind, (), kwargs)
        if (
            isinstance(value, dict)
            and (later := _set_later(value, kwargs))
            and _others(value, call)
        ):
            call = Call(_SetLater(kind, later), (), kwargs)
    elif isinstance(value, dict):
        call = Call(kind, (dict(value),))
    elif kind in pytree.SUPPORTED_NODES and not isinstance(value, _SEQUENCES):
        parts, context = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
        return Call(_Unflatten(kind, context), tuple(parts))
    elif hasattr(value, "__dict__") and is_plain(kind):
        constants = {n: v for n, v in vars(value).items() if isinstance(v, _CONSTANTS)}
        held = {n: v for n, v in vars(value).items() if n not in constants}
        call = Call(_Plain(kind, list(vars(value)), constants), (), held)
    else:
        return None
    if others := _others(value, call):
        raise CaptureError(_makes_another(value, others))
    return call


def _set_later(value: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Return the fields that were set when it was made: no items, or behind those of later ones."""
    place = {name: i for i, name in enumerate(names)}
    items = [name for name in value if name in place]
    first = next((i for i, (a, b) in enumerate(pairwise(items), 1) if place[a] > place[b]), None)
    return (items[first:] if first else []) + [name for name in place if name not in value]


def _others(value: Any, call: Call) -> list[str]:
    """Return what is another in an object than in the one that ``call`` makes.

    Raises:
        CaptureError: if its class makes none.
    """
    try:
        made, found = _parts(call.target(*call.args, **call.kwargs)), _parts(value)
    except Exception as error:
        raise CaptureError(_makes_another(value)) from error
    if list(made.items()) == list(found.items()):
        return []
    return [n for n in {**found, **made} if made.get(n) != found.get(n)] or ["order of its items"]


def _parts(value: Any) -> dict[str, Any]:
    """Return what tells an object from another: what its fields and items are, and its names."""
    told = [f.name for f in fields(value) if f.init] if is_dataclass(value) else []
    items = value.items() if isinstance(value, dict) else ()
    return {
        **{f"field {name!r}": id(getattr(value, name)) for name in told},
        **{f"item {key!r}": id(part) for key, part in items},
        **{f"attribute {name!r}": True for name in sorted(getattr(value, "__dict__", ()))},
    }


def _makes_another(value: Any, others: Iterable[str] = ()) -> str:
    kind, told = type(value).__name__, ", ".join(others)
    return (
        f"the forward makes a {kind} that {kind}(...) does not make of its fields again"
        f"{told and f' (another {told})'}: let it hold nothing besides, or return tensors in "
        "tuples, lists or dicts"
    )


@dataclass(frozen=True)
class _Leaf:
    index: int


class Output:
    """What a forward returned, taken apart while it was traced and put together in a graph."""

    def __init__(self) -> None:
        self._template: Any = None

    def take_apart(self, value: Any) -> list[Any]:
        """Return the tensors and sizes in what a forward returned; or a CaptureError."""
        leaves: list[Any] = []
        self._template = _template(value, leaves)
        return leaves

    def put_together(self, graph: fx.Graph, leaves: list[Any]) -> Any:
        """Return what the graph returns, with nodes for what `take_apart` returned."""

        def build(part: Any) -> Any:
            if isinstance(part, _Leaf):
                return leaves[part.index]
            if isinstance(part, Call):
                kwargs = {name: build(value) for name, value in part.kwargs.items()}
                return graph.call_function(part.target, tuple(map(build, part.args)), kwargs)
            if isinstance(part, dict):
                return {name: build(value) for name, value in part.items()}
            return type(part)(list(map(build, part))) if isinstance(part, (tuple, list)) else part

        return build(self._template)


def _template(value: Any, leaves: list[Any]) -> Any:
    def all_of(parts: Any) -> Iterator[Any]:
        return (_template(part, leaves) for part in parts)

    if isinstance(value, (Tensor, *_SYMBOLS)):
        leaves.append(value)
        return _Leaf(len(leaves) - 1)
    if call := call_of(value):
        kwargs = dict(zip(call.kwargs, all_of(call.kwargs.values()), strict=True))
        return Call(call.target, tuple(all_of(call.args)), kwargs)
    if isinstance(value, torch.Size):
        return Call(torch.Size, (list(all_of(value)),))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return Call(type(value), tuple(all_of(value)))
    if isinstance(value, (tuple, list)):
        return type(value)(list(all_of(value)))
    if isinstance(value, dict):
        return dict(zip(value, all_of(value.values()), strict=True))
    if isinstance(value, _LITERALS):
        return value
    raise CaptureError(
        f"the model returns a {type(value).__name__}: return tensors in tuples, lists, dicts or "
        "dataclasses, or turn it off, as a cache by use_cache=False"
    )
