"""One training step of a Plan in eager PyTorch, by standing around the model's own calls.

The model runs as it is written. Of each convolution and linear layer, in the order in which they
are called, the input that it met and the output that it gave are copied as it runs; deltas come
from these by autograd. Of the library only facts are taken that have tests of their own: which
layers there are, where the boundary is, and which sums are residual.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

import fxlocal
from fxlocal import Freeze, Oja, Plan, Random, TopK, Zero
from fxlocal.plan import WeightGrad
from support import oracle
from support.prefixes import nodes_before

_ADDS = {"add", "__add__", "__radd__", "add_", "iadd", "__iadd__"}
_NORMS = {"batch_norm": 5, "instance_norm": 5}  # where their flag of training is
_FLAGS = {"batch_norm": "training", "instance_norm": "use_input_stats"}
_PASSED = ("norm", "dropout", "identity")  # between a layer and the residual sum that it feeds


@dataclass
class Facts:
    """What a plan means in one captured model, in terms of calls that an eager run can count.

    Attributes:
        boundary: index of the first layer behind it.
        num_norms: calls of norms that track statistics before it.
        posts: what a layer's delta takes for its output: the result of the n-th sum, or of the
            n-th concatenation the i-th part, to be added to its own.
    """

    plan: Plan
    paths: list[str]
    boundary: int = 0
    num_norms: int = 0
    posts: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    prefix: set[str] = field(default_factory=set)
    num_adds: int = 0

    @classmethod
    def of(cls, captured: fx.GraphModule, analysis: fxlocal.Analysis, plan: Plan) -> "Facts":
        names = analysis.names
        methods = {names.get(n, n): how for n, how in plan.weight_grads.items()}
        facts = cls(plan, [layer.path for layer in analysis.layers])
        facts.methods = methods
        before = {node.name for node in nodes_before(captured, plan)}
        graph = _Graph(captured)
        facts.boundary = analysis.boundary(plan.local.until) if plan.local else 0
        facts.num_norms = sum(name in before for name in graph.norms)
        facts.num_adds = len(graph.adds)
        for layer in analysis.layers[: facts.boundary]:
            if post := graph.post(analysis, layer, before):
                facts.posts[layer.index] = post
        return facts


class _Graph:
    """The calls of a captured graph, counted as an eager run counts them."""

    def __init__(self, captured: fx.GraphModule) -> None:
        self.captured = captured
        self.nodes = {node.name: node for node in captured.graph.nodes}
        self.adds = [n.name for n in captured.graph.nodes if self._adds(n)]
        self.cats = [n.name for n in captured.graph.nodes if self.kind(n) == "cat"]
        self.norms = [n.name for n in captured.graph.nodes if self._tracks(n)]

    def kind(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.captured.get_submodule(str(node.target))).__name__.lower()
        if node.op == "call_method":
            return str(node.target)
        if isinstance(node.target, torch._ops.OpOverload):
            return str(node.target._schema.name.rpartition("::")[2])
        return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""

    def _adds(self, node: fx.Node) -> bool:
        if node.op == "call_module" or self.kind(node) not in _ADDS:
            return False
        first = node.args[0]
        fetched = isinstance(first, fx.Node) and first.op == "get_attr"
        return not (fetched and _of_integers(self.captured, str(first.target)))

    def _tracks(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.captured.get_submodule(str(node.target)), _NormBase)
        return self.kind(node) in _NORMS

    def post(
        self, analysis: fxlocal.Analysis, layer: fxlocal.Layer, before: set[str]
    ) -> tuple[str, int, int] | None:
        """Section 3.7: the residual sum that the layer feeds, or its output plus a U-Net skip."""
        sums = {edge.target for edge in analysis.skips if edge.kind == "residual"}
        node = self.nodes[layer.node]
        while len(node.users) == 1 and (node := next(iter(node.users))).name in before:
            if node.name in sums:
                return "sum", self.adds.index(node.name), 0
            if not any(word in self.kind(node) for word in _PASSED):
                break
        for edge in analysis.skips:
            if edge.target == layer.pre and edge.kind == "concat" and edge.long_range:
                parts = [n.name for n in self.nodes[edge.target].args[0]]
                return "skip", self.cats.index(edge.target), parts.index(edge.operand)
        return None


def _of_integers(root: Any, path: str) -> bool:
    for part in path.split("."):
        root = getattr(root, part)
    return not root.is_floating_point()


@dataclass
class _Call:
    """A call of a layer: its function, its arguments by name, and its output then."""

    function: Any
    arguments: dict[str, Any]
    weight: Tensor
    output: Tensor
    errors: list[Tensor]

    def delta(self, post: Tensor, rule: Any) -> Tensor:
        copied = self.arguments["weight"].detach().clone().requires_grad_()
        with torch.enable_grad():
            again = self.function(**{**self.arguments, "weight": copied})
        (delta,) = torch.autograd.grad(again, copied, _summed(post, again))
        if isinstance(rule, Oja):
            own = _summed(post, again).square()
            at = 1 if "transpose" in self.function.__name__ else 0
            channel = -1 if self.function.__name__ == "linear" else 1
            energy = own.movedim(channel, -1).reshape(-1, own.shape[channel]).sum(0)
            shape = [1] * copied.dim()
            shape[at] = -1
            delta = delta - energy.view(shape) * copied.detach()
        return delta


def _summed(post: Tensor, output: Tensor) -> Tensor:
    return post.sum_to_size(*output.shape)


class EagerStep(TorchFunctionMode):
    """Around the forward of an eager model; then `finish` and `learn` after its backward.

    Args:
        model: the model.
        facts: of the plan.
    """

    def __init__(self, model: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.model, self.facts = model, facts
        self.calls: list[_Call] = []
        self.adds: list[Tensor] = []
        self.cats: list[list[Tensor]] = []
        self.num_norms, self.counted = 0, None
        self.counters = {
            id(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")
        }
        local = facts.plan.local
        self.fixed = facts.num_norms if local and local.norm == "eval" else 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name.startswith("conv") or name == "linear":
            return self._layer(func, args, kwargs)
        if name in _NORMS:
            return self._norm(func, name, list(args), dict(kwargs))
        if name == "add_" and id(args[0]) in self.counters and self.num_norms < self.fixed:
            self.counted = args[0]  # a norm without momentum divides by it; it is set back then
        if name == "cat":
            self.cats.append([part.detach().clone() for part in args[0]])
        result = func(*args, **kwargs)
        if name in _ADDS and isinstance(args[0], Tensor) and args[0].is_floating_point():
            self.adds.append(result.detach().clone())
        return result

    def _norm(self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        self.num_norms += 1
        mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
        if self.num_norms <= self.fixed and mean is not None:
            if len(args) > _NORMS[name]:
                args[_NORMS[name]] = False
            else:
                kwargs[_FLAGS[name]] = False
        if self.counted is not None:
            self.counted.sub_(1)
            self.counted = None
        return func(*args, **kwargs)

    def _layer(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        transposed = "transpose" in func.__name__
        names = oracle._TRANSPOSED if transposed else oracle._SLIDING
        call = dict(zip(names, args, strict=False)) | kwargs
        weight, index = call["weight"], len(self.calls)
        path = self.facts.paths[index] if index < len(self.facts.paths) else ""
        method = self.facts.methods.get(path)
        if method is not None and weight.requires_grad:
            call["weight"] = weight.detach().requires_grad_()
        kept = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in call.items()}
        output: Tensor = func(**call)
        errors: list[Tensor] = []
        if method is not None and output.requires_grad:
            output.register_hook(errors.append)
        self.calls.append(_Call(func, kept, weight, output.detach().clone(), errors))
        return output

    def learn(self) -> None:
        """Move each weight of the prefix by its normalised delta."""
        assert len(self.calls) == len(self.facts.paths), "the eager run has other layers"
        assert len(self.adds) == self.facts.num_adds, "the eager run has other sums"
        local = self.facts.plan.local
        if local is None or isinstance(local.rule, Freeze):
            return
        deltas: dict[int, tuple[Tensor, Tensor]] = {}
        for i, call in enumerate(self.calls[: self.facts.boundary]):
            if not call.weight.requires_grad:
                continue
            delta = call.delta(self._post(i, call.output), local.rule)
            weight, total = deltas.get(id(call.weight), (call.weight, 0))
            deltas[id(call.weight)] = weight, total + delta
        rate = float(torch.tensor(local.rule.rate))
        with torch.no_grad():
            for weight, delta in deltas.values():
                length = rate * (weight.norm() if local.rule.relative else 1)
                if delta.norm() > 0:
                    weight += length * delta / delta.norm()

    def _post(self, index: int, output: Tensor) -> Tensor:
        kind, at, part = self.facts.posts.get(index, ("", 0, 0))
        if kind == "sum":
            return self.adds[at]
        if kind == "skip" and (skip := self.cats[at][part]).shape == output.shape:
            return output + skip
        return output

    def finish(self, prefix: set[str]) -> set[str]:
        """Put the plan's gradients in place; return the names of those that are no one value.

        They are random, or of the largest of errors two of which are as large.
        """
        names = {id(p): n for n, p in self.model.named_parameters()}
        uncertain = set(self._approximate(names))
        for name, parameter in self.model.named_parameters():
            if name in prefix:
                parameter.grad = None
        return uncertain

    def _approximate(self, names: dict[int, str]) -> Iterator[str]:
        for path, call in zip(self.facts.paths, self.calls, strict=True):
            method = self.facts.methods.get(path)
            if not call.errors or not call.weight.requires_grad:
                continue
            (error,) = call.errors
            gradient = self._gradient(call, error, method)
            if gradient is None:
                if isinstance(method, (Random, TopK)):
                    yield names[id(call.weight)]
                    gradient = torch.zeros_like(call.weight)
                else:
                    continue
            old = call.weight.grad
            call.weight.grad = gradient if old is None else old + gradient

    def _gradient(self, call: _Call, error: Tensor, method: WeightGrad | None) -> Tensor | None:
        if isinstance(method, Zero):
            return None if method.none else torch.zeros_like(call.weight)
        if not isinstance(method, TopK) or _has_ties(call, error, method.k):
            return None
        given = {**call.arguments}
        return oracle.LargestErrors(nn.Module(), {})._gradient(given, error, method.k, method.scale)


def _has_ties(call: _Call, error: Tensor, k: int) -> bool:
    """Tell whether two errors of a map are so close that rounding may choose between them."""
    linear = call.function.__name__ == "linear"
    maps = error.movedim(-1, 1) if linear and error.dim() > 2 else error
    sizes = maps.abs().flatten(2) if maps.dim() > 2 else maps.abs()[..., None]
    if sizes.shape[2] <= k:
        return False
    ordered = sizes.sort(2, descending=True).values
    return bool(((ordered[..., k - 1] - ordered[..., k]) <= 1e-7 * ordered[..., 0]).any())
