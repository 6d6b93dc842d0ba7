"""Small functions on the values that cross a boundary or feed a local rule."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "NOT_GIVEN",
    "NotGiven",
    "add_where_shapes_agree",
    "channels_last",
    "clone_all",
    "detach_all",
    "instance_norm_by_statistics",
    "is_plain",
    "laid_out_as",
    "leave_no_gradient",
    "leaves_at",
    "leaves_of",
    "own_rows",
    "require_given",
    "require_shape",
    "require_value",
]


class NotGiven(Enum):
    """The default of an optional input whose own default generated code cannot say."""

    NOT_GIVEN = "not given"


NOT_GIVEN = NotGiven.NOT_GIVEN


def detach_all(value: Any) -> Any:
    """Return ``value``, any nesting of containers, with each tensor detached."""
    return pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, value)


def clone_all(value: Any) -> Any:
    """Return ``value``, any nesting of containers, with each tensor cloned."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def leaves_at(value: Any, name: str, paths: Sequence[str]) -> list[Any]:
    """Return what lies in the input ``name`` at ``paths``, as "['mask']" or "[0]".

    Raises:
        RuntimeError: if it has others, which the captured graph would pass over.
    """
    found = {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(value)[0]}
    if found.keys() != set(paths):
        has = f"is of class {type(value).__name__}" if "" in found else f"has {_listed(found)}"
        raise RuntimeError(
            f"the input {name!r} {has}; the captured graph holds for {_listed(paths)}. Capture "
            "again with such an example"
        )
    return [found[path] for path in paths]


def _listed(paths: Iterable[str]) -> str:
    return ", ".join(paths) or "nothing"


def leaves_of(value: Any) -> Iterator[Any]:
    """Yield what is in any nesting of containers, dicts of any class, and plain objects."""
    if isinstance(value, Tensor):  # most often, and asked in each step
        yield value
        return
    for leaf in pytree.tree_leaves(value):
        kind: Any = type(leaf)
        if is_dataclass(leaf) and not isinstance(leaf, type):
            yield from leaves_of([getattr(leaf, field.name) for field in fields(leaf)])
        elif isinstance(leaf, dict):
            yield from leaves_of(list(leaf.values()))
        elif hasattr(leaf, "__dict__") and is_plain(kind):
            yield from leaves_of(list(vars(leaf).values()))
        else:
            yield leaf


@cache
def is_plain(kind: Any) -> bool:
    """Tell whether an object of ``kind`` is its attributes, and is copied and pickled by them."""
    own = [(name, value) for base in kind.__mro__[:-1] for name, value in vars(base).items()]
    told = {name for name, value in own if name != "__slots__" or value}  # an ABC has empty ones
    special = ("__slots__", "__setstate__", "__getstate__", "__reduce__", "__reduce_ex__")
    makes: Any = kind.__new__
    return makes is object.__new__ and told.isdisjoint(special)


def channels_last(x: Tensor) -> Tensor:
    """Return images of many channels, (B, C, H, W) on a CPU, channels-last; all else as it is."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
        return x
    if not _is_channels_first(x) or x.shape[1] < 8:  # of few, the copies cost more
        return x
    return x.contiguous(memory_format=torch.channels_last)


def laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """Return ``y`` channels-first where ``x`` is, for the next layer's bits may hang on it."""
    if _is_channels_first(x) and y.is_contiguous(memory_format=torch.channels_last):
        return y.clone(memory_format=torch.contiguous_format)  # of one pixel, it is both
    return y


def _is_channels_first(x: Tensor) -> bool:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 4 and x.is_contiguous() and not last


def add_where_shapes_agree(post: Tensor, skip: Tensor) -> Tensor:
    """Return ``post + skip`` where their shapes agree, else ``post`` (LoCal+SGD, section 3.7)."""
    return post + skip if post.shape == skip.shape else post


def own_rows(post: Tensor, shaped: Tensor, output: Tensor) -> Tensor:
    """Return ``post`` as rows like ``output``, which the forward gave the shape of ``shaped``.

    It is summed to that shape where a residual sum made it larger.
    """
    return post.sum_to_size(shaped.shape).reshape(output.shape)


def instance_norm_by_statistics(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    num_spatial: int,
) -> Tensor:
    """Return what an instance norm that tracks computes in evaluation.

    Args:
        input: shape (B, C, *) or, of one sample alone, (C, *).
        mean: running mean, shape (C,).
        var: running variance, shape (C,).
        weight: shape (C,), or None.
        bias: shape (C,), or None.
        eps: added to the variance.
        num_spatial: how many dimensions * stands for.

    Returns:
        The normalised input, of its shape.
    """
    batch = input if input.dim() == num_spatial + 2 else input.unsqueeze(0)
    normalised = F.instance_norm(batch, mean, var, weight, bias, False, 0.0, eps)
    return normalised.reshape(input.shape)


def require_shape(
    value: Tensor,
    bounds: Sequence[tuple[int | None, int | None]],
    ties: Sequence[tuple[int, Tensor, int]] = (),
) -> Tensor:
    """Return ``value`` if each size lies within its (least, largest) bound, None for no bound.

    Each of ``ties`` is a dimension that is as large as one of another tensor, given with it.

    Raises:
        RuntimeError: if a size does not; the graph would take a branch that the model does not.
    """
    for dimension, (size, (low, high)) in enumerate(zip(value.shape, bounds, strict=True)):
        if (low is not None and size < low) or (high is not None and size > high):
            wanted = f"{low}" if low == high else f"{low} to {'any' if high is None else high}"
            raise RuntimeError(
                f"an input of shape {tuple(value.shape)}: the captured graph holds for a size of "
                f"{wanted} in dimension {dimension}. Capture again with such an example"
            )
    for dimension, other, at in ties:
        if value.shape[dimension] != other.shape[at]:
            raise RuntimeError(
                f"an input of shape {tuple(value.shape)}: the captured graph holds where its size "
                f"in dimension {dimension} is the {other.shape[at]} in dimension {at} of one of "
                f"shape {tuple(other.shape)}, as in the example. Capture again with such an example"
            )
    return value


def require_value(value: Any, expected: Any, name: str = "") -> None:
    """Refuse another value of an input that is no tensor than the one that the graph has fixed."""
    is_tensor = isinstance(value, Tensor)
    if value is not expected and (is_tensor or value != expected):
        told = f"a tensor of shape {tuple(value.shape)}" if is_tensor else repr(value)
        raise RuntimeError(
            f"an input {f'{name!r} ' if name else ''}of {told}: the graph was captured with "
            f"{expected!r}, which is fixed in it. Capture again with such an example"
        )


def leave_no_gradient(output: Any, parameters: Sequence[Tensor]) -> None:
    """Have the backward of ``output`` leave ``parameters`` without gradient.

    A penalty over all weights in the user's loss would else have the optimizer move a prefix.
    """

    def drop_gradients() -> None:
        for parameter in parameters:
            parameter.grad = None

    def hook(gradient: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(drop_gradients)

    for value in leaves_of(output) if parameters else ():
        if isinstance(value, Tensor) and value.grad_fn is not None:  # a leaf outlives the call
            value.register_hook(hook)  # type: ignore[no-untyped-call]


def require_given(value: Any, name: str) -> None:
    """Refuse to go without an optional input without which the graph would be another one."""
    if value is None or value is NOT_GIVEN:
        raise RuntimeError(
            f"no {name!r}: the graph was captured with it, and needs it in training. Give it, or "
            "capture again without such an example"
        )
