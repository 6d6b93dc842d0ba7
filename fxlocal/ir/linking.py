"""Run the last layers of a local module a second time, in front of the next one.

    %conv = call_module conv(%relu)        %conv = call_function call_weighted(conv, 0.5, %relu)
    %drop = call_module drop(%conv)        %drop_mask = call_module drop(%drop_ones)
                                    ->     %drop = call_function mul(%conv, %drop_mask)
                                           ...
                                           %conv_linked = call_function call_again(conv, 0.5,
                                                                                   %cut_relu)
                                           %drop_linked = call_function mul(%conv_linked,
                                                                            %cut_drop_mask)

Both copies share their weights, whose gradients are weighted; buffers move in the first one only,
and both have the same dropout mask.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from ..errors import PlanError
from ..facts import StageBoundary
from ..ops.local_modules import call_again, call_weighted, weight_gradient
from .edit import insert_before
from .network import Network
from .nodes import STAGE, Origin, module_of, node_named
from .operators import is_inplace, is_plain

__all__ = ["TailCopy", "overwrites"]

_FETCHES = ("placeholder", "get_attr")

# Each is its input times a random mask, which is what it returns for ones.
_DROPOUTS = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"}
_DROPOUTS |= {"stochastic_depth"}
# Each makes random values that depend on nothing learned: both copies read the first one's.
_DRAWS = {"rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm"}
_DRAWS |= {"bernoulli", "normal", "multinomial", "poisson"}
_REFUSED = {"rrelu", "rrelu_", "alpha_dropout", "alpha_dropout_", "feature_alpha_dropout"}
_REFUSED |= {"feature_alpha_dropout_", "gumbel_softmax", "bernoulli_", "normal_", "uniform_"}
_VIEWS = {"view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "detach"}
_VIEWS |= {"contiguous", "chunk", "split", "getitem", "view_as", "expand", "unbind", "movedim"}

Cut = Callable[[fx.Node, int, fx.Node], fx.Node]


class TailCopy:
    """The layers of a module that the next one runs again.

    Making one weights the gradients of the module's own copy.

    Args:
        gm: the network, edited in place; each node knows its module.
        border: between the two modules, with a tail.
        alpha: weight of the gradients of the module's own copy; 1 - alpha is the other's.
        pass_name: who edits, for the stamps.

    Attributes:
        copied: the nodes that the next module's layers depend on.

    Raises:
        PlanError: if a layer among them draws random numbers that cannot be drawn again.
    """

    def __init__(self, gm: Network, border: StageBoundary, alpha: float, pass_name: str) -> None:
        self.gm, self.alpha, self.pass_name = gm, alpha, pass_name
        self.module = border.stage
        assert border.tail is not None
        start, tail = node_named(gm, border.tail), False
        self.tail: list[fx.Node] = []
        for node in gm.graph.nodes:
            tail = tail or node is start
            if tail and node.meta[STAGE] == self.module and node.op not in _FETCHES:
                self.tail.append(node)
        for node in self.tail:
            self._refuse_random(node)
        for node in self.tail:
            if _name(node) in _DROPOUTS or isinstance(module_of(gm, node), _DropoutNd):
                self._part_mask(node)
        self.copied = self._find_copied()
        self._weight_gradients()
        self._cuts: dict[fx.Node, fx.Node] = {}

    def insert_cuts(self, before: fx.Node, cuts: Mapping[fx.Node, fx.Node], cut: Cut) -> None:
        """Cut what the copies take, where it is not; keep what the tail overwrites from before."""
        nodes = [n for n in self.gm.graph.nodes if n in self.copied]
        taken = dict.fromkeys(value for node in nodes for value in node.all_input_nodes)
        for value in taken:
            if value.op == "get_attr" or value in self.copied or is_plain(value):
                continue
            inside = value.meta[STAGE] == self.module and value.op != "placeholder"
            if any(overwrites(self.gm, node, value) for node in self.tail):
                place = value.next if inside else self.tail[0]
                detached = cut(place, self.module, value)
                self._cuts[value] = self._insert(
                    place, self.module, "call_method", "clone", (detached,), ""
                )
            elif inside or value.op == "placeholder":
                self._cuts[value] = cuts.get(value) or cut(before, self.module, value)

    def insert_copies(self, before: fx.Node) -> dict[fx.Node, fx.Node]:
        """Insert the second copies; return each by its first."""
        copies: dict[fx.Node, fx.Node] = {}
        module, weight = self.module + 1, 1 - self.alpha
        buffers = {name for name, _ in self.gm.named_buffers(remove_duplicate=False)}

        def mapped(value: fx.Node) -> fx.Node:
            if value.op == "get_attr" and value.target in buffers:  # it may be moved
                return self._insert(before, module, "call_method", "clone", (value,), "")
            return copies.get(value, self._cuts.get(value, value))

        for node in [n for n in self.gm.graph.nodes if n in self.copied]:
            args, kwargs = fx.map_arg((node.args, node.kwargs), mapped)
            op, target = node.op, node.target
            if target is weight_gradient:
                args = (args[0], weight)
            elif target is call_weighted:
                target, args = call_again, (args[0], weight, *args[2:])
            elif (called := module_of(self.gm, node)) and any(True for _ in called.buffers()):
                fetched = self._insert(
                    before, module, "get_attr", target, (), f"{node.name}_module"
                )
                op, target, args = "call_function", call_again, (fetched, weight, *args)
            copy = self._insert(before, module, op, target, args, f"{node.name}_linked")
            copy.kwargs = kwargs
            for key in ("fxlocal_contexts", "val"):
                if key in node.meta:
                    copy.meta[key] = node.meta[key]
            copies[node] = copy
        return copies

    def _insert(
        self, before: fx.Node, module: int, op: str, target: Any, args: tuple[Any, ...], name: str
    ) -> fx.Node:
        node = insert_before(before, op, target, args, self._origin(module), name)
        node.meta[STAGE] = module
        return node

    def _origin(self, module: int) -> Origin:
        return Origin(self.pass_name, f"module {module}")

    def _find_copied(self) -> frozenset[fx.Node]:
        """Return the nodes of the tail on which the next module depends."""
        tail = set(self.tail)
        wanted = [n for n in tail if any(u.meta[STAGE] == self.module + 1 for u in n.users)]
        found: set[fx.Node] = set()
        while wanted:
            node = wanted.pop()
            if node not in tail or node in found or is_plain(node):
                continue
            if _name(node) not in _DRAWS:
                found.add(node)
                wanted += node.all_input_nodes
        return frozenset(found)

    def _weight_gradients(self) -> None:
        """Weight the gradients of the tail's parameters, of whichever form."""
        parameters = {name for name, _ in self.gm.named_parameters(remove_duplicate=False)}
        copied = set(self.copied)
        weighted: dict[str, fx.Node] = {}
        for node in self.tail:
            called = module_of(self.gm, node)
            if called is not None and any(True for _ in called.parameters()):
                fetched = self._insert(
                    node, self.module, "get_attr", node.target, (), f"{node.name}_module"
                )
                node.args = (fetched, self.alpha, *node.args)
                node.op, node.target = "call_function", call_weighted
                node.meta["fxlocal"] = self._origin(self.module)
            for value in node.all_input_nodes:
                name = str(value.target)
                if value.op == "get_attr" and name in parameters:
                    if name not in weighted:
                        args = (value, self.alpha)
                        weighted[name] = self._insert(
                            *(node, self.module, "call_function", weight_gradient, args),
                            f"{value.name}_weighted",
                        )
                    node.replace_input_with(value, weighted[name])
                    if node in copied:
                        copied.add(weighted[name])
        self.copied = frozenset(copied)

    def _part_mask(self, node: fx.Node) -> None:
        """Turn a dropout into a product with its mask, which the other copy then reads too."""
        value = node.all_input_nodes[0]
        module, contexts = node.meta[STAGE], node.meta.get("fxlocal_contexts", ())
        ones = self._insert(
            *(node, module, "call_function", torch.ones_like, (value,)), f"{node.name}_ones"
        )
        mask = self._insert(node, module, node.op, node.target, node.args, f"{node.name}_mask")
        mask.kwargs = node.kwargs
        mask.replace_input_with(value, ones)
        node.op, node.target, node.args, node.kwargs = (
            *("call_function", operator.mul),
            *((value, mask), {}),
        )
        node.meta["fxlocal"] = self._origin(module)
        for new in (ones, mask):
            new.meta["fxlocal_contexts"] = contexts

    def _refuse_random(self, node: fx.Node) -> None:
        module = module_of(self.gm, node)
        kind = type(module).__name__ if module is not None else _name(node)
        shifts = isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU))
        drops = isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
        if shifts or drops or kind in _REFUSED or _attends_randomly(node):
            raise PlanError(
                f"link: the {kind} at {node.name!r} lies in the last layers of local module "
                f"{self.module}, which run twice, and its random numbers cannot be drawn again. "
                "Leave it out (dropout=0), or give link=0 or another balance"
            )


def overwrites(gm: Network, node: fx.Node, value: fx.Node) -> bool:
    """Tell whether ``node`` changes ``value``, or a view of it, in place."""
    return is_inplace(gm, node) and any(origin is value for origin in _origins(gm, node))


def _origins(gm: Network, node: fx.Node) -> Iterator[fx.Node]:
    """Yield the first input of ``node``, and what that may be a view of."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        yield node
        views = isinstance(module_of(gm, node), (nn.Identity, nn.Flatten, nn.Unflatten))
        if not (views or is_inplace(gm, node) or _name(node) in _VIEWS):
            return


def _attends_randomly(node: fx.Node) -> bool:
    """Tell whether ``node`` is an attention with dropout."""
    drops = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
    return _name(node) == "scaled_dot_product_attention" and bool(drops != 0.0)


def _name(node: fx.Node) -> str:
    """Return the plain name of what a node calls."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return str(getattr(node.target, "__name__", ""))
