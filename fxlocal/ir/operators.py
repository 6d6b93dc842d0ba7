"""What is known of operators by their names: families of them, and what a call makes."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from ..facts import Layer, TensorSpec
from .nodes import fetched, module_of

__all__ = [
    "AUGMENTED",
    "CONCATS",
    "DRAWS",
    "DROPOUTS",
    "DROPOUT_MODULES",
    "NORMS",
    "PRODUCTS",
    "SELECTIONS",
    "SUMS",
    "UNREPEATABLE",
    "arguments_of",
    "carries_gradient",
    "is_container",
    "is_inplace",
    "is_plain",
    "is_product",
    "last_changes",
    "layer_arguments",
    "operator_name",
    "origins",
    "overwrites",
    "overwrites_shared",
    "resolution_change",
    "transposed_value",
    "weight_parameters",
]

SUMS = frozenset({"add", "iadd", "add_"})
CONCATS = frozenset({"cat", "concat", "concatenate", "hstack"})
PRODUCTS = frozenset({"mul", "imul", "mul_", "multiply"})
# Each returns a part of its input, or a copy.
SELECTIONS = frozenset({"getitem", "chunk", "split", "tensor_split", "narrow", "select", "slice"})
SELECTIONS |= {"pad", "crop", "center_crop", "contiguous", "clone"}
NORMS = frozenset({"batch_norm", "group_norm", "layer_norm", "instance_norm"})
# Each is its input times a random mask, which is what it returns for ones.
DROPOUTS = frozenset({"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d"})
DROPOUTS |= {"feature_dropout", "stochastic_depth"}
DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Each makes random values that depend on nothing learned.
DRAWS = frozenset({"rand", "randn", "rand_like", "randn_like", "randint", "randint_like"})
DRAWS |= {"randperm", "bernoulli", "normal", "multinomial", "poisson"}
# Each mixes random numbers into its input in a way that no mask repeats.
UNREPEATABLE = frozenset({"rrelu", "rrelu_", "alpha_dropout", "alpha_dropout_"})
UNREPEATABLE |= {"feature_alpha_dropout", "feature_alpha_dropout_", "gumbel_softmax"}
UNREPEATABLE |= {"bernoulli_", "normal_", "uniform_"}

# Products of matrices, and what their arguments are where they are layers.
_OPERANDS: dict[str, tuple[str, ...]] = {
    "addmm": ("bias", "input", "weight"),
    "mm": ("input", "weight"),
    "matmul": ("input", "weight"),
}

_TENSORS = (torch.Tensor, TensorSpec)  # in meta["val"]
_SIZE_METHODS = {"size", "dim", "numel", "ndimension", "stride", "is_floating_point", "get_device"}
_SIZE_METHODS |= {"item", "nelement", "element_size", "is_contiguous"}
_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout"}
_CONTAINERS = {"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_chunk"}
_CONTAINERS |= {"meshgrid", "max", "min", "median", "mode", "sort", "topk", "kthvalue", "aminmax"}
_CONTAINERS |= {"std_mean", "var_mean"}
# Each may share memory with its input.
_VIEWS = {"view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "detach"}
_VIEWS |= {"contiguous", "chunk", "split", "getitem", "view_as", "expand", "unbind", "movedim"}
_VIEWS |= {"narrow", "select", "slice", "tensor_split", "swapaxes", "swapdims", "moveaxis", "t"}
_VIEWS |= {"unflatten", "expand_as", "reshape_as", "diagonal", "ravel", "unfold", "to", "type"}
_VIEWS |= {"float", "double", "half", "bfloat16", "real", "alias", "split_with_sizes", "type_as"}
_VIEWS |= {"adjoint", "as_strided", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_to"}
_VIEWS |= {"conj", "as_tensor", "asarray", "as_subclass", "linalg_diagonal", "rename", "align_to"}
_VIEWS |= {"cpu", "cuda", "dsplit", "hsplit", "vsplit", "pos", "positive", "resolve_conj"}
_VIEWS |= {"resolve_neg", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "sum_to_size"}
_VIEWS |= {"view_as_real", "view_as_complex", "to_dense", "imag", "int", "long", "bool"}
# Each may, with any of its inputs.
_VIEWS_OF_EACH = {"broadcast_tensors", "meshgrid", "cartesian_prod", "einsum"}
_VIEW_ATTRIBUTES = {"data", "T", "mT", "H", "mH", "real", "imag"}
# Each returns what no gradient flows through.
_STOPS = {"detach", "argmax", "argmin", "argsort", "eq", "ne", "gt", "lt", "ge", "le", "isnan"}
AUGMENTED = {"iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "ipow", "ifloordiv", "imod"}
AUGMENTED |= {"imatmul", "ilshift", "irshift"}
_FALLS = ("pool", "pixel_unshuffle")
_RISES = ("interpolate", "upsample", "pixel_shuffle", "unpool", "conv_transpose")


def operator_name(node: fx.Node) -> str:
    """Return the plain name of what ``node`` calls: "add" for a function, method or ATen overload.

    Empty for the call of a module, for an input and for a fetched attribute.
    """
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return str(getattr(node.target, "__name__", ""))


def arguments_of(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a call by name; ``names`` are those of its positional ones."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def layer_arguments(node: fx.Node) -> dict[str, Any]:
    """Return a layer's input, weight and bias by these names, and what else it is called with.

    Of a product, ``x @ weight`` or ``addmm(bias, x, weight)``, the weight is the right operand.
    """
    names = _OPERANDS.get(operator_name(node), ("input", "weight", "bias"))
    found = arguments_of(node, names)
    if names[-1] == "weight":  # its keywords are named otherwise
        other = {"self": names[0], "input": names[0], "mat1": "input"}
        other |= {"mat2": "weight", "other": "weight"}
        by_keyword = {other.get(name, name): value for name, value in node.kwargs.items()}
        found = {**dict(zip(names, node.args, strict=False)), **by_keyword}
    return found


def is_product(node: fx.Node) -> bool:
    """Tell whether ``node`` multiplies matrices: ``x @ y``, or ``addmm(bias, x, y)``."""
    return operator_name(node) in _OPERANDS


def transposed_value(node: fx.Node) -> fx.Node | None:
    """Return the matrix that ``node`` is the transpose of, if it is one."""
    name, args = operator_name(node), node.args
    if node.target is getattr:
        found = args[1] in ("T", "mT")
    else:
        dims = args[1] if name == "permute" and len(args) == 2 else args[1:]
        swaps = sorted(d % 2 for d in pytree.tree_leaves(dims) if isinstance(d, int)) == [0, 1]
        found = name in ("t", "mT", "numpy_T") or (name in ("transpose", "permute") and swaps)
    return node.all_input_nodes[0] if found else None


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


def carries_gradient(node: fx.Node) -> bool:
    """Tell whether a gradient may flow back through ``node``: no size, index or comparison."""
    if is_plain(node) or operator_name(node) in _STOPS:
        return False
    tensors = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, _TENSORS)]
    return not tensors or any(_is_floating(tensor) for tensor in tensors)


def _is_floating(tensor: torch.Tensor | TensorSpec) -> bool:
    dtype = getattr(torch, tensor.dtype) if isinstance(tensor, TensorSpec) else tensor.dtype
    return dtype.is_floating_point or dtype.is_complex


def is_container(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether ``node`` may be a tuple, list or other container rather than one tensor.

    It shows in how the value is made, or used: an item or an attribute is taken of it. A call of
    a module or function from outside torch, whose result only running it would tell, counts too.
    """
    if "val" in node.meta:
        return not isinstance(node.meta["val"], _TENSORS)
    if any(_takes_part(user) for user in node.users):
        return True
    if node.op == "call_module":
        module = module_of(gm, node)
        returns_tuple = isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase))
        return returns_tuple or not type(module).__module__.startswith("torch.nn.")
    if operator_name(node) in _CONTAINERS:
        return True
    return node.op != "call_method" and not _is_of(node, *_TORCHS)


_TORCHS = ("torch", "_operator", "math", "builtins")


def _is_of(node: fx.Node, *homes: str) -> bool:
    """Tell whether the function that ``node`` calls is of a module that begins so."""
    return (getattr(node.target, "__module__", None) or "").startswith(homes)


def _is_users_function(node: fx.Node) -> bool:
    """Tell whether ``node`` calls a function of the user's, which may return its input itself."""
    return node.op == "call_function" and not _is_of(node, *_TORCHS, "fxlocal")


def _takes_part(user: fx.Node) -> bool:
    if user.target is getattr:
        return user.args[1] not in _SIZE_ATTRIBUTES
    return user.target is operator.getitem and isinstance(user.args[1], int)


def is_inplace(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether ``node`` overwrites its first argument."""
    if node.op == "call_module":
        return bool(getattr(module_of(gm, node), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = operator_name(node)
    if name.strip("_") == "setitem" or (name.endswith("_") and not name.endswith("__")):
        return True
    return node.op == "call_function" and (name in AUGMENTED or node.kwargs.get("inplace") is True)


def overwrites(gm: fx.GraphModule, node: fx.Node, value: fx.Node) -> bool:
    """Tell whether ``node`` changes ``value`` in place, or what may share memory with it."""
    outs = pytree.tree_leaves(node.kwargs.get("out"))
    changed = [out for out in outs if isinstance(out, fx.Node)]
    if is_inplace(gm, node):
        changed += node.all_input_nodes[:1]
    if not changed:
        return False
    owners = set(origins(gm, value))
    return any(owners & set(origins(gm, one)) for one in changed)


def last_changes(gm: fx.GraphModule) -> dict[int, fx.Node]:
    """Return the last node that changes each fetched tensor in place, by the tensor's id.

    Also through a view of it, such as ``.data``.
    """
    found: dict[int, fx.Node] = {}
    for node in gm.graph.nodes:
        if is_inplace(gm, node):
            values = (v for v in origins(gm, node.all_input_nodes[0]) if v.op == "get_attr")
            found |= {id(fetched(gm, value)): node for value in values}
    return found


def overwrites_shared(
    gm: fx.GraphModule, nodes: Iterable[fx.Node], values: Iterable[fx.Node]
) -> tuple[fx.Node, list[fx.Node]] | None:
    """Return the first of ``nodes`` that changes two or more of ``values`` at once, and these.

    They may share memory, so that one that is detached or cloned no longer follows the other.
    """
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for value in values:
        for owner in origins(gm, value):
            sharing.setdefault(owner, []).append(value)
    twins = dict.fromkeys(one for group in sharing.values() if len(group) > 1 for one in group)
    for node in nodes if twins else ():
        changed = [value for value in twins if overwrites(gm, node, value)]
        if len(changed) > 1:
            return node, changed
    return None


def origins(gm: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """Yield ``node``, and what it may be a view of."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        if operator_name(node) in _VIEWS_OF_EACH or _is_users_function(node):
            waiting += node.all_input_nodes
        elif node.all_input_nodes and _may_be_view(gm, node):
            waiting.append(node.all_input_nodes[0])


def _may_be_view(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a value may share memory with its first input."""
    if is_inplace(gm, node):
        return True
    if (module := module_of(gm, node)) is not None:
        idle = isinstance(module, _DropoutNd) and (module.p == 0 or not module.training)
        return idle or isinstance(module, (nn.Identity, nn.Flatten, nn.Unflatten))
    name = operator_name(node)
    if name in DROPOUTS or name in ("alpha_dropout", "feature_alpha_dropout"):
        options = arguments_of(node, ("input", "p", "training"))
        drops = options.get("training", name in DROPOUTS)  # else it returns its input itself
        return not drops or options.get("p") == 0
    return name in _VIEWS or (node.target is getattr and node.args[1] in _VIEW_ATTRIBUTES)


def resolution_change(gm: fx.GraphModule, node: fx.Node) -> Literal["fall", "rise"] | None:
    """Tell whether ``node`` lets the resolution fall or rise, as far as its name says."""
    module = module_of(gm, node)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "rise" if max(module.stride) > 1 else None
    if isinstance(module, nn.modules.conv._ConvNd):
        return "fall" if max(module.stride) > 1 else None
    name = type(module).__name__ if module is not None else operator_name(node)
    name = name.lower().replace("pixelshuffle", "pixel_shuffle")
    if any(word in name for word in _RISES):
        return "rise"
    if any(word in name for word in _FALLS):
        return "fall"
    if node.target in (F.conv1d, F.conv2d, F.conv3d) or name.startswith("conv"):
        stride = node.kwargs.get("stride", node.args[3] if len(node.args) > 3 else 1)
        steps = (stride,) if isinstance(stride, int) else tuple(stride)  # type: ignore[arg-type]
        return "fall" if max(steps) > 1 else None
    return None


def weight_parameters(gm: fx.GraphModule, layer: Layer, node: fx.Node) -> list[nn.Parameter]:
    """Return the parameters that make up a layer's weight: one, unless it is computed.

    None if it is fixed: a buffer such as a blur's filter, an input, or made of such and of sizes.
    """
    if layer.weight is not None:
        return [gm.get_parameter(layer.weight)]
    if (module := module_of(gm, node)) is not None:
        # A bias may be computed too: bias_orig, parametrizations.bias.original
        return [p for name, p in module.named_parameters() if "bias" not in name]
    named = dict(gm.named_parameters(remove_duplicate=False))
    waiting, seen = [node.kwargs.get("weight") or node.args[1]], dict[fx.Node, None]()
    found: list[nn.Parameter] = []
    while waiting:
        value = waiting.pop()
        if isinstance(value, fx.Node) and value not in seen and not is_plain(value):
            seen[value] = None
            waiting += value.all_input_nodes
            if value.op == "get_attr" and str(value.target) in named:
                found.append(named[str(value.target)])
            elif (module := module_of(gm, value)) is not None:
                found += module.parameters()
    return found
