"""Give each local module a head, a loss and an immediate backward; return output and loss.

    %relu = call_module relu(%add)         %relu = call_module relu(%add)
    %cut = call_method detach(%relu)       %cut = call_method detach(%relu)
                                    ->     %head_0 = call_module fxlocal.heads.0(%relu)
                                           %loss_0 = call_function cross_entropy(%head_0, %target)
                                           %backward_0 = call_function backward(%loss_0, ...)
    %conv = call_module conv(%cut)         %conv = call_module conv(%cut)

A module's loss is back-propagated as soon as it is known, which frees its activations; the loss of
the last one is returned, for the user to do so. The network takes a target behind the inputs of
the example, which is checked. Forward-exact. Cost: the heads. Refuses an input of the model called
"target".
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import fx

from fxlocal.errors import PlanError
from fxlocal.facts import BlockInput, StageBoundary
from fxlocal.ir.additions import ADDITIONS
from fxlocal.ir.boundary import first_of_stage
from fxlocal.ir.edit import insert_in_stage
from fxlocal.ir.network import Network
from fxlocal.ir.nodes import FIXED, STAGE, node_named, parts_of
from fxlocal.ops.local_modules import (
    TARGET,
    backward,
    combine_losses,
    keep_gradients,
    require_target,
    weight_gradient,
)
from fxlocal.plan import InfoProHead, LocalModules

__all__ = ["insert_losses"]

_insert = partial(insert_in_stage, pass_name="insert_losses")

# Nothing uses what they return: dead-code elimination must let them be.
for _function in (backward, require_target):
    fx.node.has_side_effect(_function)


def insert_losses(
    gm: Network,
    *,
    modules: LocalModules,
    stages: Sequence[StageBoundary],
    first_input: BlockInput,
    output: BlockInput,
) -> None:
    """Give each stage but the last its head and backward; return output and loss of the last.

    Args:
        gm: the graph, edited in place, its stages cut; what it calls (heads, loss) is there.
        modules: what is asked for.
        stages: the boundaries behind those that learn, in order.
        first_input: of the model.
        output: its prediction, one tensor.

    Raises:
        PlanError: if an input of the model is called "target".
    """
    if any(n.op == "placeholder" and n.target == TARGET for n in gm.graph.nodes):
        raise PlanError(
            f"local modules add an input {TARGET!r} to the network, and the model has one of that "
            "name: rename it"
        )
    _Losses(gm, modules, first_input, output).insert(stages)


def _weighted(value: fx.Node, stage: int) -> fx.Node:
    """Return ``value`` as the last block of a link lets it out, its gradient weighted."""
    links = (n for n in value.users if n.target is weight_gradient and n.meta[STAGE] == stage)
    link = next(links, None)
    return value if link is None else _weighted(link, stage)


class _Losses:
    """Knows the input and the target that every module learns from."""

    def __init__(
        self, gm: Network, modules: LocalModules, first_input: BlockInput, output: BlockInput
    ) -> None:
        self.gm, self.modules = gm, modules
        self.own = callable(modules.loss)
        self.first_input = node_named(gm, first_input.value)
        self.target = self._insert_target(first_input.shape or (), output.shape)

    def insert(self, stages: Sequence[StageBoundary]) -> None:
        for boundary in stages:
            first, k = first_of_stage(self.gm, boundary.stage + 1), boundary.stage
            value = _weighted(node_named(self.gm, str(boundary.value)), k)
            loss = self._loss(first, k, *self._call_head(first, k, value))
            scale = _insert(first, k, "get_attr", f"{ADDITIONS}.loss_scale", ())
            _insert(first, k, "call_function", backward, (loss, scale), f"backward_{k}")
        end = self.gm.graph.output_node()
        last, result = end.meta[STAGE], end.args[0]
        name = self.modules.output
        prediction = result if name is None else parts_of(result)[name]
        assert isinstance(prediction, fx.Node)
        loss = self._loss(end, last, prediction)
        if stages and (kept := self._first_parameter(stages[0].stage)):
            # Its gradient was left by the forward: gone, someone cleared it before the backward.
            fetched = _insert(end, last, "get_attr", kept, (), "kept_parameter")
            args = (loss, fetched)
            loss = _insert(end, last, "call_function", keep_gradients, args, "loss")
        end.args = ((result, loss),)

    def _first_parameter(self, stage: int) -> str | None:
        prefix = f"{ADDITIONS}.heads.{stage}."
        names = (name for name, _ in self.gm.named_parameters())
        return next((name for name in names if name.startswith(prefix)), None)

    def _insert_target(self, first_input: tuple[int, ...], output: Any) -> fx.Node:
        inputs = self.gm.graph.find_nodes(op="placeholder")
        after, loss = inputs[-1].next, None
        target = _insert(after, 0, "placeholder", TARGET, (None,), TARGET)
        for fixed in (node for node in inputs if FIXED in node.meta):
            after.prepend(fixed)  # net(x, target), whatever stands between them in the model
        if self.own:
            loss = _insert(after, 0, "get_attr", f"{ADDITIONS}.loss", (), "module_loss")
        args = (target, self.first_input, first_input, output, loss)
        _insert(after, 0, "call_function", require_target, args, "check_target")
        return target

    def _call_head(self, before: fx.Node, k: int, value: fx.Node) -> tuple[fx.Node, ...]:
        """Return the head's scores and, of InfoPro's, the reconstruction."""
        head = f"{ADDITIONS}.heads.{k}"
        if not isinstance(self.modules.head, InfoProHead):
            return (_insert(before, k, "call_module", head, (value,), f"head_{k}"),)
        scores = _insert(before, k, "call_module", f"{head}.classifier", (value,), f"head_{k}")
        decoder = f"{head}.decoder"
        return scores, _insert(before, k, "call_module", decoder, (value,), f"decoded_{k}")

    def _loss(
        self, before: fx.Node, k: int, scores: fx.Node, decoded: fx.Node | None = None
    ) -> fx.Node:
        op, target = ("module", f"{ADDITIONS}.loss") if self.own else ("function", F.cross_entropy)
        name = f"loss_{k}" if decoded is None else f"scores_loss_{k}"
        loss = _insert(before, k, f"call_{op}", target, (scores, self.target), name)
        if decoded is None:
            return loss
        head = self.modules.head
        assert isinstance(head, InfoProHead)
        args = (loss, decoded, self.first_input, head.classification, head.reconstruction)
        return _insert(before, k, "call_function", combine_losses, args, f"loss_{k}")
