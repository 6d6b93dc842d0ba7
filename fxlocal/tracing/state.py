"""The model's tensors while it is traced: each by the path at which it is registered.

A forward may reach a parameter or a buffer by another way than its attribute: a list or a dict
that holds it too, a closure, a global, another object. Tracing knows attributes alone; what comes
by another way it would keep as a constant, which neither learns nor follows.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from operator import attrgetter, is_, not_
from typing import Any
from unittest.mock import patch
from weakref import ref

from torch import Generator, Tensor, fx, is_grad_enabled, nn, strided
from torch._C._functorch import is_batchedtensor
from torch._subclasses.fake_tensor import is_fake
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from .user_code import Line, current_line, is_of_torch

__all__ = ["HOOKS", "TracedState", "assigns_attribute", "refuse_generator", "registers_hook"]

HOOKS = {"register_hook", "register_post_accumulate_grad_hook"}

# What only asks a tensor: its answer is no tensor, and holds for good.
_QUESTIONS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset"}
_QUESTIONS |= {"is_floating_point", "is_complex", "is_contiguous", "element_size", "__len__"}
_QUESTIONS |= {"get_device", "__hash__", "__repr__", "type", "is_shared", "is_inference"}
# Attributes that are tensors; to ask for one twice would record it twice.
_TENSORS = {"data", "grad", "T", "mT", "H", "mH", "real", "imag"}


class TracedState(TorchFunctionMode):
    """Has each call inside take a registered tensor as the model's attribute gives it.

    Raises, at such a call:
        CaptureError: for a tensor that requires a gradient and is not registered, one that is
            changed in place and not registered, and one whose attributes are assigned.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.paths: dict[int, str] = {}
        for path, module in model.named_modules():
            for registry in (module._parameters, module._buffers):
                for name, tensor in registry.items():
                    self.paths.setdefault(id(tensor), f"{path}.{name}".lstrip("."))
        self.paths.pop(id(None), None)
        self._watched: list[tuple[ref[Any], Line]] = []
        self.asks_for_grad: Line | None = None  # where the user's code does so of a parameter
        self.asks_for_dtype: Line | None = None  # of a value
        self.texts: dict[str, Line] = {}  # that the user's code made of values
        self.with_grad: list[bool] = []  # of the autocasts that are entered, as `plain_context` has
        self.changes_grad = False  # whether anything runs in one in another grad mode
        self._made: dict[int, Tensor] = {}  # by their storages; kept, so that no id comes twice

    @contextmanager
    def around_forward(self, finish: Callable[[Any], Any]) -> Iterator[None]:
        """Be in force wherever the model's forward runs, and only there; ``finish`` its result."""
        of_its_own = "forward" in vars(self.model)
        forward = self.model.forward if of_its_own else type(self.model).forward

        running = False

        @wraps(forward)
        def inside(*args: Any, **kwargs: Any) -> Any:
            nonlocal running
            if running:  # that of a module of the same class
                return forward(*args, **kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            running = True
            try:
                with self:
                    result = forward(*args, **kwargs)
            finally:
                running = False
            now, other = pytree.tree_flatten((args, kwargs))
            if other != spec or not all(map(is_, leaves, now)):
                raise CaptureError(
                    "the forward writes into a container that it is given, or takes something out "
                    "of it, which the graph would not: let it work on a copy (dict(batch))"
                )
            return finish(result)

        if of_its_own:
            patched: AbstractContextManager[Any] = patch.dict(vars(self.model), forward=inside)
        else:
            patched = patch.object(type(self.model), "forward", inside)
        with patched:
            yield

    def path_of(self, value: Tensor) -> str | None:
        """Return the path at which ``value`` is registered; None for a constant.

        Raises:
            CaptureError: if it is not registered, and requires a gradient.
        """
        path = self.paths.get(id(value))
        if path is None and value.requires_grad:
            raise CaptureError(
                "the forward uses a tensor that requires a gradient and is no parameter of the "
                f"model, at {current_line()}: register it (as an attribute, in nn.ParameterList or "
                "nn.ParameterDict; its module as an attribute or in nn.ModuleList), or call "
                "requires_grad_(False) on it"
            )
        return path

    def is_made(self, value: Tensor) -> bool:
        """Tell whether the forward made ``value`` while it was traced."""
        return _storage(value) in self._made

    def watch(self, value: Tensor | fx.Proxy) -> None:
        """Note a value that the forward made, and where."""
        self._watched.append((ref(value), current_line()))

    def refuse_kept(self) -> None:
        """Refuse a forward that kept what it made, where only its own run would put it."""
        for generation in range(3):  # what holds itself is held by no one; it is young
            if self._kept():
                gc.collect(generation)
        if kept := self._kept():
            raise CaptureError(
                f"the model's forward keeps what it computes at {kept[-1]} somewhere else than in "
                "its result: a list, an object, a global. The graph would not: return the value"
            )

    def _kept(self) -> list[Line]:
        return [line for value, line in self._watched if value() is not None]

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with what the model's attributes give."""
        self.changes_grad |= is_grad_enabled() in map(not_, self.with_grad)
        kwargs, name = kwargs or {}, getattr(func, "__name__", "").partition(".")[0]
        if name in _QUESTIONS:
            return func(*args, **kwargs)
        attribute = func.__self__.__name__ if name in ("__get__", "__set__") else ""
        if name == "__set__":
            raise CaptureError(assigns_attribute(attribute))
        if name in HOOKS:
            raise CaptureError(registers_hook())
        for value in (*args, *kwargs.values()):
            refuse_generator(value)
        if kwargs.get("generator", self) is None:  # with which torch knows no symbolic sizes
            kwargs = {key: value for key, value in kwargs.items() if key != "generator"}
        if attribute and attribute not in _TENSORS:
            answer = func(*args)
            if attribute in ("requires_grad", "dtype"):
                self._note_question(attribute, sys._getframe(1).f_code.co_filename)
            if not isinstance(answer, Tensor):
                return answer
        given_args, given_kwargs = pytree.tree_map_only(Tensor, self._given, (args, kwargs))
        given = pytree.tree_leaves((given_args, given_kwargs))
        traced = any(isinstance(value, fx.Proxy) for value in given)
        self._refuse_change(name, given_args, given_kwargs, traced)
        if traced:
            if attribute:
                return getattr(given_args[0], attribute)
            return fx.Proxy.__torch_function__(func, types, given_args, given_kwargs)
        if attribute == "data" and is_fake(given_args[0]):
            return given_args[0].detach()  # export would take the value of `.data` for a constant
        result = func(*given_args, **given_kwargs)
        self._note(result, given)
        new = isinstance(result, Tensor) and all(v is not result for v in given)
        if new and is_fake(result) and not is_batchedtensor(result):  # torch's nodes keep that
            self.watch(result)
        return result

    def _note_question(self, attribute: str, filename: str) -> None:
        if is_of_torch(filename):
            return
        if attribute == "dtype":
            self.asks_for_dtype = self.asks_for_dtype or current_line()
        else:
            self.asks_for_grad = current_line()

    def _given(self, value: Tensor) -> Any:
        """Return what the model's attribute gives in place of ``value``, or else ``value``."""
        if isinstance(value, fx.Proxy) or is_fake(value):
            return value
        path = self.path_of(value)
        return value if path is None else attrgetter(path)(self.model)

    def _refuse_change(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], traced: bool
    ) -> None:
        """Refuse a change of what was there before, unless the graph will fetch and change it."""
        overwrites = (name.endswith("_") and name[-2:] != "__") or name == "__setitem__"
        changed = kwargs.get("out", args[0] if overwrites and args else None)
        for value in pytree.tree_leaves(changed):
            if not isinstance(value, Tensor) or is_fake(value) or self.is_made(value):
                continue
            held = (v for module in self.model.modules() for v in vars(module).values())
            if not traced or all(v is not value for v in held):
                raise CaptureError(
                    f"the forward changes a tensor that is no buffer of the model at "
                    f"{current_line()}, which the graph would not: use register_buffer"
                )

    def _note(self, result: Any, given: list[Any]) -> None:
        """Note the tensors that a call made: all but views of those that were there before."""
        before = {_storage(v) for v in given if isinstance(v, Tensor) and not is_fake(v)}
        before -= self._made.keys()
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and not is_fake(value):
                storage = _storage(value)
                if storage not in before:
                    self._made.setdefault(storage, value)


def _storage(value: Tensor) -> int:
    stored = value.layout is strided and not is_batchedtensor(value)
    return value.untyped_storage()._cdata if stored else id(value)


def registers_hook() -> str:
    """Return the message that refuses a forward that registers a hook of a tensor."""
    return (
        f"the forward registers a hook of a tensor's gradient at {current_line()}, which the graph "
        "would not: register it on a parameter, outside of the forward, or use a function whose "
        "gradient is the one that is wanted"
    )


def refuse_generator(value: Any) -> None:
    """Refuse a generator that a call is given: no node holds it, nor how far it has come."""
    if isinstance(value, Generator):
        raise CaptureError(
            f"the forward draws from a generator of its own at {current_line()}, which the graph "
            "would not: draw from torch's own, or give the numbers as an input"
        )


def assigns_attribute(name: str) -> str:
    """Return the message that refuses a forward that assigns an attribute of a tensor."""
    return (
        f"the forward assigns {name!r} of a tensor at {current_line()}, which a graph cannot keep: "
        "change the tensor in place (copy_, mul_; of a parameter under no_grad)"
    )
