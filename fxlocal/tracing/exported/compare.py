"""Compare a graph with its model on the example itself, where the forward asks who calls it.

One that asks whether it is compiled or traced computes for export what training does not, such as
with a mask that else is left out where it masks nothing. Both are alike, most often; where the mask
is also that of a causal attention, they are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import starmap
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from ...ir.contexts import ContextInterpreter
from ...ir.network import Network
from ...ir.random_state import random_state, restore_random_state
from ...ir.source import arguments
from ...ops.values import leaves_of
from ..assignments import unchanged
from ..examples import Examples
from ..guards import plain_context
from ..user_code import names_in, reached_by

__all__ = ["warn_if_other"]

_QUESTIONS = {"is_compiling", "is_dynamo_compiling", "is_exporting", "is_tracing", "FakeTensor"}
_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3}  # of narrower ones, of two digits: 2e-2
_FEW = 0.01  # of the values: these may be noise around 0


def warn_if_other(model: nn.Module, network: Network, examples: Examples, stacklevel: int) -> None:
    """Warn where a graph returns something else than its model for the example.

    Where numbers are drawn, or one of them cannot run, they are not compared.
    """
    off = None
    if any(names_in(f.__code__) & _QUESTIONS for f in reached_by(model)):
        with suppress(Exception):
            off = _difference(model, network, examples)
    if off is not None:
        warn(
            f"the forward of {type(model).__name__} asks whether it is compiled or traced, and "
            f"computes something else then: for this example outputs of the graph are off by "
            f"{off:.0%}. A mask that is left out where it masks nothing may be the reason: give "
            "examples, and batches, for which it is there",
            stacklevel=stacklevel,
        )


def _difference(model: nn.Module, network: Network, examples: Examples) -> float | None:
    """Return how far outputs differ, by their size; None within a rounding."""
    with unchanged(model), _as_it_was(model) as drawn, plain_context(), torch.no_grad():
        args, kwargs = examples.map(Tensor.clone)
        values = arguments(network.graph, args, kwargs).values()
        found = _numbers(ContextInterpreter(network).run(*values))
        if drawn():
            return None
        args, kwargs = examples.map(Tensor.clone)
        wanted = _numbers(model.forward(*args, **kwargs))
    return max(filter(None, starmap(_off, zip(found, wanted, strict=True))), default=None)


def _off(one: Tensor, other: Tensor) -> float | None:
    """Return how far values differ that do, by their own mean: others may be a mask's fill."""
    if one.shape != other.shape:
        return float("inf")
    differs = (one != other) & one.isfinite() & other.isfinite()
    if differs.double().mean() < _FEW:
        return None
    one, other = one[differs], other[differs]
    off = float((one - other).abs().max() / other.abs().mean().clamp(min=1e-12))
    return off if off > _ROUNDING.get(other.dtype, 2e-2) else None


def _numbers(output: Any) -> list[Tensor]:
    tensors = (leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor))
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[Any]:
    """Restore buffers and random state; yield what tells whether numbers were drawn."""
    before, state = [(b, b.clone()) for b in model.buffers()], random_state()
    try:
        yield lambda: any(map(_differ, leaves_of(state), leaves_of(random_state())))
    finally:
        restore_random_state(state)
        for buffer, value in before:
            buffer.copy_(value)


def _differ(one: Any, other: Any) -> bool:
    return not torch.equal(one, other) if isinstance(one, Tensor) else one != other
