"""What a cache cannot keep: where the same sample would not cross the boundary alike again."""

from collections.abc import Iterable

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ...compiler.analysis import Analysis
from ...compiler.resolve import ResolvedPlan, boundary_of
from ...errors import PlanError
from ...ir.boundary import nodes_before
from ...ir.network import Network
from ...ir.nodes import computations, module_of
from ...ir.operators import DRAWS, DROPOUTS, UNREPEATABLE, arguments_of, operator_name, overwrites
from ...plan import Freeze
from ...schedules import Schedule
from ...schedules.base import horizon_of

__all__ = ["refuse_cut", "refuse_uncacheable"]

_RANDOM = DRAWS | DROPOUTS | UNREPEATABLE | {"fractional_max_pool2d", "fractional_max_pool3d"}
_RANDOM_MODULES = (nn.modules.dropout._DropoutNd, nn.RReLU)
_ADVICE = "leave cache out, or end the prefix before it"


def refuse_uncacheable(
    cache: object,
    plans: Iterable[ResolvedPlan],
    captured: Network,
    schedule: Schedule,
    analysis: Analysis,
) -> None:
    """Refuse Plans whose prefix does not make the same of a sample in each epoch.

    Raises:
        PlanError: naming the rule, the node or the schedule; or if ``cache`` is none.
    """
    if not hasattr(cache, "explain"):
        raise PlanError(f"cache={cache!r}: give an fxlocal.ActivationCache, such as of '4GiB'")
    if "sample_ids" in {str(n.target) for n in captured.graph.find_nodes(op="placeholder")}:
        raise PlanError("cache: the model has an input 'sample_ids' of its own: rename it")
    if "shard" in captured.meta:
        raise PlanError(
            "cache: weights in shards have no place of their own: use fxlocal.replicate"
        )
    for resolved in plans:
        local = resolved.plan.local
        if local is None or not resolved.boundary:
            continue
        if not isinstance(local.rule, Freeze):
            raise PlanError(
                f"cache: {local.rule!r} changes the layers before the boundary in each step, and "
                "so what crosses it. Give Freeze(), or leave cache out"
            )
        if resolved.plan.modules is not None:
            raise PlanError(
                f"cache: {resolved.plan.modules!r} back-propagate while the network runs, which "
                "is then not parted at a boundary too. Leave one of the two out"
            )
        before = nodes_before(captured, resolved.start)
        for node in computations(captured.graph):
            if node in before and (reason := _reason(captured, node, local.norm == "eval")):
                raise PlanError(f"cache: {node.name!r} {reason}")
    _refuse_refreshed(schedule, analysis)


def _reason(captured: Network, node: fx.Node, norms_stand: bool) -> str:
    """Say why a node before the boundary makes another value of the same sample; or nothing."""
    module = module_of(captured, node)
    for inner in module.modules() if module is not None else ():
        if isinstance(inner, _RANDOM_MODULES) and getattr(inner, "p", True):
            return f"is {type(inner).__name__}, drawn anew in each step: {_ADVICE}"
        if isinstance(inner, _NormBase) and inner.running_mean is None:
            if isinstance(inner, _BatchNorm):
                return f"is {type(inner).__name__} without running statistics: {_ADVICE}"
        elif isinstance(inner, _NormBase) and not norms_stand:
            return (
                f"is {type(inner).__name__}, whose batch statistics differ in each step: give "
                "LocalPrefix(norm='eval'), or norm='eval' of the schedule"
            )
    if module is None and (name := operator_name(node)) in _RANDOM:
        options = arguments_of(node, ("input", "p", "training"))
        if name not in DROPOUTS or (options.get("training", True) and options.get("p", 0.5)):
            return f"draws random numbers anew in each step: {_ADVICE}"
    if module is None and operator_name(node) == "batch_norm" and not norms_stand:
        return "is a batch norm, whose statistics differ in each step: give norm='eval'"
    return ""


def _refuse_refreshed(schedule: Schedule, analysis: Analysis) -> None:
    """Refuse a schedule that trains in some steps what it freezes in others of the same epoch."""
    horizon = horizon_of(schedule)
    steps = range(horizon.start + horizon.period)
    for epoch in range(horizon.epochs) if len(steps) > 1 else ():
        found = {boundary_of(schedule.plan(analysis, epoch, step), analysis) for step in steps}
        if len(found) > 1:
            raise PlanError(
                f"cache: {schedule!r} moves the boundary within epoch {epoch}, to layers "
                f"{', '.join(map(str, sorted(found)))}, and trains what it had frozen. Give "
                "refresh_every=None, or leave cache out"
            )


def refuse_cut(network: Network, start: str) -> None:
    """Refuse a prefix that changes in place an input that is used behind its boundary too."""
    before = nodes_before(network, start)
    inputs = network.graph.find_nodes(op="placeholder")
    for value in (one for one in inputs if not before.issuperset(one.users)):
        for node in computations(network.graph):
            if node in before and overwrites(network, node, value):
                raise PlanError(
                    f"cache: {node.name!r} changes the input {value.name!r} in place before the "
                    "boundary, and it is used behind it: make it an operation that is not in place"
                )
