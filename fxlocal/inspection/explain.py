"""Say what was done to a model: the plan, and the diff of each pass."""

from collections.abc import Callable
from typing import Any

from ..ir.network import Network
from ..ir.nodes import unwrapped

__all__ = ["explain"]


def explain(gm: Callable[..., Any]) -> str:
    """Say what was done to a model: the plan, then each pass with the diff that it made.

    Args:
        gm: what `transform` or `Driver.network` returned, or its `torch.compile` wrapper.

    Raises:
        TypeError: for a module that fxlocal did not make.
    """
    gm = unwrapped(gm)
    history = gm.history if isinstance(gm, Network) else None
    if history is None:
        raise TypeError(
            f"cannot explain a {type(gm).__name__}: give what fxlocal.transform returned"
        )
    parts = [repr(history.plan)]
    if not history.records:
        parts.append("no pass ran: the network is the source model")
    for i, record in enumerate(history.records, start=1):
        parts.append(f"{i}. {record.name}({record.arguments})\n{record.diff}")
    return "\n\n".join(parts)
