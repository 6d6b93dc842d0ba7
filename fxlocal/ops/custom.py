"""A user's own rule as a function of the same arguments as the built-in deltas."""

import copy
import dis
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hebbian import conv_delta, linear_delta

__all__ = ["DeltaError", "bind_delta", "codes", "for_trial", "sample_activities", "try_delta"]


class DeltaError(ValueError):
    """A user's rule failed, or did something else than return a delta of the weight's shape."""


def bind_delta(
    rule: Callable[..., Tensor], geometry: tuple[Any, ...] | None, described: str
) -> Any:
    """Return ``delta(pre, post, weight)``, which calls ``rule(weight, pre, post)``.

    A rule that takes ``product`` gets the layer's own product of an input and an output.
    ``geometry`` is the last five arguments of `fxlocal.ops.hebbian.conv_delta`, or None for a
    linear layer; ``described`` names rule and layer in an error.

    Raises:
        DeltaError: when ``delta`` is called and the rule returns no tensor of the weight's shape.
    """
    called = rule.forward if isinstance(rule, nn.Module) else rule
    takes_product = "product" in inspect.signature(called).parameters

    def delta(pre: Tensor, post: Tensor, weight: Tensor) -> Tensor:
        def product(pre: Tensor, post: Tensor) -> Tensor:
            if geometry is None:
                return linear_delta(pre, post, weight)
            return conv_delta(pre, post, weight, *geometry)

        pre, post, weight = pre.detach(), post.detach(), weight.detach()
        given = {"product": product} if takes_product else {}
        found = rule(weight, pre, post, **given)
        if not isinstance(found, Tensor) or found.shape != weight.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise DeltaError(
                f"{described} returned {got} for {_describe_shapes(weight, pre, post)}: return a "
                "tensor of the weight's shape"
            )
        return found

    # As torch.fx names it in the code and in the printed graph; a lambda's name is no identifier.
    named: Any = rule
    while isinstance(named, partial):
        named = named.func
    name = getattr(named, "__name__", type(named).__name__)
    delta.__name__ = name if name.isidentifier() else "custom_rule"
    delta.__module__ = getattr(named, "__module__", type(named).__module__)
    return delta


def for_trial(function: Any) -> Any:
    """Return what computes as a user's function does, and keeps nothing that the other sees.

    None where there may be no such one: a bound method, an object that holds a model, a function
    that changes or reads what lives longer than its call.
    """
    if isinstance(function, partial):
        inner = for_trial(function.func)
        return inner and partial(inner, *function.args, **function.keywords)
    if isinstance(function, FunctionType | BuiltinFunctionType | type):
        return function if _keeps_nothing(function, set()) else None
    holds = getattr(function, "__dict__", {}).values()
    if inspect.ismethod(function) or any(isinstance(value, nn.Module) for value in holds):
        return None
    try:
        return copy.deepcopy(function)
    except Exception:  # the user's object, which may be made of anything
        return None


_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CODE = (ModuleType, FunctionType, BuiltinFunctionType, type)
_WRITES = {"STORE_GLOBAL", "STORE_ATTR", "STORE_DEREF"}


def _keeps_nothing(value: Any, met: set[int]) -> bool:
    """Tell whether a function changes nothing outside of itself, by what its code names.

    That is modules, plain values, classes and functions of the same kind.
    """
    if not isinstance(value, FunctionType) or id(value) in met:
        return isinstance(value, _PLAIN + _CODE)
    if str(value.__module__).partition(".")[0] == "torch":
        return True
    met.add(id(value))
    names, own = set[str](), set[str]()
    for code in codes(value.__code__):
        names |= {*code.co_names}
        own |= {*code.co_cellvars}
        for step in dis.get_instructions(code):
            if step.opname in _WRITES and step.argval not in own:
                return False
    if "random" in names:
        return False
    found = [value.__globals__[name] for name in names & value.__globals__.keys()]
    found += [cell.cell_contents for cell in value.__closure__ or ()]
    found += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return all(_keeps_nothing(one, met) for one in found)


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yield ``code`` and that of the functions that it makes."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def _describe_shapes(weight: Tensor, pre: Tensor, post: Tensor) -> str:
    """Return what a rule was given, as text for an error."""
    return f"weight {tuple(weight.shape)}, pre {tuple(pre.shape)}, post {tuple(post.shape)}"


def try_delta(
    delta: Callable[..., Tensor], described: str, weight: Tensor, geometry: tuple[Any, ...] | None
) -> None:
    """Refuse a user's rule that works on none of the small samples of a layer's activity.

    The arguments are what `bind_delta` returned, and what it was given.

    Raises:
        DeltaError: if it does.
    """
    refusals = []
    for pre, post in sample_activities(weight, geometry):
        try:
            return _try_on(delta, described, weight, pre, post)
        except DeltaError as error:
            refusals.append(error)
    raise refusals[0]


def _try_on(
    delta: Callable[..., Tensor], described: str, weight: Tensor, pre: Tensor, post: Tensor
) -> None:
    """Call a user's rule once; nothing that it does, drawing random numbers included, lasts."""
    shapes = _describe_shapes(weight, pre, post)
    given = [tensor.detach().clone() for tensor in (pre, post, weight)]
    devices = [weight.device] if weight.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            found = delta(*given)
    except DeltaError:
        raise
    except Exception as error:  # the user's code, which may raise anything
        raise DeltaError(
            f"{described} failed on small random tensors ({shapes}): {type(error).__name__}: "
            f"{error}"
        ) from error
    if not torch.isfinite(found).all():
        raise DeltaError(
            f"{described} returned NaN or inf for {shapes}, all finite: mend the rule before it "
            "reaches a weight"
        )
    names = ("pre", "post", "weight")
    for name, before, after in zip(names, (pre, post, weight), given, strict=True):
        if not torch.allclose(before, after, rtol=0, atol=0, equal_nan=True):
            raise DeltaError(
                f"{described} changed {name} in place, which is the model's own: work on "
                f"{name}.clone()"
            )


def sample_activities(
    weight: Tensor, geometry: tuple[Any, ...] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield small random inputs of a layer, always the same, each with the output it leads to.

    A linear layer takes rows or sequences of rows, which a rule need not both know: one of each.
    """
    generator = torch.Generator().manual_seed(0)
    weight = weight.detach()
    if geometry is None:
        for leading in ((2,), (2, 3)):
            pre = torch.randn(*leading, weight.shape[1], generator=generator).to(weight)
            yield pre, F.linear(pre, weight)
        return
    stride, padding, dilation, transposed, groups = geometry
    sides = zip(weight.shape[2:], stride, padding, dilation, strict=True)
    spatial = [max(d * (k - 1) + 1 + s - 2 * p, 2) for k, s, p, d in sides]
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    pre = torch.randn(2, channels, *spatial, generator=generator).to(weight)
    none = [0] * len(spatial)
    post: Tensor = torch.ops.aten.convolution(
        pre, weight, None, stride, padding, dilation, transposed, none, groups
    )
    yield pre, post
