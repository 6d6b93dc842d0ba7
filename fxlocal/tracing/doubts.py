"""Check a trace against its model where the forward asks what a value is: a proxy is no tensor.

    x = [x] if isinstance(x, Tensor) else x     # another branch than any call takes
    if hasattr(x, "feature"):                   # True of a proxy
    if batch.mask is None:                      # False of a proxy
    scale = {torch.float16: 2.0}.get(x.dtype, 1.0)  # no proxy is a key

The check runs both on fake tensors and compares the operators that they call and the outputs, which
costs as much as a transform. So the code of the forward is read first, and that of what it calls by
name: where nothing is asked, nothing can differ.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dis import Instruction, get_instructions
from functools import cache, partial
from itertools import takewhile, zip_longest
from opcode import opmap
from types import CodeType
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CaptureError
from ..ir.contexts import ContextInterpreter
from ..ir.fakes import with_fake_state
from ..ir.network import Network
from ..ir.source import ONE_AT_A_TIME, arguments, device_of
from ..ops.custom import codes
from ..ops.values import leaves_of
from .assignments import unchanged
from .examples import Examples
from .guards import no_random_draws, plain_context
from .stand_in import own_forwards
from .user_code import Line, names_in, reached_by

__all__ = [
    "Dtypes",
    "OtherOutputError",
    "asks_for_autocast",
    "dtype_of",
    "first_line",
    "may_differ",
    "refuse_other_output",
]

_QUESTIONS = {"isinstance", "issubclass", "type", "hasattr", "getattr", "callable", "__class__"}
_QUESTIONS |= {"is_tensor", "is_tensor_like", "is_fx_tracing", "is_fx_symbolic_tracing", "Proxy"}
_QUESTIONS |= {"str", "repr", "get", "suppress", "singledispatch"}
_CATCHES = opmap.get("CHECK_EXC_MATCH") or opmap["JUMP_IF_NOT_EXC_MATCH"]  # before 3.11
_CONSTANTS = ("LOAD_CONST", "BUILD_SET", "BUILD_MAP", "SET_UPDATE")


_OF_AUTOCAST = {"is_autocast_enabled", "is_autocast_cpu_enabled", "get_autocast_dtype"}
_OF_AUTOCAST |= {"get_autocast_cpu_dtype", "get_autocast_gpu_dtype"}


class OtherOutputError(Exception):
    """A trace computes something else than its model."""


def may_differ(model: nn.Module) -> bool:
    """Tell whether code that the forward may run asks what a value is, or catches errors."""
    return any(_asks(function.__code__) for function in reached_by(model))


@cache
def _asks(code: CodeType) -> bool:
    return not names_in(code).isdisjoint(_QUESTIONS) or any(
        _CATCHES in inner.co_code[::2] or _asks_by_operator(inner) for inner in codes(code)
    )


def asks_for_autocast(model: nn.Module) -> Line | None:
    """Return where code that the forward may run asks for autocast, which a capture has not."""
    functions = (f.__code__ for f in reached_by(model) if names_in(f.__code__) & _OF_AUTOCAST)
    return next((Line((code.co_filename, code.co_firstlineno)) for code in functions), None)


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
            raise OtherOutputError(f"{_DIFFERS}, and fails ({first_line(error)})") from error
        if failed:
            told = f"{type(failed).__name__}: {first_line(failed)}"
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


class Dtypes:
    """Checks whether a graph has dtypes of its capture that are others now.

    Args:
        line: where the forward first asks for one, or for autocast.
        weights: of which dtype they were, if the graph keeps what it was told.
    """

    def __init__(self, line: Line, weights: torch.dtype | None = None) -> None:
        self._line: Line | None = line
        self._asked, self._weights = line, weights

    def warn(self, network: Network, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Warn, once, where the model casts to other dtypes than its graph under autocast.

        Both run on fake tensors. What they compute else need not be the same: a mask may be skipped
        for its values.

        Raises:
            RuntimeError: if the weights were of another dtype when the graph was made.
        """
        source, device = network.source_model, device_of(network.source_model).type
        if self._weights not in (None, now := dtype_of(source)):
            raise RuntimeError(
                f"the model is in {now}, and was in {self._weights} when its graph was made, which "
                f"keeps what the forward asked for at {self._asked}: convert the model before, or "
                "transform it again"
            )
        if self._line is None or not torch.is_autocast_enabled(device):
            return
        line, self._line = self._line, None
        casts = []
        surrounded = own_forwards(source), unchanged(source), no_random_draws(of_torch=False)
        with ONE_AT_A_TIME, ExitStack() as stack, suppress(Exception):  # or it cannot be checked
            for context in (*surrounded, torch.no_grad()):  # with nothing saved, hooks see no fakes
                stack.enter_context(context)
            fake = stack.enter_context(with_fake_state(network))
            args, kwargs = Examples(source, args, kwargs).map(fake)
            values = arguments(network.graph, args, kwargs).values()
            for call in (
                partial(source.forward, *args, **kwargs),
                partial(ContextInterpreter(network).run, *values),
            ):
                dtype = torch.get_autocast_dtype(device)
                with torch.autocast(device, dtype, cache_enabled=False), _Casts() as made:
                    call()
                casts.append(made)
        if len(casts) == 2 and casts[0].differ_from(casts[1]):
            warn(
                "the graph has dtypes of a capture without autocast: the forward asks for such, "
                f"first at {line}, and computes in others under autocast, so that results differ "
                "by roundings. Train without autocast, or rewrite what asks",
                stacklevel=8,
            )


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of the first parameter that computes; None without any."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floating, None)


_aten = torch.ops.aten
# They take what is there to another place; of what dtype, those show that compute with it.
_MOVING = {_aten.clone, _aten.copy, _aten.copy_, _aten.cat, _aten.stack}
_MOVING |= {_aten.where, _aten.expand, _aten.view, _aten._unsafe_view, _aten.slice, _aten.select}
_MOVING |= {_aten.detach, _aten.alias, _aten.unsqueeze, _aten.squeeze, _aten.transpose, _aten.t}
_MOVING |= {_aten.permute, _aten.index, _aten.full, _aten.ones, _aten.zeros, _aten.empty}


_INFOS = [torch.finfo(t) for t in (torch.half, torch.bfloat16, torch.float32, torch.float64)]
_OF_DTYPES = {value for i in _INFOS for value in (i.min, i.max, i.eps, i.tiny)}


class _Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts of which dtype the results of each operator that computes something are.

    And what numbers it takes that `torch.finfo` has.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: dict[Any, Counter[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if isinstance(result, Tensor) and result.numel() and packet not in _MOVING:
            packet = _aten.lift_fresh if packet is _aten.lift_fresh_copy else packet  # a constant
            numbers = tuple(v for v in args if isinstance(v, float) and v in _OF_DTYPES)
            self.dtypes.setdefault(packet, Counter())[(result.dtype, numbers)] += 1
        return result

    def differ_from(self, graph: "_Casts") -> bool:
        """Tell whether the graph rounds less often, or computes with other dtypes.

        That it casts more tells nothing: what was widened is as it was when it is narrow again.
        """
        mine, theirs = (one.dtypes.pop(_aten._to_copy, Counter()) for one in (self, graph))
        narrow = ((torch.bfloat16, ()), (torch.half, ()))
        return any(mine[dtype] > theirs[dtype] for dtype in narrow) or any(
            self.dtypes[f].total() == graph.dtypes[f].total() and self.dtypes[f] != graph.dtypes[f]
            for f in self.dtypes.keys() & graph.dtypes.keys()
        )


def first_line(error: BaseException) -> str:
    """Return the first line that says something; the name of the class where none does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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
