"""Run one step of training on a network, node by node, and note what each layer does in it.

The graph is interpreted, in the contexts in which its generated code would run it. Each node
belongs to the layer whose stretch it lies in: from the layer (or its block's start) to the next.

How a backward computation finds its layer: autograd numbers its nodes as the forward makes them,
so that the numbers drawn while a layer's node ran are those of its own backward.

A checkpointed stage is run once. As its generated code would, it keeps what it takes, and nothing
of what it makes.

Limits: a weight-gradient product is one matrix product or convolution backward of ATen; one that a
rule or a leaf module computes otherwise, by a kernel of its own, is not counted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..facts import Layer
from ..ir.contexts import ContextInterpreter
from ..ir.network import Network
from ..ir.nodes import CHECKPOINT, Origin, module_of, nodes_by_name, stretches
from ..ir.operators import weight_parameters
from ..ops.local_modules import call_weighted

__all__ = ["RecordedTensors", "Watch", "run_step"]

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default)
_MASK = 10  # aten.convolution_backward(..., output_mask): which of its three gradients are wanted
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Watch(ContextInterpreter):
    """Interprets a network and notes, by the index of the layer, what happens.

    A layer's stretch begins at the node whose name is in ``starts``.

    Attributes:
        weights: the parameters that make up each layer's weight.
        statistics: the running statistics in each layer's stretch.
        records: whether autograd recorded each layer's call.
        products: how many weight-gradient products were issued for each layer.
    """

    def __init__(self, network: Network, layers: Sequence[Layer], starts: Sequence[str]) -> None:
        super().__init__(network)
        self.extra_traceback = False  # an error of the model's is raised as it is
        nodes = nodes_by_name(network.graph)
        self.weights = [weight_parameters(network, layer, nodes[layer.node]) for layer in layers]
        self.statistics: list[list[Tensor]] = [[] for _ in layers]
        self.records = [False] * len(layers)
        self.products = [0] * len(layers)
        self._calls = {layer.node: layer.index for layer in layers}
        self._stretch = stretches(network.graph, {name: i for i, name in enumerate(starts)})
        self._updates = _updates(network.graph, layers)
        buffers = dict(network.named_buffers(remove_duplicate=False))
        for node in network.graph.nodes if layers else ():
            self.statistics[self._stretch[node.name]] += _statistics_of(network, node, buffers)
        self._spans: list[tuple[int, int, int]] = []
        # What each layer multiplies with: its weight, then the copy that autocast makes of it.
        self._operands: list[list[Tensor]] = [list(weights) for weights in self.weights]
        own = (*network.parameters(), *network.buffers())
        self._own = {t.untyped_storage().data_ptr() for t in own}
        self._kept: dict[int, tuple[int, int]] = {}
        self._node, self._stage, self._is_of_rule = "", None, False

    @property
    def saved_bytes(self) -> list[int]:
        """The bytes kept for backward that no later layer keeps too, of each layer.

        Each storage counts once and whole; parameters and buffers do not count.
        """
        saved = [0] * len(self.weights)
        for index, num_bytes in self._kept.values():
            saved[index] += num_bytes
        return saved

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network on ``args``."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and note which numbers autograd draws meanwhile."""
        self._node, self._stage = n.name, n.meta.get(CHECKPOINT)
        origin = n.meta.get("fxlocal")  # what a rule's own autograd keeps is gone behind it
        self._is_of_rule = getattr(origin, "pass_name", "") == "insert_local_updates"
        for value in n.all_input_nodes if self._stage is not None else ():
            if value.meta.get(CHECKPOINT) != self._stage:
                pytree.tree_map_only(Tensor, self._keep, self.env[value])
        first = torch._C._autograd._get_sequence_nr()
        result = super().run_node(n)
        if (index := self._calls.get(n.name)) is not None:
            self.records[index] = result.requires_grad
            self._spans.append((first, torch._C._autograd._get_sequence_nr(), index))
        return result

    def _pack(self, tensor: Tensor) -> Tensor:
        if self._stage is None and not self._is_of_rule:
            self._keep(tensor)
        return tensor.detach()  # a saved output would otherwise hold the graph that holds it

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._own and self.weights:
            index, _ = self._kept.get(address, (0, 0))
            self._kept[address] = max(index, self._stretch[self._node]), storage.nbytes()

    def note(self, call: Any, args: Sequence[Any], result: Any) -> None:
        """Count ``call`` if it is a weight-gradient product of some layer."""
        backward = torch._C._current_autograd_node()
        if backward is None and self._node in self._calls and call in _PRODUCTS:
            self._operands[self._calls[self._node]].append(args[-1])
        elif (index := self._layer_of(backward)) is not None:
            self.products[index] += self._is_weight_gradient(call, args, result, index)

    def _layer_of(self, backward: Any) -> int | None:
        """Return the layer for which a computation runs, in the backward or in an update."""
        if backward is None:
            return self._updates.get(self._node)
        number = backward._sequence_nr()
        return next((i for first, end, i in self._spans if first <= number < end), None)

    def _is_weight_gradient(self, call: Any, args: Sequence[Any], result: Any, index: int) -> bool:
        if call is _aten.convolution_backward.default:
            return bool(args[_MASK][1])
        operands = self._operands[index]
        if call not in _PRODUCTS or not operands or result.numel() != operands[-1].numel():
            return False
        # The gradient of the input, or a decay, is a product with the weight itself.
        weights = {operand.untyped_storage()._cdata for operand in operands}
        return not any(a.untyped_storage()._cdata in weights for a in args if isinstance(a, Tensor))


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every call of an ATen operator to a watch."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.watch.note(func, args, result)
        return result


class RecordedTensors(TorchFunctionMode):
    """Lets deepcopy copy the value of a tensor that autograd recorded, which it refuses.

    A pruned or weight-normed module keeps such a weight, and computes it anew in each forward; so
    does a module that keeps its last activation.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def run_step(watch: Watch, batch: Sequence[Any], loss: Callable[[Any], Tensor]) -> Tensor:
    """Run a forward and a backward under ``watch``; return the loss.

    Only the network's parameters get a gradient: ``loss`` may hold parameters of the user's.
    """
    with _Calls(watch):
        value = loss(watch.run(*batch))
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss is {found}: give loss=, a function from output to scalar")
        own = [p for p in watch.module.parameters() if p.requires_grad]
        if value.requires_grad and own:
            torch.autograd.backward(value, inputs=own)
    return value.detach()


def _updates(graph: fx.Graph, layers: Sequence[Layer]) -> dict[str, int]:
    """Return, by the names of the nodes that rewrites inserted for layers, each one's layer.

    Layers that share a path (a module called twice) are told apart by the names of their nodes.
    """
    found = {}
    for node in graph.nodes:
        origin = node.meta.get("fxlocal")
        if isinstance(origin, Origin):
            same = [layer for layer in layers if layer.path == origin.layer]
            named = [layer for layer in same if node.name.startswith(f"{layer.node}_")]
            if same:
                best = max(named or same[:1], key=lambda layer: len(layer.node))
                found[node.name] = best.index
    return found


def _statistics_of(network: Network, node: fx.Node, buffers: dict[str, Tensor]) -> list[Tensor]:
    """Return the running statistics that ``node`` uses."""
    module = module_of(network, node)
    if node.target is call_weighted:
        module = network.get_submodule(str(node.all_input_nodes[0].target))
    if module is not None:
        used = dict(module.named_buffers())
    else:
        fetched = (str(n.target) for n in node.all_input_nodes if n.op == "get_attr")
        used = {name: buffers[name] for name in fetched if name in buffers}
    return [buffer for name, buffer in used.items() if name.rpartition(".")[2] in _STATISTICS]
