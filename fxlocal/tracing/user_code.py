"""The user's own code: the lines of it, which messages name, and what a forward may run of it."""

import linecache
import sys
import sysconfig
import traceback
from collections import ChainMap
from collections.abc import Iterator, Mapping
from functools import cache, partial
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Line",
    "attributes_read",
    "codes",
    "current_line",
    "is_of_torch",
    "names_in",
    "reached_by",
    "reached_from",
    "user_line",
]

_OURS = __file__.rpartition("/")[0] + "/"
_TORCH = torch.__file__.rpartition("/")[0] + "/"
_STDLIB = sysconfig.get_path("stdlib") + "/"
_PLAIN = {bool, int, float, str, NoneType}
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


def user_line(error: BaseException) -> Line:
    """Return the last line of the user's own code that ``error`` passed."""
    stack = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in stack if _is_of_user(frame.filename)] or list(stack)
    return Line((own[-1].filename, own[-1].lineno or 0))


def reached_by(model: nn.Module) -> Iterator[FunctionType]:
    """Yield the user's functions that the forward of ``model`` may run.

    By name: the methods of its modules, the globals that these name, and what they close over.
    """
    modules = list(model.modules())
    for cls in dict.fromkeys(map(type, modules)):
        yield from reached_from(getattr(cls, "forward", None), cls)
    for value in (v for m in modules for v in vars(m).values() if type(v) in _CALLED):
        yield from reached_from(value, type(model))


def reached_from(forward: Any, cls: type[nn.Module]) -> tuple[FunctionType, ...]:
    """Return the user's functions that ``forward`` may run, of a module of class ``cls``."""
    return _reached((forward, cls))


@cache
def _reached(start: tuple[Any, type[nn.Module]]) -> tuple[FunctionType, ...]:
    forward, cls = start
    found, seen = [forward], dict[FunctionType, None]()
    while found:
        function = _plain_function(found.pop())
        if function is not None and function not in seen:
            seen[function] = None
            names = names_in(function) - {"_log_api_usage_once"}  # torchvision's
            found += _called(function, cls, names)
    return tuple(seen)


def _plain_function(value: Any) -> FunctionType | None:
    """Return the user's function in ``value``; None for one of torch's or Python's, or none."""
    while isinstance(value, (partial, property)):
        value = value.func if isinstance(value, partial) else value.fget
    value = getattr(value, "__func__", value)
    if not isinstance(value, FunctionType):
        return None
    file = value.__code__.co_filename
    of_python = file.startswith(_STDLIB) and "-packages" not in file
    return None if of_python or is_of_torch(file) else value


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yield ``code`` and that of the functions that it makes."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


@cache
def names_in(function: FunctionType) -> frozenset[str]:
    """Return the names of globals, methods and attributes that the code of ``function`` has."""
    return frozenset(name for code in codes(function.__code__) for name in code.co_names)


def attributes_read(module: nn.Module) -> Iterator[str]:
    """Yield the names of numbers, flags and texts that the forward of ``module`` may read.

    Its own, those of its class, and with a dot those of objects that it has, such as a config.
    """
    kind: Any = type(module)
    names = _names_read(kind)
    held = ChainMap(vars(module), *(dict(vars(c)) for c in kind.__mro__ if c is not nn.Module))
    for name in names & held.keys():
        value = held[name]
        if type(value) in _PLAIN:
            yield name
        elif not isinstance(value, (type, Tensor)):
            inside = getattr(value, "__dict__", {})
            yield from (f"{name}.{n}" for n in names & inside.keys() if type(inside[n]) in _PLAIN)


@cache
def _names_read(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names in the code that a forward of this class may run; all, of torch's."""
    functions = list(reached_from(cls.forward, cls))
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        own = [value for value in vars(base).values() if isinstance(value, FunctionType)]
        functions += [f for f in own if is_of_torch(f.__code__.co_filename)]
    return frozenset(name for function in functions for name in names_in(function))


def _called(function: FunctionType, cls: type[nn.Module], names: frozenset[str]) -> Iterator[Any]:
    """Yield what a function may call: globals, what it closes over, and methods of its class."""
    scope = function.__globals__
    modules = [v for v in map(scope.get, names) if isinstance(v, ModuleType)]
    scopes: list[Mapping[str, Any]] = [scope, *map(vars, modules)]
    scopes += [vars(c) for c in cls.__mro__[: cls.__mro__.index(nn.Module)]]
    for place in scopes:
        yield from (place[name] for name in names if name in place)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield getattr(function, "__wrapped__", None)
