"""Which Plan holds for each epoch and step; imports no torch.

A schedule is anything with ``plan(analysis, epoch, step=0, rank=0) -> Plan`` and a ``repr`` that
tells it from another.
"""

from .approximation import NAMED, Approximation, Table
from .base import Constant, Facts, Horizon, LearningSchedule, Schedule, find_asked, find_plans
from .combine import combine
from .dynamic import Dynamic
from .plateau import Plateau
from .static import Static

__all__ = [
    "NAMED",
    "Approximation",
    "Constant",
    "Dynamic",
    "Facts",
    "Horizon",
    "LearningSchedule",
    "Plateau",
    "Schedule",
    "Static",
    "Table",
    "combine",
    "find_asked",
    "find_plans",
]
