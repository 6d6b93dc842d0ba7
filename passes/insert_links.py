"""Run the last layers of a local module a second time, in front of the next one (BackLink).

    %conv = call_module conv(%relu)        %conv = call_function call_weighted(conv, 0.5, %relu)
    %drop = call_module drop(%conv)        %drop_mask = call_module drop(%drop_ones)
                                    ->     %drop = call_function mul(%conv, %drop_mask)
                                           ...
                                           %conv_linked = call_function call_again(conv, 0.5, %relu)
                                           %drop_linked = call_function mul(%conv_linked,
                                                                            %drop_mask)

Rule (BackLink, eq. 4 to 7): both copies share their weights, whose gradients are weighted by alpha
in the first and 1 - alpha in the second; buffers move in the first one only, and both have the same
dropout mask. The next module reads the second copy; what that takes is cut by the cuts that follow.
With ``weighting="compound"``, the equations to the letter, no weight's gradient is weighted but the
error that enters each block, wherever it comes from:

    %relu = call_module relu(%conv) -> %relu_weighted = call_function weight_gradient(%relu, 0.5)

Forward-exact. Cost: a second forward and backward of these layers. Refuses layers whose random
numbers cannot be drawn again, dropouts with hooks, and of values that share memory a change in
place, if each crosses between two blocks that weight errors.
"""

import operator
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from fxlocal.errors import PlanError
from fxlocal.facts import StageBoundary
from fxlocal.ir.boundary import crossing_values, first_of_stage, learned_values
from fxlocal.ir.edit import insert_in_stage, replace_later_uses
from fxlocal.ir.network import Network
from fxlocal.ir.nodes import STAGE, Origin, hooks_of, module_of, node_named
from fxlocal.ir.operators import (
    DRAWS,
    DROPOUTS,
    UNREPEATABLE,
    is_inplace,
    is_plain,
    operator_name,
    overwrites,
    overwrites_shared,
)
from fxlocal.ops.local_modules import call_again, call_weighted, weight_gradient

__all__ = ["insert_links"]

_FETCHES = ("placeholder", "get_attr")
_insert = partial(insert_in_stage, pass_name="insert_links")


def insert_links(
    gm: Network,
    *,
    stages: Sequence[StageBoundary],
    alpha: float,
    weighting: Literal["once", "compound"] = "once",
) -> None:
    """Repeat the tail of each stage at the beginning of the next one.

    Args:
        gm: the network, edited in place; each node knows its stage.
        stages: where stages meet, in order; one without a tail is not linked.
        alpha: weight of the gradients of a tail's own copy; 1 - alpha is the other's.
        weighting: of each parameter's gradient, or of the error in each block.

    Raises:
        PlanError: if a layer of a tail draws random numbers that cannot be drawn again, or is a
            dropout with hooks; or values that share memory are changed in place.
    """
    tails = [(one, _tail_of(gm, one)) for one in stages if one.tail is not None]
    for boundary, tail in tails:
        for node in tail:
            _refuse_random(gm, node, boundary.stage)
            _refuse_hooked(gm, node, boundary.stage)
    for boundary, tail in tails:
        if weighting == "compound":
            _weight_errors(gm, boundary, alpha)
            tail = _tail_of(gm, boundary)
        _Link(gm, boundary, tail, alpha, weighting == "once").insert()


def _tail_of(gm: Network, boundary: StageBoundary) -> list[fx.Node]:
    """Return the computations of a stage from the beginning of its tail on."""
    nodes = list(gm.graph.nodes)
    nodes = nodes[nodes.index(node_named(gm, str(boundary.tail))) :]
    return [n for n in nodes if n.meta[STAGE] == boundary.stage and n.op not in _FETCHES]


def _refuse_random(gm: Network, node: fx.Node, stage: int) -> None:
    module = module_of(gm, node)
    kind = type(module).__name__ if module is not None else operator_name(node)
    shifts = isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU))
    drops = isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
    if shifts or drops or kind in UNREPEATABLE or _attends_randomly(node):
        raise PlanError(
            f"link: the {kind} at {node.name!r} lies in the last layers of local module {stage}, "
            "which run twice, and its random numbers cannot be drawn again. Leave it out "
            "(dropout=0), or give link=0 or another balance"
        )


def _refuse_hooked(gm: Network, node: fx.Node, stage: int) -> None:
    """Refuse a dropout whose hooks would get its mask for what it drops from."""
    module = module_of(gm, node)
    if isinstance(module, _DropoutNd) and any(hooks_of(module).values()):
        raise PlanError(
            f"link: the dropout {str(node.target)!r} lies in the last layers of local module "
            f"{stage}, which run twice with one mask, and has hooks, which would get that mask. "
            "Remove them, or give link=0 or another balance"
        )


def _attends_randomly(node: fx.Node) -> bool:
    """Tell whether ``node`` is an attention with dropout."""
    drops = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
    return operator_name(node) == "scaled_dot_product_attention" and bool(drops != 0.0)


def _weight_errors(gm: Network, boundary: StageBoundary, alpha: float) -> None:
    """Weight the gradient of each value that a block of a tail makes, where it leaves the block."""
    learned, begins = learned_values(gm), (str(boundary.tail), *boundary.inner)
    edges = [*(node_named(gm, name) for name in begins), first_of_stage(gm, boundary.stage + 1)]
    for first, last in pairwise(edges):
        crossing = crossing_values(gm, last.name)
        behind = [node for node in gm.graph.nodes if node >= last]
        if found := overwrites_shared(gm, behind, crossing):
            node, (one, other, *_) = found
            raise PlanError(
                f"weighting='compound': {one.name!r} and {other.name!r} share memory and cross "
                f"before {last.name!r}, where a linked block ends, and {node.name!r} changes both "
                "in place: make that operation one that is not in place, or give weighting='once'"
            )
        inside = {node for node in gm.graph.nodes if first <= node < last}
        for value in crossing:
            made = value in inside or any(overwrites(gm, node, value) for node in inside)
            if made and value in learned:
                copied = any(overwrites(gm, node, value) for node in behind)
                call = ("call_function", weight_gradient, (value, alpha, *[True] * copied))
                new = _insert(last, boundary.stage, *call, f"{value.name}_weighted")
                if "val" in value.meta:
                    new.meta["val"] = value.meta["val"]
                replace_later_uses(value, new)
                learned.add(new)  # a later block may change it in place, and be read by its name


class _Link:
    """One tail: its own layers are weighted, then copied."""

    def __init__(
        self,
        gm: Network,
        boundary: StageBoundary,
        tail: list[fx.Node],
        alpha: float,
        weights_parameters: bool,
    ) -> None:
        self.gm, self.alpha, self.stage, self.tail = gm, alpha, boundary.stage, tail
        self.weights_parameters = weights_parameters
        self.first = first_of_stage(gm, boundary.stage + 1)
        self.origin = Origin("insert_links", f"stage {self.stage}")

    def insert(self) -> None:
        """Insert the second copies, and let the next stage read them."""
        for node in self.tail:
            if operator_name(node) in DROPOUTS or isinstance(module_of(self.gm, node), _DropoutNd):
                self._part_mask(node)
        found = self._find_copied()
        if self.weights_parameters:
            self._weight_gradients(found)
        copied = [node for node in self.gm.graph.nodes if node in found]
        clones = self._keep_overwritten(copied)
        copies = self._insert_copies(copied, clones)
        for node, copy in (clones | copies).items():
            for user in list(node.users):
                if user.meta[STAGE] == self.stage + 1 and user not in copies.values():
                    user.replace_input_with(node, copy)

    def _part_mask(self, node: fx.Node) -> None:
        """Turn a dropout into a product with its mask, which the other copy then reads too."""
        value, contexts = node.all_input_nodes[0], node.meta.get("fxlocal_contexts", ())
        call = ("call_function", torch.ones_like, (value,))
        ones = _insert(node, self.stage, *call, f"{node.name}_ones")
        mask = _insert(node, self.stage, node.op, node.target, node.args, f"{node.name}_mask")
        mask.kwargs = node.kwargs
        mask.replace_input_with(value, ones)
        product: tuple[str, Any] = ("call_function", operator.mul)
        if is_inplace(self.gm, node):  # others may read the value itself
            product = ("call_method", "mul_")
        (node.op, node.target), node.args, node.kwargs = product, (value, mask), {}
        node.meta["fxlocal"] = self.origin
        for new in (ones, mask):
            new.meta["fxlocal_contexts"] = contexts

    def _find_copied(self) -> set[fx.Node]:
        """Return the nodes of the tail on which the next stage depends.

        A change in place is one, though nothing reads its result, if its value is read.
        """
        tail, found = set(self.tail), set[fx.Node]()
        changes = [node for node in self.tail if is_inplace(self.gm, node)]
        own = [node for node in self.gm.graph.nodes if node.meta[STAGE] <= self.stage]
        wanted = [n for n in own if any(u.meta[STAGE] == self.stage + 1 for u in n.users)]
        while wanted:
            node = wanted.pop()
            if node in found or node.op == "get_attr" or is_plain(node):
                continue
            wanted += (n for n in changes if n not in found and overwrites(self.gm, n, node))
            if node not in tail:
                continue
            if operator_name(node) not in DRAWS:
                found.add(node)
                wanted += node.all_input_nodes
        return found

    def _weight_gradients(self, copied: set[fx.Node]) -> None:
        """Weight the gradients of the tail's parameters; add what does so to what is copied."""
        parameters = {name for name, _ in self.gm.named_parameters(remove_duplicate=False)}
        weighted: dict[str, fx.Node] = {}
        for node in self.tail:
            called = module_of(self.gm, node)
            if called is not None and any(True for _ in called.parameters()):
                name = f"{node.name}_module"
                fetched = _insert(node, self.stage, "get_attr", node.target, (), name)
                node.args = (fetched, self.alpha, *node.args)
                node.op, node.target = "call_function", call_weighted
                node.meta["fxlocal"] = self.origin
            for value in node.all_input_nodes:
                name = str(value.target)
                if value.op == "get_attr" and name in parameters:
                    if name not in weighted:
                        call = ("call_function", weight_gradient, (value, self.alpha))
                        weighted[name] = _insert(node, self.stage, *call, f"{value.name}_weighted")
                    node.replace_input_with(value, weighted[name])
                    if node in copied:
                        copied.add(weighted[name])

    def _keep_overwritten(self, copied: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Clone what the copies take and the tail overwrites; return each clone by its value."""
        clones: dict[fx.Node, fx.Node] = {}
        taken = dict.fromkeys(value for node in copied for value in node.all_input_nodes)
        passed = [v for v in taken if v.op != "get_attr" and v not in copied and not is_plain(v)]
        if found := overwrites_shared(self.gm, self.tail, passed):
            node, (one, other, *_) = found
            raise PlanError(
                f"the copies behind stage {self.stage} take {one.name!r} and {other.name!r}, which "
                f"share memory, and {node.name!r} changes both in place: make that operation one "
                "that is not in place, or link fewer layers"
            )
        for value in passed:
            if any(overwrites(self.gm, node, value) for node in self.tail):
                place = max(value.next, self.tail[0])  # others may have changed it before
                clones[value] = _insert(place, self.stage, "call_method", "clone", (value,))
        return clones

    def _insert_copies(
        self, copied: Sequence[fx.Node], clones: dict[fx.Node, fx.Node]
    ) -> dict[fx.Node, fx.Node]:
        """Insert the second copies; return each by its first."""
        copies: dict[fx.Node, fx.Node] = {}
        stage, weight = self.stage + 1, 1 - self.alpha
        buffers = {name for name, _ in self.gm.named_buffers(remove_duplicate=False)}

        def mapped(value: fx.Node) -> fx.Node:
            if value.op == "get_attr" and value.target in buffers:  # it may be moved
                return _insert(self.first, stage, "call_method", "clone", (value,))
            return copies.get(value, clones.get(value, value))

        for node in copied:
            args, kwargs = fx.map_arg((node.args, node.kwargs), mapped)
            op, target = node.op, node.target
            if target is weight_gradient:
                args = (args[0], weight, *args[2:])
            elif target is call_weighted:
                target, args = call_again, (args[0], weight, *args[2:])
            elif (called := module_of(self.gm, node)) and any(True for _ in called.buffers()):
                fetched = _insert(self.first, stage, "get_attr", target, (), f"{node.name}_module")
                own = weight if self.weights_parameters else None
                op, target, args = "call_function", call_again, (fetched, own, *args)
            copy = _insert(self.first, stage, op, target, args, f"{node.name}_linked")
            copy.kwargs = kwargs
            for key in ("fxlocal_contexts", "val"):
                if key in node.meta:
                    copy.meta[key] = node.meta[key]
            copies[node] = copy
        return copies
