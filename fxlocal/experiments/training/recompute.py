"""The honest baseline of local modules: activation checkpointing over the same segments.

What local modules save in memory, `torch.utils.checkpoint` saves too, with exact gradients: the
forward keeps what crosses from segment to segment, and the backward computes each segment again::

    local modules:   forward + backward of 1, of 2, ... of K
    checkpointing:   forward of 1 ... K, then of K ... 1: forward again + backward

The second forward draws the same dropout masks, and moves no running statistics.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from ...compiler.analysis import Analysis
from ...compiler.split import find_split
from ...errors import PlanError
from ...ir.network import Network
from ...ir.nodes import module_of, positions
from ...ir.operators import is_inplace
from ...plan import LocalModules, Plan
from ...schedules import Schedule
from ...schedules.base import Facts
from .measure import count_recomputed
from .settings import Machine, SettingsError

__all__ = [
    "Recompute",
    "Recomputed",
    "Segment",
    "cut_segments",
    "describe_modules",
    "modules_of",
    "refuse_compiled",
]


@dataclass(frozen=True)
class Recompute:
    """A schedule of plain training that says which segments `Recomputed` is to compute again.

    Args:
        count: how many segments.
        balance: what they have an equal share of, as in `fxlocal.LocalModules`.

    Raises:
        PlanError: if a value is of the wrong type or out of range.
    """

    count: int
    balance: Literal["memory", "blocks", "time"] = "memory"

    def __post_init__(self) -> None:
        self.modules  # noqa: B018  # its own check

    @property
    def modules(self) -> LocalModules:
        """The local modules that the segments would be."""
        return LocalModules(self.count, balance=self.balance, num_classes=1)

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan of plain training."""
        return Plan()


def modules_of(schedule: Schedule, analysis: Facts, epoch: int = 0) -> LocalModules | None:
    """Return the local modules, or the segments of a `Recompute`, that an epoch begins with."""
    if isinstance(schedule, Recompute):
        return schedule.modules
    return schedule.plan(analysis, epoch).modules


def describe_modules(schedule: Schedule, modules: LocalModules) -> str:
    """Say how many there are of those that `modules_of` found, and of which kind."""
    if isinstance(schedule, Recompute):
        return f"{modules.count} segments, balance {modules.balance}"
    head = type(modules.head).__name__.removesuffix("Head").lower()
    kept = f", replay {modules.replay}" if modules.replay else ""
    link = f"link {modules.link}{kept}"
    return f"{modules.count} modules, balance {modules.balance}, {link}, {head} heads"


def refuse_compiled(schedule: Schedule, machine: Machine) -> None:
    """Raise a SettingsError if ``schedule`` is a `Recompute` and networks are to be compiled."""
    if isinstance(schedule, Recompute) and (machine.compile or machine.cudagraph):
        raise SettingsError(
            "checkpoint computes its segments eagerly: leave out --compile and --cudagraph, or the "
            "strategy"
        )


@dataclass(frozen=True)
class Segment:
    """A stretch of a network, as a network of its own over the same state.

    Attributes:
        network: takes ``inputs`` and returns ``outputs``, a tuple.
        inputs: names of the values that it takes, inputs of the model among them.
        outputs: names of the values that it makes and others take; or the model's "output" alone.
        norms: the norms that it calls, which have running statistics or not.
        buffers: all other buffers that it may change.
    """

    network: Network
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    norms: tuple[nn.Module, ...] = field(repr=False)
    buffers: tuple[Tensor, ...] = field(repr=False)

    @contextmanager
    def second_forward(self) -> Iterator[None]:
        """Keep the running statistics, and any other buffer, as the first forward left them."""
        others = [buffer.clone() for buffer in self.buffers]
        statistics = {norm: dict(norm._buffers) for norm in self.norms}
        for norm, kept in statistics.items():
            for name, value in kept.items():
                if value is not None:
                    norm._buffers[name] = torch.empty_like(value)  # written and never read
            norm._buffers["num_batches_tracked"] = None  # nothing is counted
        try:
            with count_recomputed():
                yield
        finally:  # checkpointing leaves by an exception once it has what it needs
            for norm, kept in statistics.items():
                norm._buffers.update(kept)
            for buffer, value in zip(self.buffers, others, strict=True):
                buffer.data.copy_(value)  # .data: as a norm's own update, unseen by autograd

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of the first and the second forward."""
        return nullcontext(), self.second_forward()


class Recomputed:
    """Runs a network segment by segment, and computes all but the last one again in backward.

    The last segment's backward follows its forward at once: nothing is gained by repeating it.

    Args:
        network: the captured graph.
        analysis: the model's, with costs where the balance needs them.
        schedule: says where the segments begin.

    Raises:
        PlanError: if the network cannot be split so.
    """

    def __init__(self, network: Network, analysis: Analysis, schedule: Recompute) -> None:
        blocks = find_split(analysis, schedule.modules)
        self.segments = cut_segments(network, [analysis.blocks[i].start for i in blocks[1:]])
        inputs = [node for node in network.graph.nodes if node.op == "placeholder"]
        self.inputs = [node.name for node in inputs]
        self.defaults = {node.name: node.args[0] for node in inputs if node.args}

    def __call__(self, *inputs: Any) -> Any:
        """Return the output of the model."""
        values = {**self.defaults, **dict(zip(self.inputs, inputs, strict=False))}
        for segment in self.segments[:-1]:
            run = partial(checkpoint, use_reentrant=False, context_fn=segment.contexts)
            values.update(_called(segment, partial(run, segment.network), values))
        return _called(self.segments[-1], self.segments[-1].network, values)["output"]


def _called(
    segment: Segment, call: Callable[..., tuple[Any, ...]], values: dict[str, Any]
) -> dict[str, Any]:
    made = call(*(values[name] for name in segment.inputs))
    return dict(zip(segment.outputs, made, strict=True))


def cut_segments(network: Network, starts: Sequence[str]) -> tuple[Segment, ...]:
    """Cut ``network`` before each of the nodes called ``starts``, in execution order.

    Values that cross a cut, long-range skips among them, are handed on.

    Raises:
        PlanError: if a value is changed in place in one segment and used in a later one.
    """
    nodes = [n for n in network.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    order = positions(network.graph)
    edges = [0, *(next(i for i, n in enumerate(nodes) if n.name == s) for s in starts), len(nodes)]
    homes = {n: k for k, (a, b) in enumerate(pairwise(edges)) for n in nodes[a:b]}
    output = network.graph.output_node()
    homes[output] = len(edges) - 2
    segments = []
    for k, (a, b) in enumerate(pairwise(edges)):
        inside = [*nodes[a:b], *([output] if b == len(nodes) else [])]
        used = dict.fromkeys(arg for node in inside for arg in node.all_input_nodes)
        given = [n for n in used if n.op != "get_attr" and homes.get(n, -1) < k]
        given.sort(key=order.__getitem__)
        made = [n for n in nodes[a:b] if any(homes[user] > k for user in n.users)]
        _refuse_late_change(network, given, homes, k)
        segments.append(_segment(network, inside, given, made))
    return tuple(segments)


def _refuse_late_change(
    network: Network, given: Sequence[fx.Node], homes: dict[fx.Node, int], k: int
) -> None:
    for value in given:
        changes = any(homes[user] == k and is_inplace(network, user) for user in value.users)
        if changes and any(homes[user] > k for user in value.users):
            raise PlanError(
                f"checkpoint: the value {value.name!r} is changed in place in segment {k} and used "
                "in a later one, where it would be the changed one in the second forward only; "
                "make that operation in the model inplace=False, or split elsewhere"
            )


def _segment(
    network: Network, inside: Sequence[fx.Node], given: Sequence[fx.Node], made: Sequence[fx.Node]
) -> Segment:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for value in given:
        copies[value] = graph.placeholder(value.name)
    for value in given:
        if any(is_inplace(network, user) for user in value.users if user in inside):
            copies[value] = graph.call_method("clone", (copies[value],))  # met twice, unchanged
    for node in inside:
        for fetched in node.all_input_nodes:
            if fetched.op == "get_attr" and fetched not in copies:
                copies[fetched] = graph.node_copy(fetched)
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    if inside[-1].op == "output":
        whole = fx.map_arg(inside[-1].args[0], copies.__getitem__)
        graph.output((whole,))
        outputs: tuple[str, ...] = ("output",)
    else:
        graph.output(tuple(copies[node] for node in made))
        outputs = tuple(node.name for node in made)
    part = network.clone()
    part.graph = graph
    norms, buffers = _buffers(part)
    return Segment(part, tuple(value.name for value in given), outputs, norms, buffers)


def _buffers(part: Network) -> tuple[tuple[nn.Module, ...], tuple[Tensor, ...]]:
    """Return the norms that ``part`` calls, and all other buffers that it may move."""
    called = [m for node in part.graph.nodes if (m := module_of(part, node)) is not None]
    modules = list(dict.fromkeys(inner for module in called for inner in module.modules()))
    norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._NormBase)]
    own = [b for m in modules if m not in norms for b in m.buffers(recurse=False)]
    known = dict(part.named_buffers())
    fetched = [str(node.target) for node in part.graph.nodes if node.op == "get_attr"]
    own += [known[target] for target in fetched if target in known]
    return tuple(norms), tuple({id(b): b for b in own}.values())
