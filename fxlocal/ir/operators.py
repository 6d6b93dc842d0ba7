"""What is known of operators by their names: which make sizes, containers, and which overwrite."""

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..facts import TensorSpec
from .nodes import module_of

__all__ = ["is_container", "is_inplace", "is_plain", "overwrites"]

_TENSORS = (torch.Tensor, TensorSpec)  # in meta["val"]
_SIZE_METHODS = {"size", "dim", "numel", "ndimension", "stride", "is_floating_point", "get_device"}


_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout"}


def is_plain(node: fx.Node) -> bool:
    """Tell whether ``node`` is surely no tensor: a size, a dtype, or arithmetic of such.

    Its value tells, if a run on fake tensors or `torch.export` noted it; else how it is made.
    """
    if "val" in node.meta:
        return not _holds_tensor(node.meta["val"])
    if node.op == "call_method" and node.target in _SIZE_METHODS:
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SIZE_ATTRIBUTES
    if torch.ops.aten.sym_size.int is node.target:
        return True
    of_python = getattr(node.target, "__module__", "") in ("_operator", "math", "builtins")
    inputs = node.all_input_nodes
    return of_python and bool(inputs) and all(is_plain(i) for i in inputs)


def _holds_tensor(value: object) -> bool:
    return any(isinstance(leaf, _TENSORS) for leaf in pytree.tree_leaves(value))


_CONTAINER_CALLS = {
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_chunk", "meshgrid"),
    *(
        "max",
        "min",
        "median",
        "mode",
        "sort",
        "topk",
        "kthvalue",
        "aminmax",
        "std_mean",
        "var_mean",
    ),
}


def is_container(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether ``node`` may be a tuple, list or other container rather than one tensor.

    It shows in how the value is made, or used: an item or an attribute is taken of it. A call of
    a module or function from outside torch, whose result only running it would tell, counts too.
    """
    if "val" in node.meta:
        return not isinstance(node.meta["val"], _TENSORS)
    if any(_takes_part(user) for user in node.users):
        return True
    if node.op == "call_method":
        return node.target in _CONTAINER_CALLS
    if node.op == "call_module":
        module = module_of(gm, node)
        returns_tuple = isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase))
        return returns_tuple or not type(module).__module__.startswith("torch.nn.")
    home = getattr(node.target, "__module__", None) or ""
    of_torch = home.startswith("torch") or home in ("_operator", "math", "builtins")
    return not of_torch or getattr(node.target, "__name__", "") in _CONTAINER_CALLS


def _takes_part(user: fx.Node) -> bool:
    if user.target is getattr:
        return user.args[1] not in _SIZE_ATTRIBUTES
    return user.target is operator.getitem and isinstance(user.args[1], int)


_INPLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "ipow"}


def is_inplace(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether ``node`` overwrites its first argument."""
    if node.op == "call_module":
        return bool(getattr(module_of(gm, node), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return node.target._schema.is_mutable
        name = getattr(node.target, "__name__", "")
        in_place = name in _INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
        return in_place or node.kwargs.get("inplace") is True
    return False


_VIEWS = {"view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "detach"}
_VIEWS |= {"contiguous", "chunk", "split", "getitem", "view_as", "expand", "unbind", "movedim"}


def overwrites(gm: fx.GraphModule, node: fx.Node, value: fx.Node) -> bool:
    """Tell whether ``node`` changes ``value``, or a view of it, in place."""
    return is_inplace(gm, node) and any(origin is value for origin in _origins(gm, node))


def _origins(gm: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """Yield the first input of ``node``, and what that may be a view of."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        yield node
        views = isinstance(module_of(gm, node), (nn.Identity, nn.Flatten, nn.Unflatten))
        if not (views or is_inplace(gm, node) or _name(node) in _VIEWS):
            return


def _name(node: fx.Node) -> str:
    """Return the plain name of what a node calls."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return str(getattr(node.target, "__name__", ""))
