"""Part a network into local modules: heads, losses, immediate backward, cuts, linked layers.

    %relu = call_module relu(%add)         %relu = call_module relu(%add)
    %conv = call_module conv(%relu)        %cut_relu = call_method detach(%relu)
                                    ->     %head_0 = call_module fxlocal.heads.0(%relu)
                                           %loss_0 = call_function cross_entropy(%head_0, %target)
                                           %backward_0 = call_function backward(%loss_0, ...)
                                           %conv = call_module conv(%cut_relu)

Every value that crosses a border is detached, skip edges included. With a link, the layers of a
module's tail weight their gradients by alpha, and the next module begins with a copy of them
(``..._linked``) on the detached value before the tail, whose gradients are weighted by 1 - alpha
(BackLink, eq. 4 to 7). Forward-exact.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import fx

from fxlocal.errors import PlanError
from fxlocal.facts import BlockInput, StageBoundary
from fxlocal.ir.additions import ADDITIONS
from fxlocal.ir.edit import insert_before
from fxlocal.ir.linking import TailCopy, overwrites
from fxlocal.ir.network import Network
from fxlocal.ir.nodes import STAGE, Origin, node_named
from fxlocal.ir.operators import is_container, is_inplace, is_plain
from fxlocal.ops.local_modules import backward, combine_losses, keep_gradients, require_target
from fxlocal.ops.values import detach_all
from fxlocal.plan import InfoProHead, LocalModules

__all__ = ["insert_local_modules"]

PASS, TARGET = "insert_local_modules", "target"

# Nothing uses what they return: dead-code elimination must let them be.
for _function in (backward, require_target):
    fx.node.has_side_effect(_function)


def insert_local_modules(
    gm: Network,
    *,
    modules: LocalModules,
    borders: Sequence[StageBoundary],
    first_input: BlockInput,
    output: BlockInput,
) -> None:
    """Give each module but the last its head and backward; return output and loss of the last.

    Args:
        gm: the graph, edited in place; what it calls (heads, loss, replay buffers) is there.
        modules: what is asked for.
        borders: one per module but the last, in order.
        first_input: of the model.
        output: its output, one tensor.

    Raises:
        PlanError: if an input of the model is called "target", or a linked layer cannot be run
            twice.
    """
    if any(n.op == "placeholder" and n.target == TARGET for n in gm.graph.nodes):
        raise PlanError(
            f"local modules add an input {TARGET!r} to the network, and the model has one of that "
            "name: rename it"
        )
    _Parting(gm, modules, first_input, output).run(borders)


class _Parting:
    """Works from border to border, and knows the input and target that the next module learns from.

    With replay buffers these come out of the buffer before the module, as all its inputs do.
    """

    def __init__(
        self, gm: Network, modules: LocalModules, first_input: BlockInput, output: BlockInput
    ) -> None:
        self.gm, self.modules = gm, modules
        self.twins: dict[fx.Node, fx.Node] = {}  # second copies of what is cut, too
        self.first_input = node_named(gm, first_input.value)
        self.target = self._insert_target(first_input, output)

    def run(self, borders: Sequence[StageBoundary]) -> None:
        for border in borders:
            first = node_named(self.gm, border.start)
            if border.learns:
                self._part(border, first)
        end = self.gm.graph.output_node()
        module = len(borders)
        result = end.args[0]
        assert isinstance(result, fx.Node)
        loss = self._loss(end, module, result)
        lowest = next((b.stage for b in borders if b.learns), None)
        names = (name for name, _ in self.gm.named_parameters())
        kept = next((n for n in names if n.startswith(f"{ADDITIONS}.heads.{lowest}.")), None)
        if kept is not None:
            parameter = self._insert(end, module, "get_attr", kept, (), "kept_parameter")
            args = (loss, parameter)
            loss = self._insert(end, module, "call_function", keep_gradients, args, "loss")
        end.args = ((result, loss),)

    def _insert_target(self, first_input: BlockInput, output: BlockInput) -> fx.Node:
        last = [n for n in self.gm.graph.nodes if n.op == "placeholder"][-1]
        origin = Origin(PASS, "module 0")
        target = insert_before(last.next, "placeholder", TARGET, (None,), origin, TARGET)
        loss = None
        if "loss" in self.gm.added_modules:
            name = f"{ADDITIONS}.loss"
            loss = insert_before(target.next, "get_attr", name, (), origin, "module_loss")
            loss.meta[STAGE] = 0
        args = (target, self.first_input, first_input.shape or (), output.shape, loss)
        check = insert_before(
            (loss or target).next, "call_function", require_target, args, origin, "check_target"
        )
        for node in (target, check):
            node.meta[STAGE] = 0
        return target

    def _part(self, border: StageBoundary, first: fx.Node) -> None:
        """Insert before ``first``, in this order: cuts, head, loss, backward, what is linked."""
        k = border.stage
        tail = TailCopy(self.gm, border, self.modules.alpha, PASS) if border.tail else None
        crossing = [n for n in self.gm.graph.nodes if _crosses(n, k)]
        self._refuse_overwritten(k)
        linked = tail.copied if tail else frozenset()
        cuts = {
            value: self._cut(first, k, value)
            for value in crossing
            if value not in linked or _is_used(value, k + 1)
        }
        if tail:
            tail.insert_cuts(first, cuts, self._cut)
        loss = self._loss(
            first, k, *self._call_head(first, k, node_named(self.gm, str(border.value)))
        )
        scale = self._insert(first, k, "get_attr", f"{ADDITIONS}.loss_scale", ())
        self._insert(first, k, "call_function", backward, (loss, scale), f"backward_{k}")
        if self.modules.replay:
            cuts = self._replay(first, k, cuts)
        copies = tail.insert_copies(first) if tail else {}
        self.twins |= {copy: cuts[value] for value, copy in copies.items() if value in cuts}
        for value in crossing:
            for user in list(value.users):
                index = user.meta[STAGE]
                behind = copies if value in copies and index == k + 1 else cuts
                if index > k and user is not cuts.get(value):
                    user.replace_input_with(value, behind[value])

    def _refuse_overwritten(self, k: int) -> None:
        """Refuse a module that changes what an earlier one made, and a later one takes too."""
        nodes = [n for n in self.gm.graph.nodes if STAGE in n.meta and n.op != "get_attr"]
        older = [n for n in nodes if n.op == "placeholder" or n.meta[STAGE] < k]
        # What the later one takes of a linked value is its first copy, cut.
        taken = {n: n for n in older} | self.twins
        for node in nodes:
            if node.meta[STAGE] != k or not is_inplace(self.gm, node):
                continue
            for value, cut in taken.items():
                if _is_used(cut, k) and overwrites(self.gm, node, value):
                    raise PlanError(
                        f"local module {k} changes {value.name!r} in place ({node.name!r}), which "
                        "was made before it and is used behind it too: make that operation one "
                        "that is not in place, or split elsewhere"
                    )

    def _insert(
        self, before: fx.Node, k: int, op: str, target: Any, args: tuple[Any, ...], name: str = ""
    ) -> fx.Node:
        node = insert_before(before, op, target, args, Origin(PASS, f"module {k}"), name)
        node.meta[STAGE] = k
        return node

    def _cut(self, before: fx.Node, k: int, value: fx.Node) -> fx.Node:
        if value.op == "call_method" and value.target == "detach":
            return value
        if is_container(self.gm, value):
            return self._insert(before, k, "call_function", detach_all, (value,), f"cut_{value}")
        return self._insert(before, k, "call_method", "detach", (value,), f"cut_{value}")

    def _call_head(self, before: fx.Node, k: int, value: fx.Node) -> tuple[fx.Node, ...]:
        """Return the head's scores and, of InfoPro's, the reconstruction."""
        head = f"{ADDITIONS}.heads.{k}"
        if not isinstance(self.modules.head, InfoProHead):
            return (self._insert(before, k, "call_module", head, (value,), f"head_{k}"),)
        scores = self._insert(before, k, "call_module", f"{head}.classifier", (value,), f"head_{k}")
        decoded = self._insert(
            before, k, "call_module", f"{head}.decoder", (value,), f"decoded_{k}"
        )
        return scores, decoded

    def _loss(
        self, before: fx.Node, k: int, scores: fx.Node, decoded: fx.Node | None = None
    ) -> fx.Node:
        own = "loss" in self.gm.added_modules
        op, target = ("module", f"{ADDITIONS}.loss") if own else ("function", F.cross_entropy)
        name = f"loss_{k}" if decoded is None else f"scores_loss_{k}"
        loss = self._insert(before, k, f"call_{op}", target, (scores, self.target), name)
        if decoded is None:
            return loss
        head = self.modules.head
        assert isinstance(head, InfoProHead)
        args = (loss, decoded, self.first_input, head.classification, head.reconstruction)
        return self._insert(before, k, "call_function", combine_losses, args, f"loss_{k}")

    def _replay(
        self, before: fx.Node, k: int, cuts: dict[fx.Node, fx.Node]
    ) -> dict[fx.Node, fx.Node]:
        """Let everything that later modules take from here go through module k + 1's buffer."""
        # Sizes too: the batch that comes out may be smaller or larger than the one that goes in.
        others = [n for n in self.gm.graph.nodes if _is_used(n, k) and _passes_uncut(n)]
        values = {**cuts, **{n: n for n in others}, self.target: self.target}
        if isinstance(self.modules.head, InfoProHead):
            values[self.first_input] = self.first_input
        taken = list(values.values())
        batch = self._insert(
            before, k + 1, "call_module", f"{ADDITIONS}.replay.{k}", tuple(taken), f"replay_{k}"
        )
        replayed = {
            value: self._insert(
                *(before, k + 1, "call_function", operator.getitem, (batch, i)),
                f"replayed_{kept.name}",
            )
            for i, (value, kept) in enumerate(values.items())
        }
        self.target = replayed[self.target]
        self.first_input = replayed.get(self.first_input, self.first_input)
        for node in others:
            for user in list(node.users):
                if user.meta[STAGE] > k and user is not batch:
                    user.replace_input_with(node, replayed[node])
        return replayed


def _is_used(node: fx.Node, k: int) -> bool:
    """Tell whether a module behind module k uses ``node``."""
    return any(user.meta.get(STAGE, 0) > k for user in node.users)


def _passes_uncut(node: fx.Node) -> bool:
    return node.op == "placeholder" or (node.op != "get_attr" and is_plain(node))


def _crosses(node: fx.Node, k: int) -> bool:
    """Tell whether ``node`` is a value of module k, or an input, that a later module uses."""
    if node.op == "placeholder":  # cut too, in case it has a graph of its own
        return "fxlocal" not in node.meta and _is_used(node, k)
    if node.op in ("get_attr", "output") or node.meta[STAGE] != k or is_plain(node):
        return False
    return _is_used(node, k)
