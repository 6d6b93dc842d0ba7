"""Local updates that were left out, because a user's rule returned what is no number."""

import warnings
from collections.abc import Mapping

from ..ir.network import Network
from ..plan import Plan

__all__ = ["warn_of_skipped"]


def warn_of_skipped(networks: Mapping[Plan, Network], epoch: int) -> None:
    """Warn of updates that were left out in an epoch, and begin to count anew."""
    found = [
        (network.fxlocal.skipped, plan.local.rule)
        for plan, network in networks.items()
        if plan.local is not None and network.fxlocal.skipped is not None
    ]
    counts = [(int(counter), rule) for counter, rule in found]
    for counter, _ in found:
        counter.zero_()
    for count, rule in counts:
        if count:
            warnings.warn(
                f"{rule} returned NaN or inf {count} times in epoch {epoch}: those updates were "
                "left out, the weights are as they were",
                stacklevel=3,
            )
