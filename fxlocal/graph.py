"""The editing vocabulary: what passes ask of a graph, and the few ways in which they change it.

Besides its standard metadata a node carries, in ``node.meta``:

* ``"fxlocal"``: the `Origin` of a node that a rewrite inserted;
* ``"fxlocal_module"``: the index of the local module that it lies in, where there are any;
* ``"fxlocal_contexts"``: the context managers that it runs under, as Python source, outermost
  first. Capture fills them with the model's own (``no_grad``, ``autocast``), a rewrite may add
  more, and the code generator turns them back into ``with`` blocks.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .errors import PlanError, nearest

__all__ = [
    "MODULE_INDEX",
    "Origin",
    "boundary_position",
    "computations",
    "context_changes",
    "contexts",
    "crossing_values",
    "insert_after",
    "insert_before",
    "is_container",
    "is_inplace",
    "is_plain",
    "module_of",
    "node_named",
    "nodes_by_name",
    "parameter_uses",
    "positions",
    "replace_later_uses",
    "unwrapped",
]

MODULE_INDEX = "fxlocal_module"
Target = str | Callable[..., Any]


@dataclass(frozen=True)
class Origin:
    """Which pass inserted a node, and for which layer; frozen, as copied graphs share it."""

    pass_name: str
    layer: str


# --- asking -------------------------------------------------------------------------------------


def unwrapped(network: Any) -> Any:
    """Return the module in a wrapper of `torch.compile` or of CUDA graphs, else what is given."""
    name = "_orig_mod" if isinstance(network, nn.Module) else "network"
    return getattr(network, name, network)


def nodes_by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return each node by its name."""
    return {node.name: node for node in graph.nodes}


def node_named(gm: fx.GraphModule, name: str) -> fx.Node:
    """Return the node called ``name``; PlanError with the nearest names if there is none."""
    names = nodes_by_name(gm.graph)
    if name not in names:
        raise PlanError(f"no node {name!r} in the graph. Nearest: {nearest(name, names)}")
    return names[name]


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return each node's place in execution order."""
    return {node: i for i, node in enumerate(graph.nodes)}


def computations(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that compute: all but inputs, fetched attributes and the output."""
    for node in graph.nodes:
        if node.op in ("call_module", "call_function", "call_method"):
            yield node


def module_of(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that ``node`` calls, if it is a ``call_module``."""
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


def contexts(node: fx.Node) -> tuple[str, ...]:
    """Return the context managers that ``node`` runs under, outermost first, as source."""
    found: tuple[str, ...] = node.meta.get("fxlocal_contexts", ())
    return found


def context_changes(graph: fx.Graph) -> Iterator[tuple[fx.Node, int, tuple[str, ...]]]:
    """Yield each node with how many contexts end, and which begin, before it.

    Fetching an attribute depends on no context, so it ends none.
    """
    opened: tuple[str, ...] = ()
    for node in graph.nodes:
        wanted = opened if node.op == "get_attr" else contexts(node)
        shared = 0
        while opened[shared : shared + 1] == wanted[shared : shared + 1] != ():
            shared += 1
        yield node, len(opened) - shared, wanted[shared:]
        opened = wanted


_SIZE_METHODS = {"size", "dim", "numel", "ndimension", "stride", "is_floating_point", "get_device"}
_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout"}


def is_plain(node: fx.Node) -> bool:
    """Tell whether ``node`` is surely no tensor: a size, a dtype, or arithmetic of such."""
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
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(v) for v in value)
    return isinstance(value, torch.Tensor)


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
        return not isinstance(node.meta["val"], torch.Tensor)
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


def parameter_uses(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str, nn.Parameter]]:
    """Yield ``(node, qualified name, parameter)`` for each use of a parameter by a computation."""
    named = dict(gm.named_parameters(remove_duplicate=False))
    for node in computations(gm.graph):
        module = module_of(gm, node)
        if module is not None:
            for name, parameter in module.named_parameters():
                yield node, f"{node.target}.{name}", parameter
        for used in node.all_input_nodes:
            if used.op == "get_attr" and str(used.target) in named:
                yield node, str(used.target), named[str(used.target)]


def boundary_position(gm: fx.GraphModule, start: str) -> int:
    """Return the position of the boundary just before the node named ``start``."""
    return positions(gm.graph)[node_named(gm, start)]


def crossing_values(gm: fx.GraphModule, start: str) -> list[fx.Node]:
    """Return the values computed before the node named ``start`` and used at or after it.

    Inputs and fetched attributes are no computed values; sizes and other plain values carry no
    gradient. Skip edges over the boundary are included: they are uses like any other.
    """
    order = positions(gm.graph)
    boundary = order[node_named(gm, start)]
    return [
        node
        for node in computations(gm.graph)
        if order[node] < boundary
        and any(order[user] >= boundary for user in node.users)
        and not is_plain(node)
    ]


# --- editing ------------------------------------------------------------------------------------


def insert_before(
    node: fx.Node, op: str, target: Target, args: tuple[Any, ...], origin: Origin, name: str = ""
) -> fx.Node:
    """Insert a node just before ``node``, stamped with ``origin``, by ``name`` if given."""
    with node.graph.inserting_before(node):
        new = node.graph.create_node(op, target, args, name=name or None)
    new.meta["fxlocal"] = origin
    return new


def insert_after(
    node: fx.Node, op: str, target: Target, args: tuple[Any, ...], origin: Origin, name: str = ""
) -> fx.Node:
    """Insert a node just after ``node``, stamped with ``origin``, by ``name`` if given."""
    return insert_before(node.next, op, target, args, origin, name)


def replace_later_uses(old: fx.Node, new: fx.Node, order: dict[fx.Node, int], start: int) -> None:
    """Let every user of ``old`` at position ``start`` or later use ``new`` instead."""
    for user in list(old.users):
        if user is not new and order.get(user, -1) >= start:
            user.replace_input_with(old, new)
