"""What can go wrong, and whose mistake it is.

Each message says what was asked, what was found, and what to do next.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "BoundaryWarning",
    "CaptureError",
    "CheckpointError",
    "NoEffectWarning",
    "PassError",
    "PlanError",
]


class CaptureError(RuntimeError):
    """The model cannot be turned into a graph that computes what the model computes."""


class PlanError(ValueError):
    """The plan, rule or schedule is malformed, or does not fit this model."""


class PassError(RuntimeError):
    """A rewrite failed or broke an invariant of the graph: a mistake of whose pass it is."""


class CheckpointError(ValueError):
    """The checkpoint belongs to another model, optimizer or schedule."""


class NoEffectWarning(UserWarning):
    """A rewrite ran and changed nothing."""


class BoundaryWarning(UserWarning):
    """The nearest legal boundary lies far from the one that was asked for."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the five names closest to ``name`` as a quoted list, or the first few of them."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
    return ", ".join(repr(n) for n in close) or "none"
