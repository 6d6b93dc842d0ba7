"""What begins and ends a driver's epoch: what is refused, and what its schedule learns from."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..compiler.analysis import Analysis
from ..errors import PlanError
from ..ir.network import Network
from ..ir.nodes import node_named
from ..ir.operators import weight_parameters
from ..ir.source import train_mode
from ..ops.shards import whole
from ..plan import Custom, Plan
from ..schedules import Schedule
from ..schedules.base import length_of
from .cache.activation_cache import CachedNetwork
from .cudagraph import GraphedNetwork, refuse_graphed

__all__ = [
    "copies_of",
    "refuse_late",
    "refuse_unended",
    "release",
    "transition_weights",
    "update_norm",
    "warn_if_past",
    "warn_of_evaluation",
    "warn_of_skipped",
]


def refuse_unended(epoch: int, num_steps: int) -> None:
    """Refuse to begin an epoch that was begun, if there are steps to lose, and say how many."""
    if num_steps:
        raise RuntimeError(
            f"start_epoch() in epoch {epoch}, of which {num_steps} steps are taken: call "
            "end_epoch() first, or, after load_state_dict() inside an epoch, network()"
        )


def refuse_late(plan: Plan, how: object, has_heads: bool) -> None:
    """Refuse a Plan to come, where networks are captured or the optimizer knows no heads."""
    if how == "cudagraph":
        refuse_graphed(plan)
    if plan.modules is not None and not has_heads:
        raise PlanError(
            f"the schedule brings in {plan.modules!r} after the first step, when the optimizer "
            "has been made without the heads: let them be part of its first Plan"
        )


def release(callables: Iterable[Callable[..., Any]]) -> None:
    """Let networks go of the activations of a boundary that is no more."""
    for one in callables:
        if isinstance(one, (GraphedNetwork, CachedNetwork)):
            one.release()


def warn_if_past(schedule: Schedule, epoch: int) -> None:
    """Warn of the first epoch past the end of a schedule."""
    if epoch == (length := length_of(schedule)):
        warnings.warn(
            f"epoch {epoch} (from 0) is past the end of the schedule, made for {length} epochs: it "
            "stays where it is",
            stacklevel=3,
        )


def warn_of_evaluation(model: nn.Module) -> None:
    """Warn of a model that is to train and is in evaluation mode."""
    if not model.training:
        warnings.warn(
            "the model is in evaluation mode, in which every network runs the model's own "
            "forward: call model.train() before the epoch",
            stacklevel=3,
        )


def transition_weights(captured: Network, analysis: Analysis, index: int) -> list[nn.Parameter]:
    """Return what the weight of the layer at ``index`` is made of."""
    if not analysis.layers:
        return []
    layer = analysis.layers[index]
    with train_mode(captured):
        return weight_parameters(captured, layer, node_named(captured, layer.node))


def copies_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return each parameter as it is, whole."""
    return [whole(p.detach()).clone() for p in parameters]


def update_norm(parameters: Sequence[nn.Parameter], before: Sequence[Tensor]) -> float:
    """Return how far parameters have moved since they were ``before``."""
    pairs = zip(parameters, before, strict=True)
    changes = (whole(p.detach()) - q.to(p.device) for p, q in pairs)
    return math.sqrt(sum(float(change.float().norm()) ** 2 for change in changes))


def warn_of_skipped(networks: Mapping[Plan, Network], epoch: int) -> None:
    """Warn of updates that a user's rule made no numbers of in an epoch, and count anew."""
    found = [
        (network.fxlocal.skipped, plan.local.rule.name)
        for plan, network in networks.items()
        if plan.local is not None
        and isinstance(plan.local.rule, Custom)
        and network.fxlocal.skipped is not None
    ]
    counts = [(int(counter), name) for counter, name in found]
    for counter, _ in found:
        counter.zero_()
    for count, name in counts:
        if count:
            warnings.warn(
                f"the rule {name} returned NaN or inf {count} times in epoch {epoch}: those "
                "updates were left out, the weights are as they were",
                stacklevel=3,
            )
