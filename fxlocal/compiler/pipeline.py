"""List the rewrites of a Plan, in the order in which they must run."""

from collections.abc import Sequence
from functools import partial

from ..errors import PlanError, nearest
from ..facts import Layer, Shapes
from ..passes import (
    approximate_weight_grads,
    insert_cuts,
    insert_local_modules,
    insert_local_updates,
    insert_no_grad,
    replace_norms,
)
from ..plan import Freeze, LocalPrefix, Plan, TopK, WeightGrad
from .analysis import Analysis
from .local_modules import find_borders
from .runner import Rewrite
from .topk_time import predict_topk_time

__all__ = ["build_pipeline"]


def build_pipeline(plan: Plan, analysis: Analysis) -> tuple[Rewrite, ...]:
    """Return the rewrites of ``plan``, in the order in which they must run.

    Raises:
        PlanError: if the plan does not fit the model.
    """
    prefix = plan.local
    boundary = analysis.boundary(prefix.until) if prefix else 0
    approximated = _approximated(plan, analysis, boundary)
    steps: list[Rewrite] = []
    if prefix is not None and boundary > 0:
        steps += _prefix_steps(prefix, boundary, analysis)
    if approximated:  # after the cuts, so that what it inserts lies behind them
        steps.append(
            partial(
                approximate_weight_grads,
                approximations=approximated,
                shapes=analysis.shapes,
                exact=_kept_exact(approximated, analysis.shapes),
            )
        )
    if plan.modules is not None:  # last, so that what a link repeats is what the others made
        edges = analysis.block_inputs or ()
        steps.append(
            partial(
                insert_local_modules,
                modules=plan.modules,
                borders=find_borders(analysis, plan.modules, boundary),
                first_input=edges[0],
                output=edges[-1],
            )
        )
    return tuple(steps)


def _prefix_steps(prefix: LocalPrefix, boundary: int, analysis: Analysis) -> list[Rewrite]:
    steps: list[Rewrite] = []
    start = analysis.start(boundary)
    if not isinstance(prefix.rule, Freeze):  # first: reads the original producers of pre and post
        local = partial(insert_local_updates, start=start, layers=analysis.layers[:boundary])
        steps.append(partial(local, skips=analysis.skips, rule=prefix.rule))
    if prefix.norm == "eval":
        steps.append(partial(replace_norms, start=start))
    steps.append(partial(insert_cuts, start=start, layer=analysis.layers[boundary].path))
    steps.append(partial(insert_no_grad, start=start))  # covers what the others inserted
    return steps


def _approximated(
    plan: Plan, analysis: Analysis, boundary: int
) -> tuple[tuple[Layer, WeightGrad], ...]:
    """Return the layers whose weight gradient ``plan`` names, and how."""
    paths = {layer.path: layer for layer in reversed(analysis.layers)}  # the first call of each
    for path, method in plan.weight_grads.items():
        if path not in paths:
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
    chosen = [layer for layer in analysis.layers if layer.path in plan.weight_grads]
    return tuple((layer, plan.weight_grads[layer.path]) for layer in chosen)


def _kept_exact(
    approximated: Sequence[tuple[Layer, WeightGrad]], shapes: Sequence[Shapes] | None
) -> dict[str, str]:
    """Return the layers for which TopK is predicted to take longer than the exact gradient."""
    kept: dict[str, str] = {}
    for layer, method in approximated:
        if shapes and isinstance(method, TopK) and not method.force:
            time = predict_topk_time(layer, shapes[layer.index], method.k)
            if time.topk >= time.exact:
                kept[layer.path] = f"exact {time.exact:.2f} ms, TopK {time.topk:.2f} ms"
    return kept
