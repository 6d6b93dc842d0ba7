"""List the rewrites of a resolved Plan, in the order in which they must run, and their checks."""

from collections.abc import Iterable
from functools import partial
from operator import attrgetter
from typing import Any

from ..ir.computed import check_precision
from ..ir.network import Network
from ..ir.source import train_mode
from ..passes import (
    approximate_weight_grads,
    assign_stages,
    insert_checkpoints,
    insert_cuts,
    insert_drops,
    insert_links,
    insert_local_updates,
    insert_losses,
    insert_no_grad,
    insert_replay,
    reduce_deltas,
    replace_norms,
)
from ..passes.approximate_weight_grads import check_weight_grads
from ..passes.insert_cuts import check_cuts
from ..passes.insert_drops import check_drops
from ..passes.insert_local_updates import check_local_updates
from ..plan import Freeze, LocalModules, LocalPrefix, Rule
from ..plan.checks import changed
from .analysis import Analysis
from .resolve import ResolvedPlan
from .runner import Rewrite

__all__ = ["build_pipeline", "check_boundary", "check_plans"]


def build_pipeline(resolved: ResolvedPlan, analysis: Analysis) -> tuple[Rewrite, ...]:
    """Return the rewrites of a Plan, in the order in which they must run."""
    plan, steps = resolved.plan, list[Rewrite]()
    if plan.local is not None and resolved.boundary:
        steps += _prefix_steps(plan.local, resolved, analysis)
        if resolved.group and not isinstance(plan.local.rule, Freeze):
            late = partial(reduce_deltas, group=resolved.group)  # behind cuts: sums have none
            steps.append(partial(late, at_end=not (plan.modules or plan.checkpoint)))
    if resolved.approximations:  # after the cuts, so that what it inserts lies behind them
        approximate = partial(approximate_weight_grads, approximations=resolved.approximations)
        steps.append(partial(approximate, shapes=analysis.shapes, exact=resolved.exact))
    if plan.modules or resolved.stages:  # last, so that a link repeats what the others made
        steps.append(partial(assign_stages, stages=resolved.stages))
    if plan.drop and (plan.drop.rate or plan.drop.replace):  # knows of cuts, not of copies
        steps.append(partial(insert_drops, **_drop_arguments(resolved, analysis)))
    if plan.checkpoint and resolved.stages:
        start = resolved.start if resolved.boundary else None
        steps.append(partial(insert_checkpoints, start=start))
    if plan.modules is not None:
        steps += _module_steps(plan.modules, resolved, analysis)
    return tuple(steps)


def _drop_arguments(resolved: ResolvedPlan, analysis: Analysis) -> dict[str, Any]:
    plan = resolved.plan
    spared: list[tuple[str, str, object]] = []
    if resolved.boundary:
        spared.append(("", resolved.start, plan.local))
    spared += [(one.tail, one.start, plan.modules) for one in resolved.stages if one.tail]
    return {"drop": plan.drop, "branches": analysis.branches, "spared": tuple(spared)}


def _module_steps(
    modules: LocalModules, resolved: ResolvedPlan, analysis: Analysis
) -> list[Rewrite]:
    stages = tuple(one for one in resolved.stages if one.learns)
    edges = analysis.block_inputs or ()
    steps: list[Rewrite] = []
    if any(one.tail for one in stages):  # first: what copies take is cut with the rest
        link = partial(insert_links, alpha=modules.alpha, weighting=modules.weighting)
        steps.append(partial(link, stages=stages))
    if stages:
        steps.append(partial(insert_cuts, start=tuple(one.stage + 1 for one in stages)))
    losses = partial(insert_losses, modules=modules, stages=stages)
    steps.append(partial(losses, first_input=edges[0], output=analysis.prediction(modules)))
    if modules.replay and stages:  # last: it takes targets too
        steps.append(partial(insert_replay, stages=stages))
    return steps


def _prefix_steps(prefix: LocalPrefix, resolved: ResolvedPlan, analysis: Analysis) -> list[Rewrite]:
    start, layers = resolved.start, resolved.prefix
    steps: list[Rewrite] = []
    if not isinstance(prefix.rule, Freeze):  # first: reads the original producers of pre and post
        local = partial(insert_local_updates, start=start, layers=layers)
        if prefix.rates:  # of all layers, for a tensor of one size whatever the boundary
            behind = [0.0] * (len(analysis.layers) - len(layers))
            local = partial(local, rates=(*prefix.rates, *behind))
        steps.append(partial(local, skips=analysis.skips, rule=prefix.rule))
    if prefix.norm == "eval":
        steps.append(partial(replace_norms, start=start))
    layer = analysis.layers[resolved.boundary].path
    steps.append(partial(insert_cuts, start=start, layer=layer))
    steps.append(partial(insert_no_grad, start=start))  # covers what the others inserted
    return steps


def check_boundary(captured: Network, resolved: ResolvedPlan, analysis: Analysis) -> None:
    """Refuse a boundary that parts the uses of a weight, and name those that do not.

    Of a prefix that holds what the Plan leaves out, which replaced norms would hide.

    Raises:
        PlanError: if it does.
    """
    if resolved.boundary:
        legal = analysis.nearest_boundaries(resolved.boundary)
        check_cuts(captured, start=resolved.start, legal=legal)
        if resolved.plan.drop:
            check_drops(captured, **_drop_arguments(resolved, analysis))


def check_plans(captured: Network, plans: Iterable[ResolvedPlan], analysis: Analysis) -> None:
    """Raise the PlanError that a rewrite of ``plans`` would raise, before any of them runs."""
    tried = dict[Rule, Any]()  # each on the longest prefix, which holds the others
    with train_mode(captured):
        for resolved in sorted(plans, key=attrgetter("boundary"), reverse=True):
            local, layers = resolved.plan.local, resolved.prefix
            if local is not None and resolved.boundary:
                if not isinstance(rule := local.rule, Freeze):
                    if (kind := changed(rule, rate=0.0)) not in tried:
                        tried[kind] = check_local_updates(captured, layers=layers, rule=rule)
                    check_precision(tried[kind], layers=layers, rule=rule, rates=local.rates)
                check_boundary(captured, resolved, analysis)
            approximations = resolved.approximations
            check_weight_grads(captured, approximations=approximations, shapes=analysis.shapes)
            if resolved.plan.drop:
                check_drops(captured, **_drop_arguments(resolved, analysis))
            if resolved.stages:
                assign_stages(captured.clone(), stages=resolved.stages)
