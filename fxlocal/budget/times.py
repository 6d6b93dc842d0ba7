"""Measure what each block of a network takes, equal ones once.

A block runs alone, on what the ones before it made, so that no more is ever kept than it keeps
itself. Blocks are of one kind if they have the same operators with the same settings, and values
and parameters of the same shapes; the fastest of a few runs counts.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir.network import Network
from ..ir.nodes import fetched, module_of
from ..ir.source import arguments
from ..ir.stages import Span, cut_spans

__all__ = ["BlockTime", "clock", "time_blocks"]

_RUNS = 4  # the fastest counts; the first one sets things up


@dataclass(frozen=True)
class BlockTime:
    """Seconds of one block.

    Attributes:
        forward: of its forward.
        backward: of its backward; 0 where nothing is learned.
        first_backward: of its backward without the gradient of what it takes.
    """

    forward: float
    backward: float
    first_backward: float


def clock(device: torch.device) -> float:
    """Return the time in seconds, once ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_blocks(
    network: Network,
    starts: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device,
) -> list[BlockTime]:
    """Return the times of the blocks of ``network`` that begin at the nodes named ``starts``.

    Args:
        network: in train mode, of a model whose state may move.
        starts: where each block begins, in order.
        args: one batch of inputs.
        kwargs: those of them that are given by keyword.
        device: that it computes on.
    """
    bound = arguments(network.graph, args, kwargs)
    inputs = network.graph.find_nodes(op="placeholder")
    values = {node.name: _held(bound[str(node.target).lstrip("*")]) for node in inputs}
    known = dict[Any, BlockTime]()
    times = []
    for span in cut_spans(network, starts):
        given = [values[name] for name in span.inputs]
        kind = _kind(span, given)
        if kind not in known:
            known[kind] = _time(span.network, given, device)
            network.zero_grad(set_to_none=True)
        times.append(known[kind])
        made = _held(span.network.forward(*_fresh(given)))
        for name in span.ended:
            del values[name]
        values.update(zip(span.outputs, made, strict=True))
    return times


class _Value:
    """A tensor without the graph that made it, and whether it had one."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.learned = tensor.detach(), tensor.requires_grad

    def fresh(self, learned: bool) -> Tensor:
        """Return a copy, which may be changed in place."""
        leaf = self.tensor.clone()
        return leaf.requires_grad_().clone() if learned and self.learned else leaf


def _held(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, _Value, value)


def _fresh(values: Sequence[Any], learned: bool = True) -> list[Any]:
    """Return copies of tensors; with ``learned``, those that had a graph want a gradient."""
    fresh: list[Any] = pytree.tree_map_only(_Value, lambda v: v.fresh(learned), list(values))
    return fresh


def _time(network: Network, given: Sequence[Any], device: torch.device) -> BlockTime:
    forward, backward, first = list[float](), list[float](), list[float]()
    for found, learned in ((backward, True), (first, False)):
        for _ in range(_RUNS):
            values = _fresh(given, learned)
            start = clock(device)
            made = network.forward(*values)
            forward.append(clock(device) - start)
            outputs = [t for t in pytree.tree_leaves(made) if isinstance(t, Tensor)]
            outputs = [t for t in outputs if t.requires_grad]
            if not outputs:
                continue
            gradients = [torch.ones_like(t) for t in outputs]
            start = clock(device)
            torch.autograd.backward(outputs, gradients)
            found.append(clock(device) - start)
        if not found:
            break  # nothing is learned
    return BlockTime(min(forward), min(backward, default=0.0), min(first, default=0.0))


def _kind(span: Span, given: Sequence[Any]) -> Any:
    """Return what two blocks share that compute the same on values of the same shapes."""
    graph = span.network.graph
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    lines = [_line(span.network, node, numbers) for node in graph.nodes]
    leaves = [_described(leaf) for leaf in pytree.tree_leaves(list(given))]
    return tuple(lines), tuple(leaves)


def _line(network: Network, node: fx.Node, numbers: Mapping[fx.Node, int]) -> Any:
    arguments = fx.map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}")
    contexts = repr(node.meta.get("fxlocal_contexts"))
    if node.op == "placeholder":
        return node.op
    if (module := module_of(network, node)) is not None:
        state = [(t.shape, t.dtype, t.requires_grad) for t in module.parameters()]
        return repr(module), module.training, str(state), repr(arguments), contexts
    if node.op == "get_attr":
        return node.op, _described(fetched(network, node))
    return node.op, str(node.target), repr(arguments), contexts


def _described(value: Any) -> str:
    if isinstance(value, _Value):
        return f"{value.learned} {_described(value.tensor)}"
    if not isinstance(value, Tensor):
        return repr(value)
    stride = value.stride() if value.layout is torch.strided else ()
    return str((value.shape, value.dtype, stride, value.requires_grad))


def in_turns(turns: Mapping[str, Callable[[], float]], rounds: int) -> Iterator[tuple[str, float]]:
    """Yield each name with the least that its turns took, which all take in rounds."""
    taken = [(name, turn()) for _ in range(rounds) for name, turn in turns.items()]
    for name, group in groupby(sorted(taken), lambda pair: pair[0]):
        yield name, min(seconds for _, seconds in group)
