"""Trace a model symbolically, and tag each node with the contexts that it was traced under."""

import enum
import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import get_ident
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _NormBase

from ..errors import CaptureError
from ..ir.contexts import NO_GRAD, Context
from ..ir.nodes import FIXED
from ..ops.values import require_value
from .augmented import in_place_assignments
from .buffers import BufferProxy
from .examples import Argument, Examples
from .outputs import call_of
from .state import HOOKS, TracedState, assigns_attribute, refuse_generator, registers_hook
from .user_code import Line, current_line, is_of_torch

__all__ = ["ContextTracer"]


class ContextTracer(fx.Tracer):
    """A tracer that tags each node with the context managers that it was traced under."""

    # Else arithmetic on buffers alone would run while tracing and be kept as a constant.
    proxy_buffer_attributes = True

    def __init__(
        self,
        leaf_modules: tuple[type[nn.Module], ...],
        examples: Examples,
        autocasts: list[Context],
        switched: dict[nn.Module, Line],
        state: TracedState,
    ) -> None:
        super().__init__(autowrap_modules=(math,))
        self.leaf_modules = leaf_modules
        self.examples = examples
        self.autocasts = autocasts
        self.switched = switched
        self.state = state
        self._thread = get_ident()

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """Trace a model; what it sets on a traced value would be set on nothing."""
        own = patch.object(fx.Proxy, "__setattr__", _set_own)
        with own, in_place_assignments(), self._conversions(), self._texts():
            return super().trace(*args, **kwargs)

    @contextmanager
    def _texts(self) -> Iterator[None]:
        """Note where the user's code makes text of a traced value, as f-strings do."""
        original = fx.Proxy.__repr__

        def text_of(proxy: fx.Proxy, told: str = "") -> str:
            text = original(proxy)
            if not is_of_torch(sys._getframe(1).f_code.co_filename):
                self.state.texts[text] = current_line()
            return format(text, told)

        ways: dict[str, Any] = dict.fromkeys(("__repr__", "__str__", "__format__"), text_of)
        with patch.multiple(fx.Proxy, create=True, **ways):
            yield

    def _conversions(self) -> AbstractContextManager[Any]:
        """Record accelerate's conversion of a prepared model's outputs: it asks for their dtype."""
        operations = sys.modules.get("accelerate.utils.operations")
        convert = getattr(operations, "convert_to_fp32", None)
        if convert is None:
            return nullcontext()

        def recorded(value: Any) -> fx.Proxy:
            return self.create_proxy("call_function", convert, (value,), {})

        return patch.object(operations, "convert_to_fp32", recorded)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether ``m`` is kept whole."""
        kept = isinstance(m, self.leaf_modules)
        if self.switched and (
            lines := [self.switched[s] for s in m.modules() if s in self.switched]
        ):
            # Its call would be in the mode that it has then, what is inside it is in this one.
            if kept:
                raise CaptureError(
                    f"the forward switches {module_qualified_name!r}, which leaf_modules keeps "
                    f"whole, between training and evaluation at {lines[0]}: the graph would not. "
                    "Do that before the forward, or in that module's own"
                )
            if any(map(_has_modes, m.modules())):
                return False
        if "forward" in vars(m):  # set on the instance: no longer what its class says
            return kept
        return kept or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Trace a call; the check of a norm that is traced into would ask for a shape.

        A backward hook looks for a tensor in the call's output, where there is none, and is not in
        the graph in any case: `capture` warns of it.
        """
        if get_ident() != self._thread:  # which torch.fx's patches do not ask
            forward, given, named = args
            return forward(*given, **named)
        own = vars(m)  # past `__setattr__`, which is watched
        hooks = {name: own[name] for name in ("_backward_hooks", "_backward_pre_hooks")}
        own.update({name: {} for name in hooks})
        try:
            return self._call_module(m, *args, **kwargs)
        finally:
            own.update(hooks)

    def _call_module(self, m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(m, _NormBase) and (self.switched or "forward" in vars(m)):
            with patch.object(type(m), "_check_input_dim", lambda self, input: None):
                return super().call_module(m, *args, **kwargs)
        return super().call_module(m, *args, **kwargs)

    def create_args_for_root(
        self, root_fn: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, list[Any]]:
        """Make the inputs; those with a default and no example are fixed at it, and checked."""
        own = vars(self.root).get("forward")  # torch.fx knows that of the class
        if not self.examples:
            if own:
                return own, [self._fixed_at_default(value) for value in self._inputs_of(own)]
            fn, inputs = super().create_args_for_root(root_fn, *args, **kwargs)
            return fn, [self._fixed_at_default(value) for value in inputs]
        arguments = list(self.examples.arguments())
        values: dict[str, Any] = {a.name: self._input(a) for a in arguments}
        for argument in arguments:
            if argument.check:
                function, *told = argument.check
                self.create_proxy("call_function", function, (values[argument.name], *told), {})
            if argument.value is None:
                values[argument.name] = None
        given, named = self.examples.call(values)
        forward = own or partial(root_fn, self.root)
        return (lambda: forward(*given, **named)), []

    def _input(self, argument: Argument) -> fx.Proxy:
        made = self.create_proxy("placeholder", argument.name, argument.default, {})
        made.node.meta.update(argument.meta)
        return made

    def _fixed_at_default(self, value: Any) -> Any:
        name = str(value.node.target) if isinstance(value, fx.Proxy) else None
        defaults = self.examples.defaults
        if name not in defaults:
            return value
        value.node.meta[FIXED] = True
        self.create_proxy("call_function", require_value, (value, defaults[name], name), {})
        return defaults[name]

    def _inputs_of(self, forward: Any) -> list[Any]:
        """Make the inputs of a forward that was set on the instance."""
        parameters = inspect.signature(forward).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if unknown := [str(p) for p in parameters if p.kind not in positional]:
            raise RuntimeError(
                f"the forward that was set on the model takes {', '.join(unknown)}, so its inputs "
                "are not known: functools.wraps tells them"
            )
        return [
            self.create_proxy(
                "placeholder", p.name, () if p.default is p.empty else (p.default,), {}
            )
            for p in parameters
        ]

    def create_arg(self, a: Any) -> Any:
        """Lower a value to what a node takes; a constant becomes one that has a literal."""
        refuse_generator(a)
        if isinstance(a, Tensor):
            if path := self.state.path_of(a):
                return self.create_node("get_attr", path, (), {})
            a = a.detach() if isinstance(a, nn.Parameter) else a
        elif call := call_of(a):
            kwargs = {name: self.create_arg(part) for name, part in call.kwargs.items()}
            return self.create_node(
                "call_function", call.target, self.create_arg(call.args), kwargs
            )
        return super().create_arg(_plain(a))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return what a module's attribute is while it is traced."""
        value = super().getattr(attr, attr_val, parameter_proxy_cache)
        if type(value) is fx.Proxy and not isinstance(attr_val, nn.Parameter):
            value = BufferProxy(value.node, self, attr_val)
            parameter_proxy_cache[str(value.node.target)] = value
        return value

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Make what stands for the value of ``node``."""
        made = super().proxy(node)
        if node.op != "get_attr":  # torch.fx keeps those
            self.state.watch(made)
        return made

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Record a call, but not that of a hook, whose function no node holds."""
        if kind == "call_method" and target in HOOKS:
            raise CaptureError(registers_hook())
        if target is torch._C._set_grad_enabled:
            raise TraceError("set_grad_enabled of a traced value")
        return super().create_proxy(kind, target, *args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node and tag it with what it was traced under."""
        node = super().create_node(*args, **kwargs)
        node.type = None  # torch.fx would print the annotation, which may name anything
        grad = () if torch.is_grad_enabled() else (NO_GRAD,)
        if contexts := (*grad, *self.autocasts):
            node.meta["fxlocal_contexts"] = contexts
        return node


def _has_modes(module: nn.Module) -> bool:
    """Tell whether code of the module's class reads its training flag."""
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    functions = (function for cls in classes for function in vars(cls).values())
    return any("training" in f.__code__.co_names for f in functions if hasattr(f, "__code__"))


def _set_own(proxy: fx.Proxy, name: str, value: Any) -> None:
    """Set what `torch.fx` keeps on a proxy; refuse attributes of what it stands for."""
    if name not in ("tracer", "node", "root", "attr", "_node"):
        raise CaptureError(assigns_attribute(name))
    object.__setattr__(proxy, name, value)


def _plain(value: Any) -> Any:
    """Return a number or text as Python's own type: generated code is made of reprs.

    A member of an enum stays, as ``torch.fx`` prints it by its name; a union of flags has none.
    """
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, numpy.complexfloating) and not isinstance(value, complex):
        return value  # torch drops its imaginary part
    if numpy and isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, enum.Enum):
        members = type(value).__members__
        if members.get(str(value.name)) is value:
            return value
    bases = (base for base in (int, float, complex, str) if isinstance(value, base))
    base = next(bases, None)
    return value if base is None or type(value) in (base, bool) else base(value)
