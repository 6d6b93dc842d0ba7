"""The user's own code: the lines of it, which messages name, and what a forward may run of it."""

import contextlib
import copy
import linecache
import sys
import sysconfig
import traceback
import warnings
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dis import get_instructions
from functools import cache, partial
from itertools import pairwise
from numbers import Number
from operator import attrgetter
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    FunctionType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.custom import codes

__all__ = [
    "Attributes",
    "Line",
    "current_line",
    "is_of_torch",
    "names_in",
    "reached_by",
    "user_line",
]

_OURS = __file__.rpartition("/")[0] + "/"
_TORCH = torch.__file__.rpartition("/")[0] + "/"
_STDLIB = sysconfig.get_path("stdlib") + "/"
_PLAIN = (Number, str, NoneType)  # numpy's numbers too
_FUNCTIONS = {FunctionType, BuiltinFunctionType}
_CONTAINERS, _MANY = {dict, list, tuple, set, frozenset}, 64
_BY_TEXT = {"getattr", "hasattr", "vars", "attrgetter"}  # what asks for an attribute so
_CALLED = {FunctionType, MethodType, partial}  # a forward set on an instance too


class Line(tuple[str, int]):
    """A file and a number in it; its text is read only where it is printed."""

    def __str__(self) -> str:
        filename, number = self
        return f"{filename}:{number}: `{linecache.getline(filename, number).strip()}`"


def is_of_torch(filename: str) -> bool:
    """Tell whether code of this file belongs to torch."""
    return filename.startswith(_TORCH)


@cache  # asked for each frame below each value
def _is_of_user(filename: str) -> bool:
    return not filename.startswith((_TORCH, _OURS, "<")) and "importlib" not in filename


def current_line() -> Line:
    """Return the line of the user's own code that is running: neither torch's nor ours."""
    innermost = sys._getframe(1)
    frame: FrameType | None = innermost
    while frame is not None and not _is_of_user(frame.f_code.co_filename):
        frame = frame.f_back
    found = frame or innermost
    return Line((found.f_code.co_filename, found.f_lineno))


def user_line(error: BaseException) -> Line | None:
    """Return the last line of the user's own code that ``error`` passed, if it passed one."""
    stack = traceback.extract_tb(error.__traceback__)
    own = [f for f in stack if _is_of_user(f.filename) and f.filename != contextlib.__file__]
    return Line((own[-1].filename, own[-1].lineno or 0)) if own else None


def reached_by(model: nn.Module) -> Iterator[FunctionType]:
    """Yield the user's functions that the forward of ``model`` may run, each once.

    By name: the methods of its modules, the globals that these name, and what they close over.
    """
    modules = list(model.modules())
    found: list[Any] = [v for m in modules for v in vars(m).values() if type(v) in _CALLED]
    for cls in dict.fromkeys(map(type, modules)):
        found += _methods(cls)
    seen = set[FunctionType]()
    while found:
        for function in _functions_in(found.pop()):
            if function not in seen:
                seen.add(function)
                yield function
                found += _named_in(function)


def _methods(cls: type[nn.Module]) -> set[FunctionType]:
    """Return the user's functions of a class, or of its bases, that its forward may run."""
    scopes = [vars(c) for c in cls.__mro__ if c not in (nn.Module, object)]
    found, seen = [getattr(cls, "forward", None)], set[FunctionType]()
    while found:
        for function in _functions_in(found.pop()):
            if function not in seen:
                seen.add(function)
                names = names_in(function.__code__)
                found += [place[name] for place in scopes for name in names & place.keys()]
    return seen


def _functions_in(value: Any) -> Iterator[FunctionType]:
    """Yield the user's function in ``value``, and those that it wraps; none of torch's."""
    while value is not None:
        if isinstance(value, (MethodType, staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, (partial, property)):
            value = value.func if isinstance(value, partial) else value.fget
        elif type(value) is FunctionType:
            file = value.__code__.co_filename
            of_python = file.startswith(_STDLIB) and "-packages" not in file
            if not of_python and not is_of_torch(file):
                yield value
            value = vars(value).get("__wrapped__")
        else:
            return


def _named_in(function: FunctionType) -> Iterator[Any]:
    """Yield what a function may call: globals, those of modules that it names, and its closure."""
    scope = function.__globals__
    names = names_in(function.__code__) - {"_log_api_usage_once"}  # torchvision's
    modules = [v for v in map(scope.get, names) if isinstance(v, ModuleType)]
    for place in (scope, *map(vars, modules)):
        yield from (place[name] for name in names & place.keys())
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not filled yet
            yield cell.cell_contents


@cache
def names_in(code: CodeType) -> frozenset[str]:
    """Return the names of globals, methods and attributes that a function's code has."""
    return frozenset(name for inner in codes(code) for name in inner.co_names)


def names_in_all(functions: Iterable[FunctionType]) -> frozenset[str]:
    """Return the names in the code of all these functions."""
    return frozenset(name for function in functions for name in names_in(function.__code__))


def _asked_for(functions: Iterable[FunctionType]) -> frozenset[str]:
    """Return the names of attributes that these functions may ask for, by a text too."""
    found = set[str]()
    for function in functions:
        names = names_in(function.__code__)
        found |= names
        if names & _BY_TEXT:
            told = (text for inner in codes(function.__code__) for text in inner.co_consts)
            found |= {text for text in told if isinstance(text, str) and text.isidentifier()}
    return frozenset(found)


@cache
def _flagged(code: CodeType) -> frozenset[str]:
    """Return the names of parts whose training flag code asks for, as of ``self.part.training``."""
    steps = [step for inner in codes(code) for step in get_instructions(inner)]
    pairs = pairwise(step.argval if step.opname == "LOAD_ATTR" else None for step in steps)
    return frozenset(name for name, flag in pairs if name and flag == "training")


class Attributes:
    """The numbers, flags and texts of a model that its forward may read, so that a graph has them.

    Those of modules and of their classes, alone or in lists and dicts, of objects that they have,
    such as a config, and buffers that are None.

    Args:
        model: the model.
        modules: those of it that its graph does not call whole, by path.
        filled: paths of attributes that its first call fills.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], filled: Collection[str]
    ) -> None:
        functions, met = list(reached_by(model)), set[int]()
        read, flagged = _asked_for(functions), {n for f in functions for n in _flagged(f.__code__)}
        self._told = set[str]()
        self._of: list[tuple[str, list[str], nn.Module, attrgetter[Any]]] = []  # by path
        for path, module in model.named_modules():
            names = list[str]()
            if path in modules:
                names = [n for n in _attributes(read, module, met) if _at(path, n) not in filled]
            if path.rpartition(".")[2] in flagged and "training" not in names:
                names.append("training")
            if names:  # the first twice, so that of one it is a tuple too
                self._of.append((path, names, module, attrgetter(*names, names[0])))
        self._values = [_kept(values(module)) for *_, module, values in self._of]

    def warn(self, *_: object) -> None:
        """Warn of those that have another value by now, once of each."""
        with suppress(Exception):  # one is gone, or a tensor
            if [values(module) for *_, module, values in self._of] == self._values:
                return
        told: list[str] = []
        for i, (path, names, module, values) in enumerate(self._of):
            now = [_value_at(module, name) for name in names]
            for name, value, found in zip(names, self._values[i], now, strict=False):
                if not _alike(value, found) and _at(path, name) not in self._told:
                    self._told.add(_at(path, name))
                    told.append(f"{_at(path, name)} (was {value!r})")
            with suppress(AttributeError):
                self._values[i] = _kept(values(module))
        if told:
            more = f" and {len(told) - 5} more" if len(told) > 5 else ""
            warnings.warn(
                f"attributes are others than when the graph was made: {', '.join(told[:5])}{more}. "
                "In training, what the forward reads of them stays as it was: transform the model "
                "again, or make a new Driver",
                stacklevel=8,
            )


def _at(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")


def _value_at(module: nn.Module, name: str) -> Any:
    try:
        return attrgetter(name)(module)
    except Exception:  # a config's may raise what it likes
        return ...


def _alike(value: Any, now: Any) -> bool:
    """Tell whether numbers or texts are equal, also where both are no number.

    What holds something else by now, such as tensors that it collects, is let alone.
    """
    if now is value or (type(value) in _CONTAINERS and not _is_plain(now)):
        return True
    return type(now) is type(value) and (now == value or (now != now and value != value))


def _is_plain(value: Any) -> bool:
    """Tell whether a value is a number, a flag or a text, or holds a few such."""
    if type(value) not in _CONTAINERS:
        return isinstance(value, _PLAIN)
    parts = (*value.keys(), *value.values()) if isinstance(value, dict) else value
    return len(parts) <= _MANY and all(map(_is_plain, parts))


def _kept(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return values that stay as they are, whatever happens to the lists and dicts among them."""
    return tuple(copy.deepcopy(v) if type(v) in _CONTAINERS else v for v in values)


def _attributes(names: frozenset[str], module: nn.Module, met: set[int]) -> Iterator[str]:
    """Yield the names of what a forward may read of a module; with a dot, of an object in it.

    Of an object that several have, such as the config of a model, only once.
    """
    kind: Any = type(module)
    own, of_torch = _own_names(kind)
    names = names - {"training"} | (own & {"training"}) | of_torch
    held = ChainMap(
        {name: buffer for name, buffer in module._buffers.items() if buffer is None},
        vars(module),
        *(dict(vars(cls)) for cls in kind.__mro__ if cls is not nn.Module),
    )
    for name in sorted(names & held.keys()):
        value = held[name]
        if _is_plain(value) or (type(value) in _FUNCTIONS and name in vars(module)):
            yield name
        elif not isinstance(value, (type, Tensor)) and id(value) not in met:
            met.add(id(value))
            inside = getattr(value, "__dict__", {})
            known = (f"{name}.{n}" for n in sorted(names & inside.keys()) if _is_plain(inside[n]))
            yield from (path for path in known if _value_at(module, path) is not ...)


@cache
def _own_names(cls: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names in the code of a class and its bases, and in that of torch's among them."""
    bases = [base for base in cls.__mro__ if base not in (nn.Module, object)]
    own = [f for base in bases for f in vars(base).values() if isinstance(f, FunctionType)]
    of_torch = [function for function in own if is_of_torch(function.__code__.co_filename)]
    return names_in_all(own), names_in_all(of_torch)
