"""Find the layers of a graph: convolutions of every dimension, transposed ones, and linear.

A layer is one *call*, in execution order, in any of three forms: a module (``call_module``
`torch.nn.Conv2d`), a function (`torch.nn.functional.conv2d` with a fetched weight), or an ATen
call (``aten.conv2d.default``) as `torch.export` writes them. A module called twice is two layers
with one path and one weight. A product of something that depends on an input with a parameter, of
two dimensions, is a linear layer too: ``x @ w``, ``x @ w.t()``, ``torch.addmm(bias, x, w)``.

    %conv1: call_module conv1(%x)             -> Layer(0, "conv1", "conv", ...)
    %linear: call_function linear(%relu, %w)  -> Layer(1, "fc", "linear", ...)

Limits: layers inside a leaf module (`torch.nn.MultiheadAttention`) or a wrapped function are not
seen; they count as computation between layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxlocal.facts import ConvGeometry, Layer
from fxlocal.ir.nodes import computations, module_of
from fxlocal.ir.operators import (
    arguments_of,
    is_plain,
    is_product,
    layer_arguments,
    transposed_value,
)

__all__ = ["find_layers", "find_leaves", "find_names"]

_CONV_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_MODULES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYER_MODULES = (*_CONV_MODULES, *_TRANSPOSED_MODULES, nn.Linear)

_aten = torch.ops.aten
_CONV_ARGS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGS = (*_CONV_ARGS[:5], "output_padding", "groups", "dilation")
_GENERAL_ARGS = (*_CONV_ARGS[:6], "transposed", "output_padding", "groups")
# call target -> (number of spatial dimensions, argument names)
_CONV_CALLS: dict[Any, tuple[int, tuple[str, ...]]] = {
    F.conv1d: (1, _CONV_ARGS),
    F.conv2d: (2, _CONV_ARGS),
    F.conv3d: (3, _CONV_ARGS),
    _aten.conv1d.default: (1, _CONV_ARGS),
    _aten.conv2d.default: (2, _CONV_ARGS),
    _aten.conv3d.default: (3, _CONV_ARGS),
    _aten.conv1d.padding: (1, _CONV_ARGS),
    _aten.conv2d.padding: (2, _CONV_ARGS),
    _aten.conv3d.padding: (3, _CONV_ARGS),
    F.conv_transpose1d: (1, _TRANSPOSED_ARGS),
    F.conv_transpose2d: (2, _TRANSPOSED_ARGS),
    F.conv_transpose3d: (3, _TRANSPOSED_ARGS),
    _aten.conv_transpose1d.default: (1, _TRANSPOSED_ARGS),
    _aten.conv_transpose2d.input: (2, _TRANSPOSED_ARGS),
    _aten.conv_transpose3d.input: (3, _TRANSPOSED_ARGS),
}
_LINEAR_CALLS = (F.linear, _aten.linear.default)


def find_layers(gm: fx.GraphModule) -> tuple[Layer, ...]:
    """Return the layers of ``gm`` in execution order; see the module's docstring."""
    named = dict(gm.named_parameters(remove_duplicate=False))
    # An exported call knows its module, but fetches a tied weight by any of its names.
    owners = {id(module): path for path, module in gm.named_modules()}
    found: list[Layer] = []
    active = _depends_on_inputs(gm)
    for node in computations(gm.graph):
        module = module_of(gm, node)
        if module is not None:
            layer = _of_module(len(found), node, module)
        else:
            if is_product(node):
                layer = _of_product(len(found), node, named, active)
            else:
                layer = _of_call(len(found), node, named)
            if layer is not None:
                layer = replace(layer, start=_start(node, active))
            if layer is not None:
                layer = _named_by_owner(layer, node, gm, named, owners)
        if layer is not None:
            found.append(layer)
    return tuple(found)


def find_names(gm: fx.GraphModule, *, layers: Sequence[Layer]) -> dict[str, str]:
    """Return the other names that the model holds its layers by, and which path each means."""
    called = {layer.path for layer in layers}
    fetched = {layer.path for layer in layers if layer.weight == layer.path}  # a bare parameter
    names: dict[str, str] = {}
    for kept, every, paths in (
        (gm.named_modules(), gm.named_modules(remove_duplicate=False), called),
        (gm.named_parameters(), gm.named_parameters(remove_duplicate=False), fetched),
    ):
        first = {id(value): path for path, value in kept}
        named = ((name, first[id(value)]) for name, value in every)
        names |= {name: path for name, path in named if name not in called and path in paths}
    return names


def find_leaves(gm: fx.GraphModule, *, layers: Sequence[Layer]) -> dict[str, str]:
    """Return the modules that are kept whole, by each of their names, and their call's node."""
    known = {layer.node for layer in layers}
    calls: dict[int, str] = {}
    for node in computations(gm.graph):
        module = module_of(gm, node)
        if module is not None and node.name not in known and next(module.children(), None):
            calls.setdefault(id(module), node.name)
    every = gm.named_modules(remove_duplicate=False) if calls else ()
    return {path: calls[id(module)] for path, module in every if id(module) in calls}


def _named_by_owner(
    layer: Layer,
    node: fx.Node,
    gm: fx.GraphModule,
    named: dict[str, nn.Parameter],
    owners: dict[int, str],
) -> Layer:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    if layer.weight is None:  # computed, as by a parametrisation
        own = bool(path) and isinstance(gm.get_submodule(path), _LAYER_MODULES)
        return replace(layer, path=path) if own else layer
    weight = f"{path}.weight"
    if named.get(weight) is not named[layer.weight]:
        return layer
    path = owners.get(id(gm.get_submodule(path)), path)
    return replace(layer, path=path, weight=f"{path}.weight")


def _of_module(index: int, node: fx.Node, module: nn.Module) -> Layer | None:
    if isinstance(module, (*_CONV_MODULES, *_TRANSPOSED_MODULES)):
        kind, geometry = "conv", _module_geometry(module)
    elif isinstance(module, nn.Linear):
        kind, geometry = "linear", None
    else:
        return None
    path = str(node.target)
    # A parametrised weight is computed, no parameter of the module itself.
    weight = None if module._parameters.get("weight") is None else f"{path}.weight"
    pre = node.all_input_nodes[0].name
    return Layer(index, path, kind, node.name, weight, pre, geometry)  # type: ignore[arg-type]


def _of_call(index: int, node: fx.Node, named: dict[str, nn.Parameter]) -> Layer | None:
    conv: tuple[int, bool] | None = None  # number of spatial dimensions, whether transposed
    if node.op != "call_function":
        return None
    if node.target in _LINEAR_CALLS:
        args = arguments_of(node, ("input", "weight", "bias"))
    elif node.target in _CONV_CALLS:
        dimensions, names = _CONV_CALLS[node.target]
        args, conv = arguments_of(node, names), (dimensions, names is _TRANSPOSED_ARGS)
    elif node.target is _aten.convolution.default:
        args = arguments_of(node, _GENERAL_ARGS)
        conv = len(args["stride"]), args["transposed"]
    else:
        return None
    weight_node, pre = args["weight"], args["input"]
    if not isinstance(pre, fx.Node):
        return None
    fetched = isinstance(weight_node, fx.Node) and weight_node.op == "get_attr"
    weight = str(weight_node.target) if fetched and str(weight_node.target) in named else None
    path = (weight or node.name).removesuffix(".weight")
    if conv is None:
        return Layer(index, path, "linear", node.name, weight, pre.name)
    kernel = tuple(named[weight].shape[2:]) if weight else (1,) * conv[0]
    geometry = _geometry(kernel, args, conv[1])
    return Layer(index, path, "conv", node.name, weight, pre.name, geometry)


def _of_product(
    index: int, node: fx.Node, named: dict[str, nn.Parameter], active: set[fx.Node]
) -> Layer | None:
    args = layer_arguments(node)
    pre, operand, bias = (args.get(name) for name in ("input", "weight", "bias"))
    if not isinstance(operand, fx.Node) or pre not in active:
        return None
    fetched = transposed_value(operand) or operand
    weight = named.get(str(fetched.target)) if fetched.op == "get_attr" else None
    if weight is None or weight.dim() != 2 or args.get("beta", 1) != 1 or args.get("alpha", 1) != 1:
        return None
    transposed = fetched is operand
    if bias is not None:
        added = named.get(str(bias.target)) if isinstance(bias, fx.Node) else None
        if added is None or added.shape != weight.shape[1 if transposed else 0 :][:1]:
            return None
    path = str(fetched.target)
    name = path.removesuffix(".weight")
    return Layer(index, name, "linear", node.name, path, pre.name, transposed=transposed)


def _start(node: fx.Node, active: set[fx.Node]) -> str:
    """Return the first node that computes the weight of the layer ``node``; empty for none.

    Back to where an earlier layer may be.
    """
    waiting, made = [layer_arguments(node).get("weight")], set[fx.Node]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, fx.Node) and value not in active and value.op != "get_attr":
            made.add(value)
            waiting += value.all_input_nodes
    first, at = "", node.prev
    while made and at.op != "root":
        if at in made:
            made.remove(at)
            first = at.name
        elif at.op == "call_module" or any(v.op == "get_attr" for v in at.all_input_nodes):
            break
        at = at.prev
    return first


def _depends_on_inputs(gm: fx.GraphModule) -> set[fx.Node]:
    """Return what depends on an input's numbers: what a layer's input may be."""
    found = set[fx.Node]()
    for node in gm.graph.nodes:
        inside = any(value in found for value in node.all_input_nodes)
        if node.op == "placeholder" or (inside and not is_plain(node)):
            found.add(node)
    return found


def _module_geometry(module: Any) -> ConvGeometry:
    transposed = isinstance(module, _TRANSPOSED_MODULES)
    if module.padding_mode == "zeros":
        return _geometry(module.kernel_size, vars(module), transposed)
    # The module pads its input itself, then pads no more.
    geometry = _geometry(module.kernel_size, {**vars(module), "padding": 0}, transposed)
    pad_input = tuple(module._reversed_padding_repeated_twice)
    return replace(geometry, pad_input=pad_input, pad_mode=module.padding_mode)


def _geometry(kernel: tuple[int, ...], args: Mapping[str, Any], transposed: bool) -> ConvGeometry:
    """Normalise ints, one-element lists and string paddings to one entry per dimension."""
    n, padding = len(kernel), args.get("padding", 0)
    dilation = _per_dimension(args.get("dilation", 1), n)
    pad_input: tuple[int, ...] = ()
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [t // 2 for t in total]
        if any(t % 2 for t in total):  # the odd one goes to the right
            pad_input = tuple(side for t in reversed(total) for side in (0, t % 2))
    return ConvGeometry(
        _per_dimension(args.get("stride", 1), n),
        _per_dimension(padding, n),
        dilation,
        args.get("groups", 1),
        transposed,
        pad_input,
        output_padding=_per_dimension(args.get("output_padding", 0), n) if transposed else (),
    )


def _per_dimension(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) * n if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values
