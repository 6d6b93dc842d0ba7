"""What a forward assigns: refused by line, as a graph computes values and assigns nothing."""

import pickle
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from copy import copy
from operator import is_
from types import CellType, FunctionType, ModuleType, NoneType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, jit, nn

from ..errors import CaptureError
from .augmented import augmented_path
from .user_code import Line, current_line, is_of_torch, names_in, reached_by

__all__ = ["AssignedError", "Snapshot", "assigns", "unchanged"]

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_EVERY_MODULE = frozenset(vars(nn.Module()))
# What compares by its value, and cannot change.
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_HOLDING = (list, dict, set, deque)
_UNHELD = frozenset({*_PLAIN, NoneType, FunctionType, Tensor, nn.Parameter})  # most by far
# What changes when it is asked for the next, and shows nothing of it.
_MOVING = (random.Random, Iterator, bytearray)
_NOTHING = object()
_LARGE = 1000  # entries of a container that is a table, and counts nothing


class AssignedError(CaptureError):
    """The forward assigns what the graph would not."""


def assigns(what: str, where: object = "") -> str:
    """Return the message that refuses a forward that assigns ``what``."""
    return (
        f"the model's forward assigns {what}{f' at {where}' if where else ''}, which the graph "
        "would not: return the value instead, or keep it in a buffer that is changed in place "
        "(copy_, add_). If it is filled by the first call alone, run the model once before"
    )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[tuple[dict[nn.Module, Line], set[str]]]:
    """Restore what the forward sets on the model's modules while it is traced.

    Yields:
        the modules that are in another mode by now than at first, with the lines that switch them;
        and the names of what torch's own code sets, as its hooks that prune or normalise a weight.

    Raises:
        AssignedError: if that is another value than was there; at the line, where it has one.
    """
    before = Snapshot(model)
    paths = {id(vars(module)): path for path, module, *_ in before.modules}
    refused: list[AssignedError] = []
    switched: dict[nn.Module, Line] = {}
    assign = nn.Module.__setattr__

    def assigning(module: nn.Module, name: str, value: Any) -> None:
        path = paths.get(id(vars(module)))
        if path is not None and not same(_current(module, name), value):
            named = f"{path}.{name}".lstrip(".")
            if augmented_path(value) == named:  # the tensor that is there
                return
            if name == "training":
                if switched.pop(module, None) is None:  # else it is back
                    switched[module] = current_line()
                return assign(module, name, value)
            if not is_of_torch(sys._getframe(1).f_code.co_filename):
                refused.append(AssignedError(assigns(repr(named), current_line())))
                raise refused[-1]
            before.by_torch.add(named)
        assign(module, name, value)

    try:
        with patch.object(nn.Module, "__setattr__", assigning):
            yield switched, before.by_torch
        changed = [*map(repr, before.changed()), *(f"hooks of {p!r}" for p in before.hooked())]
        if changed:
            refused.append(AssignedError(assigns(", ".join(changed))))
        if counted := before.outside.changed():
            told = assigns(", ".join(map(repr, counted)) + ", outside of the model")
            raise CaptureError(f"{told}. What is for a log alone, count outside of the forward")
    finally:
        before.restore()
        if refused:  # whatever became of it in the forward, or in torch.export
            raise refused[0]


def _current(module: nn.Module, name: str) -> Any:
    for registry in _REGISTRIES:
        if name in vars(module).get(registry, ()):
            return vars(module)[registry][name]
    return vars(module).get(name, _NOTHING)


def same(then: Any, now: Any) -> bool:
    """Tell whether two values are one object, equal numbers or text, or containers of such."""
    if then is now:
        return True
    if type(then) is not type(now):
        return False
    if isinstance(then, (list, tuple, deque)):
        return len(then) == len(now) and all(map(same, then, now))
    if isinstance(then, dict):
        return then.keys() == now.keys() and all(same(then[key], now[key]) for key in then)
    return isinstance(then, (*_PLAIN, set)) and bool(then == now)


class Snapshot:
    """The attributes of a model's modules, and what their containers hold, hooks included."""

    def __init__(self, model: nn.Module) -> None:
        self.by_torch: set[str] = set()  # names that torch assigned
        self.modules = [
            (path, module, dict(vars(module)))
            for path, module in model.named_modules()
            if not isinstance(module, jit.ScriptModule)  # has none that could be told or set
        ]
        self._held: dict[int, tuple[str, Any, Any]] = {}  # of the user's: by path
        functions = list(reached_by(model))
        classes = {type(module) for _, module, _ in self.modules}
        packages = {*map(_package, functions), *map(_package, classes)} - {"torch", "numpy", ""}
        self._numbers = _Numbers(packages, (bool, int, float))  # in objects of the user's
        self.outside = _Numbers(packages, (int, float)).of_code(functions, classes)
        self._moving: list[tuple[str, Any, str, bytes]] = []  # by path, owner and name
        self._registered: list[tuple[str, str, Any, Any]] = []  # of torch's: by path and name
        self._empty: list[Any] = []  # of torch's; nearly all, so they are looked at in one call
        for path, module, attributes in self.modules:
            for name, value in attributes.items():
                if type(value) in _UNHELD:
                    continue
                if name not in _EVERY_MODULE:
                    self._look_into(f"{path}.{name}".lstrip("."), value, vars(module), name)
                elif type(value) not in (dict, OrderedDict, set):
                    continue
                elif value:
                    self._registered.append((path, name, value, value.copy()))
                else:
                    self._empty.append(value)

    def _look_into(self, path: str, value: Any, owner: dict[str, Any], name: str) -> None:
        """Note what ``owner[name]`` holds and shows, or keeps to itself."""
        if isinstance(value, (*_HOLDING, tuple)):
            self._hold(path, value)
            self._numbers.note(path, value)
        elif isinstance(value, _MOVING) or type(value).__module__.startswith("numpy"):
            with suppress(Exception):  # what cannot be pickled is not seen
                self._moving.append((path, owner, name, pickle.dumps(value)))
        else:
            self._numbers.of_object(path, value)

    def _hold(self, path: str, value: Any) -> None:
        if id(value) in self._held:
            return
        if not isinstance(value, tuple):
            self._held[id(value)] = path, value, copy(value)
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, (*_HOLDING, tuple)):
                self._hold(path, part)

    def _of_torch(self) -> list[tuple[str, str, Any, Any]]:
        """Return what torch keeps in each module and may have changed."""
        if not any(self._empty):
            return self._registered
        empty = set(map(id, self._empty))
        filled = [
            (path, name, value, type(value)())
            for path, _, attributes in self.modules
            for name, value in attributes.items()
            if id(value) in empty and value
        ]
        return self._registered + filled

    def changed(self) -> list[str]:
        """Return the paths of the attributes and registered tensors that are others by now."""
        found = [path for path, value, then in self._held.values() if not same(then, value)]
        found += [path for path, *_ in self._moved()]
        found += self._numbers.changed()
        for path, module, attributes in self.modules:
            now = vars(module)
            for name in _differing(attributes, now):
                named = f"{path}.{name}".lstrip(".")
                known = name in _EVERY_MODULE or named in self.by_torch
                if not known and not same(attributes.get(name, _NOTHING), now.get(name, _NOTHING)):
                    found.append(named)
        for path, registry, value, then in self._of_torch():
            if registry in _REGISTRIES:
                found += [f"{path}.{name}".lstrip(".") for name in _differing(then, value)]
        return list(dict.fromkeys(found))

    def _moved(self) -> list[tuple[str, Any, str, bytes]]:
        return [one for one in self._moving if pickle.dumps(one[1].get(one[2])) != one[3]]

    def hooked(self) -> list[str]:
        """Return the paths of the modules that have other hooks by now."""
        hooks = [
            (path, then, now) for path, name, now, then in self._of_torch() if "_hooks" in name
        ]
        return list(dict.fromkeys(path for path, then, now in hooks if _differing(then, now)))

    def restore(self) -> None:
        """Put back what was there; what is unchanged is not touched, as Python keeps it packed."""
        self._numbers.restore()
        self.outside.restore()
        moved = self._moved()
        changed = [(value, then) for _, value, then in self._held.values() if not same(then, value)]
        others = [(vars(module), attributes) for _, module, attributes in self.modules]
        others += [(value, then) for _, _, value, then in self._of_torch()]
        for now, then in changed + [pair for pair in others if _differing(pair[1], pair[0])]:
            now.clear()
            now.extend(then) if isinstance(now, (list, deque)) else now.update(then)
        for _, owner, name, then in moved:
            owner[name] = pickle.loads(then)


class _Numbers:
    """Numbers that a forward may count up, in objects and elsewhere, and how to put them back.

    Args:
        packages: those of the model's own code, whose objects are looked into.
        kinds: of numbers; a flag outside of the model, as of what is told once, is none.
    """

    def __init__(self, packages: Set[str], kinds: tuple[type, ...]) -> None:
        self._packages, self._kinds = packages, kinds
        self._then: list[tuple[str, Any, Any, Any]] = []  # by path, owner and key
        self._met = dict[int, Any]()  # kept, so that no id comes twice

    def of_code(self, functions: Iterable[FunctionType], classes: Iterable[type]) -> "_Numbers":
        """Note those that the code of a model names, and those of its classes."""
        for function in functions:
            scope, code = function.__globals__, function.__code__
            modules = [v for v in map(scope.get, names_in(code)) if isinstance(v, ModuleType)]
            own = [vars(m) for m in modules if m.__name__.partition(".")[0] in self._packages]
            for place in (scope, *own):
                for name in names_in(code) & place.keys():
                    self.note(name, place[name], place, name)
            for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
                with suppress(ValueError):  # not filled yet
                    self.note(name, cell.cell_contents, cell, "cell_contents")
            defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            self.note(f"a default of {function.__name__}", defaults)
        for base in {base for cls in classes for base in cls.__mro__}:
            self.note(base.__name__, base)
        return self

    def note(self, path: str, value: Any, owner: Any = None, key: Any = None) -> None:
        """Note a number, or those in a container or an object of the model's own code."""
        waiting = [(path, value, owner, key)]
        while waiting:
            path, value, owner, key = waiting.pop()
            if type(value) in self._kinds:
                self._then.append((path, owner, key, value))
            elif id(value) not in self._met and type(value) not in _UNHELD - {FunctionType}:
                self._met[id(value)] = value
                waiting += self._parts(path, value)

    def _parts(self, path: str, value: Any) -> Iterator[tuple[str, Any, Any, Any]]:
        """Yield by path what a container or an object holds, its owner and where it is there."""
        if isinstance(value, (list, tuple, deque, dict)):
            if len(value) <= _LARGE:
                items = value.items() if isinstance(value, dict) else enumerate(value)
                yield from ((path, part, value, key) for key, part in items)
        elif isinstance(value, (type, FunctionType)):
            if _package(value) in self._packages:
                for name, part in list(vars(value).items()):
                    yield f"{value.__name__}.{name}", part, value, name
        elif isinstance(value, (nn.Module, Tensor)):
            return
        elif type(value) is SimpleNamespace or _package(type(value)) in self._packages:
            yield from self._attributes_of(path, value)

    def of_object(self, path: str, value: Any) -> None:
        """Note those of an object of whatever class, and of what it holds."""
        if not isinstance(value, (nn.Module, Tensor, type)) and id(value) not in self._met:
            self._met[id(value)] = value
            for part in self._attributes_of(path, value):
                self.note(*part)

    @staticmethod
    def _attributes_of(path: str, value: Any) -> Iterator[tuple[str, Any, Any, Any]]:
        slots = (vars(c).get("__slots__", ()) for c in type(value).__mro__)
        names = [n for own in slots for n in ((own,) if isinstance(own, str) else own)]
        attributes = {n: getattr(value, n) for n in names if hasattr(value, n)}
        for name, part in {**attributes, **getattr(value, "__dict__", {})}.items():
            yield f"{path}.{name}", part, value, name

    def changed(self) -> list[str]:
        """Return the paths of those that are others by now."""
        return list(dict.fromkeys(path for path, *_ in self._moved()))

    def _moved(self) -> list[tuple[str, Any, Any, Any]]:
        return [one for one in self._then if not same(_item(one[1], one[2]), one[3])]

    def restore(self) -> None:
        """Put back the numbers that were there."""
        for _, owner, key, then in self._moved():
            if isinstance(owner, (dict, list, deque)):
                with suppress(LookupError):  # what is gone stays so
                    owner[key] = then
            elif isinstance(owner, (type, CellType)):
                setattr(owner, key, then)
            else:
                object.__setattr__(owner, key, then)


def _item(owner: Any, key: Any) -> Any:
    with suppress(Exception):  # of what an attribute raises that is computed
        if isinstance(owner, (dict, list, tuple, deque)):
            return owner[key]
        own = getattr(owner, "__dict__", {})
        return own[key] if key in own else getattr(owner, key)
    return _NOTHING


def _package(code: type | FunctionType) -> str:
    return (code.__module__ or "").partition(".")[0]  # a torch.fx graph's has none


def _differing(then: Any, now: Any) -> Any:
    """Return the keys of what is another object in the one dict, or set, than in the other."""
    if isinstance(then, set):
        return then ^ now
    if all(map(is_, then.values(), now.values())) and then.keys() == now.keys():
        return ()  # as nearly always, and fast
    names = then.keys() | now.keys()
    return [name for name in names if then.get(name, _NOTHING) is not now.get(name, _NOTHING)]
