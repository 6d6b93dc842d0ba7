"""All facts about one model, and the table that shows them."""

import math
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from ..errors import BoundaryWarning, NoEffectWarning, PlanError, nearest
from ..facts import Block, BlockInput, Branch, Cost, Layer, Shapes, SkipEdge
from ..ir.fakes import run_on_fakes
from ..ir.network import Network
from ..ir.source import ONE_AT_A_TIME, train_mode
from ..ir.text import format_table
from ..passes import (
    find_attentions,
    find_block_inputs,
    find_blocks,
    find_branches,
    find_costs,
    find_layers,
    find_outputs,
    find_shapes,
    find_skips,
)
from ..passes.find_layers import find_leaves, find_names
from ..plan import LocalModules
from ..tracing.capture import capture

__all__ = ["Analysis", "analyze", "capture_and_analyze"]

_FAR = 0.15  # of the layers


@dataclass(frozen=True)
class Analysis:
    """What is known of a model: frozen facts, by name. ``print`` it for a table.

    Attributes:
        layers: convolutions and linear layers, in execution order.
        skips: skip edges, ordered by merge node.
        blocks: stretches of layers between legal boundaries.
        costs: one `Cost` per layer; None without example inputs.
        order: each node's name and its place in execution order.
        shapes: one `Shapes` per layer; None without example inputs.
        block_inputs: what enters each block and, last, what leaves the model; None without
            example inputs.
        names: the layers' other names, and which path each means.
        leaves: the modules that are kept whole, layers inside them unseen, and their call's node.
        outputs: with example inputs, the tensors in what the model returns, by name or index; none
            if it returns one tensor alone.
        branches: what residual sums add to their shortcuts.
        attentions: names of the nodes that attend.
    """

    layers: tuple[Layer, ...]
    skips: tuple[SkipEdge, ...]
    blocks: tuple[Block, ...]
    costs: tuple[Cost, ...] | None = None
    order: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    shapes: tuple[Shapes, ...] | None = None
    block_inputs: tuple[BlockInput, ...] | None = None
    names: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    leaves: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    outputs: dict[str | int, BlockInput] = field(default_factory=dict, repr=False, compare=False)
    branches: tuple[Branch, ...] = field(default=(), repr=False, compare=False)
    attentions: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """The legal block edges: the index of each block's first layer."""
        return tuple(block.layers[0] for block in self.blocks)

    def boundary(self, until: str | int | float) -> int:
        """Return the index of the transition layer that ``until`` means in this model.

        Args:
            until: as in `LocalPrefix`.

        Raises:
            PlanError: if there is no such layer, it lies past the last one, or ``until`` is a
                fraction and the model has no legal block edge to put it at.
        """
        count = len(self.layers)
        if isinstance(until, str):
            return self._first_layer(until)
        if isinstance(until, float):
            wanted = math.floor(until * count + 1e-9)
            if wanted and not any(self.boundaries):
                raise PlanError(
                    f"until={until}: a fraction snaps to a legal block edge, and this model has "
                    "none behind its first layer: branches, or a tied weight, span it all. "
                    "Freeze (requires_grad_(False)) or untie such a weight. To cut through "
                    f"branches give the index or the path of a layer, until={wanted} or "
                    f"until={self.layers[wanted].path!r}"
                )
            return max((edge for edge in self.boundaries if edge <= wanted), default=0)
        if not 0 <= until < max(count, 1):
            raise PlanError(
                f"until={until}: the boundary lies past the last layer. The model has {count} "
                f"layers, 0 to {count - 1}; the last one must be trained by back-propagation"
            )
        return until

    def nearest_boundaries(self, boundary: int) -> str:
        """Return the legal block edges that are nearest to layer ``boundary``, for a message."""
        edges = sorted(filter(None, self.boundaries), key=lambda edge: abs(edge - boundary))
        return ", ".join(f"{i} ({self.layers[i].path!r})" for i in sorted(edges[:4])) or "none"

    def warn_if_far(
        self, what: str, pairs: Iterable[tuple[float, int]], *, stacklevel: int
    ) -> None:
        """Warn where block edges leave a boundary far from what was asked for, or at 0.

        Args:
            what: what asks, for the message.
            pairs: how many layers it wants local, and how many it gets.
            stacklevel: as in `warnings.warn`, from the caller.
        """
        kind: type[UserWarning]
        pairs, count = list(pairs), len(self.layers)
        asked, taken = max(pairs, key=lambda pair: abs(pair[0] - pair[1]), default=(0, 0))
        advice = "Give one of these, or any layer's index or path (of a schedule, align=False)"
        advice = f"{self.nearest_boundaries(int(asked))}. {advice} to cut through all that crosses"
        if asked >= 1 and not any(taken for _, taken in pairs):
            text, kind = "no layer is local, as the nearest legal block edges", NoEffectWarning
        elif abs(asked - taken) > _FAR * count:
            text = f"{taken} layers are local where {asked:g} of {count} are asked for, as the "
            text, kind = f"{text}nearest legal block edges", BoundaryWarning
        else:
            return
        warnings.warn(f"{what}: {text} are {advice} there", kind, stacklevel=stacklevel + 1)

    def start(self, boundary: int) -> str:
        """Return the name of the first node after the boundary at layer ``boundary``."""
        edges = {block.layers[0]: block.start for block in self.blocks}
        layer = self.layers[boundary]
        return edges.get(boundary, layer.start or layer.node)

    def saved_bytes(self, boundary: int) -> int | None:
        """Return the bytes kept for backward with the boundary there; None without costs.

        Raises:
            PlanError: if there is no such boundary.
        """
        if self.costs is None:
            return None
        if not 0 <= boundary <= len(self.layers):
            raise PlanError(
                f"saved_bytes({boundary}): give a boundary from 0 to {len(self.layers)}"
            )
        return sum(cost.saved_bytes for cost in self.costs[boundary:])

    def _first_layer(self, path: str) -> int:
        inside = f"{path}."
        meant = {p for n, p in self.names.items() if n == path or n.startswith(inside)}
        by_path = [x for x in self.layers if x.path == path or x.path.startswith(inside)]
        by_name = [x for x in self.layers if x.path in meant]
        if by_path and by_name and by_name[0].index < by_path[0].index:
            raise PlanError(
                f"until={path!r}: means two places. It holds layer {by_name[0].path!r}, which runs "
                f"before its own first one, {by_path[0].path!r}: give one of these two instead"
            )
        if found := by_path or by_name:
            return found[0].index
        for block in self.blocks:
            if block.name == path:
                return block.layers[0]
        if kept := self.kept_whole(path):
            raise PlanError(f"until={path!r}: {kept}")
        names = dict.fromkeys(
            part for layer in self.layers for part in (layer.path, layer.path.rpartition(".")[0])
        )
        raise PlanError(
            f"until={path!r}: no such layer or block. Nearest: "
            f"{nearest(path, [n for n in names if n])}. Print them with fxlocal.analyze(model)"
        )

    def kept_whole(self, path: str) -> str:
        """Say which leaf module hides the layers at ``path``, and what to give; empty if none."""
        for leaf, node in self.leaves.items():
            if not (f"{path}.".startswith(f"{leaf}.") or leaf.startswith(f"{path}.")):
                continue
            place = self.order[node]
            before = [x.path for x in self.layers if self.order[x.node] < place][-1:]
            behind = [x.path for x in self.layers if self.order[x.node] > place][:1]
            near = ", ".join(
                f"{layer!r} {where}"
                for where, layers in (("before it", before), ("behind it", behind))
                for layer in layers
            )
            return (
                f"no layer is seen there, because {leaf!r} is a leaf module, kept whole. Give a "
                f"layer outside it ({near or 'there is none'}), or call its parts in a module of "
                "your own"
            )
        return ""

    def prediction(self, modules: LocalModules) -> BlockInput:
        """Return the output of the model that local modules learn from."""
        assert self.block_inputs is not None
        return self.block_inputs[-1] if modules.output is None else self.outputs[modules.output]

    def attentions_of(self, block: Block) -> int:
        """Return how many times ``block`` attends."""
        starts = [self.order[one.start] for one in self.blocks[1:]]
        found = (bisect_right(starts, self.order[name]) for name in self.attentions)
        return [*found].count(self.blocks.index(block))

    def block_cost(self, block: Block) -> Cost | None:
        """Return the cost of all layers of ``block``; None without costs."""
        if self.costs is None:
            return None
        return sum((self.costs[i] for i in block.layers), start=Cost(0, 0, 0))

    def __str__(self) -> str:
        rows = [_row(self, i, block) for i, block in enumerate(self.blocks)]
        header = ["#", "block", "layers", "kinds", "skip edges"]
        if self.costs is not None:
            header += _COSTS
        return "\n".join([format_table(header, rows, ["#", *_COSTS]), _totals(self)])


def analyze(
    model: nn.Module,
    *example_inputs: Any,
    leaf_modules: tuple[type[nn.Module], ...] = (),
    **example_inputs_by_name: Any,
) -> Analysis:
    """Find the layers, skip edges and blocks of ``model``, and with inputs their costs.

    Nothing is computed and nothing is changed; with example inputs the graph runs once on fake
    tensors.

    Args:
        model: the model, or a network that `capture` returned.
        example_inputs: one batch; adds `Analysis.costs`, `Analysis.shapes` and
            `Analysis.block_inputs`.
        leaf_modules: module classes to keep as single nodes, the layers inside them unseen.
        example_inputs_by_name: those inputs that are given by keyword, as in ``model(**batch)``.

    Raises:
        CaptureError: if the model cannot be captured.
        TypeError: if the model does not take such a batch.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(analyze(model))
        #  block  layers  kinds     skip edges
        0  0      0       1 linear
        1  2      1       1 linear
        2 layers, 2 blocks, 0 skip edges
    """
    args, kwargs = example_inputs, example_inputs_by_name
    gm = capture(model, *args, leaf_modules=leaf_modules, **kwargs)
    with ONE_AT_A_TIME, train_mode(gm):
        layers = find_layers(gm)
        run = run_on_fakes(gm, args, kwargs) if (args or kwargs) and layers else None
        skips = find_skips(gm)
        blocks = find_blocks(gm, layers=layers, skips=skips)
        costs = shapes = block_inputs = None
        outputs: dict[str | int, BlockInput] = {}
        if run is not None:
            costs = find_costs(gm, run, layers=layers, blocks=blocks)
            shapes = find_shapes(gm, run, layers=layers)
            block_inputs = find_block_inputs(gm, run, blocks=blocks, layers=layers)
            outputs = find_outputs(gm, run, layers=layers)
        order = {node.name: i for i, node in enumerate(gm.graph.nodes)}
        names, leaves = find_names(gm, layers=layers), find_leaves(gm, layers=layers)
        branches = find_branches(gm, layers=layers, skips=skips)
    facts = (layers, skips, blocks, costs, order, shapes, block_inputs, names, leaves, outputs)
    return Analysis(*facts, branches, find_attentions(gm))


def capture_and_analyze(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    leaf_modules: tuple[type[nn.Module], ...],
) -> tuple[Network, Analysis]:
    """Return the capture of ``model`` and its facts; inputs by keyword are given as a dict.

    Raises:
        TypeError: if ``example_inputs`` are neither a tuple nor a dict.
    """
    if not isinstance(example_inputs, (tuple, list, Mapping)):
        raise TypeError(
            f"example_inputs={type(example_inputs).__name__}: give a tuple, (x,), or a dict"
        )
    args: tuple[Any, ...] = () if isinstance(example_inputs, Mapping) else example_inputs
    kwargs = example_inputs if isinstance(example_inputs, Mapping) else {}
    captured = capture(model, *args, leaf_modules=leaf_modules, **kwargs)
    return captured, analyze(captured, *args, **kwargs)


_COSTS = ("parameters", "MFLOPs", "kept KiB")


def _row(analysis: Analysis, index: int, block: Block) -> list[str]:
    layers = [analysis.layers[i] for i in block.layers]
    first, last = layers[0].index, layers[-1].index
    kinds = dict(sorted(Counter(layer.kind for layer in layers).items()))
    span = str(first) if first == last else f"{first}-{last}"
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    row = [str(index), block.name, span, counted, ", ".join(_skips_of(analysis, index))]
    if (cost := analysis.block_cost(block)) is not None:
        row += [f"{cost.parameters:,}", f"{cost.flops / 1e6:,.1f}"]
        row += [f"{cost.saved_bytes / 1024:,.0f}"]
    return row


def _skips_of(analysis: Analysis, index: int) -> list[str]:
    """Describe the skip edges that are merged in one block."""
    starts = [0, *(analysis.order[block.start] for block in analysis.blocks[1:])]
    begin, end = [*starts, len(analysis.order)][index : index + 2]
    found = Counter(
        edge.kind
        + (" (projection)" if edge.projection else "")
        + (" (long-range)" if edge.long_range else "")
        for edge in analysis.skips
        if begin <= analysis.order[edge.target] < end
    )
    return [kind if count == 1 else f"{count} {kind}" for kind, count in found.items()]


def _totals(analysis: Analysis) -> str:
    def counted(count: int, noun: str) -> str:
        return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

    several = sum(len(block.values) > 1 for block in analysis.blocks)
    parts = [
        counted(len(analysis.layers), "layer"),
        counted(len(analysis.blocks), "block")
        + (f" ({several} of several values)" * bool(several)),
        counted(len(analysis.skips), "skip edge"),
    ]
    if analysis.costs is not None:
        total = sum(analysis.costs, start=Cost(0, 0, 0))
        parts += [f"{total.parameters:,} parameters", f"{total.flops / 1e6:,.1f} MFLOPs forward"]
        parts += [f"{total.saved_bytes / 2**20:,.1f} MiB kept for backward"]
    return ", ".join(parts)
