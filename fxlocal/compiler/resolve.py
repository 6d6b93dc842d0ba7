"""Resolve a Plan against a model, once: what it means there, or why it does not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import PlanError, nearest
from ..facts import Layer, StageBoundary
from ..plan import LocalModules, Plan, TopK, WeightGrad
from .analysis import Analysis
from .split import find_split, find_stage_boundaries
from .topk_time import predict_topk_time

__all__ = ["ResolvedPlan", "boundary_of", "resolve", "weight_grads_of"]


@dataclass(frozen=True)
class ResolvedPlan:
    """What a Plan means in one model.

    Attributes:
        plan: as it was given.
        boundary: index of the transition layer; 0 if there is no prefix.
        start: name of the first node behind the boundary.
        prefix: the layers before it.
        approximations: the layers whose weight gradient the plan names, in order, and how.
        exact: paths of those that keep their exact one all the same, and why.
        split: index of the first block of each stage, of local modules or of checkpointing.
        stages: where they meet, one per stage but the last.
        group: name of the process group whose ranks sum their deltas; "" for a rank alone, None
            where there is no process group.
    """

    plan: Plan
    boundary: int
    start: str
    prefix: tuple[Layer, ...]
    approximations: tuple[tuple[Layer, WeightGrad], ...]
    exact: Mapping[str, str]
    split: tuple[int, ...]
    stages: tuple[StageBoundary, ...]
    group: str | None = None


def boundary_of(plan: Plan, analysis: Analysis) -> int:
    """Return the index of the transition layer of ``plan``, or a PlanError; 0 if there is none."""
    return analysis.boundary(plan.local.until) if plan.local else 0


def weight_grads_of(plan: Plan, analysis: Analysis) -> dict[str, WeightGrad]:
    """Return the weight gradients of ``plan`` by the paths of `Analysis.layers`.

    Raises:
        PlanError: if two names of one layer ask for different ones.
    """
    found: dict[str, tuple[str, WeightGrad]] = {}
    for name, method in plan.weight_grads.items():
        path = analysis.names.get(name, name)
        other, rival = found.setdefault(path, (name, method))
        if rival != method:
            raise PlanError(
                f"weight_grads[{name!r}]={method!r}: {other!r} is another name of the same layer, "
                f"for which {rival!r} is given. Keep one of the two"
            )
    return {path: method for path, (_, method) in found.items()}


def resolve(plan: Plan, analysis: Analysis, group: str | None = None) -> ResolvedPlan:
    """Say what ``plan`` means in the model of ``analysis``; a PlanError if it does not fit."""
    boundary = boundary_of(plan, analysis)
    if plan.rates and len(plan.rates) != boundary:
        raise PlanError(
            f"{plan.local!r}: {len(plan.rates)} rates for the {boundary} layers before the "
            "boundary; give one for each, in execution order"
        )
    approximations = _find_approximations(plan, analysis, boundary)
    stages = plan.modules or plan.checkpoint
    if plan.modules is not None:
        _refuse_unknown_shapes(plan.modules, analysis)
    if plan.drop and plan.drop.rate and not analysis.branches:
        raise PlanError(
            f"{plan.drop!r}: the model has no residual blocks, whose shortcut could be passed on; "
            "it is for networks like ResNets and transformers. Leave it out"
        )
    split = () if stages is None else find_split(analysis, stages)
    link = plan.modules.link if plan.modules else 0
    return ResolvedPlan(
        plan,
        boundary,
        analysis.start(boundary) if analysis.layers else "",
        analysis.layers[:boundary],
        approximations,
        _find_exact(approximations, analysis),
        split,
        find_stage_boundaries(analysis, split, link, boundary),
        group,
    )


def _refuse_unknown_shapes(modules: LocalModules, analysis: Analysis) -> None:
    if not analysis.blocks:
        raise PlanError(f"{modules!r}: the model has no convolution and no linear layer to split")
    if analysis.block_inputs is None:
        raise PlanError(
            f"{modules!r}: the shapes of the features are needed: give one batch of inputs, "
            "transform(model, plan, x), or Driver(..., example_inputs=(x,))"
        )
    found = ", ".join(map(repr, analysis.outputs))
    if modules.output is not None and modules.output not in analysis.outputs:
        raise PlanError(
            f"{modules!r}: the model returns no {modules.output!r}, but {found or 'one tensor'}"
        )
    if analysis.prediction(modules).shape is None:
        advice = "wrap it in a module that returns the tensor to learn from"
        if found:
            advice = f"say which of {found} is the prediction, LocalModules(..., output=...)"
        raise PlanError(
            f"{modules!r}: the model's output is no single tensor, from which a loss could be "
            f"computed: {advice}"
        )


def _find_approximations(
    plan: Plan, analysis: Analysis, boundary: int
) -> tuple[tuple[Layer, WeightGrad], ...]:
    paths = {layer.path: layer for layer in reversed(analysis.layers)}  # the first call of each
    weight_grads = weight_grads_of(plan, analysis)
    for path, method in weight_grads.items():
        if path not in paths:
            if kept := analysis.kept_whole(path):
                raise PlanError(f"weight_grads[{path!r}]={method!r}: {kept}")
            raise PlanError(
                f"weight_grads[{path!r}]={method!r}: the model has no such layer. Nearest: "
                f"{nearest(path, paths)}"
            )
        if paths[path].index < boundary:
            raise PlanError(
                f"weight_grads[{path!r}]={method!r}: the layer lies inside the local prefix, "
                f"{plan.local!r}, where nothing is back-propagated. Leave it out of weight_grads, "
                "or put the boundary before it"
            )
    chosen = [layer for layer in analysis.layers if layer.path in weight_grads]
    return tuple((layer, weight_grads[layer.path]) for layer in chosen)


def _find_exact(
    approximations: Sequence[tuple[Layer, WeightGrad]], analysis: Analysis
) -> dict[str, str]:
    """Return the layers for which TopK is predicted to take longer than the exact gradient."""
    exact: dict[str, str] = {}
    for layer, method in approximations:
        if analysis.shapes and isinstance(method, TopK) and not method.force:
            time = predict_topk_time(layer, analysis.shapes[layer.index], method.k)
            if time.topk >= time.exact:
                exact[layer.path] = f"exact {time.exact:.2f} ms, TopK {time.topk:.2f} ms"
    return exact
