"""What a forward does by torch.func: masks of indices are kept, and all else is refused.

    vmap(vmap(lambda q, k: k <= q))(qs, ks)   ->   (ks[:, None] <= qs).expand(k, q).permute(1, 0)

Torch's own nodes for a vmap open and close it as they run, which no pass can follow. In one that
makes a mask each value is one whole number or truth, so what computes one computes all at once.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any
from unittest.mock import patch

import torch
from torch import Tag, Tensor, fx
from torch._functorch import eager_transforms, predispatch
from torch._ops import OpOverload
from torch.autograd import forward_ad

from ...errors import CaptureError
from ..user_code import Line, current_line

__all__ = ["no_derivatives", "write_out_vmaps"]

_aten = torch.ops.aten
_NESTING = (
    predispatch.lazy_load_decompositions,
    predispatch._vmap_increment_nesting,
    predispatch._vmap_decrement_nesting,
)
_ASSERT = _aten._assert_tensor_metadata.default  # which is not copied
_FLAT_APPLY = torch.ops.higher_order.flat_apply
_INDEX = "torch._dynamo._trace_wrapped_higher_order_op.ModIndex"  # mask[i, j] of a batch of i, j
_VIEWS = (_aten.unsqueeze.default, _aten.expand.default)  # which a vmap leaves unused
# Besides those that torch tags, they compute each element from those at its place.
_POINTWISE = {_aten.__and__, _aten.__or__, _aten.where, _aten.to, _aten.floor_divide}
_POINTWISE |= {_aten.new_ones, _aten.new_zeros, _aten.new_full, _aten.alias, _aten.detach}
_DERIVATIVES = {
    (eager_transforms, "grad_increment_nesting"): "torch.func.grad, vjp or jacrev",
    (eager_transforms, "jvp_increment_nesting"): "torch.func.jvp or jacfwd",
    (forward_ad, "enter_dual_level"): "torch.autograd.forward_ad",
}


def write_out_vmaps(exported: fx.GraphModule) -> None:
    """Replace the nodes of vmaps in an exported graph and in its regions.

    Raises:
        CaptureError: for a vmap of other values than single whole numbers and truths.
    """
    for module in exported.modules():
        if isinstance(module, fx.GraphModule):
            first = next(filter(_is_of_functorch, module.graph.nodes), None)
            if first is not None and not _write_out(module.graph):
                raise CaptureError(
                    f"the forward uses torch.vmap at {_line(first)}, for more than a mask of "
                    "indices: a graph cannot keep its values apart from each other. Write it for "
                    "whole batches"
                )


@contextmanager
def no_derivatives() -> Iterator[None]:
    """Refuse a forward that asks for derivatives, of which export keeps constants."""
    captures = get_ident()

    def refused(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def enter(*args: Any, **kwargs: Any) -> Any:
            if get_ident() != captures:
                return original(*args, **kwargs)
            raise CaptureError(
                f"the forward computes a derivative at {current_line()}, by {kind}, which a graph "
                "does not keep: write the derivative out"
            )

        return enter

    with ExitStack() as stack:
        for (owner, name), kind in _DERIVATIVES.items():
            new = refused(kind, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, new))
        yield


class _OtherError(Exception):
    """A vmap has more than single whole numbers and truths."""


def _write_out(graph: fx.Graph) -> bool:
    """Replace the nodes of the vmaps in a graph; tell whether that could be done."""
    for node in reversed(graph.nodes):
        if node.target in _VIEWS and not node.users:
            graph.erase_node(node)
    inside = set[fx.Node]()  # their dimensions are the indices; those of the outermost vmap last
    left: dict[fx.Node, tuple[Any, list[Any]]] = {}  # what leaves a vmap, and the sizes of such
    try:
        for node in graph.nodes:
            taken = set(node.all_input_nodes)
            if node.target is _ASSERT:
                continue
            if node.target in _NESTING:
                _require(not node.args or node.args[-1] == "error")  # or random numbers differ
                graph.erase_node(node)
            elif node.target is predispatch._add_batch_dim:
                value, dimension, level = node.args
                _require(dimension == 0 and value not in inside and _value(value).dim() == 1)
                inside.add(_replace(node, _aten.view.default, value, [-1] + [1] * (level - 1)))
            elif node.target is predispatch._remove_batch_dim:
                value, level, size, dimension = node.args
                value, sizes = left.get(value, (value, []))
                _require(dimension == 0 and _is_single(value))
                left[node] = value, [*sizes, size]
                if level == 1:
                    _leave(node, *left[node])
            elif node.target is _FLAT_APPLY or not taken.isdisjoint(inside):
                inside.add(_map(node, inside))
            else:
                _require(not _is_of_functorch(node) and taken.isdisjoint(left))
    except _OtherError:
        return False
    for node in inside:  # it has the shape of one value
        node.meta = {key: node.meta[key] for key in node.meta.keys() - {"val", "tensor_meta"}}
    for node in reversed(left):
        graph.erase_node(node)
    return True


def _map(node: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """Return the node that makes all values of a node inside vmaps at once."""
    _require(_is_single(node))
    if node.target is _FLAT_APPLY:
        _, _, function, values, *indices = node.args
        _require(function == _INDEX and values not in inside)
        _require(all(_is_single(index) and _value(index).dtype != torch.bool for index in indices))
        return _replace(node, _aten.index.Tensor, values, indices)
    target, taken = node.target, [_value(n) for n in node.all_input_nodes]
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        raise _OtherError
    _require(Tag.pointwise in target.tags or target.overloadpacket in _POINTWISE)
    dtypes = {value.dtype for value in taken if isinstance(value, Tensor)} - {torch.bool}
    _require(len(dtypes) <= 1)  # of two, that of more dimensions would win
    return node


def _leave(node: fx.Node, value: fx.Node, sizes: list[Any]) -> None:
    """Replace what leaves the outermost vmap by a tensor with a dimension for each index."""
    whole = _insert(node, _aten.expand.default, value, sizes)
    turned = _insert(node, _aten.permute.default, whole, [*reversed(range(len(sizes)))])
    _replace(node, _aten.contiguous.default, turned)


def _replace(node: fx.Node, target: OpOverload, *args: Any) -> fx.Node:
    new = _insert(node, target, *args)
    node.replace_all_uses_with(new)
    new.meta = dict(node.meta)
    if node.target is not predispatch._remove_batch_dim:
        node.graph.erase_node(node)
    return new


def _insert(node: fx.Node, target: OpOverload, *args: Any) -> fx.Node:
    with node.graph.inserting_before(node):
        return node.graph.call_function(target, args)


def _value(node: Any) -> Any:
    return node.meta.get("val")


def _is_single(node: Any) -> bool:
    """Tell whether a value is one whole number or truth, for which no gradient is."""
    value = _value(node)
    exact = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    return exact and value.dim() == 0


def _require(holds: Any) -> None:
    if not holds:
        raise _OtherError


def _is_of_functorch(node: fx.Node) -> bool:
    return "_functorch" in getattr(node.target, "__module__", "")


def _line(node: fx.Node) -> Line:
    """Return the line of the model that made a node."""
    found = re.findall(r'File "(.+)", line (\d+)', node.meta.get("stack_trace") or "")
    name, number = found[-1] if found else ("?", 0)
    return Line((name, int(number)))
