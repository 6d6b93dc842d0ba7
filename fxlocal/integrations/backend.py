"""A backend of torch.compile that rewrites what Dynamo captured by a Plan, and hands it on.

Dynamo captures what `transform` cannot: a model that breaks into several graphs. The passes are the
same. They edit by ``detach`` and operators alone: what compiles the graph next interprets it and
knows no ``with`` block. It keeps nothing of a prefix, as no gradient asks for it.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import ShortenTraceback
from torch.utils import _pytree as pytree

from ..compiler.analysis import Analysis, analyze
from ..compiler.pipeline import build_pipeline, check_boundary
from ..compiler.resolve import resolve
from ..compiler.runner import run_passes
from ..compiler.transform import find_prefix
from ..errors import NoEffectWarning, PlanError, nearest
from ..inspection.explain import explain
from ..ir.network import Network
from ..ops.checkpoint import refuse_checkpointing
from ..ops.ranks import find_group
from ..ops.values import leave_no_gradient
from ..passes import insert_no_grad
from ..plan import LearningRule, Plan
from .dynamo import Captured, lower_graph, raise_graph, read_graph

__all__ = ["Backend", "backend"]

Compiler = Callable[..., Any]


def backend(plan: Plan, inner: str | Compiler = "inductor") -> "Backend":
    """Return a backend of `torch.compile` that carries out ``plan`` on what it compiles.

    ``torch.compile(model, backend=fxlocal.backend(plan))`` trains as
    ``torch.compile(fxlocal.transform(model, plan))`` does, also where the model breaks into several
    graphs, if the boundary lies in the first one that has layers. In evaluation mode, and where
    gradients are disabled, the model is compiled as it is.

    Equal arguments give the same object: another one would have all compiled again.

    Args:
        plan: what to do, layers given by their paths; no local modules and no checkpointing.
        inner: what compiles the rewritten graph: the name of a backend of `torch.compile`, or a
            function like one.

    Raises:
        PlanError: if the plan asks for something that only `transform` does.

    Example:
        >>> import torch
        >>> from fxlocal import LocalPrefix
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> by_plan = backend(Plan(local=LocalPrefix(until="2")), inner="eager")
        >>> torch.compile(model, backend=by_plan)(torch.ones(3, 4)).sum().backward()
        >>> [p.grad is not None for p in model.parameters()]
        [False, False, True, True]
    """
    _refuse_unfit(plan)
    try:
        hash(inner)
    except TypeError as error:
        raise PlanError(f"inner={inner!r}: {error}, and equal arguments give one backend") from None
    return _backend(plan, inner)


def _refuse_unfit(plan: Plan) -> None:
    if not isinstance(plan, Plan):
        raise PlanError(f"fxlocal.backend({plan!r}): give a Plan")
    for part in (plan.modules, plan.checkpoint, plan.drop):
        if part is not None:
            raise PlanError(
                f"{part!r}: a backend sees the graphs of a model one by one, and does local "
                "prefixes and weight gradients alone. Use fxlocal.transform(model, plan, *inputs)"
            )
    if plan.local is not None and not isinstance(until := plan.local.until, str):
        raise PlanError(
            f"until={until!r}: a backend sees the graphs of a model one by one and cannot count "
            "its layers. Give the path of a layer: fxlocal.analyze(model).boundary(until) is its "
            "index in .layers, which have paths"
        )


class PlanRefused(ShortenTraceback, PlanError):
    """A PlanError that Dynamo lets through, and wraps in none of its own."""


@cache
def _backend(plan: Plan, inner: str | Compiler) -> "Backend":
    return Backend(plan, inner)


class Backend:
    """What `backend` returns. `explain` says what it did to each graph."""

    def __init__(self, plan: Plan, inner: str | Compiler) -> None:
        self.plan, self.inner = plan, inner
        self._compile: Compiler = lookup_backend(inner) if isinstance(inner, str) else inner
        self._records: list[str] = []
        self._reached: Callable[[], Tensor | None] = lambda: None  # a weight where the boundary is
        self._prefix: set[str] = set()  # names of the parameters before it
        self._missing: dict[type[nn.Module], set[str]] = {}  # of weight_grads, in no graph yet
        self._warned: set[type[nn.Module]] = set()

    def __repr__(self) -> str:
        return f"fxlocal.backend({self.plan!r}, inner={self.inner!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return backend, (self.plan, self.inner)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Compiler:
        """Rewrite ``gm`` and compile it; a PlanError if the plan does not fit model or graph."""
        try:
            captured = read_graph(gm, inputs)
            made = self._rewrite(captured)
        except PlanError as error:
            raise PlanRefused(str(error), first_useful_frame=None) from error
        compiled: Compiler = self._compile(gm, inputs, **options)
        return compiled if made is None else self._wrap(compiled, captured, *made)

    def explain(self) -> str:
        """Return what was done to each graph that was compiled: the diff of each pass."""
        return "\n\n".join([repr(self), *(self._records or ["no graph was compiled yet"])])

    def _rewrite(self, captured: Captured) -> "tuple[list[nn.Parameter], bool] | None":
        """Rewrite a graph in place; return the parameters before the boundary, if it is there.

        And whether it learns in its forward.
        """
        if captured.model is None:
            self._note(captured, "holds none of the model's parameters: as it is")
            return None
        captured.watch()
        if not captured.trains:
            self._note(captured, "evaluation: as it is")
            return None
        if isinstance(captured.model, Network):
            raise PlanError(
                "a network that fxlocal made already carries out its Plan: compile it with "
                f"backend={self.inner!r}, or give the model itself to this backend"
            )
        network = raise_graph(captured)
        analysis = analyze(network)
        if not analysis.layers:
            self._note(captured, "no layers: as it is")
            return None
        plan = self._part(captured, analysis)
        resolved = resolve(plan, analysis, find_group())
        if resolved.boundary and (names := captured.trained_before()):
            raise PlanError(_trained_outside(captured, plan, names))
        check_boundary(network, resolved, analysis)
        steps = build_pipeline(resolved, analysis)
        kept = [step for step in steps if getattr(step, "func", None) is not insert_no_grad]
        if not kept:
            self._note(captured, _layers_of(analysis), "as it is")
            return [], False
        rewritten = run_passes(network, kept, plan)
        lower_graph(rewritten, captured.gm, plan.rate)
        self._note(captured, _layers_of(analysis), explain(rewritten))
        if plan.local is None:
            return [], False
        prefix = find_prefix(rewritten, resolved)
        self._prefix = {captured.names[id(parameter)] for parameter in prefix}
        return prefix, bool(resolved.boundary) and isinstance(plan.local.rule, LearningRule)

    def _note(self, captured: Captured, *what: str) -> None:
        """Record what was done to a graph."""
        self._records.append("\n".join([f"{captured.title}: {what[0]}", *what[1:]]))

    def _part(self, captured: Captured, analysis: Analysis) -> Plan:
        """Return the part of the plan that lies in one graph; or a PlanError."""
        model, plan = captured.model, self.plan
        assert model is not None
        self._refuse_unknown(model)
        paths = {layer.path for layer in analysis.layers}
        inside = {n: m for n, m in plan.weight_grads.items() if analysis.names.get(n, n) in paths}
        self._missing.setdefault(type(model), set(plan.weight_grads)).difference_update(inside)
        if plan.local is not None and not _holds(analysis, plan.local.until):
            reached = self._reached()
            if reached is None or id(reached) not in captured.names:
                raise PlanError(_too_early(captured, plan, analysis))
            values = [state.value for state in captured.state.values()]
            names = {captured.names.get(id(v), "") for v in values if v.requires_grad}
            if tied := sorted(names & self._prefix):
                raise PlanError(
                    f"{captured.title} uses {tied[0]!r}, which also lies before the boundary "
                    f"at {plan.local.until!r}, in another graph. Tied weights must lie on one "
                    "side or be frozen: call its requires_grad_(False)"
                )
            plan = replace(plan, local=None)
        return replace(plan, weight_grads=inside)

    def _refuse_unknown(self, model: nn.Module) -> None:
        named = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        known = {*named, *(name for name, _ in model.named_parameters(remove_duplicate=False))}
        asked = [(f"weight_grads[{path!r}]", path) for path in self.plan.weight_grads]
        if self.plan.local is not None:
            until = str(self.plan.local.until)
            asked.append((f"until={until!r}", until.partition("@")[0]))
        for what, path in asked:
            if path not in known:
                raise PlanError(
                    f"{what}: {type(model).__name__}, which is compiled, has no such module. "
                    f"Nearest: {nearest(path, named)}"
                )

    def _wrap(
        self, compiled: Compiler, captured: Captured, prefix: list[nn.Parameter], learns: bool
    ) -> Compiler:
        """Return ``compiled`` with what a network does before and after its forward."""
        owned = [id(value) in captured.names for value in captured.inputs]
        before = {id(parameter) for parameter in prefix}
        places = [i for i, value in enumerate(captured.inputs) if id(value) in before]
        mark = owned.index(True) if self.plan.local is not None and True in owned else None
        assert captured.model is not None
        kind = type(captured.model)

        def run(*args: Any) -> Any:
            if learns:
                refuse_checkpointing()
            # Not those that were captured: other models of the same class may run this.
            parameters = [args[i] for i in places]
            for parameter in parameters:
                parameter.grad = None  # a stale one would have the optimizer move it
            if mark is not None:
                self._reached = weakref.ref(args[mark])
            output = compiled(*args)
            self._finish(output, parameters, kind)
            return output

        return run

    def _finish(self, output: Any, prefix: Sequence[Tensor], kind: type[nn.Module]) -> None:
        """Leave no gradient before the boundary, and warn of layers that were in no graph."""
        leave_no_gradient(output, prefix)
        missing = self._missing[kind]
        if not missing or kind in self._warned:
            return

        def warn(gradient: Tensor) -> None:  # behind the forward, when all graphs are there
            if missing and kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(_not_found(kind, missing), NoEffectWarning, stacklevel=2)

        for value in pytree.tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(warn)  # type: ignore[no-untyped-call]


def _holds(analysis: Analysis, until: str | int | float) -> bool:
    """Tell whether a graph has a layer that ``until`` names, by any of its names."""
    names = {*analysis.names, *(layer.path for layer in analysis.layers)}
    names |= {block.name for block in analysis.blocks}
    return any(name == until or name.startswith(f"{until}.") for name in names)


def _layers_of(analysis: Analysis) -> str:
    first, *others = analysis.layers
    if not others:
        return f"1 layer, {first.path!r}"
    return f"{len(analysis.layers)} layers, {first.path!r} to {others[-1].path!r}"


def _too_early(captured: Captured, plan: Plan, analysis: Analysis) -> str:
    assert plan.local is not None
    return (
        f"until={plan.local.until!r} is not in the first graph with layers that torch.compile "
        f"makes of {type(captured.model).__name__}, {captured.title} with {_layers_of(analysis)}: "
        "that was compiled before anyone knew that it lies before the boundary. Give a layer in "
        "it, or mend the graph break behind it, which torch.compile(..., fullgraph=True) names"
    )


def _trained_outside(captured: Captured, plan: Plan, names: Sequence[str]) -> str:
    assert plan.local is not None
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"until={plan.local.until!r}: the inputs of {captured.title}, in which it lies, were "
        f"computed from {names[0]!r}{more} outside of it, in another graph or uncompiled, where "
        "nothing learns locally. Freeze these, requires_grad_(False), or mend the graph break "
        "before it, which torch.compile(..., fullgraph=True) names"
    )


def _not_found(kind: type[nn.Module], missing: set[str]) -> str:
    return (
        f"weight_grads of {', '.join(map(repr, sorted(missing)))}: torch.compile captured no graph "
        f"of {kind.__name__} with a layer of that path. Its gradient is exact. Print what was "
        "captured with the backend's explain()"
    )
