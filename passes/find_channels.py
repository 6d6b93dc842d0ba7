"""Find which channels of which tensors can only be cut together.

Channels are numbered one by one, and followed through the graph: each value has at most one axis of
channels, and each axis of a parameter or buffer that meets it holds some of them. What two values
that are added hold in the same place is one channel, so a residual stream is cut in all its layers
or in none; a concat holds the channels of all its parts, each at its own place.

    %conv1: call_module conv1(%x)        conv1.weight axis 0, conv1.bias        channels 0 1 2 3
    %bn1: call_module bn1(%conv1)        bn1.weight, .bias, .running_mean ...   channels 0 1 2 3
    %conv2: call_module conv2(%relu)     conv2.weight axis 1                    channels 0 1 2 3

| operator | channels |
|---|---|
| convolution, linear layer | its input's end, its output's begin |
| depthwise convolution | an input's are its outputs' |
| grouped convolution | those in the same place of each group are one |
| batch and instance norm, PReLU | each has its own entry in the norm's tensors |
| group norm | those of a group are one, as a part of it would have another mean |
| sum, product | those in the same place are one (squeeze-and-excitation) |
| concat | one after the other |
| flatten, then a linear layer | each has as many features as it has pixels |
| activation, dropout, pooling, interpolation | pass them on |

What leaves the model, or meets an input, or an operator that is not listed, cannot be cut: it is
*fixed*, by a reason that names the operator. So is what a layer norm takes its mean over. A
``view`` is known only as ``x.view(x.size(0), -1)`` and as ``x.view(b, c, 1, 1)`` with the ``c`` of
``x.size()``; else a value that takes their number fixes channels, as slices of them do.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from networkx.utils import UnionFind
from torch import fx, nn

from fxlocal.facts import ChannelAxis, ChannelRole, Channels, ChannelUse, Layer
from fxlocal.ir.additions import ADDITIONS
from fxlocal.ir.nodes import fetched, module_of
from fxlocal.ir.operators import (
    CONCATS,
    DROPOUTS,
    PRODUCTS,
    SUMS,
    arguments_of,
    is_plain,
    layer_arguments,
    operator_name,
)

__all__ = ["find_channels"]

_JOINS = SUMS | PRODUCTS | {"sub", "isub", "sub_", "div", "truediv", "maximum", "minimum"}
_POINTWISE = DROPOUTS | {"relu", "relu_", "relu6", "gelu", "silu", "sigmoid", "tanh", "elu", "mish"}
_POINTWISE |= {"hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "softplus", "celu", "selu"}
_POINTWISE |= {"neg", "exp", "abs", "sqrt", "pow", "square", "clamp", "contiguous", "clone"}
_POINTWISE |= {"detach", "to", "float", "hardswish_", "silu_", "sigmoid_", "expand_as"}
_WINDOWS = ("avg_pool", "max_pool", "lp_pool", "interpolate", "upsample")  # in names of functions
_REDUCTIONS = {"mean", "sum", "amax", "amin"}
_NORM_MODULES = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_MIXING = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)
_MODULES = (nn.Identity, nn.modules.dropout._DropoutNd, nn.Upsample)
_HOMES = ("torch.nn.modules.activation", "torch.nn.modules.pooling", "torch.nn.modules.padding")


def find_channels(gm: fx.GraphModule, *, layers: Sequence[Layer]) -> Channels:
    """Return the channels of the unrewritten graph; see the module's docstring."""
    return _Flow(gm, layers).found()


class _Flow:
    """Follows the channels through a graph."""

    def __init__(self, gm: fx.GraphModule, layers: Sequence[Layer]) -> None:
        self.gm, self.layers = gm, {layer.node: layer for layer in layers}
        self.axes: dict[fx.Node, ChannelAxis] = {}
        self.lengths: dict[fx.Node, ChannelAxis] = {}  # by a shape, or a size: what it is that of
        self.counts: dict[fx.Node, tuple[int, ...]] = {}
        self.same, self.count = UnionFind(), 0
        self.reasons: dict[int, str] = {}
        self.uses: dict[tuple[int, int], ChannelUse] = {}
        self.outputs: dict[str, tuple[int, ...]] = {}
        state = (*gm.named_parameters(), *gm.named_buffers())
        self.names = {id(t): n for n, t in state if not n.startswith(f"{ADDITIONS}.")}
        self.foreign: dict[int, str] = {}  # tensors that something unknown uses
        for node in gm.graph.nodes:
            self.visit(node)

    def found(self) -> Channels:
        """Return what the nodes that were visited have shown."""
        for (tensor, _), use in self.uses.items():
            if tensor in self.foreign:
                self.fix(use.channels, self.foreign[tensor])
        uses = (replace(u, channels=self._roots(u.channels)) for u in self.uses.values())
        outputs = {path: self._roots(channels) for path, channels in self.outputs.items()}
        fixed = {self.same[channel]: reason for channel, reason in self.reasons.items()}
        return Channels(tuple(uses), outputs, fixed)

    def visit(self, node: fx.Node) -> None:
        """Note the channels of a node's value, or why those of its inputs are fixed."""
        if node.op != "output" and is_plain(node):
            self.counts[node] = self._length(node)
        if node in self.counts or node.op in ("placeholder", "get_attr"):
            return
        module, axis = module_of(self.gm, node), None
        layer = self.layers.get(node.name)
        inputs = [self.axes[n] for n in node.all_input_nodes if n in self.axes]
        if layer is not None and layer.weight is not None:
            axis = self._layer(node, module, layer)
        elif inputs and node.op != "output":
            one = inputs[0]
            axis = self._called(node, one) if module is None else self._module(module, one)
        if axis is None or operator_name(node) not in ("view", "reshape"):
            for size in node.all_input_nodes:
                self.fix(self.counts.get(size, ()), f"node {node.name!r} takes their number")
        if axis is not None:
            self.axes[node] = axis
            return
        reason = "they leave the model" if node.op == "output" else self._why(node, module)
        for one in inputs:
            self.fix(one.channels, reason)
        values = [fetched(self.gm, n) for n in node.all_input_nodes if n.op == "get_attr"]
        own = module.parameters() if module is not None else ()
        self.foreign |= {id(tensor): reason for tensor in (*values, *own)}

    def fix(self, channels: Sequence[int], reason: str) -> None:
        """Note why channels cannot be cut; the first reason stays."""
        for channel in channels:
            self.reasons.setdefault(channel, reason)

    def _roots(self, channels: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.same[channel] for channel in channels)

    def _unite(self, *several: Sequence[int]) -> None:
        """Make one channel of those in the same place."""
        for together in zip(*several, strict=True):
            self.same.union(*together)

    def _use(self, tensor: Any, axis: int, channels: Sequence[int], role: ChannelRole) -> None:
        """Note the channels of an axis of ``tensor``, which may be None."""
        if tensor is None:
            return
        name, key = self.names.get(id(tensor)), (id(tensor), axis)
        if name is None or tensor.shape[axis] != len(channels):
            self.fix(channels, f"a tensor of {tuple(tensor.shape)} that they meet is not known")
        elif key in self.uses:  # a layer that is called twice, a tied weight
            self._unite(self.uses[key].channels, channels)
        else:
            self.uses[key] = ChannelUse(name, axis, tuple(channels), role)

    def _new(self, count: int) -> tuple[int, ...]:
        self.count += count
        return tuple(range(self.count - count, self.count))

    def _fetched(self, node: Any) -> Any:
        return fetched(self.gm, node) if isinstance(node, fx.Node) else None

    def _why(self, node: fx.Node, module: nn.Module | None) -> str:
        name = operator_name(node) if module is None else type(module).__name__
        return f"{name!r}, node {node.name!r}, may mix them or depend on their number"

    def _layer(self, node: fx.Node, module: Any, layer: Layer) -> ChannelAxis | None:
        """Return the axis of the output of a layer whose weight is a parameter."""
        args, geometry = layer_arguments(node), layer.geometry
        weight = self.gm.get_parameter(str(layer.weight))
        bias = module.bias if module is not None else self._fetched(args.get("bias"))
        groups = geometry.groups if geometry else 1
        backwards = geometry.transposed if geometry else layer.transposed
        dim = -1 - len(geometry.stride) if geometry else -1
        source = self.axes.get(args["input"])
        rank = 1 - dim if geometry else source.rank if source else None
        inner, outer = (0, 1) if backwards else (1, 0)  # axes of the weight
        sizes = [weight.shape[inner], weight.shape[outer]]
        sizes[0 if inner else 1] *= groups
        outs, ins = self._new(sizes[1]), None
        if source is not None and (ins := source.entering(dim, sizes[0])) is None:
            self.fix(source.channels, self._why(node, module))
        if groups > 1:
            if ins is None or (module is None and sizes[0] == groups):
                self.fix(outs, f"{layer.path!r} has groups, and an input of unknown channels")
            ins = ins or self._new(sizes[0])
            self._group(ins, outs, groups)
        if sizes[0] == groups > 1:  # depthwise: the other axis holds no channels
            self._use(weight, 0, ins or () if backwards else outs, "depthwise")
        else:
            self._use(weight, outer, outs[: weight.shape[outer]], "out")
            self._use(weight if ins else None, inner, (ins or ())[: weight.shape[inner]], "in")
        self._use(bias, 0, outs, "other")
        self.outputs[layer.path] = outs
        return ChannelAxis(outs, dim, rank)

    def _group(self, ins: Sequence[int], outs: Sequence[int], groups: int) -> None:
        """Make one of what a convolution with groups can only lose together."""
        each = [
            channels[i :: len(channels) // groups]
            for channels in (ins, outs)
            for i in range(len(channels) // groups)
        ]
        if len(ins) == groups:  # a group is an input and its outputs
            self._unite(*each)
        else:
            self._unite(*zip(*each, strict=True))

    def _norm(self, module: Any, axis: ChannelAxis) -> ChannelAxis | None:
        """Return the axis behind a batch, instance or group norm that is a module."""
        is_group = isinstance(module, nn.GroupNorm)
        count = module.num_channels if is_group else module.num_features
        channels = axis.entering(axis.dim, count)
        assumed = axis.rank is None and axis.dim == -1  # a linear layer's output
        if channels is None or not (axis.is_second or assumed):
            return None
        if is_group:
            if module.weight is None:
                return None
            size = count // module.num_groups
            for start in range(0, count, size):
                self.same.union(*channels[start : start + size])
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.dim():
                self._use(tensor, 0, channels, "other")
        return replace(axis, channels=channels, spread=False)

    # What passes channels on

    def _module(self, module: Any, axis: ChannelAxis) -> ChannelAxis | None:
        """Return the axis behind a module that is no layer; None if it is not known."""
        if isinstance(module, (*_NORM_MODULES, nn.GroupNorm)):
            return self._norm(module, axis)
        if isinstance(module, nn.Flatten):
            return axis.flattened(module.start_dim, module.end_dim)
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            self._use(module.weight, 0, axis.channels, "other")
            return axis if axis.is_second else None
        mixes = isinstance(module, _MIXING) or getattr(module, "return_indices", False)
        known = isinstance(module, _MODULES) or type(module).__module__ in _HOMES
        return axis if known and not mixes else None

    def _called(self, node: fx.Node, axis: ChannelAxis) -> ChannelAxis | None:
        """Return the axis behind a function or method; None if it is not known."""
        name = operator_name(node)
        if name in CONCATS:
            return self._concat(node)
        if name in _JOINS:
            return self._join(node)
        if node.all_input_nodes[0] not in self.axes:
            return None
        if name == "batch_norm":
            for value in node.all_input_nodes[1:]:
                self._use(self._fetched(value), 0, axis.channels, "other")
            return axis if axis.is_second and not axis.spread else None
        if name in _REDUCTIONS:
            return axis.reduced(**arguments_of(node, ("input", "dim", "keepdim")))
        if name == "flatten":
            args = arguments_of(node, ("input", "start_dim", "end_dim"))
            return axis.flattened(args.get("start_dim", 0), args.get("end_dim", -1))
        if name in ("view", "reshape"):
            return self._reshaped(node, axis)
        if name == "getitem":
            return _indexed(axis, node.args[1])
        if name == "pad":
            within = len(arguments_of(node, ("input", "pad"))["pad"]) // 2
            return axis if within < -axis.dim else None
        return axis if name in _POINTWISE or any(word in name for word in _WINDOWS) else None

    def _concat(self, node: fx.Node) -> ChannelAxis | None:
        """Return the axis of values one after the other; None if those of one are not known."""
        args = arguments_of(node, ("tensors", "dim"))
        axes = [self.axes.get(value) for value in args["tensors"]]
        known = [axis for axis in axes if axis is not None and not axis.spread]
        dims = {(axis.dim, axis.rank) for axis in known}
        if len(known) < len(axes) or len(dims) > 1 or known[0].rank is None:
            return None
        dim = args.get("dim", args.get("axis", 0))
        if (dim if dim < 0 else dim - known[0].rank) == known[0].dim:
            return replace(known[0], channels=sum((axis.channels for axis in known), ()))
        if len({len(axis.channels) for axis in known}) > 1:
            return None
        self._unite(*(axis.channels for axis in known))
        return known[0]

    def _join(self, node: fx.Node) -> ChannelAxis | None:
        """Return the axis of a sum or product; None if it is not that of all operands."""
        nodes = [value for value in node.all_input_nodes if not is_plain(value)]
        axes = [self.axes[value] for value in nodes if value in self.axes]
        longest = max(axes, key=lambda axis: len(axis.channels))
        count = len(longest.channels)
        if any((a.dim, a.spread) != (longest.dim, longest.spread) for a in axes):
            return None
        for axis in axes:
            if len(axis.channels) == count:
                self._unite(longest.channels, axis.channels)
            else:
                self.fix(axis.channels, f"node {node.name!r} takes it for each of several")
        for tensor in (
            self._fetched(v) for v in nodes if v not in self.axes and v.op == "get_attr"
        ):
            at = tensor.dim() + longest.dim
            if at >= 0 and tensor.shape[at] > 1:
                self._use(tensor, at, longest.channels, "other")
        unknown = any(v not in self.axes and v.op != "get_attr" for v in nodes)
        ranks = [axis.rank for axis in axes]
        rank = None if None in ranks else max(r for r in ranks if r is not None)
        return None if unknown else replace(longest, rank=rank)

    def _reshaped(self, node: fx.Node, axis: ChannelAxis) -> ChannelAxis | None:
        """Return the axis behind ``x.view(size, -1)`` or ``x.view(b, c, ...)`` with its own c."""
        given = arguments_of(node, ("input", "shape")).get("shape")
        shape: Any = given if isinstance(given, (tuple, list)) else node.args[1:]
        if not axis.is_second or len(shape) < 2 or axis.spread:
            return None
        if len(shape) == 2 and shape[1] == -1:
            return axis.flattened(1, -1)
        counted = self.lengths.get(shape[1])
        if counted is None or len(counted.channels) != len(axis.channels):
            return None
        self._unite(counted.channels, axis.channels)  # the size is that of both
        return replace(axis, dim=1 - len(shape), rank=len(shape))

    def _length(self, size: fx.Node) -> tuple[int, ...]:
        """Return the channels on whose number a plain value may depend; note whose length it is."""
        name, source, given = operator_name(size), size.all_input_nodes[0], [*size.args[1:]]
        axis = self.axes.get(source, self.lengths.get(source))
        if name == "getattr" and given.pop() != "shape":
            return ()
        index: Any = next(iter([*given, *size.kwargs.values()]), slice(None))
        known = name in ("getattr", "size", "sym_size", "getitem") and type(index) is not fx.Node
        if axis is None or axis.rank is None or not known:
            own = axis.channels if axis and name not in ("dim", "ndimension") else ()
            return sum((self.counts.get(n, ()) for n in size.all_input_nodes), own)
        at = range(-axis.rank, 0)[index]
        if at == axis.dim or index == slice(None):
            self.lengths[size] = axis
        return axis.channels if axis.dim in (at if isinstance(at, range) else (at,)) else ()


def _indexed(axis: ChannelAxis, index: Any) -> ChannelAxis | None:
    """Return the axis behind ``x[:, :, None, None]``, or with less than all of other axes."""
    if axis.rank is None or not isinstance(index, tuple) or Ellipsis in index:
        return None
    place, sizes, found = 0, 0, None  # in the input, in the result
    for entry in (*index, *[slice(None)] * (axis.rank - sum(e is not None for e in index))):
        if entry is None:
            sizes += 1
            continue
        if place == axis.rank + axis.dim:
            found = sizes if entry == slice(None) else None
        elif not isinstance(entry, (slice, int)):
            return None
        place, sizes = place + 1, sizes + (not isinstance(entry, int))
    return None if found is None else replace(axis, dim=found - sizes, rank=sizes)
