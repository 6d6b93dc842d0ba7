"""One example batch, and which inputs a graph has for it.

An argument without example is fixed at its default in the graph. It stays an optional input, which
is marked as `FIXED` and checked: whoever passes another value is told.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from inspect import Parameter
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..ir.nodes import BY_NAME, EXTRA, FIXED
from ..ops.values import NOT_GIVEN, is_plain, leaves_of, require_given, require_value

__all__ = ["Argument", "Examples"]

_LITERALS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Argument:
    """An input that a graph is to have.

    Attributes:
        name: of the argument; of those that ``*args`` takes its name and a number.
        default: one value, if the input is optional.
        fixed: whether no example was given, so that it is fixed at the default.
        extra: whether ``*args`` takes it.
        by_name: whether the example gives it so; None without.
        value: its example, or the default.
    """

    name: str
    default: tuple[Any, ...] = ()
    fixed: bool = False
    extra: bool = False
    by_name: bool | None = None
    value: Any = None

    @property
    def check(self) -> tuple[Any, ...] | None:
        """What checks the input in the graph: a function and what it takes besides the input."""
        if self.fixed or self.value is None:
            return require_value, self.value, self.name
        if self.default and self.default[0] in (None, NOT_GIVEN):
            return require_given, self.name
        return None

    @property
    def meta(self) -> dict[str, bool]:
        """What its node is marked with."""
        marks = (FIXED, self.fixed or None), (EXTRA, self.extra or None), (BY_NAME, self.by_name)
        return {name: mark for name, mark in marks if mark is not None}


class Examples:
    """One example batch, bound to the arguments of a model's forward; or none.

    Attributes:
        args: what was given by position.
        kwargs: what was given by name, in the order of the forward's arguments.

    Raises:
        TypeError: if the forward does not take them.
    """

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._signature = signature = inspect.signature(model.forward)
        try:
            bound = (signature.bind if args or kwargs else signature.bind_partial)(*args, **kwargs)
        except TypeError as error:
            more = ". What a decorator of it takes besides is no input of a graph: give its own"
            more = more if hasattr(model.forward, "__wrapped__") else ""
            raise TypeError(
                f"{type(model).__name__} got {len(args) + len(kwargs)} inputs for a forward"
                f"{signature}: {error}{more}"
            ) from None
        named = {name: value for name, value in bound.arguments.items() if name in kwargs}
        self.args, self.kwargs, self.by_argument = args, {**named, **kwargs}, bound.arguments

    def __bool__(self) -> bool:
        return bool(self.args or self.kwargs)

    def map(self, function: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return args and kwargs with ``function`` of each tensor in its place."""

        def mapped(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return function(leaf)
            kind: Any = type(leaf)
            if hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module) and is_plain(kind):
                leaf = copy.copy(leaf)
                vars(leaf).update(pytree.tree_map(mapped, vars(leaf)))
            return leaf

        args, kwargs = pytree.tree_map(mapped, (self.args, self.kwargs))
        return args, kwargs

    @property
    def hold_none(self) -> bool:
        """Whether a container among them holds None, where a trace would have a value."""
        values = [v for v in (*self.args, *self.kwargs.values()) if v is not None]
        return any(leaf is None for leaf in leaves_of(values))

    def without_values(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return args and kwargs that only tell what was given: Ellipsis for each, or None."""
        kwargs = {name: value if value is None else ... for name, value in self.kwargs.items()}
        return tuple(value if value is None else ... for value in self.args), kwargs

    @property
    def defaults(self) -> dict[str, Any]:
        """The arguments that are fixed at their defaults: those without example.

        Traced as inputs, they would take the branch of a value that is given, ``mask is not None``.
        """
        parameters = self._signature.parameters.values()
        return {
            p.name: p.default
            for p in parameters
            if p.name not in self.by_argument and p.default is not Parameter.empty
        }

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what has the places of the examples, by the names of inputs."""
        return {**dict(zip(self._names(), args, strict=True)), **kwargs}

    def call(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return args and kwargs with ``values``, by the names of inputs, in place of examples."""
        args = tuple(values[name] for name in self._names())
        return args, {name: values[name] for name in self.kwargs}

    def arguments(self) -> Iterator[Argument]:
        """Yield the inputs of a graph that was captured with these, in the model's own order.

        A default that has no literal stays where it is: its argument is no input.
        """
        values = self.named(self.args, self.kwargs)
        optional = False
        for parameter in self._signature.parameters.values():
            name, kind = parameter.name, parameter.kind
            if kind is Parameter.VAR_POSITIONAL:
                for extra in self._names()[len(self._by_position) :]:
                    behind: tuple[Any, ...] = (NOT_GIVEN,) if optional else ()
                    yield Argument(extra, behind, extra=True, value=values[extra])
            elif kind is Parameter.VAR_KEYWORD:
                for extra in self.by_argument.get(name, ()):
                    yield Argument(extra, (NOT_GIVEN,), value=values[extra])
            else:
                has_none = parameter.default is Parameter.empty
                default: tuple[Any, ...] = () if has_none else (parameter.default,)
                given = name in values
                if not _has_literal(default):
                    if not given:
                        continue
                    default = (NOT_GIVEN,)
                if optional and not default:  # Python takes none without default behind one
                    default = (NOT_GIVEN,)
                optional = optional or bool(default)
                value = values[name] if given else default[0]
                by_name = name in self.kwargs if given else None
                yield Argument(name, default, fixed=not given, by_name=by_name, value=value)

    @property
    def _by_position(self) -> list[str]:
        parameters = self._signature.parameters.values()
        return [p.name for p in parameters if p.kind in _BY_POSITION]

    def _names(self) -> list[str]:
        """Return the names of the inputs that are taken by position."""
        names = self._by_position[: len(self.args)]
        variable = [
            p.name for p in self._signature.parameters.values() if p.kind is p.VAR_POSITIONAL
        ]
        return names + [f"{variable[0]}_{i}" for i in range(len(self.args) - len(names))]


def _has_literal(value: Any) -> bool:
    """Tell whether generated code can say ``value``."""
    return all(
        type(leaf) in _LITERALS or isinstance(leaf, Enum) for leaf in pytree.tree_leaves(value)
    )
