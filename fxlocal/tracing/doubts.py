"""Check a trace against its model where the forward asks what a value is: a proxy is no tensor.

    x = [x] if isinstance(x, Tensor) else x     # another branch than any call takes
    if hasattr(x, "feature"):                   # True of a proxy
    if batch.mask is None:                      # False of a proxy
    scale = {torch.float16: 2.0}.get(x.dtype, 1.0)  # no proxy is a key

The check runs both on fake tensors and compares the operators that they call and the outputs, which
costs as much as a transform. So the code of the forward is read first, and that of what it calls by
name: where nothing is asked, nothing can differ.
"""

import sysconfig
from collections.abc import Iterator, Mapping
from dis import Instruction, get_instructions
from functools import cache, partial
from itertools import takewhile, zip_longest
from opcode import opmap
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CaptureError
from ..ir.contexts import ContextInterpreter
from ..ir.fakes import with_fake_state
from ..ir.network import Network
from ..ir.source import arguments
from ..ops.values import leaves_of
from .assignments import unchanged
from .examples import Examples
from .guards import no_random_draws, plain_context
from .lines import is_of_torch

__all__ = ["OtherOutputError", "may_differ", "refuse_other_output"]

_QUESTIONS = {"isinstance", "issubclass", "type", "hasattr", "getattr", "callable", "__class__"}
_QUESTIONS |= {"is_tensor", "is_tensor_like", "is_fx_tracing", "is_fx_symbolic_tracing", "Proxy"}
_QUESTIONS |= {"str", "repr", "get", "suppress", "singledispatch"}
_CATCHES = opmap.get("CHECK_EXC_MATCH") or opmap["JUMP_IF_NOT_EXC_MATCH"]  # before 3.11
_CONSTANTS = ("LOAD_CONST", "BUILD_SET", "BUILD_MAP", "SET_UPDATE")
_CALLED = (FunctionType, MethodType, partial)  # a forward set on an instance too
_STDLIB = sysconfig.get_path("stdlib") + "/"


class OtherOutputError(Exception):
    """A trace computes something else than its model."""


def may_differ(model: nn.Module) -> bool:
    """Tell whether code that the forward may run asks what a value is, or catches errors."""
    modules = list(model.modules())
    held = [v for m in modules for v in vars(m).values() if isinstance(v, _CALLED)]
    return any(map(_class_asks, set(map(type, modules)))) or any(
        _asks(v, type(model)) for v in held
    )


@cache
def _class_asks(cls: type[nn.Module]) -> bool:
    return _asks(getattr(cls, "forward", None), cls)


def _asks(forward: Any, cls: type[nn.Module]) -> bool:
    found, seen = [forward], set()
    while found:
        function = _plain_function(found.pop())
        if function is None or function in seen:
            continue
        seen.add(function)
        names: set[str] = set()
        for code in _codes(function.__code__):
            names.update(code.co_names)
            if _CATCHES in code.co_code[::2] or _asks_by_operator(code):
                return True
        if names & _QUESTIONS:
            return True
        found += _called(function, cls, names - {"_log_api_usage_once"})  # torchvision's
    return False


def _asks_by_operator(code: CodeType) -> bool:
    """Tell whether code asks what a value is by ``is``, ``in`` of a constant, or ``match``.

    But for what an argument is, or an attribute of the module: those are Python's own values.
    """
    before: list[Instruction] = []
    for step in get_instructions(code):
        name = step.opname
        if name.startswith("MATCH_"):
            return True
        of_constant = name == "CONTAINS_OP" and before[-1].opname in _CONSTANTS
        if of_constant or name == "IS_OP" or name.endswith(("IF_NONE", "IF_NOT_NONE")):
            asked = before[:-1] if name in ("IS_OP", "CONTAINS_OP") else before
            attributes = [*takewhile(lambda b: b.opname == "LOAD_ATTR", reversed(asked))]
            owner = asked[-1 - len(attributes)] if len(asked) > len(attributes) else step
            arguments = code.co_varnames[: 1 if attributes else code.co_argcount]
            own = owner.opname.startswith("LOAD_FAST") and owner.argval in arguments
            if not own or any(a.argval == "grad" for a in attributes):
                return True
        before = [*before[-8:], step]
    return False


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


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _called(function: FunctionType, cls: type[nn.Module], names: set[str]) -> Iterator[Any]:
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


def refuse_other_output(model: nn.Module, network: Network, examples: Examples) -> None:
    """Run a trace and its model on fake tensors; where neither can, they are not checked.

    Raises:
        OtherOutputError: if they return tensors of other shapes or types, or in other containers,
            or compute something else with their inputs, such as a value that one alone asks for.
    """
    with unchanged(model), plain_context(), no_random_draws(), with_fake_state(network) as fake:
        args, kwargs = examples.map(fake)
        failed: Exception | None = None
        try:
            with _Operators(args, kwargs) as wanted:
                expected = _form(model.forward(*args, **kwargs))
        except CaptureError:  # what a graph cannot keep
            raise
        except Exception as error:
            failed = error
        args, kwargs = examples.map(fake)  # as a forward may change its inputs
        values = arguments(network.graph, args, kwargs).values()
        try:
            with _Operators(args, kwargs) as computed:
                found = _form(ContextInterpreter(network).run(*values))
        except Exception as error:
            if failed:
                return
            raise OtherOutputError(f"{_DIFFERS}, and fails ({_first_line(error)})") from error
        if failed:
            told = f"{type(failed).__name__}: {_first_line(failed)}"
            raise OtherOutputError(f"{_DIFFERS}: only the model has no result ({told})") from failed
        if found != expected:
            raise OtherOutputError(f"{_DIFFERS}: it returns {found} instead of {expected}")
        for own, other in zip_longest(computed.names, wanted.names):
            if own != other:
                told = f"it computes {own or 'nothing'} where that computes {other or 'nothing'}"
                raise OtherOutputError(f"{_DIFFERS}: {told}")


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators that take what depends on the inputs, with their numbers.

    What else a forward computes, such as a table of positions, a trace may hold as a constant.
    """

    def __init__(self, *inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self._depends: dict[int, Tensor] = {}  # by ids; kept, so that none comes twice
        self._mark(inputs)

    def _mark(self, values: Any) -> None:
        self._depends |= {id(v): v for v in leaves_of(values) if isinstance(v, Tensor)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = pytree.tree_leaves((args, kwargs))
        if any(id(value) in self._depends for value in given):
            plain = ", ".join(repr(value) for value in given if not isinstance(value, Tensor))
            self.names.append(f"{func}({plain})")
            self._mark(result)
        return result


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


_DIFFERS = (
    "the symbolic trace differs from the model, whose forward asks what a value is (isinstance, "
    "hasattr) and got another answer of a proxy"
)


def _form(value: Any) -> Any:
    """Return the containers of an output, with shape and dtype in the place of each tensor."""
    if isinstance(value, Tensor):
        return [*value.shape, value.dtype]
    if isinstance(value, Mapping):
        return {str(key): _form(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_form(part) for part in value]}
    return None
